"""What an export says of itself in ``export.json``, in place of a manifest: other programs read its folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import ArtifactError
from peftc.store import artifact, documents, manifest
from peftc.store.source import EXPORT

AGAIN = "export again with `--overwrite`"
MADE_FROM = {name: manifest.FIELDS[name] for name in ("base", "steps", "parameters")} | {"kept_layers": [str]}
EXPORTED = {
    "id": str,
    "request": manifest.REQUEST,
    "files": {str: manifest.ENTRY},
    "about": {
        "format": str,
        "modules": manifest.FIELDS["modules"],
        "made_from?": MADE_FROM,
        "library_name?": (str, None),
        "tags?": [str],
        "use?": (str, None),
    },
}


@dataclass(frozen=True)
class ExportRecord:
    """What ``export.json`` says.

    Attributes:
        id: digest of the base and of every request.
        request: what was asked.
        files: name -> ``{"sha256", "bytes"}`` of everything else in the folder but ``result.json``.
        about: how to use it: format, inputs, output, preprocessing, labels, forms of the modules.
    """

    id: str
    request: Mapping[str, Any]
    files: dict[str, dict[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``export.json`` into a folder, with a digest of what it says."""
        artifact.write_json(folder / EXPORT, documents.sealed(asdict(self)))


def read_export(folder: Path) -> ExportRecord:
    """Return what an export says of itself; an `ArtifactError` where it, or a file that it lists, is damaged."""
    path = folder / EXPORT
    value = documents.read_shaped(path, EXPORTED, ArtifactError, AGAIN)
    if documents.is_sealed(value) is False:
        raise manifest.edited(path)
    record = ExportRecord(value["id"], value["request"], value["files"], value["about"])
    changed = [
        name
        for name, entry in record.files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]
    ]
    if changed:
        why = f"`{changed[0]}` is missing or of another length"
        raise ArtifactError(f"`{folder}` is not as it was exported", why=why, hint=AGAIN)
    return record
