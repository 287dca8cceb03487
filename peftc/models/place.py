"""Where and in what precision a network computes."""

import copy
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftc import processes
from peftc.errors import SourceError, UsageError
from peftc.models import streaming
from peftc.models.model import Batch, Model, detached
from peftc.models.streaming import STREAM
from peftc.nn import surgery

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}


def device_of(device: str) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` (UsageError, SourceError: it is none)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        why = "it is `auto`, `cpu`, `cuda`, `cuda:N` or `mps`"
        raise UsageError(f"unknown value `{device}` for `--device`", why=why)
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None and processes.size() > 1 and torch.cuda.is_available():
        chosen = torch.device("cuda", processes.place() % torch.cuda.device_count())
    on_cuda = torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()
    there = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": on_cuda}
    if not there[chosen.type]:
        raise SourceError(f"there is no `{device}` on this machine", hint="run on `--device auto`")
    return chosen


def solver_device(device: torch.device) -> torch.device:
    """Return where to factor: the device itself, or the CPU for one without float64."""
    return torch.device("cpu") if device.type == "mps" else device


def runnable(model: Model, *, device: str = "auto", dtype: str = "auto") -> Model:
    """Move the network to a device in one floating dtype, and return the same model.

    ``auto`` keeps the stored dtype, except where stored dtypes are mixed, or are half precision on a CPU: then float32.
    """
    place = device_of(device)
    if dtype == "auto":
        wanted = usual_dtype(model, place)
    elif dtype in DTYPES:
        wanted = DTYPES[dtype]
    else:
        raise UsageError(f"unknown value `{dtype}` for `--dtype`", why=f"it is `auto` or one of {', '.join(DTYPES)}")
    if _is_streamed(model, place, wanted):
        streaming.install(model.module, place, wanted)
    else:
        model.module.to(place, wanted)
    return model


def usual_dtype(model: Model, place: torch.device) -> torch.dtype:
    """Return the floating dtype in which a network runs on a device unless another is asked for."""
    stored = surgery.uniform_dtype(model.module)
    half_on_cpu = place.type == "cpu" and stored in (torch.float16, torch.bfloat16)
    return torch.float32 if stored is None or half_on_cpu else stored


def _is_streamed(model: Model, place: torch.device, wanted: torch.dtype) -> bool:
    """Return whether a copy of all weights, in another dtype or on a device, is more than the memory is for."""
    if model.max_memory is None:
        return False
    floating = [each for each in surgery.tensors_of(model.module).values() if each.is_floating_point()]
    if place.type == "cpu":  # what is as it is stored stays mapped
        return any(each.dtype != wanted for each in floating)
    return sum(each.numel() for each in floating) * wanted.itemsize > model.max_memory // 2


def place_of(module: nn.Module) -> torch.device:
    """Return the device on which a network computes: of its first parameter; the CPU where it has none."""
    if stream := module.__dict__.get(STREAM):
        return stream.device  # type: ignore[no-any-return]
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a network computes: of its first floating parameter; float32 where it has none."""
    if stream := module.__dict__.get(STREAM):
        return stream.dtype  # type: ignore[no-any-return]
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)


def moved(model: Model, inputs: Batch) -> Batch:
    """Return inputs on the model's device, floating ones in its dtype; a GPU copies what is pinned as it computes."""
    device, floating = place_of(model.module), dtype_of(model.module)
    beside = device.type == "cuda"

    def move(tensor: Tensor) -> Tensor:
        dtype = floating if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, dtype, non_blocking=beside)

    return {name: move(tensor) for name, tensor in inputs.items()} if isinstance(inputs, dict) else move(inputs)


HALF = (torch.float16, torch.bfloat16)


def one_dtype(model: Model) -> Model:
    """Return a model that can run: itself, or a float32 copy where stored dtypes are mixed.

    Where memory is limited only the module that runs is copied; half precision too, as torch keeps what it prepares to
    multiply by it for every shape, and factors come in many.
    """
    stored, place = surgery.uniform_dtype(model.module), place_of(model.module).type
    limited = model.max_memory is not None and place != "meta"
    if stored is not None and not (limited and place == "cpu" and stored in HALF):
        return model
    if limited:
        return runnable(replace(model, module=detached(model.module)), device="cpu")
    return replace(model, module=copy.deepcopy(model.module).float())
