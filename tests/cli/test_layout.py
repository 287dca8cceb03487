"""Tables keep inside the terminal, stay tables as long as they can, and never break an interval."""

from itertools import product

import pytest

from peftc.cli.layout import laid_out

TABLE = [
    ["name", "dense", "small"],
    ["last stage", "", "prune-layers"],
    ["share", "100.0 %", "50.0 %"],
    ["top1", "0.932 [0.889, 0.959]", "0.946 [0.907, 0.970] on samples it knows"],
    ["speed-up", "", "1.20x faster [1.15, 1.25]"],
]


def test_a_table_that_fits_has_a_line_for_each_row() -> None:
    for room in (None, 160):
        lines = laid_out(TABLE, room)
        assert len(lines) == 4
        assert lines[0].startswith("name   last stage")
        assert set(lines[1]) == {"-", " "}


def test_long_cells_are_folded_but_no_interval_is() -> None:
    lines = laid_out(TABLE, 80)
    assert sum(line.startswith("name") for line in lines) == 1
    text = "\n".join(lines)
    for whole in ("[0.889, 0.959]", "[0.907, 0.970]", "[1.15, 1.25]", "1.20x faster"):
        assert whole in text


def test_a_narrow_terminal_gets_blocks_with_the_names_in_each() -> None:
    lines = laid_out(TABLE, 40)
    assert max(map(len, lines)) <= 40
    heads = [line for line in lines if line.startswith("name")]
    assert len(heads) > 1
    assert sum(line.startswith("small") for line in lines) == len(heads)


@pytest.mark.parametrize("room", range(1, 130, 3))
def test_nothing_is_lost_and_nothing_is_too_wide(room: int) -> None:
    lines = laid_out(TABLE, room)
    text = " ".join(lines)
    for piece in ("dense", "prune-layers", "50.0 %", "[0.889, 0.959]", "[1.15, 1.25]", "knows"):
        assert piece in text, (room, piece)
    if room >= 24:  # the longest interval, beside the longest name
        assert max(map(len, lines)) <= room


def test_the_least_terminal_gets_a_line_for_each_cell() -> None:
    assert laid_out(TABLE, 12)[:3] == ["dense", "  share: 100.0 %", "  top1: 0.932 [0.889, 0.959]"]


def test_a_column_alone_is_there_to_be_copied() -> None:
    line = "peftc decompose models/dense --ratio 0.5 -o small"
    assert laid_out([["", line]], 20) == [line]
    assert laid_out([["", ""], ["", "a b"]], 20) == ["  a b"]


def test_tables_of_all_shapes_come_out() -> None:
    for columns, rows, room in product((1, 2, 5), (0, 1, 3), (None, 1, 10, 80)):
        assert isinstance(laid_out([["head", *["a cell [1, 2"] * rows]] * columns, room), list)
