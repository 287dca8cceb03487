"""What `modules.json` of sentence-transformers lets follow a network: from vectors of tokens to one of the sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.models.weights import Weights, from_file
from peftc.store import documents
from peftc.store.source import OF_PART, PARTS, part_files

VECTOR = "sentence_embedding"  # what that library calls it


def _at(tokens: Tensor, place: Tensor) -> Tensor:
    """Return of each text (batch, tokens, width) the token at a place (batch,)."""
    return tokens.gather(1, place[:, None, None].expand(-1, 1, tokens.shape[-1])).squeeze(1)


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.int32).argmax(1)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int32).argmax(1)


def _mean(tokens: Tensor, weights: Tensor, root: bool = False) -> Tensor:
    count = weights.sum(1).clamp_min(1e-9)
    return (tokens * weights).sum(1) / (count.sqrt() if root else count)


def _weighted(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean in which the n-th token counts n times."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) - _first(mask)[:, None]
    return _mean(tokens, (mask * places)[..., None].to(tokens.dtype))


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of vectors (batch, tokens, width) and a mask, in this order
    "cls": lambda tokens, mask: _at(tokens, _first(mask)),
    "max": lambda tokens, mask: tokens.masked_fill(mask[..., None] == 0, torch.finfo(tokens.dtype).min).amax(1),
    "mean": lambda tokens, mask: _mean(tokens, mask[..., None].to(tokens.dtype)),
    "mean_sqrt_len_tokens": lambda tokens, mask: _mean(tokens, mask[..., None].to(tokens.dtype), root=True),
    "weightedmean": _weighted,
    "lasttoken": lambda tokens, mask: _at(tokens, _last(mask)),
}
OLD = {  # how configs before version 6 of the library say so
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = "Identity Tanh ReLU GELU SiLU Sigmoid".split()


class Ends(nn.Module):
    """Vectors of tokens and their mask to vectors of sentences."""

    def __init__(self, modes: list[str], rest: nn.Sequential) -> None:
        super().__init__()
        self.modes, self.rest = modes, rest

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map (batch, tokens, width) and (batch, tokens) to (batch, width)."""
        return self.rest(torch.cat([MODES[mode](tokens, mask) for mode in self.modes], -1))  # type: ignore[no-any-return]


class Normalised(nn.Module):
    """Vectors at the length of one."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Map (batch, width) to the same."""
        return F.normalize(vectors, dim=-1)


def of_folder(folder: Path | None) -> Ends | None:
    """Return what follows the network of a folder; None where nothing does.

    Raises:
        ValueError: something does, and is not understood.
    """
    if folder is None or not (folder / PARTS).is_file():
        return None
    parts, files = documents.read_json(folder / PARTS), part_files(folder)
    if why := documents.misfit(parts, [{"type": str, "path": str}]):
        raise ValueError(why)
    modes: list[str] = []
    rest: list[nn.Module] = []
    for place, part in enumerate(parts):
        kind, name = part["type"].rpartition(".")[2], part["path"]
        config = documents.read_json(files[f"{name}/config.json"]) if f"{name}/config.json" in files else {}
        if why := documents.misfit(config, dict):
            raise ValueError(why)
        if kind == "Transformer" and place == 0 and name in ("", "."):
            continue
        if kind == "Pooling" and not modes:
            modes = _modes(config)
        elif kind == "Dense" and modes:
            weights = (files.get(f"{name}/{each}") for each in OF_PART[1:])
            rest.append(_dense(config, next((file for file in weights if file), None)))
        elif kind == "Normalize" and modes and not config.keys() & WAYS.keys():
            rest.append(Normalised())
        else:
            raise ValueError(f"`{kind}` is none of the parts that are known here")
    if not modes:
        raise ValueError("nothing pools")
    return Ends(modes, nn.Sequential(*rest)).eval()


def _modes(config: dict[str, Any]) -> list[str]:
    """Return how a pooling makes one vector of many (ValueError: otherwise than is known here)."""
    named = config.get("pooling_mode") or [mode for word, mode in OLD.items() if config.get(word)] or "mean"
    modes = [named] if isinstance(named, str) else named
    if documents.misfit(modes, [str]) or any(mode not in MODES for mode in modes):
        raise ValueError(f"it pools by {named}")
    if not config.get("include_prompt", True):
        raise ValueError("it pools without the prompt, which a graph does not tell from the text")
    return list(modes)


WAYS = {"module_input_name": VECTOR, "module_output_name": VECTOR, "use_residual": False}  # as a layer usually goes


def _dense(config: dict[str, Any], weights: Path | None) -> nn.Module:
    """Return a linear layer and its activation (ValueError: it is none)."""
    name = str(config.get("activation_function", "torch.nn.Tanh"))
    activation = name.rpartition(".")[2]
    stored = from_file(weights) if weights else Weights("nothing")
    tensors = {each: stored.read(each) for each in stored.names()}
    usual = all(config.get(word) in (None, value) for word, value in WAYS.items())
    if not usual or not name.startswith("torch.nn.") or activation not in ACTIVATIONS or "linear.weight" not in tensors:
        raise ValueError("its dense layer is of a kind of its own")
    matrix, bias = tensors.pop("linear.weight"), tensors.pop("linear.bias", None)
    if tensors or matrix.ndim != 2:
        raise ValueError("its dense layer has other weights than those of one layer")
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
    linear.load_state_dict({"weight": matrix.float()} | ({} if bias is None else {"bias": bias.float()}), assign=True)
    return nn.Sequential(linear, getattr(nn, activation)())
