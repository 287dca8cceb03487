"""Tables as lines of text, in as many columns as the terminal has."""

import re
from collections.abc import Callable, Sequence

GAP = 2  # between columns
PIECE = re.compile(r"(?:\[[^\[\]]*\]|[^\s\[]|\[)+")  # no cell is broken inside one: a word, an interval

Column = Sequence[str]  # its name, then its cells


def laid_out(table: Sequence[Column], room: int | None) -> list[str]:
    """Return a table in at most ``room`` characters a line.

    Cells that are too long are folded. Where that is not enough the columns stand in blocks beneath each other, the
    first column in each of them; where not even two fit, every cell has a line. A column alone is never folded: what
    stands in it may be there to be copied.
    """
    if room is None or len(table) == 1 or _width(table, _least) <= room:
        return _block(table, room if len(table) > 1 else None)
    first, blocks = table[0], list[list[Column]]()
    for column in table[1:]:
        if _width([first, column], _least) > room:
            return _list(table)
        if blocks and _width([*blocks[-1], column], _longest) <= room:
            blocks[-1].append(column)
        else:
            blocks.append([first, column])
    return [line for at, block in enumerate(blocks) for line in ([""] if at else []) + _block(block, room)]


def _block(block: Sequence[Column], room: int | None) -> list[str]:
    """Return columns beside each other."""
    widths = [_longest(column) for column in block]
    least = [_least(column) for column in block]
    while room is not None and sum(widths) + GAP * (len(widths) - 1) > room:
        widest = max(range(len(widths)), key=lambda at: (widths[at] > least[at], widths[at]))
        widths[widest] -= 1
    right = [len(column) > 1 and all(map(_is_number, column[1:])) for column in block]
    lines = []
    for at, row in enumerate(zip(*block, strict=True)):
        if at == 0 and not any(row):
            continue
        cells = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = (each[number] if number < len(each) else "" for each in cells)
            padded = (part.rjust(w) if r else part.ljust(w) for part, w, r in zip(parts, widths, right, strict=True))
            lines.append((" " * GAP).join(padded).rstrip())
        if at == 0:
            lines.append((" " * GAP).join("-" * width for width in widths))
    return lines


def _list(table: Sequence[Column]) -> list[str]:
    """Return a line for each cell, under the first of its row."""
    lines = []
    for first, *rest in list(zip(*table, strict=True))[1:]:
        named = zip((column[0] for column in table[1:]), rest, strict=True)
        lines += [first, *(f"  {name}: {cell}" for name, cell in named if cell)]
    return lines


def _folded(cell: str, width: int) -> list[str]:
    """Return a cell in lines of at most ``width``, which no piece of it is longer than."""
    if len(cell) <= width:
        return [cell]
    lines: list[str] = []
    for piece in PIECE.findall(cell):
        if lines and len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _longest(column: Column) -> int:
    return max(map(len, column))


def _least(column: Column) -> int:
    return max((len(piece) for cell in column for piece in PIECE.findall(cell)), default=0)


def _width(block: Sequence[Column], of: Callable[[Column], int]) -> int:
    return sum(map(of, block)) + GAP * (len(block) - 1)


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.lstrip("+-−±<>~ ")[:1].isdecimal()
