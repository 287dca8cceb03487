"""Seeded mutations of the files that peftc reads (JSON, safetensors, TOML, bytes of anything), and their judge."""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from peftc.errors import PeftcError

HANG = 60  # seconds that one case may take: only a hang does
MOST_MEMORY = 2 * 1024**3
REFUSED, SAME, AS_OTHERS, AS_WRITTEN = "refused", "the same", "as the library reads it", "as written"

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 10**7, 10**12, -(10**9), 0.5, 1e308, float("nan"), "", "x", "0", "../../x",
    "/etc/passwd", "\x1b[31mred", "\u202e", "\ud800", "a" * 100_000, "(a+)+$", "none", "float16", "auto", [], {}, [[]],
    [1, "a"], ["x"], {"a": 1}, {"": ""}, [None], [0] * 50, {"0": "x"}, "python:os:getcwd", "timm:resnet18",
]  # fmt: skip


def mutated(name: str, content: bytes, random: Random) -> tuple[bytes, str]:
    """Return a file with one thing changed, and what that was."""
    kinds: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
        ".json": _json, ".jsonl": _json_lines, ".safetensors": _header, ".toml": _toml,
    }  # fmt: skip
    ending = next((ending for ending in kinds if name.endswith(ending)), "")
    change = kinds[ending] if ending and random.random() < 0.8 else _bytes
    return change(content, random)


