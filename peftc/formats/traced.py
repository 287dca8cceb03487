"""Model > a graph of its operations with a free batch, and for texts a free length: what .pt2 and ONNX are made of."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import ExportError
from peftc.formats import alone, exported, sentences
from peftc.formats.exported import Inputs
from peftc.formats.foreign import instead, is_one_graph
from peftc.measure.costs import without_fused_layers
from peftc.models import padding
from peftc.models.model import Model, detached
from peftc.models.place import runnable
from peftc.nn.lowrank import LowRankConv2d, LowRankEmbedding, LowRankLinear
from peftc.nn.shared import SharedDown

ATEN = torch.ops.aten
PRODUCTS = (
    *(ATEN.linear.default, ATEN.matmul.default, ATEN.mm.default, ATEN.addmm.default),
    *(ATEN.conv2d.default, ATEN.conv2d.padding, ATEN.convolution.default),
)
VIEWS = (
    *(ATEN.t.default, ATEN.transpose.int, ATEN.permute.default, ATEN.numpy_T.default),
    *(ATEN.alias.default, ATEN.detach.default, ATEN.to.dtype),
)
# what tracing raises where a network does what no graph can hold
ELSE = "`--format torch-export` takes what torch can trace"
UNTRACEABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Traced:
    """A traced network."""

    program: Any  # the graph
    outputs: list[str]  # names; the second, where there is one, is the vector of a sentence
    expected: list[tuple[int, ...]]  # shapes of the factors that are multiplied with, once per product
    axes: dict[str, dict[int, str]]  # name of each input, in order -> its free axes, by place

    @property
    def about(self) -> dict[str, Any]:
        """What ``export.json`` says of it."""
        return {
            "inputs": self.axes,
            "output": self.outputs[0],
            **({"vectors": self.outputs[1]} if self.outputs[1:] else {}),
        }

    def fed(self, inputs: Inputs) -> Inputs:
        """Return what it takes, in order: what is not there is zero."""
        first = next(iter(inputs.values()))
        return {name: inputs[name] if name in inputs else torch.zeros_like(first) for name in self.axes}


class _Whole(nn.Module):
    """A network that takes its inputs by place and gives its main output, and what ``ends`` makes of it."""

    def __init__(self, network: nn.Module, names: list[str] | None, ends: nn.Module | None) -> None:
        super().__init__()
        self.network, self.names, self.ends = network, names, ends
        takes = inspect.signature(network.forward).parameters
        self.more = {"use_cache": False} if names and "use_cache" in takes else {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the main output, with the vectors of sentences where there are such."""
        if self.names is None:
            return alone.picked(self.network(*inputs))[0]
        named = dict(zip(self.names, inputs, strict=True))
        tokens = alone.picked(self.network(**named, **self.more))[0]
        return tokens if self.ends is None else (tokens, self.ends(tokens, named["attention_mask"]))


def trace(
    model: Model, example: Inputs, *, limits: Mapping[str, int] | None = None, ends: nn.Module | None = None
) -> Traced:
    """Return the graph of a model, which stays as it is, in float32 with its batch free, and the length of texts.

    Args:
        model, example: as for every format; a model of two networks is refused.
        limits: largest ``batch`` and ``sequence``, for a runtime that plans its memory; None for no limit.
        ends: what makes vectors of sentences of those of tokens, if the network gives them, and their mask.
    """
    if not is_one_graph(model):
        why = "it has two networks that are used apart, and a graph holds one"
        raise ExportError(f"`{model.name}` cannot be written as one graph", why=why, hint=instead(model))
    runs = runnable(replace(model, module=detached(model.module)), device="cpu", dtype="float32")
    runs.module.requires_grad_(False)
    if padding.reads_last_token(runs.module) and padding.padding_id(runs.module) is None:  # a graph cannot look
        runs.module.config.get_text_config().pad_token_id = padding.id_to_write(model)
    output = exported.computed(runs, example)[1]
    ends = ends if output == "last_hidden_state" and "attention_mask" in example else None
    named = list(example) if model.library == "transformers" else None
    free = {0: "batch", 1: "sequence"} if "input_ids" in example else {0: "batch"}
    axes = {name: {at: word for at, word in free.items() if at < tensor.ndim} for name, tensor in example.items()}
    whole = _Whole(runs.module, named, ends).eval()
    any_side: Any = torch.export.Dim.DYNAMIC
    sides = {word: any_side if limits is None else any_side(max=limits[word]) for word in free.values()}
    dynamic = tuple({at: sides[word] for at, word in axes[name].items()} for name in example)
    what = f"`{model.name}` cannot be written as a graph with a free batch{' and length' if len(free) > 1 else ''}"
    with refusing(what, *UNTRACEABLE, hint=instead(model, graph=False)), torch.no_grad(), without_fused_layers():
        program = torch.export.export(whole, tuple(example.values()), dynamic_shapes=(dynamic,))
    names = program.graph_signature.inputs_to_parameters
    known = {node: whole.get_parameter(name) for node, name in names.items()}
    _merge_shared(program, whole, known)
    outputs = [output] if ends is None else [output, sentences.VECTOR]
    return Traced(program, outputs, _factors_in_use(program, whole, known), axes)


