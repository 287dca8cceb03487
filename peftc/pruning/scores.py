"""One forward pass over the samples > what every layer reads and gives, pooled > one score per layer.

The scores themselves are in `peftc/methods/importance/`; here is what they may ask for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from peftc import processes, progress
from peftc.errors import WeightError
from peftc.methods import registry
from peftc.methods.importance import tsne_silhouette
from peftc.models import families, layers
from peftc.models.inputs import mask_of, outputs
from peftc.models.model import Model
from peftc.models.place import moved
from peftc.nn import surgery
from peftc.training.samples import Samples

MEANS = "sentence-similarity"  # the task whose sentences are means over tokens
OF_FEATURES = ("features", "input_features", "labels", "cosines", "angles")
OF_DATA = (*OF_FEATURES, "gradient_products", "loss", "loss_without")


@dataclass
class Seen:
    """What one forward pass showed.

    Attributes:
        pooling: how tokens became one row per sample.
        labels: (n,) output of the true class, a batch each; empty without labels.
        figures: (layer, what) -> a batch each: ``features`` and ``input_features`` (n, width) after and before it,
            ``cosines`` and ``angles`` (n,) between what it reads and gives, mean over tokens, angles in half turns;
            ``gradient_products`` (n,), where they were asked for.
        maps: layer -> (n, 2), where a score is taken of maps.
    """

    pooling: str = ""
    labels: list[Tensor] = field(default_factory=list)
    figures: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, layer: str, **figures: Tensor) -> None:
        """Add what a batch showed of a layer."""
        for what, value in figures.items():
            self.figures.setdefault((layer, what), []).append(value.cpu())

    def of(self, layer: str, needs: Sequence[str]) -> dict[str, Any]:
        """Return what a score asks for, of one layer."""
        return {need: torch.cat(self.labels if need == "labels" else self.figures[layer, need]) for need in needs}

    def part(self, rows: Tensor) -> Seen:
        """Return what some of the samples showed."""
        figures = {key: [torch.cat(parts)[rows]] for key, parts in self.figures.items()}
        return Seen(self.pooling, [torch.cat(self.labels)[rows]] if self.labels else [], figures)


@dataclass(frozen=True)
class Score:
    """A score of the table of methods, with its settings."""

    name: str
    function: Callable[..., float]
    settings: Mapping[str, Any]
    needs: tuple[str, ...]

    @property
    def word(self) -> str:
        """The name as typed."""
        return self.name.replace("_", "-")

    @property
    def reads_data(self) -> bool:
        """Whether it looks at samples."""
        return bool(set(self.needs) & set(OF_DATA))

    @property
    def is_of_depth(self) -> bool:
        """Whether it says how good the features are up to a layer, not what the layer itself adds."""
        return "labels" in self.needs

    @property
    def is_measured(self) -> bool:
        """Whether the network runs without each layer for it."""
        return "loss_without" in self.needs

    @property
    def has_map(self) -> bool:
        """Whether it is taken of a map of the features."""
        return self.name == "tsne_silhouette"


def named(name: str, settings: Mapping[str, Any]) -> Score:
    """Return the score of a name, as typed or as in the table; UsageError where it or a setting is unknown."""
    name = name.replace("-", "_")
    function = registry.find("importance", name, "--score")
    chosen = registry.with_settings(function, name, settings)
    return Score(name, function, chosen, tuple(registry.needs_of(function)))


def scored(model: Model, names: Sequence[str], score: Score, seen: Seen | None) -> list[float]:
    """Return one score per layer, none of them measured, several layers and processes at once.

    ``seen`` keeps the maps; None for scores of weights. DataError and WeightError are as the score says.
    """

    def scored(name: str) -> tuple[float, np.ndarray | None]:
        if "weights" in score.needs:
            tensors = surgery.tensors_of(model.module.get_submodule(name)).values()
            return score.function(weights=[each for each in tensors if each.ndim > 1], **score.settings), None
        assert seen is not None
        statistics = seen.of(name, score.needs)
        if score.has_map:
            return tsne_silhouette.with_map(**statistics, **score.settings)
        return score.function(**statistics, **score.settings), None

    with processes.together():
        mine = processes.share(names)
        found = list(zip(mine, _at_once(scored, mine, score.word), strict=True))
    everything = dict(processes.gathered(found))
    if seen is not None and score.has_map:
        seen.maps = {name: everything[name][1] for name in names if everything[name][1] is not None}
    return [everything[name][0] for name in names]


def _at_once(work: Callable[[str], Any], names: Sequence[str], word: str) -> Iterator[Any]:
    """Yield what comes of each name, as many at once as there are cores, each on one.

    Several t-SNE maps with one thread each take 0.9 of the time of one after the other with all threads, a tenth of it
    where other programs run on the same cores, and are the same on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    def alone() -> None:
        threadpool_limits(1, user_api="openmp")  # that of this thread; gone with it

    workers = max(1, min(torch.get_num_threads(), len(names)))
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(workers, initializer=alone) as pool,
        progress.track(f"scoring layers by {word}", len(names)) as advance,
    ):
        for name, found in zip(names, pool.map(work, names), strict=True):
            advance(name)
            yield found


