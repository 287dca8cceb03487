"""A folder in the format of timm's hub, for ``timm.create_model("local-dir:...", pretrained=True)``."""

import sys
from pathlib import Path

from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.formats.foreign import refuse_other_library
from peftc.models.model import Model
from peftc.models.weights import pieces_of
from peftc.store import artifact, quantization

PLACES = ("url", "hf_hub_id", "hf_hub_filename", "file", "source", "custom_load", "state_dict")  # of other weights
LIBRARY = "timm"
USE = """\
import timm

network = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
"""


def timm(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` (architecture, arguments, preprocessing, classes) and ``model.safetensors``.

    A factored model gets the architecture that `peftc.timm` registers, and its own among the arguments of that.
    """
    refuse_other_library(model, "timm", "timm", skips=True)
    record = model.manifest
    is_factored = record is not None and bool(record.modules or record.skipped)
    was = model.config.get("pretrained_cfg") or {}
    settings = {name: value for name, value in was.items() if name not in PLACES}
    settings |= dict(model.preprocess)
    classes = getattr(model.module, "num_classes", None)
    if classes is not None:
        settings["num_classes"] = classes
    config = {**model.config, "architecture": model.config["architecture"], "pretrained_cfg": settings}
    config |= {"num_classes": classes, "num_features": getattr(model.module, "num_features", None)}
    config |= {"model_args": dict(model.config.get("model_args") or {})}
    if record is not None and is_factored:
        told = quantization.entry(record.modules, record.skipped, record.tied)
        config["model_args"][quantization.METHOD] = {**told, "architecture": config["architecture"]}
        config["architecture"] = quantization.ARCHITECTURE
    if model.labels:
        config["label_names"] = list(model.labels)
    artifact.write_json(folder / "config.json", config)
    artifact.write_weights(folder, pieces_of(model), None, sys.maxsize)  # timm reads one file
    written = exported.plain(model, folder, factored=is_factored)
    if is_factored:
        written.expected = exported.factors(model)
        written.about["use"] = f"import peftc.timm\n{USE}"
        written.notes.append("whoever loads it has to `import peftc.timm`; `--dense` multiplies the factors out")
    return written
