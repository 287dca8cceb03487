"""One file of plain weights; how modules compute with them stands in ``export.json`` beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from peftc import artifact
from peftc.models import exported
from peftc.models.exported import Exported, Inputs
from peftc.models.load import Model, detached, runnable
from peftc.models.weights import pieces_of
from peftc.nn import surgery

FORMS = {
    "linear": "y = up (down x) + bias",
    "transposed": "y = up (down x) + bias",
    "embedding": "row = up[id] down",
    "channel": "y = up * (down * x) + bias, convolutions in a row",
    "spatial": "y = up * (down * x) + bias, convolutions in a row",
    "tucker2": "y = up * (core * (down * x)) + bias, convolutions in a row",
}


def safetensors(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``model.safetensors``; ``export.json`` says form and rank of each factored module.

    Args:
        model: as stored.
        example: not looked at.
        folder: to write to.
    """
    from safetensors import safe_open

    artifact.write_weights(folder, pieces_of(model), None, sys.maxsize)
    network = detached(model.module).to("meta")
    for name, buffer in model.module.named_buffers():  # what is computed, not stored, stays
        path, _, leaf = name.rpartition(".")
        if leaf in network.get_submodule(path)._non_persistent_buffers_set:
            network.get_submodule(path)._buffers[leaf] = buffer
    with safe_open(folder / "model.safetensors", "pt") as file:
        surgery.fill(network, file.keys(), file.get_tensor, where="model.safetensors")
        read = runnable(Model(network, model.source, model.library, model.config, model.base, model.name), device="cpu")

    def run(inputs: Inputs) -> Tensor:
        return exported.computed(read, inputs)[0]

    def prepare(inputs: Inputs) -> Callable[[], object]:
        return lambda: run(inputs)

    edits = model.manifest.modules if model.manifest else {}
    forms = {edit["form"] for edit in edits.values()}
    tied = {alias: names[0] for names in surgery.stored_names(model.module).values() for alias in names[1:]}
    about = {"modules": edits, "forms": {form: FORMS[form] for form in sorted(forms)}, "tied": tied}
    runtime = f"safetensors {version('safetensors')}, torch {torch.__version__}"
    return Exported(runtime, run, prepare, about=about)
