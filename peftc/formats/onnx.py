"""An ONNX graph that ONNX Runtime runs.

Attention is written as two products and a softmax, and shapes between nodes are left out: ONNX Runtime then takes 21 %
less time for MiniLM and 5 % less for ViT-Ti (batch 16, `tests/benchmarks/RESULTS.md`). With the shapes it fuses sums
and norms into one node, SkipLayerNormalization, that is slower than both.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.errors import UsageError, one_of
from peftc.formats import exported, sentences, traced
from peftc.formats.exported import CLOSE, Exported, Inputs
from peftc.formats.traced import Traced
from peftc.models.model import Model
from peftc.store.source import PARTS

LARGEST = 1_800_000_000  # bytes of weights in one file: a message of protobuf ends at 2 GiB
PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "MatMulInteger", "ConvInteger")
TOLERANCES = {"fp32": CLOSE, "fp16": 2e-2}
OPSETS = range(18, 24)
LIBRARY = "onnx"
TAGS = ("onnx",)
USE = """\
import huggingface_hub, onnxruntime

folder = huggingface_hub.snapshot_download("{repo}")
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
"""


def onnx(
    model: Model, example: Inputs, folder: Path, *, opset: int = 20, dtype: str = "fp32", quantize: str = "no"
) -> Exported:
    """Write ``model.onnx`` with a free batch and for texts a free length; weights above 1.8 GB lie beside it.

    Args:
        model, example, folder: as for every format.
        opset: version of the operators, 18 to 23; 20 is the first with GELU.
        dtype: fp32 or fp16; inputs and outputs stay float32.
        quantize: no or int8: weights of matrix products in 8 bits, their inputs rounded as they come.
    """
    one_of("--set dtype=", dtype, list(TOLERANCES))
    one_of("--set quantize=", quantize, ["no", "int8"])
    if opset not in OPSETS:
        raise UsageError(f"`--set opset={opset}` is not supported", why=f"it is {OPSETS[0]} to {OPSETS[-1]}")
    if dtype == "fp16" and quantize == "int8":
        raise UsageError("`dtype=fp16` and `quantize=int8` are both given", hint="leave one of them out")
    exported.require("onnx", ("onnx", "onnxscript", "onnxruntime"))
    import onnxruntime

    ends, notes = None, []
    try:
        ends = sentences.of_folder(model.folder)
    except ValueError as error:
        notes.append(f"the graph ends with vectors of tokens: of what `{PARTS}` lets follow, {error}")
    graph = traced.trace(model, example, ends=ends)
    path = folder / "model.onnx"
    is_large = 4 * sum(tensor.numel() for tensor in model.module.state_dict().values()) > LARGEST
    _write(graph, example, path, opset, is_large, model.name)
    if dtype == "fp16":
        _to_half(path, is_large)
    notes += [_quantise(path, is_large)] if quantize == "int8" else []
    tolerance = TOLERANCES[dtype] if quantize == "no" else None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with traced.refusing("ONNX Runtime does not load what was written", *_refusals()):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        given = {name: tensor.numpy() for name, tensor in graph.fed(inputs).items()}
        return lambda: session.run(None, given)

    def run(inputs: Inputs, place: int = 0) -> Tensor:
        with traced.refusing("ONNX Runtime does not run what was written", *_refusals()):
            return torch.from_numpy(prepare(inputs)()[place]).float()

    vectors = None
    if ends is not None and graph.outputs[1:]:
        vectors = (ends, partial(run, place=1))
        notes.append(f"its second output `{graph.outputs[1]}` is what `{PARTS}` makes of the first")
    mixes = quantize == "int8"  # inputs are rounded by the range that they have in the whole batch
    found: Any = {"about": graph.about, "notes": notes, "vectors": vectors, "mixes": mixes}
    return Exported(
        f"ONNX Runtime {onnxruntime.__version__}", run, prepare, tolerance, _products(path), graph.expected, **found
    )


def _write(graph: Traced, example: Inputs, path: Path, opset: int, is_large: bool, name: str) -> None:
    """Translate the graph and name its free axes; what says where code stood when it was traced is left out."""
    from onnx_ir import Shape, save

    plain = {torch.ops.aten.scaled_dot_product_attention.default: traced.attention}
    names = {"input_names": list(graph.axes), "output_names": graph.outputs}
    about: Any = {"dynamo": True, "verbose": False, "opset_version": opset, **names}
    with traced.refusing(f"`{name}` cannot be written as ONNX", *traced.UNTRACEABLE):
        program = torch.onnx.export(graph.program.run_decompositions(plain), tuple(example.values()), **about)
    assert program is not None
    model = program.model
    words: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = graph.axes[value.name]
        words |= {str(value.shape[at]): word for at, word in axes.items()}
        value.shape = Shape([axes.get(at, side) for at, side in enumerate(value.shape)])
    for value in model.graph.outputs:
        value.shape = Shape([words.get(str(side), side) for side in value.shape])
    for node in model.graph:
        node.doc_string = None
    values = (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())
    for each in (*model.graph, *values, model.graph, model):
        each.metadata_props.clear()
    save(model, path, external_data=f"{path.name}.data" if is_large else None)
    _forget_shapes(path)


def _forget_shapes(path: Path) -> None:
    """Leave out the shapes of what lies between nodes; whoever needs them infers them."""
    import onnx as library

    model = library.load(path, load_external_data=False)
    del model.graph.value_info[:]
    library.save(model, path)


def _to_half(path: Path, is_large: bool) -> None:
    """Store and compute in float16, with inputs and outputs in float32."""
    import onnx as library
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(library.load(path), keep_io_types=True, disable_shape_infer=is_large)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    library.save(model, path, save_as_external_data=is_large, location=data.name)
    _forget_shapes(path)


def _quantise(path: Path, is_large: bool) -> str:
    """Round the weights of matrix products to 8 bits, and say how many there are."""
    import onnx as library
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = _products(path)
    whole = path.rename(path.with_name("whole.onnx"))
    logging.disable(logging.WARNING)  # it advises a step that is for static quantization
    try:
        how = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(whole, path, use_external_data_format=is_large, **how)
    finally:
        logging.disable(logging.NOTSET)
    whole.unlink()
    _forget_shapes(path)
    nodes = library.load(path, load_external_data=False).graph.node
    number = sum(node.op_type == "MatMulInteger" for node in nodes)
    return f"{number} of {len(before)} products with weights compute in 8 bits; convolutions stay as they are"


def _products(path: Path) -> list[tuple[int, ...]]:
    """Return the shape of the weight of every product with one."""
    import onnx as library

    graph = library.load(path, load_external_data=False).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in PRODUCTS]
    return [weights[name] for node in nodes for name in node.input[:2] if len(weights.get(name, ())) > 1]


def _refusals() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)
