"""One student forward, one teacher forward > the terms that a loss is made of."""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import processes
from peftc.data.augment import Seeds
from peftc.errors import DataError, UsageError
from peftc.methods import registry
from peftc.models import dual, layers, shorten, unread
from peftc.models.inputs import mask_of, mask_of_outputs
from peftc.models.model import Model, detached
from peftc.models.place import moved, place_of, runnable
from peftc.models.weights import save_part
from peftc.nn import lowrank, surgery
from peftc.nn.peers import ALONE, Peers, here
from peftc.nn.vocabulary import Foremost, Logits, Unread, foremost
from peftc.options import Recipe
from peftc.tasks import retrieval
from peftc.tasks.sentences import sentence_vectors
from peftc.tasks.task import Batch
from peftc.training import parallel
from peftc.training.held import Held
from peftc.training.samples import Samples, figures

TASK = "task"
OF_TEACHER = ("teacher_features", "teacher_outputs", "teacher_vectors", "weights")


@dataclass(frozen=True)
class Term:
    """One term of a loss: its weight, its function, and what that asks for by name."""

    weight: float
    function: functools.partial[Tensor]
    needs: tuple[str, ...]


def terms(asked: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, Term]:
    """Return the terms with a weight above 0, without the task's own.

    Args:
        asked: name -> weight.
        settings: ``NAME.SETTING`` -> value.

    Raises:
        UsageError: an unknown term or setting, or a weight below 0.
    """
    known = registry.METHODS["loss"]
    for key in settings:
        if key.partition(".")[0] not in known:
            why = f"the terms with settings are {', '.join(f'`{n}`' for n in known)}"
            hint = "write it as `--set features.scale_free=true`"
            raise UsageError(f"`--set {key}` names no term", why=why, hint=hint)
    found = {}
    for name, weight in asked.items():
        if not weight >= 0:
            raise UsageError(f"the weight of `{name}` in `--loss` is {weight}", why="a weight is at least 0")
        if name == TASK or not weight:
            continue
        function = registry.find("loss", name, "--loss")
        own = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == name}
        chosen = registry.with_settings(function, name, own)
        found[name] = Term(weight, functools.partial(function, **chosen), tuple(registry.needs_of(function)))
    return found


@dataclass(frozen=True)
class Given:
    """A batch, and which of the samples to learn from it holds, where it does."""

    batch: Batch
    rows: Sequence[int] = ()

    def pin_memory(self) -> "Given":
        """Return it in memory from which a GPU copies while others compute; torch's loader asks for it by this name."""
        return replace(self, batch=self.batch.pin_memory())

    @property
    def tokens(self) -> int:
        """How many tokens of text there are, padding apart; of pairs with images none are counted."""
        inputs = self.batch.inputs
        if not isinstance(inputs, dict) or "input_ids" not in inputs or "pixel_values" in inputs:
            return 0
        mask = mask_of(inputs)
        return inputs["input_ids"].numel() if mask is None else int(mask.sum())


