"""Build the base network of a source, or of an artifact's record, with parameters on the meta device."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftc.errors import ArtifactError, PeftcError, SourceError, UsageError
from peftc.models import from_timm, from_transformers, weights
from peftc.models.skeleton import Base, on_meta
from peftc.nn import surgery
from peftc.store.source import Located, Source

if TYPE_CHECKING:
    from peftc.store.manifest import Manifest


def build(source: Source, located: Located, with_weights: bool) -> Base:
    """Return the base network of anything but an artifact, unfilled."""
    if located.kind == "python":
        _refuse_unasked(source)
        base = _python(located.name, dict(source.arch_set), empty=located.weights is not None or not with_weights)
        base.weights = weights.from_file(located.weights) if located.weights and with_weights else None
    elif located.kind == "timm-arch":
        base = from_timm.from_architecture(source, located, with_weights)
    else:
        folder = located.folder
        assert folder is not None
        base = (from_timm if located.kind == "timm" else from_transformers).from_folder(source, folder)
        if with_weights:
            base.weights = weights.from_file(located.weights) if located.weights else weights.from_folder(folder)
        base.name = located.name.split("/")[-1] or folder.resolve().name
    base.record["source"] = _source_record(source, located)
    return base


def _refuse_unasked(source: Source) -> None:
    """Refuse to run code that a file names, unless the user said so: whoever wrote the file would decide what runs.

    Raises:
        SourceError: with the option that allows it.
    """
    if source.from_file and not source.allow_code:
        raise SourceError(
            f"`{source.spec}` is code that a file names, and peftc would have to import and run it",
            why="it was not typed: it stands in a manifest, an adapter, a chain or a project file",
            hint="add `--allow-code` (in Python: `allow_code=True`) if you trust that file and that code",
        )


def _source_record(source: Source, located: Located) -> dict[str, Any]:
    record: dict[str, Any] = {
        "spec": source.spec,
        "arch": source.arch,
        "arch_set": dict(source.arch_set),
        "weights": str(source.weights) if source.weights else None,
        "revision": located.revision,
        "preprocess": dict(source.preprocess),
        "trust_remote_code": source.trust_remote_code,
    }
    return {key: value for key, value in record.items() if value}


def fill(base: Base) -> dict[str, str]:
    """Map the weights of ``base`` into its network; return stored name -> name in the file."""
    if base.library == "transformers":
        return from_transformers.fill(base)
    assert base.weights is not None
    return surgery.fill(base.module, base.weights.names(), base.weights.read, where=base.weights.where)


def from_record(record: Manifest, folder: Path, source: Source) -> Base:
    """Return the base network that an artifact's manifest describes, before its edits."""
    library, architecture = record.base["library"], record.base["architecture"]
    if library == "python":
        return _python(architecture, record.base.get("arguments", {}), empty=True)
    if library not in ("timm", "transformers"):
        raise ArtifactError(f"`{folder}` has a base of the unknown library `{library}`", why="its manifest is damaged")
    if library == "timm":
        return from_timm.from_config(from_timm.read_config(folder, ours=True), folder.name, folder, record)
    return from_transformers.from_folder(source, folder, record)


def from_live(module: Any) -> Base:
    """Return a live network as a base, with what may serve to build it again (see `refuse_unbuildable`)."""
    name = type(module).__name__.lower()
    if hasattr(module, "config") and hasattr(module, "save_pretrained"):
        config = json.loads(module.config.to_json_string(use_diff=False))
        config["architectures"] = [type(module).__name__]
        record = {"library": "transformers", "architecture": type(module).__name__}
        return Base(module, "transformers", name, record, config, labels=from_transformers.id2label(config))
    cfg = dict(getattr(module, "pretrained_cfg", None) or {})
    if cfg.get("architecture"):
        classes = getattr(module, "num_classes", None)
        config = {"architecture": cfg["architecture"], "num_classes": classes, "pretrained_cfg": cfg}
        base = from_timm.describe(module, config, cfg["architecture"])
    else:
        factory = f"{type(module).__module__}:{type(module).__qualname__}"
        base = Base(module, "python", name, {"library": "python", "architecture": factory, "arguments": {}})
    return base


def refuse_unbuildable(base: Base) -> None:
    """Refuse a live network that its class or config does not build again with the same tensors.

    Raises:
        SourceError: with what to do instead.
    """

    def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    why = "building it again gives other tensors, so its constructor had arguments that nobody kept"
    try:
        if shapes(_again(base)) == shapes(base.module):
            return
    except PeftcError as error:
        why = error.why or error.what
    raise SourceError(
        f"a live `{type(base.module).__name__}` cannot be stored so that it reloads",
        why=why,
        hint="write a factory function that builds it, and name it: `python:module:factory` with `--weights FILE`",
    )


def _again(base: Base) -> nn.Module:
    if base.library == "timm":
        return from_timm.from_config(base.config, base.name, None).module
    if base.library == "transformers":
        return on_meta(lambda: type(base.module)(base.module.config))
    return _python(base.record["architecture"], {}, empty=True).module


def _call(factory: str, made: Callable[..., Any], arguments: dict[str, Any], *, empty: bool) -> Any:
    """Run the user's own factory; whatever it raises is said to be theirs."""
    try:
        return on_meta(lambda: made(**arguments)) if empty else made(**arguments)
    except TypeError as error:
        raise UsageError(
            f"`python:{factory}` does not accept its arguments",
            why=str(error),
            hint="pass them as `--arch-set key=value`",
        ) from error
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise SourceError(f"`python:{factory}` failed while it built the network", why=why) from error


def _python(factory: str, arguments: dict[str, Any], *, empty: bool) -> Base:
    module_name, attribute = factory.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look in the working folder, `python -m` does
    try:
        made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"cannot import `python:{factory}`",
            why=str(error),
            hint="run peftc in the folder that holds the module, or add it to PYTHONPATH",
        ) from error
    network = _call(factory, made, arguments, empty=empty)
    if not isinstance(network, nn.Module):
        raise SourceError(f"`python:{factory}` returned a {type(network).__name__}, not an nn.Module")
    record = {"library": "python", "architecture": factory, "arguments": arguments}
    return Base(
        network,
        "python",
        attribute.split(".")[-1],
        record,
        preprocess={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    )
