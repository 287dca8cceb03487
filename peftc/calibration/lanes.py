"""Sums of parts of a calibration set: kept as files, and added in one order, one tensor in memory at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.calibration.statistics import Site, Sums
from peftc.calibration.sums import Running, Triangle
from peftc.models.weights import piece, read_note, read_tensor, save_part
from peftc.plans.plan import Target
from peftc.store.artifact import Piece
from peftc.store.header import read_header

ROWS = 256  # of a weight that are turned into float64 at once
LANES = 4  # parts of the calibration set that are summed apart, so that a resume and other processes add in one order


def save(path: Path, sums: Sums) -> None:
    """Keep the sums of one lane: scatters, summed in float64, as float32, which is all that is kept of their sum."""
    tensors: dict[str, Tensor | Piece] = {
        f"total:{name}": value.entries if isinstance(value, Triangle) else value for name, value in sums.totals.items()
    }
    for name, seen in sums.running.items():
        tensors[f"mean:{name}"] = seen.mean
        if seen.scatter is not None:
            tensors[f"scatter:{name}"] = _later("F32", tuple(seen.scatter.entries.shape), seen.scatter.entries.float)
    sizes = {name: value.size for name, value in sums.totals.items() if isinstance(value, Triangle)}
    counts = {name: seen.count for name, seen in sums.running.items()}
    save_part(path, tensors, {"samples": sums.samples, "counts": counts, "sizes": sizes})


class Lanes:
    """The lanes of one pass, added on a device in the order of their paths."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        self.device = device
        self.files = [read_header(path)[0] for path in paths]  # read, not mapped: what is mapped counts as taken
        self.notes: list[dict[str, Any]] = [read_note(path) or {} for path in paths]
        self.samples = [int(note["samples"]) for note in self.notes]
        self.keys = {key for file in self.files for key in file}
        self.sizes: dict[str, int] = {name: size for note in self.notes for name, size in note["sizes"].items()}

    def count(self, name: str) -> int:
        """Return how many rows were seen."""
        return sum(note["counts"].get(name, 0) for note in self.notes)

    def running(self, name: str, *, scatter: bool) -> Running:
        """Return a running sum over all lanes."""
        found: Running | None = None
        for file, note in zip(self.files, self.notes, strict=True):
            if name not in note["counts"]:
                continue
            mean = read_tensor(file[f"mean:{name}"]).to(self.device)
            kept = None
            if scatter:
                kept = Triangle(len(mean), read_tensor(file[f"scatter:{name}"]).to(self.device, torch.float64))
            one = Running(len(mean), kept, mean, note["counts"][name])
            if found is None:
                found = one
            else:
                found.merge(one)
        assert found is not None
        return found

    def covariance(self, name: str) -> Tensor:
        """Return the covariance (d, d) over all lanes, float32."""
        return self.running(name, scatter=True).covariance().float()

    def average(self, name: str, number: int) -> Tensor:
        """Return a plain sum over all lanes, divided by a number."""
        key = f"total:{name}"
        parts = (read_tensor(file[key]).to(self.device) for file in self.files if key in file)
        total = functools.reduce(Tensor.add_, parts).div_(number)
        return Triangle(self.sizes[name], total).whole() if name in self.sizes else total

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor that the lanes hold, where it is a half of a matrix that of the whole."""
        name = key.removeprefix("total:")
        return (
            (self.sizes[name],) * 2
            if name in self.sizes
            else next(file[key].shape for file in self.files if key in file)
        )


def stored(lanes: Lanes, sites: Mapping[str, Site], weight_of: Callable[[Target], Tensor]) -> dict[str, Piece]:
    """Return the statistics of some sites by name, each computed when it is written; float32 but for the means.

    ``weight_of`` gives the weight of a target as a matrix, to take the bias out of the mean of its outputs.
    """
    names = sorted({name for note in lanes.notes for name in note["counts"]})
    means = {name: lanes.running(name, scatter=False).mean for name in names}
    found = {f"{name}.mean": piece(mean) for name, mean in means.items()}
    for name in means:
        if f"scatter:{name}" in lanes.keys:
            compute = functools.partial(lanes.covariance, name)
            found[f"{name}.covariance"] = _later("F32", (len(means[name]),) * 2, compute)
    samples = max(sum(lanes.samples), 1)
    for site in sites.values():
        name = site.target.name
        if f"{name}.output" in means and f"{site.leader}.input" in means:
            weight = weight_of(site.target)
            mean = means[f"{site.leader}.input"].to(weight.device)
            rows = [block.double() @ mean for block in weight.split(ROWS)]
            found[f"{name}.output.mean"] = piece(torch.cat(rows))
        for kind, by, number in (
            ("gradient", name, samples),
            ("fisher", name, samples),
            ("magnitude", site.leader, max(lanes.count(f"{site.leader}.input"), 1)),
        ):
            key = f"{by}.{kind}"
            if f"total:{key}" in lanes.keys:
                compute = functools.partial(lanes.average, key, number)
                found[key] = _later("F64", lanes.shape(f"total:{key}"), compute)
    return found


def _later(dtype: str, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Piece:
    """Return a tensor that is computed when it is written."""

    def blocks() -> Iterator[Any]:
        yield from piece(compute()).blocks()

    return Piece(dtype, shape, blocks)
