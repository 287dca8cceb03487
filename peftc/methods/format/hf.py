"""A folder that transformers loads with ``from_pretrained``, without peftc."""

from __future__ import annotations

from pathlib import Path

from peftc import artifact
from peftc.models import exported
from peftc.models.exported import Exported, Inputs
from peftc.models.foreign import refuse_foreign
from peftc.models.load import Model
from peftc.models.weights import pieces_of

SHARD = 5 * 10**9  # bytes per file, as transformers writes them


def hf(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` and weights as transformers does.

    Args:
        model: as stored, its modules all of its own library.
        example: not looked at.
        folder: to write to.

    Raises:
        ExportError: the model is not of transformers, or has modules of peftc.
    """
    refuse_foreign(model, "transformers", "hf")
    config = {name: value for name, value in model.config.items() if name != "transformers_weights"}
    config.setdefault("architectures", [model.architecture])
    artifact.write_json(folder / "config.json", config)
    artifact.write_weights(folder, pieces_of(model), None, SHARD)
    return exported.plain(model, folder)
