"""A program of ExecuTorch for phones and small boards, its products computed by XNNPACK where that can."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.errors import ExportError, UsageError
from peftc.formats import exported, traced
from peftc.formats.exported import Exported, Inputs
from peftc.models.model import Model

NEEDS = ("executorch.exir", "executorch.runtime", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
LIBRARY = "executorch"
TAGS = ("executorch",)
USE = """\
import huggingface_hub
from executorch.runtime import Runtime

file = huggingface_hub.hf_hub_download("{repo}", "model.pte")
method = Runtime.get().load_program(file).load_method("forward")
"""


def executorch(
    model: Model, example: Inputs, folder: Path, *, largest_batch: int = 32, largest_length: int = 512
) -> Exported:
    """Write ``model.pte``, in float32, with a free batch and for texts a free length up to a limit.

    Args:
        model, example, folder: as for every format.
        largest_batch, largest_length: what memory is planned for, at least 2; a length also fits the positions of the
            network.
    """
    for name, limit in (("largest_batch", largest_batch), ("largest_length", largest_length)):
        if limit < 2:
            raise UsageError(f"`--set {name}={limit}` is too small", why="it is 2 at least")
    exported.require("executorch", NEEDS)
    from executorch.runtime import Runtime

    positions = getattr(getattr(model.module, "config", None), "max_position_embeddings", None) or largest_length
    limits = {"batch": largest_batch, "sequence": min(largest_length, positions)}
    graph = traced.trace(model, example, limits=limits)
    products = traced.products(graph.program)
    path = folder / "model.pte"
    path.write_bytes(_lowered(graph.program, model.name))
    method = Runtime.get().load_program(path).load_method("forward")
    if method is None:
        hint = traced.ELSE
        raise ExportError("ExecuTorch does not load what was written", why="it has no method `forward`", hint=hint)

    def run(inputs: Inputs) -> Tensor:
        return prepare(inputs)()[0].float().clone()

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        given = [*graph.fed(inputs).values()]

        def call() -> Any:
            with traced.refusing("ExecuTorch does not run what was written", RuntimeError):
                return method.execute(given)

        return call

    axes = {word for free in graph.axes.values() for word in free.values()}
    about = {**graph.about, "largest": {word: limits[word] for word in sorted(axes)}}
    runtime = f"ExecuTorch {version('executorch')}"
    return Exported(runtime, run, prepare, products=products, expected=graph.expected, about=about)


def _lowered(program: Any, name: str) -> bytes:
    """Translate a graph to what ExecuTorch runs."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError as Refusal
    from executorch.exir.error import InternalError

    with traced.refusing(f"`{name}` cannot be written for ExecuTorch", *traced.UNTRACEABLE, Refusal, InternalError):
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)
