"""What a training keeps in its folder: the checkpoint from which it goes on, its log, and its number of steps."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftc import processes
from peftc.errors import UsageError
from peftc.store import documents
from peftc.training import pieces

CHECKPOINT, LOG, STEPS = "checkpoint.pt", "log.jsonl", "steps.json"


@dataclass(frozen=True)
class Journal:
    """Of one training; the first process writes it, and nothing is kept where there is no folder."""

    folder: Path | None

    @property
    def last(self) -> Path | None:
        """The checkpoint to go on from: a file, or a folder of pieces."""
        if self.folder is None:
            return None
        found = [path for path in (self.folder / CHECKPOINT, pieces.newest(self.folder)) if path and path.exists()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def save(self, state: Mapping[str, Any], *, in_pieces: bool) -> None:
        """Write a checkpoint, whole or not at all; one in pieces is written by all processes at once."""
        if self.folder is None:
            return
        if in_pieces:
            pieces.save(self.folder, state)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        elif processes.rank() == 0:
            with documents.replacing(self.folder / CHECKPOINT) as unfinished:
                torch.save(state, unfinished)
            pieces.drop(self.folder)

    def saved(self, device: torch.device, like: pieces.Like, *, in_pieces: bool) -> dict[str, Any] | None:
        """Return the last checkpoint that the first process sees; None where there is none.

        Args:
            device: for its tensors.
            like: what tensors look like here, where they are read from pieces.
            in_pieces: this training is in pieces.

        Raises:
            UsageError: it is, and the checkpoint is of whole weights.
        """
        last = processes.agreed(lambda: self.last)
        if last is None:
            return None
        if last.name != CHECKPOINT:
            return pieces.read(last, like)
        if in_pieces:
            hint = "go on without `--shard`, or begin again: `--overwrite`"
            raise UsageError(f"`{last}` is a checkpoint of whole weights, and `--shard` cuts them", hint=hint)
        place = torch.device("cpu") if device.type == "cpu" else device  # Accelerate numbers CPUs, torch does not
        return dict(torch.load(last, map_location=place, weights_only=True))

    def steps(self, find: Callable[[], int]) -> int:
        """Return a number of steps that was found before, or is found now, by all processes at once, and kept."""
        path = None if self.folder is None else self.folder / STEPS
        known = processes.agreed(lambda: json.loads(path.read_text()) if path is not None and path.is_file() else None)
        if known is not None:
            return int(known)
        found = find()
        if path is not None and processes.rank() == 0:
            documents.write_whole(path, json.dumps(found))
        return processes.agreed(lambda: found)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        if self.folder is not None and processes.rank() == 0:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def cut(self, step: int, *, judged: bool) -> None:
        """Drop what the log says of what came after a step, and of that step where it was not looked at: made again."""
        if self.folder is None or processes.rank() or not (self.folder / LOG).is_file():
            return
        last = {"loss", "score"} if judged else {"loss"}
        kept = []
        for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                of: Any = json.loads(line)
            except ValueError:  # a machine that went down left something else
                continue
            at = of.get("step") if isinstance(of, dict) and line.endswith("\n") else None
            if at is not None and (at < step or (at == step and last & of.keys())):
                kept.append(line)
        documents.write_whole(self.folder / LOG, "".join(kept))