@dataclass
class Imitation:
    """What a student is trained on."""

    student: Model  # whose module learns
    teacher: Model | None  # who is imitated; None where no term asks for it
    samples: Samples  # the data
    terms: Mapping[str, Term]  # weighted, the task's own apart
    task: float  # weight of the task's loss; 0 leaves the labels alone
    pairs: list[tuple[str, str]]  # (student layer, teacher layer), those whose features are compared
    kept: Path | None = None  # folder in which to keep what the teacher gives of each sample; None asks it each time
    top: int | None = None  # of its outputs so many of each token or sample; None keeps them whole
    left: list[float] = field(default_factory=list)  # what the others had together, a mean for each batch kept

    @property
    def needs(self) -> set[str]:
        """What the terms ask for."""
        return {need for term in self.terms.values() for need in term.needs}

    def batch(self, rows: Sequence[int], seeds: Seeds | None = None) -> Given:
        """Return some of the samples to learn from, as drawn for a step, or as they are without seeds."""
        train = self.samples.stream or self.samples.train
        return Given(train.batch(rows) if seeds is None else train.drawn(rows, seeds), rows)

    def loss(self, module: nn.Module, given: Given, peers: Peers | None = None) -> dict[str, Tensor]:
        """Return the weighted terms of a batch; the module is the student's.

        Args:
            module: of the student.
            given: samples, as many in each process of a launch.
            peers: whose batches are one with this where a term looks at all of it; all processes when None.
        """
        batch, peers = given.batch, here() if peers is None else peers
        inputs = moved(self.student, batch.inputs)
        known, towers = self.seen("student", self.student, module, inputs)
        outputs = known["student_outputs"]
        known |= {"mask": mask_of_outputs(inputs), "masks": self.masks(inputs)}
        if self.needs & set(OF_TEACHER[:3]):
            known |= self.remembered(given) if self.kept is not None and given.rows else self.taught(batch)
        known |= {name: peers.all(known[name]) for name in ("student_vectors", "teacher_vectors") if name in known}
        if "products" in self.needs:
            with torch.autocast(outputs.device.type, enabled=False):
                known["products"] = {name: weight_of(self.student, module, name) for name in factored(self.student)}
            known["weights"] = self.originals
        found = {}
        if self.task:
            assert self.samples.task is not None
            if towers is not None:
                found[TASK] = self.task * sum(retrieval.losses(module, towers, inputs, peers).values())
            else:
                assert self.samples.task.objective is not None
                found[TASK] = self.task * self.samples.task.objective(outputs, self.samples.mapped(batch), peers)
        for name, term in self.terms.items():
            with torch.autocast(outputs.device.type, enabled=False):
                found[name] = term.weight * term.function(**{need: known[need] for need in term.needs})
        return found

    def taught(self, batch: Batch) -> dict[str, Any]:
        """Return what the teacher gives for a batch, without gradients."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.seen("teacher", self.teacher, self.teacher.module, moved(self.teacher, batch.inputs))[0]

    def remembered(self, given: Given) -> dict[str, Any]:
        """Return what the teacher gives for a batch, as kept of an earlier time; ask it once for what is not."""
        assert self.kept is not None
        self.kept.mkdir(exist_ok=True)
        paths = [self.kept / f"{row}.safetensors" for row in given.rows]
        inputs = given.batch.inputs
        mask = mask_of_outputs(inputs)
        masks = None if mask is None else mask.bool()
        missing = not all(path.is_file() for path in paths)
        if self.teacher is not None and self.teacher.shards is not None:
            missing = any(processes.gathered([missing]))  # all ask it at once, or none
        if missing:
            found = self.taught(given.batch)
            if self.top is not None:
                some = foremost(found.pop("teacher_outputs"), self.top, self.temperature)
                others = some.logs[..., -1].exp()
                self.left.append(
                    float(others[masks].mean() if masks is not None and others.ndim > 1 else others.mean())
                )
                found |= {"teacher_words": some.words, "teacher_logs": some.logs}
            elif isinstance(outputs := found["teacher_outputs"], Unread):
                found["teacher_outputs"] = outputs.hidden
            tensors = {**{f"features.{at}": each for at, each in enumerate(found.pop("teacher_features"))}, **found}
            for at, path in enumerate(paths):
                save_part(path, {name: _unpadded(each, at, masks) for name, each in tensors.items()}, {})
        device = place_of(self.student.module)
        samples = [load_file(path) for path in paths]
        whole = {name: _padded([each[name] for each in samples], masks).to(device) for name in samples[0]}
        features = [whole.pop(f"features.{at}") for at in range(len(self.pairs))]
        if self.top is not None:
            whole["teacher_outputs"] = Foremost(whole.pop("teacher_words"), whole.pop("teacher_logs"))
        elif head := self.heads.get("teacher"):
            whole["teacher_outputs"] = Unread(whole["teacher_outputs"], head.weight, head.bias)
        return {**whole, "teacher_features": features}

    def seen(
        self, side: str, model: Model, module: nn.Module, inputs: Any
    ) -> tuple[dict[str, Any], dual.Towers | None]:
        """Return what one forward pass of the student or the teacher gives, under its name, and the vectors of pairs.

        That are the outputs, the features after each layer, and the vectors of the samples where a term asks for them.
        """
        towers, heads = None, self.heads  # found before anything watches the models
        with layers.watched(module, [names[side == "teacher"] for names in self.pairs]) as features:
            if self.samples.task is retrieval.TASK:
                towers = dual.towers(module, inputs)
                assert towers is not None
                outputs = dual.stacked(towers)
            else:
                outputs = unread.through(model, module, inputs, heads.get(side))
        found = {f"{side}_outputs": outputs, f"{side}_features": features}
        if f"{side}_vectors" in self.needs:
            found[f"{side}_vectors"] = vectors(outputs, mask_of_outputs(inputs), of_pairs=towers is not None)
        return found, towers

    def keep_some(self, number: int) -> None:
        """Let only the likeliest words of what the teacher gives be kept (UsageError: a term needs all)."""
        readers = [name for name, term in self.terms.items() if "teacher_outputs" in term.needs]
        if readers != ["logits"] or self.terms["logits"].function.keywords.get("form", "kl") != "kl":
            why = "`--loss` has no `logits`" if not readers else "`form=mse` compares all of them"
            hint = "`--loss logits=1`, or leave `--cache-top` out"
            raise UsageError("`--cache-top` keeps the largest logits", why=why, hint=hint)
        if number < 1:
            raise UsageError(f"`--cache-top` is {number}", why="at least one logit is kept")
        self.top = number

    @property
    def temperature(self) -> float:
        """At which the logits of student and teacher are compared."""
        return float(self.terms["logits"].function.keywords.get("temperature", 1.0))

    @functools.cached_property
    def heads(self) -> dict[str, nn.Linear]:
        """The heads of student and teacher by whose logits, of a large vocabulary, the two are compared in parts."""
        models = {"student": self.student, **({"teacher": self.teacher} if self.teacher is not None else {})}
        if self.samples.task is retrieval.TASK or any(f"{side}_vectors" in self.needs for side in models):
            return {}
        found = {side: unread.head_of(model) for side, model in models.items()}
        return {side: head for side, head in found.items() if head is not None} if all(found.values()) else {}

    def masks(self, inputs: Any) -> list[Tensor | None]:
        """Return which tokens count after each layer; of image patches all do."""
        mask = mask_of(inputs)
        has_images = isinstance(inputs, dict) and "pixel_values" in inputs
        return [None if has_images and dual.reads_image(name) else mask for name, _ in self.pairs]

    @functools.cached_property
    def originals(self) -> dict[str, Tensor]:
        """The teacher's weight of each factored module of the student; the teacher does not change."""
        assert self.teacher is not None
        device = place_of(self.student.module)
        found = {}
        with torch.no_grad():
            for name in factored(self.student):
                there = in_teacher(self.student, self.teacher, name)
                found[name] = weight_of(self.teacher, self.teacher.module, there).to(device)
        return found

    def score(self, held: Held, batch_size: int) -> float:
        """Return how good the student is on held-out samples: the task's metric, or without labels minus the loss."""
        if self.task and self.samples.labelled:
            return figures(self.student, self.samples, held, batch_size)
        total = 0.0
        with torch.no_grad():
            for batch in held.batches(batch_size):
                terms = self.loss(self.student.module, Given(batch), ALONE)
                terms.pop("perturbation", None)
                total += len(batch.targets) * float(sum(terms.values()))
        return -total / len(held)

    def check(self) -> None:
        """Try one sample: a teacher that does not fit is refused before the training, with the numbers that differ."""
        if self.teacher is None:
            return
        if "logits" in self.terms and self.samples.task is retrieval.TASK:
            raise UsageError("images and texts have no `logits`", hint="imitate their vectors: `--loss embeddings=1`")
        batch = self.samples.train.batch([0])
        with torch.no_grad():
            own, _ = self.seen("student", self.student, self.student.module, moved(self.student, batch.inputs))
        taught = self.taught(batch)
        hint = "choose the teacher that the student was made from, or leave features out: `--loss logits=1`"
        features = zip(self.pairs, own["student_features"], taught["teacher_features"], strict=True)
        for (one, _), student, teacher in features:
            _refuse_other_shape(student, teacher, f"student and teacher differ after `{one}`", hint)
        if {"teacher_outputs", "teacher_vectors"} & self.needs:
            what = "student and teacher give different outputs"
            hint = "choose a teacher with the same classes or vocabulary"
            _refuse_other_shape(own["student_outputs"], taught["teacher_outputs"], what, hint)


