"""The model that a result is compared with: the earliest of a chain that has the same head and the same task."""

from dataclasses import replace
from typing import Any

from peftc.errors import ArtifactError, PeftcError
from peftc.models.load import load, load_base
from peftc.models.model import Model
from peftc.store import artifact, manifest
from peftc.tasks.table import guess

FOLDER = "`--against base` means the model that the artifact records; the folder here is `--against ./base`"
NAME_ONE = "name one: `--against MODEL`"


def before(model: Model) -> Model:
    """Return the earliest model that an artifact was made from and that answers the same question.

    That is the base which its manifest records or, where a step gave it another head, what that step wrote
    (ArtifactError: there is none, it is not there any more, or it is not what it was).
    """
    found = _earliest(model)
    if found is None:
        why = "its last step gave it a new one, so there is no quality to compare with"
        raise ArtifactError(f"nothing before `{model.name}` has its head", why=why, hint=NAME_ONE)
    return found


def timed(model: Model) -> Model:
    """Return the model whose size and speed those of an artifact are set beside: `before`, where there is one.

    Size and speed ask for no common head: where the last step gave a new one, that is the base which the manifest
    records (ArtifactError: it is not there any more, or it is not what it was).
    """
    record = model.manifest
    if record is None or record.begins or record.head_step == 0:
        return load_base(model)
    return _written(model, record.head_step)


def of_gate(model: Model) -> Model:
    """Return the model that a drop of what is made from ``model`` is judged against; that may be ``model`` itself."""
    return (None if model.manifest is None else _earliest(model)) or model


def _earliest(model: Model) -> Model | None:
    """Return the earliest model of the chain with the head of the last; None where that is the last."""
    first = 0 if model.manifest is None else model.manifest.head_step
    if model.manifest is not None and model.manifest.begins:
        return None
    try:
        found = load_base(model) if first == 0 else _written(model, first)
    except PeftcError as error:
        if isinstance(error, ArtifactError) and error.hint and "--against MODEL" in error.hint:
            raise
        what = f"the model to compare `{model.name}` with cannot be loaded"
        hint = f"{NAME_ONE}; or: {error.hint}" if error.hint else NAME_ONE
        raise ArtifactError(what, why=error.what, hint=hint) from error
    if _head(found) != _head(model):
        what = f"`{found.source.spec}` has another head than `{model.name}`, so their quality cannot be compared"
        why = "it is the earliest model of the chain, and no step says that it gave another head"
        raise ArtifactError(what, why=why, hint=NAME_ONE)
    note = f"compared with `{found.source.spec}`, the earliest model of the chain with the same head and task"
    return replace(found, notes=[*found.notes, note])


def _written(model: Model, step: int) -> Model:
    """Return what a step, counted from 1, wrote: where it was read then, or beside the artifact under the same name."""
    assert model.manifest is not None and model.folder is not None
    made = model.manifest.steps[step - 1]["id"]
    named = artifact.read_result(model.folder).get("places", {}).get(made)
    if named is None:
        raise ArtifactError(f"`{model.folder}` does not say where step {step} of its chain lies", hint=NAME_ONE)
    spec = manifest.lies(named["spec"], made, model.folder)
    if spec is None:
        why = f"neither `{named['spec']}` is that artifact, nor anything of that name beside `{model.folder}`"
        raise ArtifactError(f"step {step} of the chain of `{model.name}` is not there", why=why, hint=NAME_ONE)
    return load(model.source.names(spec, revision=named.get("revision")))


def _head(model: Model) -> tuple[Any, ...]:
    """Return what two models have in common that answer the same question: their task and their classes."""
    task = guess(model)
    width = None
    if task is not None and task.has_classes and model.library != "python":
        config: Any = getattr(model.module, "config", None)
        width = getattr(model.module, "num_classes", None) if config is None else getattr(config, "num_labels", None)
    return (task.name if task else None, model.labels, width)
