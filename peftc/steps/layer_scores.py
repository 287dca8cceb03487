"""One forward pass over the samples > what every layer reads and gives, pooled > one score per layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc import methods, progress
from peftc.errors import WeightError
from peftc.models import layers, load
from peftc.models.load import Model
from peftc.nn import surgery
from peftc.steps.samples import Samples

CLASS_TOKEN = ("bert", "electra", "mpnet", "ernie")  # transformers' text models that begin with one
OF_DATA = ("features", "input_features", "labels", "cosines", "angles")


@dataclass
class Seen:
    """What one forward pass showed.

    Attributes:
        pooling: how tokens became one row per sample.
        labels: (n,) output of the true class, a batch each; empty without labels.
        figures: (layer, what) -> a batch each: ``features`` and ``input_features`` (n, width) after and before it,
            ``cosines`` and ``angles`` (n,) between what it reads and gives, mean over tokens, angles in half turns.
    """

    pooling: str = ""
    labels: list[Tensor] = field(default_factory=list)
    figures: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def add(self, layer: str, **figures: Tensor) -> None:
        """Add what a batch showed of a layer."""
        for what, value in figures.items():
            self.figures.setdefault((layer, what), []).append(value.cpu())

    def of(self, layer: str, needs: Sequence[str]) -> dict[str, Any]:
        """Return what a score asks for, of one layer."""
        return {need: torch.cat(self.labels if need == "labels" else self.figures[layer, need]) for need in needs}


@dataclass(frozen=True)
class Score:
    """A score of the table of methods, with its settings."""

    name: str
    function: Callable[..., float]
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


def named(name: str, settings: Mapping[str, Any]) -> Score:
    """Return the score of a name, as typed or as in the table.

    Raises:
        UsageError: there is none, or a setting is not one of its own.
    """
    name = name.replace("-", "_")
    function = methods.find("importance", name, "--score")
    chosen = methods.with_settings(function, name, settings)
    return Score(name, functools.partial(function, **chosen), tuple(methods.needs_of(function)))


def scores(model: Model, names: Sequence[str], score: Score, seen: Seen | None) -> list[float]:
    """Return one score per layer.

    Args:
        model: for scores of weights.
        names: the layers.
        score: which.
        seen: of the forward pass; None for scores of weights.

    Raises:
        DataError, WeightError: as the score says.
    """
    found = []
    with progress.track(f"scoring layers by {score.word}", len(names)) as advance:
        for name in names:
            if seen is None:
                tensors = surgery.tensors_of(model.module.get_submodule(name)).values()
                found.append(score.function(weights=[each for each in tensors if each.ndim > 1]))
            else:
                found.append(score.function(**seen.of(name, score.needs)))
            advance(name)
    return found


def see(model: Model, given: Samples, names: Sequence[str], batch_size: int) -> Seen:
    """Run all samples through the model once and keep what scores ask for: pooled features and means over tokens.

    Args:
        model: runnable, in eval mode.
        given: the samples; its train part is read.
        names: the layers.
        batch_size: samples at once.

    Raises:
        WeightError: a layer gives NaN or infinite features.
    """
    class_token = has_class_token(model)
    last = str(getattr(model.module, "output_fmt", "")) == "NHWC"
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
            name, features=rows, input_features=pooled(one, mask, class_token=class_token and before.ndim == 3),
            cosines=pooled(cosine[..., None], mask)[:, 0],
            angles=pooled(cosine[..., None].acos() / torch.pi, mask)[:, 0],
        )  # fmt: skip

    number = len(given.train)
    with layers.tapped(model.module, names, saw), progress.track("looking at layers", number) as advance:
        for start in range(0, number, batch_size):
            batch = given.train.batch(range(start, min(start + batch_size, number)))
            inputs = load.moved(model, batch.inputs)
            mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            load.outputs(model, inputs)
            if given.outputs:
                seen.labels.append(given.mapped(batch).targets)
            for _ in range(len(batch.targets)):
                advance("")
    return seen


def has_class_token(model: Model) -> bool:
    """Return whether token 0 stands for the whole sample."""
    config = getattr(model.module, "config", None)
    if any(word in str(getattr(config, "model_type", "")) for word in CLASS_TOKEN):
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
