"""One file of plain weights; how modules compute with them stands in ``export.json`` beside it."""

import copy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.formats import exported
from peftc.formats.exported import Exported, Inputs
from peftc.models.model import Model
from peftc.models.place import runnable
from peftc.models.weights import pieces_of
from peftc.nn import surgery
from peftc.store import artifact

FORMS = {
    "linear": "y = up (down x) + bias",
    "transposed": "y = up (down x) + bias",
    "embedding": "row = up[id] down",
    "channel": "y = up * (down * x) + bias, convolutions in a row",
    "spatial": "y = up * (down * x) + bias, convolutions in a row",
    "tucker2": "y = up * (core * (down * x)) + bias, convolutions in a row",
}
LIBRARY = "peftc"
USE = """\
import huggingface_hub, safetensors.torch

file = huggingface_hub.hf_hub_download("{repo}", "model.safetensors")
weights = safetensors.torch.load_file(file)  # export.json says how the modules compute
"""


def safetensors(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``model.safetensors``; ``export.json`` says how each module that is not plain computes with it."""
    from safetensors import safe_open

    artifact.write_weights(folder, pieces_of(model), None, sys.maxsize)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.module.buffers()}
    for each in model.module.parameters():  # what is one parameter stays one
        memo[id(each)] = nn.Parameter(each.detach().to("meta"), requires_grad=each.requires_grad)
    network = copy.deepcopy(model.module, memo)
    with safe_open(folder / "model.safetensors", "pt") as file:
        surgery.fill(network, file.keys(), file.get_tensor, where="model.safetensors")
        read = runnable(Model(network, model.source, model.library, model.config, model.base, model.name), device="cpu")

    def run(inputs: Inputs) -> Tensor:
        return exported.computed(read, inputs)[0]

    record = model.manifest
    edits = record.modules if record else {}
    forms = {edit["form"] for edit in edits.values()}
    tied = {alias: names[0] for names in surgery.stored_names(model.module).values() for alias in names[1:]}
    about = {"modules": edits, "forms": {form: FORMS[form] for form in sorted(forms)}, "tied": tied}
    more = {"updates": record.adapters, "skipped": record.skipped} if record else {}
    about |= {word: value for word, value in more.items() if value}
    runtime = f"safetensors {version('safetensors')}, torch {torch.__version__}"
    return Exported(runtime, run, lambda inputs: lambda: run(inputs), about=about)
