"""Long columns of numbers on disk: Arrow files in the cache of the `datasets` library, mapped into memory.

A file is there whole or not at all, and made once, however many processes ask. Where the cache cannot be written, or
where nothing tells whether what it is made of is still the same, it lies in a file without a name until the end.
"""

import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.errors import DataError, reason_of
from peftc.store import cache

FILE, ABOUT = "data.arrow", "about.json"
Blocks = Callable[[], Iterator[Any]]  # gives record batches, all of one schema


def home() -> Path:
    """Return peftc's own folder in the cache of the `datasets` library."""
    from huggingface_hub import constants

    own = os.environ.get("HF_DATASETS_CACHE")
    return (Path(own).expanduser() if own else Path(constants.HF_HOME) / "datasets") / "peftc"


def table(fingerprint: str | None, schema: Callable[[], Any], blocks: Blocks) -> Any:
    """Return a table of pyarrow that is mapped into memory, made of ``blocks`` where it is not there yet.

    Args:
        fingerprint: of all that it depends on; None where that is not known, so that it cannot be kept.
        schema: gives that of the blocks.
        blocks: gives its parts.
    """
    make = partial(_write, schema, blocks)
    if fingerprint is not None:
        place = home() / fingerprint / "table"
        for _ in range(2):  # a damaged one is made anew
            with suppress(OSError, RuntimeError):
                cache.folder(str(place), make)
                if (found := _read(place)) is not None:
                    return found
                shutil.rmtree(place, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix="peftc-") as folder:
            make(Path(folder))
            return _read(Path(folder))  # whose file goes with the last who maps it
    except OSError as error:
        hint = "point the variable HF_DATASETS_CACHE at a folder with room on its disk"
        what = "cannot keep a large data set on disk"
        raise DataError(what, why=f"neither in `{home()}` nor for a while: {reason_of(error)}", hint=hint) from None


def _write(schema: Callable[[], Any], blocks: Blocks, folder: Path) -> None:
    import pyarrow

    count = 0
    with pyarrow.OSFile(str(folder / FILE), "wb") as file, pyarrow.ipc.new_stream(file, schema()) as writer:
        for block in blocks():
            writer.write_batch(block)
            count += len(block)
    (folder / ABOUT).write_text(json.dumps({"rows": count, "bytes": (folder / FILE).stat().st_size}))


def _read(folder: Path) -> Any:
    """Return the table in a folder; None where it is damaged."""
    import pyarrow

    try:
        about = json.loads((folder / ABOUT).read_text())
        found = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / FILE))).read_all()
        whole = {"rows": len(found), "bytes": (folder / FILE).stat().st_size} == about
    except (OSError, ValueError, pyarrow.ArrowException):
        return None
    return found if whole else None


@dataclass(frozen=True)
class Flat:
    """Numbers in a row, as one or in parts; ``name`` tells what they are, where they are kept."""

    parts: Sequence[np.ndarray]
    name: str | None = None

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers from one place to another, which are there."""
        at = bisect_right(self._ends, start)
        found, length = list[np.ndarray](), stop - start
        while length:
            begin = len(self.parts[at]) - (self._ends[at] - start)
            found.append(self.parts[at][begin : begin + length])
            start, length, at = start + len(found[-1]), length - len(found[-1]), at + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def windows(self, starts: Sequence[int], length: int) -> Tensor:
        """Return (starts, length): the numbers from each start on, which are there."""
        rows = np.empty((len(starts), length), self.parts[0].dtype)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self.between(start, start + length)
        return torch.from_numpy(rows)


def flat(fingerprint: str | None, kind: str, blocks: Callable[[], Iterator[np.ndarray]]) -> Flat:
    """Return numbers of a ``kind``, as ``int32``, that are kept as `table` does."""
    import pyarrow

    schema = pyarrow.schema([("numbers", getattr(pyarrow, kind)())])
    found = table(
        fingerprint, lambda: schema, lambda: (pyarrow.record_batch([block], schema=schema) for block in blocks())
    )
    return Flat([chunk.to_numpy() for chunk in found["numbers"].chunks], fingerprint)
