"""A folder that transformers loads with ``from_pretrained``, without peftc."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.formats.foreign import refuse_foreign
from peftc.models.model import Model
from peftc.models.weights import piece, pieces_of
from peftc.nn import surgery
from peftc.store import artifact

SHARD = 5 * 10**9  # bytes per file, as transformers writes them
LIBRARY = "transformers"
USE = """\
import transformers

network = transformers.{architecture}.from_pretrained("{repo}")
"""


def hf(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` and weights as transformers does, of a model whose modules are all of its library."""
    refuse_foreign(model, "transformers", "hf")
    config = {name: value for name, value in model.config.items() if name != "transformers_weights"}
    config.setdefault("architectures", [model.architecture])
    artifact.write_json(folder / "config.json", config)
    # another version looks for the names in files, and fills with random numbers what it does not find
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 modules are called as in the files
        pieces = pieces_of(model)
    else:
        state = surgery.tensors_of(model.module)
        there = {name: state[name] for name in surgery.stored_names(model.module)}
        pieces = {name: piece(each) for name, each in revert_weight_conversion(model.module, there).items()}
    artifact.write_weights(folder, pieces, None, SHARD)
    written = exported.plain(model, folder)
    written.notes += read_otherwise(config)
    return written


def read_otherwise(config: Mapping[str, Any]) -> list[str]:
    """Return a note where earlier versions of transformers read a config otherwise, and do not say so."""
    parts = (config, *(each for each in config.values() if isinstance(each, Mapping)))
    note = "transformers before 5.0 does not read `rope_parameters` of `config.json`, and computes something else"
    return [note] if any("rope_parameters" in each for each in parts) else []
