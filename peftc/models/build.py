"""Build the base network of a source, or of an artifact's record, with parameters on the meta device."""

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from peftc.errors import ArtifactError, SourceError, UsageError
from peftc.models import from_timm, from_transformers, weights
from peftc.models.model import Model
from peftc.models.skeleton import on_meta
from peftc.models.weights import Weights
from peftc.nn import surgery
from peftc.store.manifest import Manifest
from peftc.store.source import Located, Source


def build(source: Source, located: Located, with_weights: bool) -> tuple[Model, Weights | None]:
    """Return the unfilled base network of anything but an artifact, and its weights (SourceError: forbidden code)."""
    if located.kind == "python":
        if source.from_file and not source.allow_code:
            what = f"`{source.spec}` is code that a file names, and peftc would have to import and run it"
            why = "it was not typed: it stands in a manifest, an adapter, a chain or a project file"
            hint = "add `--allow-code` (in Python: `allow_code=True`) if you trust that file and that code"
            raise SourceError(what, why=why, hint=hint)
        model = from_python(
            located.name, dict(source.arch_set), source, empty=bool(located.weights) or not with_weights
        )
    elif located.kind == "timm-arch":
        model = from_timm.from_architecture(source, located, with_weights)
    else:
        folder = located.folder
        assert folder is not None
        model = (from_timm if located.kind == "timm" else from_transformers).from_folder(source, folder)
        model.name = located.name.split("/")[-1] or folder.resolve().name
    record: dict[str, Any] = {
        "spec": source.spec,
        "arch": source.arch,
        "arch_set": dict(source.arch_set),
        "weights": str(source.weights) if source.weights else None,
        "revision": located.revision,
        "preprocess": dict(source.preprocess),
        "trust_remote_code": source.trust_remote_code,
    }
    model.base["source"] = {key: value for key, value in record.items() if value}
    found = None
    if with_weights and located.weights:
        found = weights.from_file(located.weights)
    elif with_weights and model.folder:
        found = weights.from_folder(model.folder)
        if model.library == "transformers":
            found = from_transformers.plain(model, found)
    return model, found


def fill(model: Model, tensors: Weights) -> dict[str, str]:
    """Map weights into the network of a model; return stored name -> name in the file."""
    if model.library == "transformers":
        return from_transformers.fill(model, tensors)
    if model.library == "timm":
        return from_timm.fill(model, tensors)
    return surgery.fill(model.module, tensors.names(), tensors.read, where=tensors.where)


def from_record(record: Manifest, folder: Path, source: Source) -> Model:
    """Return the base network that an artifact's manifest describes, before its edits."""
    library, architecture = record.base["library"], record.base["architecture"]
    if library == "python":
        return from_python(architecture, record.base.get("arguments", {}), source, empty=True)
    if library not in ("timm", "transformers"):
        raise ArtifactError(f"`{folder}` has a base of the unknown library `{library}`", why="its manifest is damaged")
    return (from_timm if library == "timm" else from_transformers).from_folder(source, folder, record)


def from_python(factory: str, arguments: dict[str, Any], source: Source, *, empty: bool) -> Model:
    """Run the user's own factory; whatever it raises is said to be theirs."""
    module_name, attribute = factory.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look in the working folder, `python -m` does
    try:
        make: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        hint = "run peftc in the folder that holds the module, or add it to PYTHONPATH"
        raise SourceError(f"cannot import `python:{factory}`", why=str(error), hint=hint) from error
    try:
        network: Any = on_meta(lambda: make(**arguments)) if empty else make(**arguments)
    except TypeError as error:
        hint = "pass them as `--arch-set key=value`"
        raise UsageError(f"`python:{factory}` does not accept its arguments", why=str(error), hint=hint) from error
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise SourceError(f"`python:{factory}` failed while it built the network", why=why) from error
    if not isinstance(network, nn.Module):
        raise SourceError(f"`python:{factory}` returned a {type(network).__name__}, not an nn.Module")
    record = {"library": "python", "architecture": factory, "arguments": arguments}
    usual = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return Model(network, source, "python", {}, record, attribute.split(".")[-1], preprocess=usual)
