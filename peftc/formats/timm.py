"""A folder in the format of timm's hub, which ``timm.create_model("local-dir:...", pretrained=True)`` loads."""

import sys
from pathlib import Path

from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.formats.foreign import refuse_foreign
from peftc.models.model import Model
from peftc.models.weights import pieces_of
from peftc.store import artifact

PLACES = ("url", "hf_hub_id", "hf_hub_filename", "file", "source", "custom_load", "state_dict")  # of other weights
LIBRARY = "timm"
USE = """\
import timm

network = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
"""


def timm(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``config.json`` (architecture, arguments, preprocessing, classes) and ``model.safetensors``.

    The modules of the model are all of timm and torch.
    """
    refuse_foreign(model, "timm", "timm")
    was = model.config.get("pretrained_cfg") or {}
    settings = {name: value for name, value in was.items() if name not in PLACES}
    settings |= dict(model.preprocess)
    classes = getattr(model.module, "num_classes", None)
    if classes is not None:
        settings["num_classes"] = classes
    config = {**model.config, "architecture": model.config["architecture"], "pretrained_cfg": settings}
    config |= {"num_classes": classes, "num_features": getattr(model.module, "num_features", None)}
    config |= {"model_args": dict(model.config.get("model_args") or {})}
    if model.labels:
        config["label_names"] = list(model.labels)
    artifact.write_json(folder / "config.json", config)
    artifact.write_weights(folder, pieces_of(model), None, sys.maxsize)  # timm reads one file
    return exported.plain(model, folder)
