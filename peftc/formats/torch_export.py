"""A program of torch.export: ``torch.export.load("model.pt2").module()`` runs it, without peftc."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.formats import traced
from peftc.formats.exported import Exported, Inputs
from peftc.models.model import Model

TAGS = ("torch-export",)
USE = """\
import huggingface_hub, torch

file = huggingface_hub.hf_hub_download("{repo}", "model.pt2")
network = torch.export.load(file).module()
"""


def torch_export(model: Model, example: Inputs, folder: Path) -> Exported:
    """Write ``model.pt2``, in float32, with a free batch and for texts a free length."""
    graph = traced.trace(model, example)
    path = folder / "model.pt2"
    torch.export.save(graph.program, path)
    with warnings.catch_warnings():  # torch 2.11 warns of buffers that it makes itself
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        program = torch.export.load(path)
    network = program.module()

    def run(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return network(*graph.fed(inputs).values()).float()

    found: Any = {"products": traced.products(program), "expected": graph.expected, "about": graph.about}
    return Exported(f"torch.export {torch.__version__}", run, lambda inputs: lambda: run(inputs), **found)