def _bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat or overwrite some bytes; of a safetensors file mostly in its header."""
    many = bytearray(content)
    end = min(len(many), 4000) if random.random() < 0.7 else len(many)
    at = random.randrange(end) if end else 0
    length = random.choice([1, 1, 2, 8, 50])
    way = random.choice(["flip", "cut off", "remove", "insert", "repeat", "overwrite", "empty"])
    if way == "flip" and many:
        many[at] ^= 1 << random.randrange(8)
    elif way == "cut off":
        del many[at:]
    elif way == "remove":
        del many[at : at + length]
    elif way == "insert":
        many[at:at] = random.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"9" * 5000, b'"', b"{"])
    elif way == "repeat":
        many[at:at] = many[at : at + length]
    elif way == "overwrite":
        many[at : at + length] = bytes(random.randrange(256) for _ in range(length))
    elif way == "empty":
        many.clear()
    return bytes(many), f"bytes: {way} at {at}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every map or list of a document with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _json(content: bytes, random: Random) -> tuple[bytes, str]:
    value = json.loads(content)
    places = list(_places(value))
    if not places:
        return _bytes(content, random)
    shallow = [place for place in places if place[0] is value]
    owner, key = random.choice(shallow if random.random() < 0.5 else places)
    way = random.choice(["another", "another", "nudge", "remove", "rename", "add", "swap", "deep", "twice", "whole"])
    said = f"json: {way} {str(key)[:60]!r}"
    if way == "another":
        owner[key] = new = copy.deepcopy(random.choice(VALUES))
        said += f" = {new!r}"[:80]
    elif way == "nudge":
        owner[key] = new = _nudged(owner[key], random)
        said += f" = {new!r}"[:80]
    elif way == "remove":
        del owner[key]
    elif way in ("rename", "add") and isinstance(owner, dict):
        new = copy.deepcopy(random.choice(VALUES)) if way == "add" else owner.pop(key)
        owner[random.choice([f"{key}_", f"x{key}", str(key).upper(), "unknown", "__class__", "self"])] = new
    elif way == "swap":
        other, there = random.choice(places)
        if (
            not isinstance(other.get(there) if isinstance(other, dict) else other[there], dict | list)
            and isinstance(owner, dict | list)
            and not isinstance(owner[key], dict | list)
        ):
            owner[key], other[there] = other[there], owner[key]
    elif way == "deep":
        owner[key] = "DEEP"
        depth = random.choice([300, 20_000, 200_000])
        return json.dumps(value).replace('"DEEP"', "[" * depth + "]" * depth).encode(), f"{said} {depth}"
    elif way == "twice" and isinstance(owner, dict):
        text = json.dumps(value)
        return text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: 0, {json.dumps(key)}:", 1).encode(), said
    elif way == "whole":
        value = copy.deepcopy(random.choice(VALUES))
    return json.dumps(value).encode(), said


def _nudged(value: Any, random: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, value - 1, value * 2, -value, value * 1000, value / 2, str(value)])
    if isinstance(value, str):
        return random.choice([value + "x", value[:-1], value.upper(), f"{value}/../y", value[::-1], [value]])
    if isinstance(value, list):
        return random.choice([value * 2, value[:-1], value[::-1], dict(enumerate(value))])
    return value if value is None else list(value)


def _json_lines(content: bytes, random: Random) -> tuple[bytes, str]:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    lines[at], said = _json(lines[at], random)
    return b"\n".join(lines) + b"\n", f"line {at}, {said}"


def _header(content: bytes, random: Random) -> tuple[bytes, str]:
    """Change the header of a safetensors file, or a bit of its data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, two = random.choice(names), random.choice(names)
    entry = header[one]
    way = random.choice(
        ["swap", "dtype", "shape", "offsets", "rename", "remove", "add", "metadata", "length", "bit", "reshape", "json"]
    )
    said = f"header: {way} {one!r}"
    if way == "swap":
        header[one], header[two] = header[two], header[one]
    elif way == "dtype":
        entry["dtype"] = random.choice(["F64", "F32", "I32", "BF16", "F16", "U8", "BOOL", "C64", "F8_E4M3", "X", 3])
    elif way == "shape":
        entry["shape"] = random.choice([[], [0], [-1], [10**12], entry["shape"][::-1], entry["shape"] + [1], "x"])
    elif way == "reshape":
        entry["shape"] = [1, *entry["shape"]] if random.random() < 0.5 else [_size(entry["shape"])]
    elif way == "offsets":
        entry["data_offsets"] = random.choice([[0, 0], [-4, 0], entry["data_offsets"][::-1], [0], [0, 10**15], None])
    elif way == "rename":
        header[random.choice([f"{one}x", two, "a.b.c", "", "model." + one])] = header.pop(one)
    elif way == "remove":
        del header[one]
    elif way == "add":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": entry["data_offsets"][1:] * 2}
    elif way == "metadata":
        header["__metadata__"] = random.choice([None, 3, {}, {"format": "tf"}, {"peftc": "x"}, {"a": 1}])
    elif way == "bit" and data:
        many = bytearray(data)
        many[random.randrange(len(many))] ^= 1 << random.randrange(8)
        data = bytes(many)
    text = json.dumps(header, separators=(",", ":")).encode()
    if way == "json":
        text, inner = _json(text, random)
        said += f", {inner}"
    text += b" " * (length - len(text))
    length = random.choice([0, 1, 2**40, 2**63, length * 2]) if way == "length" else len(text)
    return struct.pack("<Q", length) + text + data, said


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _toml(content: bytes, random: Random) -> tuple[bytes, str]:
    lines = content.decode().splitlines()
    at = random.choice([at for at, line in enumerate(lines) if line.strip()])
    line = lines[at]
    way = random.choice(["value", "value", "key", "remove", "twice", "table", "deep", "move"])
    values = [
        "1", "-1", "0.5", '""', '"x"', "true", "[]", "{}", "nan", "inf", "1979-05-27", "[1, 'a']", "{ a = 1 }",
        "99999999999999999999", '"../x"', '"\\u001b[31m"', "'''\nx'''", "07:32:00",
    ]  # fmt: skip
    if way == "value" and "=" in line:
        lines[at] = f"{line.partition('=')[0]}= {random.choice(values)}"
    elif way == "key" and "=" in line:
        lines[at] = random.choice([f"x{line}", line.upper(), f'"{line.partition("=")[0].strip()}" = 1', f"a.{line}"])
    elif way == "remove":
        del lines[at]
    elif way == "twice":
        lines.insert(at, line)
    elif way == "table":
        lines.insert(at, random.choice(["[unknown]", "[decompose.x]", "[[decompose]]", "[a.b.c]", "[decompose"]))
    elif way == "deep":
        depth = random.choice([100, 5000])
        lines[at] = f"set = {'[' * depth}{']' * depth}"
    elif way == "move":
        lines.append(lines.pop(at))
    return "\n".join(lines).encode() + b"\n", f"toml: {way} line {at} {re.sub(r'[^ -~]', '?', line)[:40]!r}"


# the judge


