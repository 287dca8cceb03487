"""The base that an artifact's manifest records: from where it was, with the bytes that it had."""

from __future__ import annotations

from pathlib import Path

from peftc.errors import ArtifactError
from peftc.models.load import load
from peftc.models.model import Model
from peftc.store import verified
from peftc.store.source import Source


def load_base(model: Model) -> Model:
    """Return the base that an artifact's manifest records, with the bytes that it had then.

    Raises:
        ArtifactError: the model is no artifact, its base was a live network, or it is not what it was.
        SourceError: the base is not there, or is code that nobody allowed.
    """
    base = load(_base_source(model))
    assert model.manifest is not None
    promised, found = model.manifest.base.get("files", {}), {path.name: path for path in base.files}
    there = {found[name]: digest for name, digest in promised.items() if name in found}
    changed = [*(name for name in promised if name not in found), *(path.name for path in verified.differing(there))]
    if changed:
        raise ArtifactError(
            f"`{base.source.spec}` is not the base that `{model.source.spec}` was made from",
            why=f"`{changed[0]}` {'holds other bytes' if changed[0] in found else 'is not there'}",
            hint="put the model back that it was made from, or name another one: `--against MODEL`, `--teacher MODEL`",
        )
    return base


def _base_source(model: Model) -> Source:
    """Return where the base of an artifact was."""
    if model.manifest is None:
        raise ArtifactError(
            f"`{model.source.spec}` is no artifact, so it records no base", hint="name one: `--against MODEL`"
        )
    record = model.manifest.base.get("source")
    if record is None:
        raise ArtifactError(
            f"the base of `{model.source.spec}` was a live network", hint="name one that is stored: `--against MODEL`"
        )
    weight_file = record.get("weights")
    return model.source.names(
        record["spec"],
        arch=record.get("arch"),
        arch_set=record.get("arch_set", {}),
        weights=Path(weight_file) if weight_file else None,
        revision=record.get("revision"),
        preprocess=model.preprocess and {key: model.preprocess[key] for key in record.get("preprocess", {})},
    )