def _refuse_other_shape(student: Logits, teacher: Logits, what: str, hint: str) -> None:
    own, theirs = list(student.shape[1:]), list(teacher.shape[1:])
    if own != theirs:
        raise DataError(what, why=f"for one sample the student gives {own}, the teacher {theirs}", hint=hint)


def _unpadded(values: Tensor, at: int, masks: Tensor | None) -> Tensor:
    """Return one sample of a batch of values, without padding where they are one for each token."""
    own = values[at].detach().cpu()
    of_tokens = masks is not None and values.ndim == 3 and values.shape[:2] == masks.shape
    return own[masks[at]] if masks is not None and of_tokens else own


def _padded(own: Sequence[Tensor], masks: Tensor | None) -> Tensor:
    """Put samples together again, with zeros for padding."""
    if masks is None or any(
        each.ndim != 2 or len(each) != int(mask.sum()) for each, mask in zip(own, masks, strict=True)
    ):
        return torch.stack(list(own))
    whole = own[0].new_zeros(*masks.shape, own[0].shape[-1])
    for row, mask, each in zip(whole, masks, own, strict=True):
        row[mask] = each
    return whole


def vectors(outputs: Tensor, mask: Tensor | None, *, of_pairs: bool = False) -> Tensor:
    """Return (samples, width) vectors of length 1: of tokens their mean, of pairs the image's and the text's."""
    if of_pairs:
        return outputs[:, :2].float().flatten(0, 1)
    if outputs.ndim == 3 and mask is not None:
        return sentence_vectors(outputs.float(), mask)
    return nn.functional.normalize(outputs.float().flatten(1), dim=1)