@dataclass
class Subject:
    """A folder in which files are changed.

    Attributes:
        folder: as it is right.
        files: patterns of the files that are changed.
        run: does with the folder what a user would, and returns what comes of it.
        oracle: what another library makes of the folder, None where it refuses; of our own folders absent.
        share: of the cases.
    """

    folder: Path
    files: tuple[str, ...]
    run: Callable[[Path], Any]
    oracle: Callable[[Path], Any] | None = None
    share: float = 1.0
    word: str = SAME
    expected: Any = field(default=None)


class Hang(BaseException):
    """A case took longer than any does."""


def equal(one: Any, other: Any, *, exactly: bool) -> bool:
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.shape != other.shape:
            return False
        if exactly:
            return torch.equal(one, other)
        return torch.allclose(one.float(), other.float(), atol=2e-3, rtol=2e-3, equal_nan=True)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(equal(a, b, exactly=exactly) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@contextmanager
def watched(allowed: Path) -> Iterator[list[str]]:
    """Tell of every file that is opened for writing, made, renamed or removed outside of ``allowed``."""
    found: list[str] = []
    roots = (str(allowed), os.environ["XDG_CACHE_HOME"], "/dev/", "/proc/", "/sys/")
    WATCHERS.append(lambda path: found.append(path) if not path.startswith(roots) else None)
    try:
        yield found
    finally:
        WATCHERS.pop()


WATCHERS: list[Callable[[str], None]] = []


def hook(event: str, given: tuple[Any, ...]) -> None:
    if not WATCHERS:
        return
    paths: tuple[Any, ...] = ()
    if event == "open" and isinstance(given[2], int):
        paths = given[:1] if given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        paths = given[:1] if given[-1] == -1 else ()  # otherwise relative to an open folder
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = given[:2]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            WATCHERS[-1](str(Path(os.fsdecode(path)).absolute()))


def attempt(subject: Subject, folder: Path) -> tuple[str, Any]:
    """Run a case; return ``refused`` and why, or what came of it."""

    def hang(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    faulthandler.dump_traceback_later(3 * HANG, exit=True)
    try:
        return "done", subject.run(folder)
    except PeftcError as error:
        str(error).encode()
        return REFUSED, error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def verdict(subject: Subject, folder: Path, outcome: str, found: Any) -> str:
    """Return what a case came to, or what is wrong with it."""
    if outcome == REFUSED:
        return REFUSED
    if subject.oracle is None:
        return SAME if equal(found, subject.expected, exactly=True) else "WRONG: other outputs, and no word of it"
    try:
        theirs = subject.oracle(folder)
    except BaseException as error:  # noqa: BLE001 (a panic of the tokenizers is no Exception)
        return f"WRONG: done, where the library refuses: {type(error).__name__}: {error}"[:300]
    return subject.word if equal(found, theirs, exactly=False) else "WRONG: the library reads it otherwise"


def fuzz(work: Path, subjects: dict[str, Subject], cases: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run the cases in an empty folder; return how many came to what by file, and what is wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shares = sum(subject.share for subject in subjects.values())
    for name, subject in subjects.items():
        for number in range(max(1, round(cases * subject.share / shares))):
            random = Random(f"{name} {number}")
            files = sorted(path for pattern in subject.files for path in subject.folder.glob(pattern))
            target = random.choice(files)
            folder = work / subject.folder.name
            shutil.copytree(subject.folder, folder)
            content, said = mutated(target.name, target.read_bytes(), random)
            (folder / target.relative_to(subject.folder)).write_bytes(content)
            label = f"{name} {number}: {target.name}, {said}"
            try:
                with watched(work) as outside:
                    outcome, found = attempt(subject, folder)
                result = verdict(subject, folder, outcome, found)
                if outside:
                    result = f"WRONG: wrote outside: {outside[:3]}"
            except (Exception, Hang) as error:  # noqa: BLE001
                place = traceback.extract_tb(error.__traceback__)[-1]
                own = [each for each in traceback.extract_tb(error.__traceback__) if "/peftc/" in each.filename]
                result = f"WRONG: {type(error).__name__}: {str(error)[:150]} ({place.filename}:{place.lineno}"
                result += f", from {own[-1].filename}:{own[-1].lineno})" if own else ")"
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
            if grown > MOST_MEMORY:
                result, start = f"WRONG: {grown:,} bytes of memory", start + grown // 1024
            counts[f"{name}: {target.name}" if len(files) > 1 else name, result.partition(":")[0]] += 1
            if result.startswith("WRONG"):
                wrong.append(f"{label}\n    {result}")
            for path in work.iterdir():
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    return counts, wrong
