"""Parts of a job that are there whole or not at all, each with a note."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.models.weights import piece
from peftc.store.artifact import Piece
from peftc.store.header import encode_header, read_header


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


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the note of a finished part, or None where there is none."""
    if not path.is_file():
        return None
    return dict(json.loads(read_header(path)[1]["note"]))
