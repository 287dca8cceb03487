"""A folder that transformers loads with ``from_pretrained``, without peftc."""

from __future__ import annotations

from pathlib import Path

from peftc import artifact
from peftc.errors import ExportError
from peftc.models import exported
from peftc.models.exported import Exported, Inputs
from peftc.models.load import Model
from peftc.models.multiplied import foreign
from peftc.models.weights import pieces_of

SHARD = 5 * 10**9  # bytes per file, as transformers writes them
KEEPS = {"transformers": "hf-code` or `--format onnx", "timm": "onnx"}  # factors


def hf(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` and weights as transformers does.

    Args:
        model: as stored, its modules all of its own library.
        example: not looked at.
        folder: to write to.

    Raises:
        ExportError: the model is not of transformers, or has factored modules.
    """
    refuse_foreign(model, "transformers", "hf")
    config = {name: value for name, value in model.config.items() if name != "transformers_weights"}
    config.setdefault("architectures", [model.architecture])
    artifact.write_json(folder / "config.json", config)
    artifact.write_weights(folder, pieces_of(model), None, SHARD)
    return exported.plain(model, folder)


def refuse_other_library(model: Model, library: str, word: str) -> None:
    """Refuse a model of another library.

    Raises:
        ExportError: with what to do instead.
    """
    if model.library != library:
        others = {"timm": "timm", "transformers": "hf"}
        raise ExportError(
            f"`{model.name}` cannot be exported as `{word}`",
            why=f"its network is one of {model.library}" if model.library in others else "its network is your own code",
            hint=f"use `--format {others.get(model.library, 'onnx')}`",
        )
    if model.manifest is not None and model.manifest.skipped:
        raise ExportError(
            f"`{model.name}` cannot be built by {library} alone",
            why=f"`{next(iter(model.manifest.skipped))}` was dropped in its place, for no config leaves it out",
            hint="export it as `--format onnx` or `--format torch-export`",
        )


def refuse_foreign(model: Model, library: str, word: str) -> None:
    """Refuse a model that a library cannot load by itself.

    Raises:
        ExportError: with what to do instead.
    """
    refuse_other_library(model, library, word)
    names = foreign(model.module)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ExportError(
            f"`{model.name}` cannot be exported as `{word}` as it is",
            why=f"{library} knows no factors, which `{names[0]}`{more} is made of",
            hint=f"multiply them out with `--dense`, or keep them with `--format {KEEPS[library]}`",
        )
