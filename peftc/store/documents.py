"""JSON documents: read within limits, checked in shape, and sealed by a digest of themselves.

A *shape* says what a value has to be:

====================  =========================================================
``int``, ``str`` ...  of that type; a truth value is no number, a whole number is a float too
``None``              null
``(a, b)``            one of these shapes
``[a]``               a list of such values
``{str: a}``          a map from any names to such values
``{"x": a, "y?": b}``  a map with ``x``, perhaps ``y``, and whatever else
``Any``               anything
====================  =========================================================
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError, did_you_mean

# what moves a cursor, changes a terminal or turns the order of letters around
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SEAL = "digest"  # the field that holds the sha256 of all others
MOST_BYTES = 512 * 1024 * 1024  # the largest honest document, a tokenizer, has 40 MB
MOST_DEEP = 200  # maps and lists in one another; the deepest honest document, a tokenizer, has 10
NAMES: dict[Any, str] = {
    dict: "a map",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    None: "null",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of a file in the end: it is there whole or not at all.

    What a killed process left of its own attempt is removed.

    Raises:
        OSError: it cannot be written; then nothing is left of it.
    """
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        number = leftover.name.removeprefix(f"{path.name}.").removesuffix(".partial")
        if number.isdecimal() and not _runs(int(number)):
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a small file as `replacing` does; ``mode`` is narrowed by the user's mask."""
    with replacing(path.expanduser()) as partial:
        partial.touch(mode)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, is larger or deeper than any that is meant, or holds text that is no Unicode.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; peftc reads documents of up to {MOST_BYTES:,}")
    return parsed(path.read_text(encoding="utf-8"))


def read_shaped(path: Path, shape: Any, refusal: type[PeftcError], hint: str | None = None) -> Any:
    """Return the value in a JSON file, which has to be of a shape.

    Raises:
        PeftcError: of the kind, where it cannot be read or is of no such shape.
    """
    try:
        value = read_json(path)
        why = misfit(value, shape)
    except FileNotFoundError:
        raise refusal(f"cannot read `{path}`", why="the path does not exist", hint=did_you_mean(path, hint)) from None
    except (OSError, ValueError) as error:
        why = str(error)
    if why:
        raise refusal(f"cannot read `{path}`", why=why, hint=hint)
    return value


def parsed(text: str) -> Any:
    """Return the value of a JSON text; a `ValueError` as of `read_json`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"its maps and lists stand in one another more than {MOST_DEEP} deep") from None
    inner, depth = [value], 0
    while inner := [each for one in inner for each in _children(one)]:
        depth += 1
        if depth > MOST_DEEP:
            raise ValueError(f"its maps and lists stand in one another more than {MOST_DEEP} deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair, alone, is a text that no file can hold
        try:
            canonical(value).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a character (a lone surrogate)") from None
    return value


def _children(value: Any) -> list[Any]:
    """Return the maps and lists that stand in one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def escaped(text: str) -> str:
    """Return a text whose control characters stand there as they are written in code."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a document, the names in its maps too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(each)


def misfit(value: Any, shape: Any) -> str | None:
    """Return where a value is not of a shape, and what stands there; None where it fits."""
    found = _misfit(value, shape, "")
    return None if found is None else f"{f'`{found[0]}`' if found[0] else 'it'} is {found[1]}"


def _misfit(value: Any, shape: Any, at: str) -> tuple[str, str] | None:
    if shape is Any:
        return None
    if isinstance(shape, tuple):
        tried = [_misfit(value, each, at) for each in shape]
        deepest = max((each for each in tried if each), key=lambda each: len(each[0]), default=None)
        return None if None in tried else deepest
    if shape is None or isinstance(shape, type):
        return None if _is(value, shape) else (at, f"{_text(value)}, not {NAMES[shape]}")
    if not isinstance(value, type(shape)):
        return at, f"{_text(value)}, not {NAMES[type(shape)]}"
    if isinstance(shape, list):
        inner = ((each, shape[0], f"{at}[{number}]") for number, each in enumerate(value))
    elif str in shape:
        inner = ((each, shape[str], f"{at}.{name}".lstrip(".")) for name, each in value.items())
    else:
        lacking = next((name for name in shape if not name.endswith("?") and name not in value), None)
        if lacking is not None:
            return f"{at}.{lacking}".lstrip("."), "missing"
        known = {name.removesuffix("?"): each for name, each in shape.items()}
        inner = ((value[name], each, f"{at}.{name}".lstrip(".")) for name, each in known.items() if name in value)
    return next((found for each, one, where in inner if (found := _misfit(each, one, where))), None)


def _is(value: Any, kind: type | None) -> bool:
    if kind is None or value is None:
        return kind is None and value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return f"`{text}`" if len(text) < 60 else f"`{text[:57]}...`"


def pretty(value: Any) -> str:
    """Return JSON for people, with sorted keys: equal values, equal text."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def said(value: Any) -> str:
    """Return a value of JSON in words, for a sentence."""
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    if isinstance(value, list):
        return ", ".join("none" if each is None else said(each) for each in value) or "nothing"
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(each)}" for key, each in value.items()) or "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256, in hexadecimal, of a JSON-ready value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return a document with the digest of all that it says, so that an edit is noticed."""
    return {**value, SEAL: digest({name: each for name, each in value.items() if name != SEAL})}


def is_sealed(value: Any) -> bool | None:
    """Return whether a document is as it was sealed; None where it has no seal."""
    if not isinstance(value, dict) or SEAL not in value:
        return None
    try:
        return bool(sealed(value)[SEAL] == value[SEAL])
    except ValueError:  # a number that no document of ours holds: NaN, infinity
        return False
