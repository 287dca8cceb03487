"""What a training keeps in its folder: the checkpoint from which it goes on, its log, and its number of steps."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftc import processes
from peftc.store import documents

CHECKPOINT, LOG, STEPS = "checkpoint.pt", "log.jsonl", "steps.json"


@dataclass(frozen=True)
class Journal:
    """Of one training; the first process writes it, and nothing is kept where there is no folder."""

    folder: Path | None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return self.folder is not None and (self.folder / CHECKPOINT).is_file()

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, whole or not at all."""
        if self.folder is not None and processes.rank() == 0:
            with documents.replacing(self.folder / CHECKPOINT) as unfinished:
                torch.save(state, unfinished)

    def saved(self, device: torch.device) -> dict[str, Any] | None:
        """Return the last checkpoint that the first process sees; None where there is none."""
        if self.folder is None or not processes.agreed(lambda: self.has_checkpoint):
            return None
        place = torch.device("cpu") if device.type == "cpu" else device  # Accelerate numbers CPUs, torch does not
        return dict(torch.load(self.folder / CHECKPOINT, map_location=place, weights_only=True))

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
