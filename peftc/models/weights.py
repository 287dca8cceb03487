"""Weight files: which tensors they hold, and each tensor mapped from the file without a copy; parts of a job."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.errors import SourceError, WeightError
from peftc.models.model import Model
from peftc.nn import surgery
from peftc.store import artifact, documents, pointers
from peftc.store.artifact import Piece
from peftc.store.header import TensorInfo, encode_header, read_header
from peftc.store.source import read_json

PICKLES = (".pth", ".pt", ".th", ".bin", ".ckpt")
NESTS = ("state_dict", "model_state_dict", "model", "module", "net")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass
class Weights:
    """The tensors of a model by name."""

    where: str  # what to call them in messages
    files: list[Path] = field(default_factory=list)  # the weight files, for digests and sizes
    infos: dict[str, TensorInfo] = field(default_factory=dict)  # name -> byte range, for tensors in safetensors files
    loaded: dict[str, Tensor] = field(default_factory=dict)  # those out of a pickle or in memory
    made: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # those that are computed when they are read
    _open: dict[Path, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [*self.infos, *self.loaded, *self.made]

    def read(self, name: str) -> Tensor:
        """Return a tensor; one from a safetensors file is mapped and takes no memory until it is read."""
        if name in self.loaded:
            return self.loaded[name]
        if name in self.made:
            return self.made[name]()
        path = self.infos[name].path
        if path not in self._open:
            from safetensors import safe_open

            self._open[path] = safe_open(path, "pt")
        return self._open[path].get_tensor(name)


def from_infos(where: str, infos: Mapping[str, TensorInfo]) -> Weights:
    """Return the weights behind a table of byte ranges."""
    return Weights(where, sorted({info.path for info in infos.values()}), dict(infos))


def from_file(path: Path) -> Weights:
    """Return the tensors of a safetensors file or of a pickle of plain tensors (read with ``weights_only``)."""
    if path.suffix == ".safetensors":
        tensors, _ = read_header(path)
        return Weights(str(path), [path], tensors)
    if path.suffix not in PICKLES:
        why = f"it ends neither in `.safetensors` nor in {', '.join(PICKLES)}"
        raise SourceError(f"`{path}` is no weight file", why=why)
    return Weights(str(path), [path], loaded=_unpickle(path))


def _unpickle(path: Path) -> dict[str, Tensor]:
    import pickle

    pointers.refuse(path, WeightError)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for `{found[1]}`" if found else "it is a pickle of objects"
        hint = "peftc runs no pickled code: save the plain `state_dict()` and name that file"
        raise WeightError(f"`{path}` holds more than tensors", why=why, hint=hint) from None
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError) as error:
        why = f"it is no checkpoint of torch, or damaged ({type(error).__name__})"
        raise WeightError(f"cannot read `{path}`", why=why) from None
    for _ in range(4):  # checkpoints nest: {"state_dict": {"module.conv.weight": ...}}
        inner = [value[key] for key in NESTS if isinstance(value, dict) and isinstance(value.get(key), dict)]
        value = inner[0] if inner else value
    sound = isinstance(value, dict) and all(isinstance(t, Tensor) and isinstance(n, str) for n, t in value.items())
    if not sound or not value:
        raise WeightError(f"`{path}` holds no state dict", why="it is not a map from names to tensors")
    while all(name.startswith("module.") for name in value):
        value = {name.removeprefix("module."): tensor for name, tensor in value.items()}
    return value


def from_folder(folder: Path) -> Weights:
    """Return the tensors of a transformers or timm folder, sharded or not; safetensors before pickles."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return from_file(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _from_shards(folder, index)
    why = "it has neither `model.safetensors` nor `pytorch_model.bin`, whole or sharded"
    raise SourceError(f"`{folder}` holds no weights", why=why, hint="name the file with `--weights FILE`")


def _from_shards(folder: Path, index: Path) -> Weights:
    content = read_json(index)
    if why := documents.misfit(content, {"weight_map": {str: str}, "metadata?": dict}):
        raise SourceError(f"cannot read `{index}`", why=why)
    where = content["weight_map"]
    weights = Weights(str(folder))
    for name in sorted(set(where.values())):
        if "/" in name or "\\" in name or "\0" in name or not (folder / name).is_file():
            raise SourceError(f"`{folder}` lacks the shard `{name}`", why=f"`{index.name}` lists it")
        shard = from_file(folder / name)
        lost = next((each for each in shard.names() if where.get(each, name) != name), None)
        if lost is not None:
            raise SourceError(f"`{index}` looks for `{lost}` in `{where[lost]}`", why=f"it lies in `{name}`")
        weights.files += shard.files
        weights.infos.update(shard.infos)
        weights.loaded.update(shard.loaded)
    if "metadata" not in content:
        raise SourceError(f"cannot read `{index}`", why="it has no `metadata`, without which transformers reads it not")
    lacking = sorted(where.keys() - set(weights.names()))
    if lacking:
        raise SourceError(f"the shards of `{folder}` lack `{lacking[0]}`", why=f"`{index.name}` lists it")
    return weights


def piece(tensor: Tensor) -> Piece:
    """Return a tensor in memory as a piece of a file."""
    if tensor.dtype not in DTYPE_NAMES:
        raise WeightError(f"peftc cannot store tensors of dtype {tensor.dtype}")

    def blocks() -> Iterator[Any]:
        flat = tensor.detach().cpu().contiguous().flatten()
        for block in flat.split(1 << 20):
            yield memoryview(block.view(torch.uint8).numpy())

    return Piece(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), blocks)


def pieces_of(model: Model) -> dict[str, Piece]:
    """Return every stored tensor of a model: byte ranges of its files where there are such, memory otherwise."""
    state = surgery.tensors_of(model.module)
    return {
        name: artifact.from_file(model.infos[name]) if name in model.infos else piece(state[name])
        for name in surgery.stored_names(model.module)
    }


def save_part(path: Path, tensors: Mapping[str, Tensor | Piece], note: Mapping[str, Any]) -> None:
    """Write one finished part of a job, with a JSON note, so that it is there whole or not at all."""
    pieces = {name: each if isinstance(each, Piece) else piece(each) for name, each in sorted(tensors.items())}
    entries = {name: (part.dtype, part.shape) for name, part in pieces.items()}
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        file.write(encode_header(entries, {"note": json.dumps(note)}))
        for part in pieces.values():
            for block in part.blocks():
                file.write(block)
    unfinished.replace(path)


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor of a finished part, in memory of its own."""
    buffer = bytearray(b"".join(artifact.from_file(info).blocks()))
    dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == info.dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(info.shape)


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the note of a finished part, or None where there is none."""
    if not path.is_file():
        return None
    return dict(json.loads(read_header(path)[1]["note"]))