def see(model: Model, given: Samples, names: Sequence[str], batch_size: int) -> Seen:
    """Run the train part through the model once and keep what scores ask for: pooled features and means over tokens.

    WeightError where a layer gives NaN or infinite features.
    """
    class_token = has_class_token(model) and (given.task is None or given.task.name != MEANS)
    last = is_channels_last(model)
    seen = Seen()
    mask: Tensor | None = None

    def saw(name: str, before: Tensor, after: Tensor) -> None:
        if not seen.pooling:
            on_tokens = "class token" if class_token else "mean over tokens"
            seen.pooling = on_tokens if after.ndim == 3 else "mean over pixels" if after.ndim == 4 else "as they are"
        one, other = tokens_of(before, last), tokens_of(after, last)
        rows = pooled(other, mask, class_token=class_token and after.ndim == 3)
        if not torch.isfinite(rows).all():
            raise WeightError(f"`{name}` of `{model.name}` gives NaN or infinite features", hint="check its weights")
        same = one.shape == other.shape  # between layers of different shapes there is no angle
        cosine = (
            F.cosine_similarity(one, other, dim=-1).clamp(-1, 1) if same else one.new_full(one.shape[:2], torch.nan)
        )
        seen.add(
            name,
            features=rows,
            input_features=pooled(one, mask, class_token=class_token and before.ndim == 3),
            cosines=pooled(cosine[..., None], mask)[:, 0],
            angles=pooled(cosine[..., None].acos() / torch.pi, mask)[:, 0],
        )

    with layers.tapped(model.module, names, saw), progress.track("looking at layers", len(given.train)) as advance:
        for batch in given.train.batches(batch_size):
            inputs = moved(model, batch.inputs)
            mask = mask_of(inputs)
            outputs(model, inputs)
            if given.outputs:
                seen.labels.append(given.mapped(batch).targets)
            for _ in range(len(batch.targets)):
                advance("")
    return seen


def is_channels_last(model: Model) -> bool:
    """Return whether the layers of a network give images as (batch, height, width, channels)."""
    return str(getattr(model.module, "output_fmt", "")) == "NHWC"


def has_class_token(model: Model) -> bool:
    """Return whether token 0 stands for the whole sample, and no mean does."""
    if getattr(model.module, "global_pool", None) == "avg":  # timm's: BEiT and EVA have a class token all the same
        return False
    rows = families.of(type(model.module).__name__) if hasattr(model.module, "config") else []
    if any(row.class_token for row in rows):
        return True
    names = {name.rpartition(".")[2] for name, _ in model.module.named_parameters()}
    return bool(names & {"cls_token", "class_embedding"})


def tokens_of(value: Tensor, channels_last: bool) -> Tensor:
    """Return what a layer gives as (batch, tokens, width), float32 at least; pixels are tokens."""
    value = value if value.dtype == torch.float64 else value.float()
    if value.ndim == 4:
        return value.flatten(1, 2) if channels_last else value.flatten(2).transpose(1, 2)
    return value if value.ndim == 3 else value.flatten(1)[:, None]


def pooled(tokens: Tensor, mask: Tensor | None, *, class_token: bool = False) -> Tensor:
    """Return (batch, width): the class token, or the mean over the tokens that the mask keeps."""
    if class_token:
        return tokens[:, 0]
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens.mean(1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)