def factored(model: Model) -> dict[str, dict[str, Any]]:
    """Return the factored modules of a model, as its manifest names them."""
    return dict(model.manifest.modules) if model.manifest is not None else {}


def weight_of(model: Model, module: nn.Module, name: str) -> Tensor:
    """Return the weight of one module of a network, float32, multiplied out where it is factored."""
    edit = factored(model).get(name)
    if edit is None:
        return module.get_submodule(name).weight.float()  # type: ignore[union-attr, operator, return-value]
    parts = {key: each.float() for key, each in module.get_submodule(name).named_parameters() if each.ndim > 1}
    shape = (len(parts["up.weight"]), *parts["down.weight"].shape[1:])
    return lowrank.dense_weight(parts, shape, edit["form"])


def pair(student: Model, teacher: Model) -> list[tuple[str, str]]:
    """Return the layers of student and teacher that stand for each other; some of the student's may be gone.

    Raises:
        DataError: they have none, or not the same.
    """
    mine, theirs = layers.layers(student), layers.layers(teacher)
    if student.manifest is not None and student.manifest.kept_layers:
        of_base = {was: name for name, was in shorten.in_base(student).items()}
        pairs = [(of_base[was], name) for name, was in shorten.in_base(teacher, theirs).items() if was in of_base]
        if len(pairs) == len(of_base):
            return pairs
    if not mine or len(mine) != len(theirs):
        why = f"`{student.name}` has {len(mine)}, `{teacher.name}` has {len(theirs)}"
        hint = "choose the teacher that the student was made from, or leave features out: `--loss logits=1,task=1`"
        raise DataError("the layers of student and teacher cannot be paired", why=why, hint=hint)
    return list(zip(mine, theirs, strict=True))


def in_teacher(student: Model, teacher: Model, name: str) -> str:
    """Return what a module of the student is called in its teacher."""
    if student.manifest is None or not student.manifest.kept_layers:
        return name
    to_base, to_teacher = shorten.in_base(student), {was: there for there, was in shorten.in_base(teacher).items()}
    layer = next((layer for layer in to_base if name.startswith(f"{layer}.")), None)
    if layer is None:
        return name
    return to_teacher.get(to_base[layer], to_base[layer]) + name[len(layer) :]


def learner(model: Model, recipe: Recipe, device: str) -> Model:
    """Return a copy on a device whose every parameter learns, whole or in pieces, half precision widened to float32."""
    if not recipe.spread:
        return runnable(trainable(model), device=device)
    copied = replace(model, module=detached(model.module).requires_grad_(), infos={}, files=[])
    return parallel.in_pieces(copied, layers.layers(model), recipe, device, learns=True)


def trainable(model: Model) -> Model:
    """Return a copy in memory whose every parameter learns, half precision widened to float32."""
    module = copy.deepcopy(model.module)
    if surgery.uniform_dtype(module) not in (torch.float32, torch.float64):
        module.float()
    return replace(model, module=module.requires_grad_(), infos={}, files=[])
