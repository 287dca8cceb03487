"""Factors in vLLM, which finds `register` by an entry point: a quantization method named "peftc".

Nothing is quantized. A linear of vLLM may be several modules, as q, k and v: here each has factors of its own rank, or
is dense. vLLM does not see whether a linear was given all its weights, so that is looked at here too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from peftc.errors import SourceError, WeightError, named
from peftc.runtimes import shards
from peftc.runtimes.shards import Shard
from peftc.store import quantization

PLACES = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the shards of a linear; those of others have their numbers


def register() -> None:
    """Let vLLM know the factors of peftc: it calls this in each of its processes."""
    register_quantization_config(quantization.METHOD)(FactorsConfig)


class FactorsConfig(QuantizationConfig):
    """What ``config.json`` says of factors (SourceError: it says more than is understood, or than vLLM holds)."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__()
        quantization.refuse_unknown(told)
        shards.refuse_unheld(told)
        self.modules: dict[str, dict[str, Any]] = {name: dict(edit) for name, edit in told["modules"].items()}
        self.tied = {alias.rsplit(".", 2)[0] for alias in told.get("tied", {})}
        self.placed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FactorsConfig":
        """Return what an entry of ``config.json`` says."""
        return cls(config)

    def get_name(self) -> str:
        """Return what ``quant_method`` says."""
        return quantization.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that it computes in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU that will do: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return where else to look: nowhere."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that modules have in vLLM."""
        new = {was: name for name, was in hf_to_vllm_mapper.apply_dict({name: name for name in self.modules}).items()}
        for edit in self.modules.values():
            if "shares" in edit:
                edit["shares"] = new.get(edit["shares"], edit["shares"])
        self.modules = {new.get(name, name): edit for name, edit in self.modules.items()}
        self.tied = {new.get(name, name) for name in self.tied}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how to hold and compute a layer of vLLM (SourceError: it is one of experts)."""
        if isinstance(layer, RoutedExperts):
            raise SourceError(f"vLLM does not hold the experts of `{prefix}` beside factors", hint=shards.DENSE)
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        # vLLM looks for norms that were not loaded only where nothing is quantized, and nothing is
        get_current_vllm_config().model_config.quantization = None  # type: ignore[assignment]
        path, dot, last = (prefix or self._name_of(layer)).rpartition(".")
        names = [path + dot + name for name in self.packed_modules_mapping.get(last, [last])]
        found = shards.shards(names, self.modules)
        self.placed.update(names)
        if any(shard.rank for shard in found):
            return FactoredMethod(self, found)
        return DenseLinear(names) if isinstance(layer, LinearBase) else DenseEmbedding(names)

    def _name_of(self, layer: nn.Module) -> str:
        """Return the name of a layer that does not know it, as the embedding of Llama."""
        if isinstance(layer, ParallelLMHead):
            return "lm_head"
        return next((name for name, edit in self.modules.items() if edit["form"] == "embedding"), "embed_tokens")

    def refuse_unplaced(self) -> None:
        """Refuse factors that no layer took (SourceError), once all layers are built, if all are here."""
        lost = sorted(self.modules.keys() - self.placed)
        if lost and get_pp_group().world_size == 1:
            raise SourceError(f"vLLM has no linear for the factors of {named(lost, 4)}", hint=shards.DENSE)


def _refuse_missing(tensors: Sequence[str]) -> None:
    if tensors:
        what = f"the weights lack {named(sorted(tensors), 4)}, which vLLM needs"
        raise WeightError(what, hint="the download is not whole, or the folder is damaged: fetch it again")


def _pieces(layer: Any, kind: str, shard: Any) -> tuple[int, int]:
    """Return the dimension in which a tensor is cut over several devices, and the number of pieces."""
    if isinstance(layer, RowParallelLinear) and kind in ("down", "weight"):
        return 1, layer.tp_size
    if isinstance(layer, ColumnParallelLinear) and kind != "down":
        return 0, layer.tp_size // (layer.num_kv_head_replicas if shard in ("k", "v") else 1)
    return 0, 1


class FactoredMethod(LinearMethodBase):
    """Holds the modules of one layer as factors, of which at least one has some: ``layer.down``, ``layer.up``.

    What the files call ``NAME.up.bias`` is loaded into the bias of the layer.
    """

    def __init__(self, config: FactorsConfig, found: Sequence[Shard]) -> None:
        self.config, self.shards = config, found

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Give the layer empty tensors that load themselves."""
        outs = list(output_partition_sizes)
        if len(outs) != len(self.shards):
            what = f"vLLM cuts `{self.shards[0].name}` into {len(outs)} parts, which its factors do not have"
            raise SourceError(what, hint=shards.DENSE)
        self.spans = shards.spans(self.shards, outs)
        self.missing = shards.held(self.shards, bias=getattr(layer, "has_bias", False))

        def empty(kind: str, *width: int) -> nn.Parameter:
            size = max(first + length for first, length in self.spans[kind]) if kind in self.spans else 0
            made = nn.Parameter(torch.zeros(size, *width, dtype=params_dtype), requires_grad=False)
            made.weight_loader = partial(self.load, layer, kind)  # type: ignore[attr-defined]
            return made

        layer.down, layer.up = nn.Module(), nn.Module()
        layer.down.weight = empty("down", input_size_per_partition)
        layer.up.weight = empty("up")
        if not all(shard.rank for shard in self.shards):
            layer.weight = empty("weight", input_size_per_partition)
        if getattr(layer, "has_bias", False):
            layer.weight_loader = partial(self.load, layer, "bias")  # vLLM makes the bias next, and gives it this
            layer.up.bias = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            layer.up.bias.weight_loader = layer.weight_loader

    def part(self, layer: Any, kind: str, place: int) -> Tensor:
        """Return where a shard lies in the tensor of a kind."""
        tensor = getattr(layer, kind).weight if kind in ("down", "up") else getattr(layer, kind)
        part = tensor.narrow(0, *self.spans[kind][place])
        return part.view(-1, self.shards[place].rank) if kind == "up" else part

    def load(self, layer: Any, kind: str, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        """Take what the files hold of a shard, or what this device needs of it (WeightError: it has another shape)."""
        place = 0 if shard is None else PLACES.get(shard, shard)
        to, own = self.part(layer, kind, place).data, loaded
        if isinstance(layer, VocabParallelEmbedding) and kind != "down":
            at, whole = layer.shard_indices, layer.org_vocab_size
            first, length, dim = at.org_vocab_start_index, at.num_org_elements, 0
            to = to[:length]  # what follows fills up, and stays 0
        else:
            dim, pieces = _pieces(layer, kind, shard)
            length = to.shape[dim]
            first, whole = layer.tp_rank * pieces // layer.tp_size * length, length * pieces
        if loaded.shape[dim] == whole:
            own = loaded.narrow(dim, first, length)
        if own.shape != to.shape or loaded.shape[dim] != whole:
            name = f"{self.shards[place].name}.{kind}"
            what = f"`{name}` has the shape {list(loaded.shape)} in the files, which is not what config.json says"
            raise WeightError(what, hint="they belong to another model: fetch the folder again, as a whole")
        to.copy_(own)
        self.missing.discard((kind, place))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Refuse a layer that was not given all its tensors (WeightError)."""
        _refuse_missing([f"{self.shards[place].name}.{kind}" for kind, place in self.missing])
        self.config.refuse_unplaced()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (..., in) to (..., outs of all shards)."""
        low = F.linear(x, layer.down.weight)  # of all shards at once
        outs = []
        for place, shard in enumerate(self.shards):
            read = low.narrow(-1, *self.spans["down"][place]) if shard.rank else x
            outs.append(F.linear(read, self.part(layer, "up" if shard.rank else "weight", place)))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out if bias is None else out + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Map ids (...) to (..., width)."""
        return F.embedding(input_, self.part(layer, "up", 0)) @ layer.down.weight

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Give a head the factors of the embedding if ``config.json`` says that they are its own too."""
        if self.shards[0].name in self.config.tied:
            layer.down, layer.up = embed_tokens.down, embed_tokens.up
            self.missing.clear()
        return layer


class _Watched:
    """Holds the modules of a dense layer as vLLM does, and refuses it if it was not given all its tensors."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.missing: set[str] = set()

    def create_weights(self, layer: Any, *sizes: Any, weight_loader: Any, **more: Any) -> None:
        """Let vLLM make the tensors, and note what of them it loads."""
        kinds = ("weight", "bias") if getattr(layer, "has_bias", False) else ("weight",)
        self.missing = {f"{name}.{kind}" for name in self.names for kind in kinds}

        def load(parameter: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
            weight_loader(parameter, loaded, *shard)
            kind = "bias" if parameter is getattr(layer, "bias", None) else "weight"
            self.missing -= {f"{name}.{kind}" for name in self._of(*shard)}

        super().create_weights(layer, *sizes, weight_loader=load, **more)  # type: ignore[misc]
        layer.weight_loader = load  # vLLM makes the bias next, and gives it this

    def _of(self, shard: Any = None) -> Sequence[str]:
        """Return the names of what vLLM calls a shard: one, several, or all where it says none that is known."""
        places = shard if isinstance(shard, tuple) else (PLACES.get(shard, shard),)
        return [name for place, name in enumerate(self.names) if place in places] or self.names

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Refuse it, or go on as vLLM does."""
        _refuse_missing(list(self.missing))
        super().process_weights_after_loading(layer)  # type: ignore[misc]


class DenseLinear(_Watched, UnquantizedLinearMethod):
    """A linear without factors."""


class DenseEmbedding(_Watched, UnquantizedEmbeddingMethod):
    """An embedding, or a head, without factors."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Give a head the weight of the embedding, unless that is factored: then the files hold one for the head."""
        if isinstance(embed_tokens.quant_method, FactoredMethod):
            return layer
        self.missing.clear()
        return super().tie_weights(layer, embed_tokens)
