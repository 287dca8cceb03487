"""What every family of data hands on: samples by index, their labels, and a digest of what was used."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from peftc.data.remembered import Identity, digest, refuse_change
from peftc.errors import DataError, UsageError
from peftc.store.commands import is_given

SPLIT_WORDS = {
    "test": ("test", "testing", "t10k"),
    "validation": ("validation", "val", "valid", "dev"),
    "train": ("train", "training"),
}
SPLITS = {word for known in SPLIT_WORDS.values() for word in known}
SKETCH, HASH = 128, 10  # hashes in a sketch, and digits in each


@dataclass(frozen=True)
class Each(Sequence[Any]):
    """A sequence whose items are made each time they are asked for."""

    size: int
    make: Callable[[int], Any]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.make(each) for each in range(self.size)[at]]
        return self.make(range(self.size)[at])


@dataclass(frozen=True)
class Pairs:
    """The caption of each row, and the first row with the same image, known before any image is read."""

    captions: Sequence[str]
    images: Sequence[int]


@dataclass(frozen=True)
class Stream:
    """How to read on where a data set is the head of one that is read as it comes.

    Attributes:
        key: tells what it is of.
        blocks: (rows of a block, rows at the start to leave out, where to begin or None) -> each block, and before it
            where it begins.
        is_whole: the head is all of it.
    """

    key: str
    blocks: Callable[[int, int, str | None], Iterator[tuple[str | None, Dataset]]]
    is_whole: bool


@dataclass
class Dataset:
    """Labelled or unlabelled samples; ``dataset[i]`` is (input, label or None), read when asked for.

    Attributes:
        kind: ``image`` (PIL image or array), ``text`` (str), ``pairs`` (two str), ``image-text`` (PIL image and str)
            or ``tensor`` (fed as it is).
        name: the spec without its split.
        split: the split in use, by its own name.
        read: gives the input of a row.
        content: gives the bytes that identify the input of a row.
        labels: per row, an index into ``classes``, or a score where ``classes`` is None; None where unlabelled.
        classes: names of class folders or label values, in sorted order, over all splits.
        rows: which rows are used.
        pairs: captions and images by row, where the kind is ``image-text``.
        notes: what people should know about how it was read.
        is_named: ``content`` begins with the name of a file, and a zero byte.
        has_lines: its one text is a file, whose lines are what rows are elsewhere.
        identity: tells without reading them whether all rows are what they were; None where they are read anyway.
        pieces: gives a text too large for memory piece by piece, each but the last ended by a new line.
        stream: what it is the head of.
    """

    kind: str
    name: str
    split: str
    read: Callable[[int], Any]
    content: Callable[[int], bytes]
    rows: Sequence[int]
    labels: Sequence[int] | Sequence[float] | None = None
    classes: list[str] | None = None
    pairs: Pairs | None = None
    notes: list[str] = field(default_factory=list)
    is_named: bool = False
    has_lines: bool = False
    identity: Callable[[], Identity | None] | None = None
    pieces: Callable[[], Iterator[str]] | None = None
    stream: Stream | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int | float | None]:
        row = self.rows[index]
        return self.read(row), None if self.labels is None else self.labels[row]

    def inputs(self) -> Each:
        """Return the inputs alone, each read when it is asked for."""
        return Each(len(self), lambda index: self.read(self.rows[index]))

    def halves(self) -> Each:
        """Return the two texts of each pair, one after the other."""
        return Each(2 * len(self), lambda index: self.read(self.rows[index // 2])[index % 2])

    @property
    def digest(self) -> str:
        """The sha256 over content and label of every sample used, in order."""
        return self._digests[0]

    @property
    def sketch(self) -> str:
        """The least hashes of the inputs used, in hexadecimal: sets that share many inputs share many of these.

        A bottom-k sketch (Cohen and Kaplan, 2007): of two large sets it estimates what they share, of small ones it
        holds all.
        """
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, str]:
        if self.identity is None:
            return self._read_digests()
        rows = self.rows if isinstance(self.rows, range) else array("q", self.rows).tobytes()
        labels = None if self.labels is None else array("q" if self.classes else "d", self.labels).tobytes()
        parts = ["digests", self.kind, rows, labels, self.classes, self.is_named]
        one, other = digest(self.begun, self.identity, parts, self._read_digests)
        return one, other

    @cached_property
    def begun(self) -> Identity | None:
        """What its identity was before anything was read of it."""
        return self.identity() if self.identity else None

    def refuse_change(self) -> None:
        """Refuse data whose files were written to since they were opened: a `DataError`."""
        if self.identity is not None:
            refuse_change(self.name, self.begun, self.identity)

    def _read_digests(self) -> tuple[str, str]:
        total, least = hashlib.sha256(self.kind.encode()), set[str]()
        for row in self.rows:
            label = None if self.labels is None else self.labels[row]
            name = self.classes[int(label)] if self.classes and label is not None else label
            alone = self._add(total, row)
            total.update(repr(name).encode())
            least.add(alone[:HASH])
            if len(least) > 64 * SKETCH:
                least = set(sorted(least)[:SKETCH])
        return total.hexdigest(), "".join(sorted(least)[:SKETCH])

    def _add(self, total: Any, row: int) -> str:
        """Add the length and the content of a row to a hash; return the digest of the content without its name."""
        if self.pieces is not None:
            alone = hashlib.sha256()
            total.update(b"%d:" % sum(len(piece.encode()) for piece in self.pieces()))
            for piece in self.pieces():
                total.update(piece.encode())
                alone.update(piece.encode())
            return alone.hexdigest()
        content = self.content(row)
        total.update(b"%d:" % len(content) + content)
        return hashlib.sha256(content.partition(b"\0")[2] if self.is_named else content).hexdigest()

    def take(self, number: int | None, *, seed: int) -> Dataset:
        """Keep ``number`` samples, the classes as even as they allow; None or more than there are keeps all."""
        if number is None:
            return self
        if number < 1:
            raise UsageError(f"`--num-samples` is {number}", why="at least one sample is needed")
        if number >= len(self):
            return self
        order = random.Random(seed)
        groups: dict[Any, list[int]] = {}
        for row in order.sample(list(self.rows), len(self)):
            groups.setdefault(self.labels[row] if self.classes and self.labels else None, []).append(row)
        rounds = [(turn, order.random(), row) for group in groups.values() for turn, row in enumerate(group)]
        return replace(self, rows=sorted(row for _, _, row in sorted(rounds)[:number]))


Splits = dict[str, Callable[[], Dataset]]


def split_word(text: str) -> str | None:
    """Return ``train``, ``validation`` or ``test`` where one of their usual words is a part of ``text``."""
    parts = re.split(r"[^a-z0-9]+", text.lower())
    return next((word for word, known in SPLIT_WORDS.items() if any(part in known for part in parts)), None)


PREFERRED = {"evaluation": ("test", "validation"), "calibration": ("train", "validation"), "training": ("train",)}


def choose(name: str, splits: Iterable[str], asked: str | None, role: str = "evaluation") -> tuple[str, str]:
    """Return the split to use, and a sentence that says so: the one asked for, else the role's first, or the only one.

    Which is first stands in `PREFERRED`.
    """
    names = list(splits)
    there = {"why": f"it has {_listed(names)}", "hint": _one(name, names[0]) if names else None}
    if asked is not None:
        for same in (lambda split: split == asked, lambda split: split_word(split) == (split_word(asked) or asked)):
            found = [split for split in names if same(split)]
            if len(found) == 1:
                return found[0], f"data: split `{found[0]}` of `{name}`, as asked"
        raise DataError(f"`{name}` has no split `{asked}`", **there)
    for word in PREFERRED[role]:
        found = [split for split in names if split == word] or [split for split in names if split_word(split) == word]
        if len(found) == 1 and len(names) > 1:
            others = _listed([split for split in names if split != found[0]])
            more = "give that alone to choose it" if is_given(name) else "choose with `@SPLIT`"
            return found[0], f"data: split `{found[0]}` of `{name}` (it also has {others}; {more})"
        if len(found) > 1:
            break
    if len(names) == 1:
        return names[0], f"data: `{names[0]}`, the only split of `{name}`"
    raise DataError(f"`{name}` does not say which split to use", **there)


def _one(name: str, split: str) -> str:
    if is_given(name):
        return f"give one split alone: `data[{split!r}]`"
    return f"name one: `--data {name}@{split}`"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