@contextmanager
def refusing(what: str, *errors: type[Exception], hint: str = ELSE) -> Iterator[None]:
    """Turn ``errors`` that a library raises about a graph into a refusal that says their kind and their first line."""
    try:
        yield
    except errors as error:
        first = next((f": {line.strip()[:300]}" for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(what, why=type(error).__name__ + first, hint=hint) from error


def _merge_shared(program: Any, whole: nn.Module, known: Mapping[str, Tensor]) -> None:
    """Multiply once with a down factor that several modules share: traced, each of them has a product of its own."""
    shared = {id(module.weight) for module in whole.modules() if isinstance(module, SharedDown)}
    if not shared:
        return
    first: dict[Any, Any] = {}
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is ATEN.linear.default and id(known.get(node.args[1].name)) in shared:
            kept = first.setdefault(node.args, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)
    program.graph_module.recompile()


def products(program: Any) -> list[tuple[int, ...]]:
    """Return the shape of the weight of every product of a graph with one."""
    known = program.graph_signature.inputs_to_parameters
    shapes = [tuple(each.meta["val"].shape) for each in _factors_of(program) if getattr(each, "name", None) in known]
    return [shape for shape in shapes if len(shape) > 1]  # the others are biases


def _factors_of(program: Any) -> Iterator[Any]:
    """Yield the nodes that the operands of all products are views of."""
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            for operand in node.args[:3]:
                while getattr(operand, "op", None) == "call_function" and operand.target in VIEWS:
                    operand = operand.args[0]
                yield operand


def _factors_in_use(program: Any, whole: nn.Module, known: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of all factors that the output hangs on, once per product; each has to be in one of its own."""
    used = {id(known[node.name]) for node in program.graph_module.graph.nodes if node.name in known and node.users}
    in_product: dict[int, list[tuple[int, ...]]] = {}
    for weight in _factors_of(program):
        if getattr(weight, "name", None) in known:
            tensor = known[weight.name]
            in_product.setdefault(id(tensor), []).append(tuple(tensor.shape))
    found: dict[int, list[tuple[int, ...]]] = {}
    for name, module in whole.named_modules():
        parts = module.children() if isinstance(module, LowRankLinear | LowRankConv2d) else ()
        if isinstance(module, LowRankEmbedding):
            parts = (module.down,)  # rows of the other one are looked up
        for factor in (part.weight for part in parts):
            if id(factor) in used and id(factor) not in in_product:
                what = f"the factors of `{name.removeprefix('network.')}` are no two products in the graph"
                hint = "multiply the factors out with `--dense`, or keep them with `--format safetensors`"
                raise ExportError(what, why="the network reads its weight instead of calling it", hint=hint)
            found[id(factor)] = in_product.get(id(factor), [])
    return [shape for shapes in found.values() for shape in shapes]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention as two products and a softmax, for runtimes without a kernel for the whole.

    Arguments are those of `torch.nn.functional.scaled_dot_product_attention`; nothing is dropped out. Rows that may
    attend to nothing attend to everything: their outputs mean nothing, but they are numbers.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (scale or 1 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # (b, h, t, t)

    def added(seen: Tensor) -> Tensor:  # a sum costs runtimes less than a choice, and layers share what is added
        return torch.zeros_like(seen, dtype=scores.dtype).masked_fill(~seen, torch.finfo(scores.dtype).min)

    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores + added(seen)
    if attn_mask is not None:
        scores = scores + (added(attn_mask) if attn_mask.dtype == torch.bool else attn_mask)
    return scores.softmax(-1) @ value
