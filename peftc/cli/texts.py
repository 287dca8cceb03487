"""What people type, read: amounts and sizes, numbers in a range, one of some words, settings."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from typer import BadParameter

from peftc.cli.suggestions import Misread, meant_by
from peftc.errors import UsageError
from peftc.options import Rule
from peftc.report import AMOUNTS, SIZES, scaled


def with_unit(units: dict[str, int], example: str) -> Callable[[Any], int]:
    """Return a reader of whole numbers with a unit."""

    def read(text: Any) -> int:
        try:
            return scaled(str(text), units)
        except ValueError as error:
            raise BadParameter(f"`{text}` {error}: write it like {example}") from None

    return read


amount = with_unit(AMOUNTS, "`22M`, `4.6G` or `1.5e9`")  # a count
size = with_unit(SIZES, "`100MB`, `4.6G` or `1GiB`")  # of bytes, decimal or binary


def fraction(text: Any) -> float:
    """Read a decimal or a fraction in (0, 1]."""
    top, slash, bottom = str(text).partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise Misread(f"`{text}` is neither a decimal nor a fraction like `2/3`", _share(str(text))) from None
    if not 0 < value <= 1:
        raise Misread(f"`{text}` is not in (0, 1]: it is the share to keep", _share(str(text)))
    return value


def _share(text: str) -> str | None:
    """Return the share that was perhaps meant: by a number of per cent, or by a comma in place of the point."""
    found = re.fullmatch(r"(\d+)(?:[.,](\d+))?( ?%)?", text.strip())
    if found is None:
        return None
    value = float(f"{found[1]}.{found[2] or 0}")
    if value > 2 or found[3]:  # 1.5 is no number of per cent that somebody keeps
        value /= 100
    return f"{value:g}" if 0 < value < 1 else None


def numeric(kind: type[int | float], rule: Rule) -> Callable[[Any], int | float]:
    """Return a reader of numbers in a range."""

    def read(text: Any) -> int | float:
        try:
            value = kind(str(text))
        except ValueError:
            raise BadParameter(f"`{text}` is not a {'whole ' if kind is int else ''}number") from None
        if not rule.fits(value):
            raise BadParameter(f"`{text}` is not {rule.text}")
        return value

    return read


def choice(*known: str, pattern: str = "(?!)") -> Callable[[Any], str]:
    """Return a reader of one of ``known``, or of whatever matches ``pattern``."""

    def read(text: Any) -> str:
        if text not in known and re.fullmatch(pattern, str(text)) is None:
            what = f"`{text}` is not one of {', '.join(f'`{word}`' for word in known)}"
            raise Misread(what, meant_by(str(text), known))
        return str(text)

    return read


def as_written(read: Callable[[Any], Any]) -> Callable[[Any], str]:
    """Return a reader that only checks a text, and leaves it as it was written: 2/3 stays exact."""

    def check(text: Any) -> str:
        read(text)
        return str(text)

    return check


TIMES = Rule("above 1: it is how many times faster the model is to be", lambda value: 1 < value < math.inf)
READERS: dict[str, Callable[[Any], Any]] = {  # of options in groups, by the name that `peftc.options` gives them
    "amount": amount,
    "share_text": as_written(fraction),
    "size_text": as_written(size),
    "above_one_text": as_written(numeric(float, TIMES)),
}


def settings(option: str, texts: Iterable[str], *, lists: bool = False) -> dict[str, Any]:
    """Read repeated ``key=value``; values become int, float, bool or stay text, and comma lists where allowed.

    Raises:
        UsageError: a text without ``=``, or a key given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"`{option} {text}` is not understood", hint=f"write it as `{option} key=value`")
        if key in found:
            raise UsageError(f"`{option} {key}` is given twice", hint="give each key once")
        parts = [_value(part.strip()) for part in value.split(",")] if lists else [_value(value)]
        found[key] = parts if len(parts) > 1 else parts[0]
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
