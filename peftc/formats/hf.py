"""A folder that transformers loads with ``from_pretrained``: without peftc, or where it has factors with its help."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.formats.foreign import refuse_other_library
from peftc.models.model import Model
from peftc.models.weights import piece, pieces_of
from peftc.nn import surgery
from peftc.store import artifact, quantization

SHARD = 5 * 10**9  # bytes per file, as transformers writes them
LIBRARY = "transformers"
USE = """\
import transformers

network = transformers.{architecture}.from_pretrained("{repo}")
"""
IMPORTED = """\
import peftc.transformers
import transformers

network = transformers.{architecture}.from_pretrained("{repo}")
"""


def hf(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` and weights as transformers does, and what `peftc.transformers` builds factors by."""
    refuse_other_library(model, "transformers", "hf", skips=True)
    record = model.manifest
    is_factored = record is not None and bool(record.modules or record.skipped)
    config = {name: value for name, value in model.config.items() if name != quantization.LOCKED}
    config.setdefault("architectures", [model.architecture])
    if record is not None and is_factored:
        told = quantization.entry(record.modules, record.skipped, record.tied)
        config |= {quantization.LOCKED: quantization.BUILT, quantization.KEY: told}
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
    written = exported.plain(model, folder, factored=is_factored)
    written.notes += read_otherwise(config)
    if is_factored:
        written.expected = exported.factors(model)
        written.about["use"] = IMPORTED
        written.notes.append(
            "whoever loads it has to `import peftc.transformers`; `--dense` multiplies the factors out"
        )
    return written


def read_otherwise(config: Mapping[str, Any]) -> list[str]:
    """Return a note where earlier versions of transformers read a config otherwise, and do not say so."""
    parts = (config, *(each for each in config.values() if isinstance(each, Mapping)))
    note = "transformers before 5.0 does not read `rope_parameters` of `config.json`, and computes something else"
    return [note] if any("rope_parameters" in each for each in parts) else []
