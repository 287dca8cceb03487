"""The chart of quality against cost: every model by its name, no two names on each other, one front of one run."""

from __future__ import annotations

import random

import pytest

from peftc.pages.labels import LONGEST, Box, cut, placed, width_of
from peftc.pages.records import Row
from peftc.pages.trade import NARROW, VIEWS, WIDE, Point, View, front_of, points_of, scatter, trade_of

SIZE, SPEED = VIEWS[0], VIEWS[3]


def row(name: str, parameters: int, value: float, times: float | None = None, *, base: bool = False) -> Row:
    metrics = {"top1": {"value": value, "low": value - 0.02, "high": value + 0.02}}
    quality = {"metric": "top1", "metrics": metrics, "higher_is_better": True}
    found = Row(name, [] if base else ["decompose"], parameters, 4 * parameters, 10 * parameters, quality)
    found.base = None if base else "dense"
    if times is not None:
        found.speedup = {"value": times, "low": times - 0.05, "high": times + 0.05, "verdict": f"{times:.2f}x faster"}
    return found


DENSE = row("dense", 1000, 0.9, base=True)


def front(rows: list[Row], view: View) -> list[str]:
    points = points_of(rows, view)
    return [each.label for each in front_of(points, less_is_better=view.less_is_better, higher_is_better=True)]


def test_the_front_is_what_no_other_beats() -> None:
    points = [Point(str(at), x, y) for at, (x, y) in enumerate([(1, 0.5), (2, 0.4), (2, 0.7), (3, 0.7), (4, 0.9)])]
    for less, higher, found in ((True, True, ["0", "2", "4"]), (False, True, ["4"]), (True, False, ["0", "1"])):
        assert [p.label for p in front_of(points, less_is_better=less, higher_is_better=higher)] == found


def test_a_front_is_drawn_only_through_what_one_run_measured() -> None:
    rows = [DENSE, row("a", 500, 0.8, 1.5), row("b", 250, 0.7, 2.0)]
    assert front(rows, SIZE) == ["b", "a", "dense"], "sizes are counted, and quality is of the same samples"
    assert front(rows, SPEED) == [], "two speed-ups are of two runs"
    text = str(trade_of(rows))
    assert text.count('class="front"') == 3 * 2, "in both sizes of three charts, not in that of speed"
    assert "No front is drawn: each speed-up was measured in a run of its own" in text
    assert front([DENSE, row("a", 500, 0.8, 1.5)], SPEED) == ["dense", "a"], "one run timed both"


def test_a_model_is_the_best_in_both_only_where_none_is_level_with_it() -> None:
    base = row("dense", 1000, 0.8, base=True)
    assert "<code>a</code> is the best in both." in str(trade_of([base, row("a", 500, 0.9), row("b", 600, 0.85)]))
    text = str(trade_of([base, row("a", 500, 0.9), row("b", 600, 0.9)]))
    assert "no model is better in either than <code>a</code>; level with that: <code>b</code> in top1." in text
    text = str(trade_of([base, row("a", 500, 0.9), row("b", 500, 0.85)]))
    assert "no model is better in either than <code>a</code>; level with that: <code>b</code> in parameters." in text
    text = str(trade_of([base, row("a", 500, 0.9), row("b", 500, 0.9)]))
    assert "no model is better in either than <code>a</code> and <code>b</code>, which are level." in text
    assert "the best in both" not in text


def test_a_model_without_a_paired_speed_up_is_not_in_the_chart_of_speed() -> None:
    rows = [DENSE, row("a", 500, 0.8, 1.5), row("b", 250, 0.7)]
    assert [point.label for point in points_of(rows, SPEED)] == ["dense", "a"]
    assert "Not here, as it was not measured: <code>b</code>." in str(trade_of(rows))
    assert "speed" not in str(trade_of([DENSE, row("b", 250, 0.7)])), "of none there is no chart of it"


def test_fewer_than_two_models_that_differ_make_no_chart() -> None:
    assert trade_of([DENSE]) is None
    assert trade_of([Row("dense"), Row("a", ["decompose"], 5)]) is None
    assert trade_of([row("dense", 9, 0.5, base=True), row("a", 9, 0.6)]) is None


def test_there_is_one_chart_and_a_switch() -> None:
    text = str(trade_of([DENSE, row("a", 500, 0.8, 1.5)]))
    assert text.count('type="radio"') == text.count("<label ") == text.count("<figure ") == 4
    assert text.count("checked") == 1
    for word in ("parameters", "bytes", "multiply-adds", "speed"):
        assert f">{word}</label>" in text
    assert text.count("linear; less is better") == 2 * 3 and text.count("linear; more is better") == 2 * (4 + 1)


def boxes(points: list[Point], box: tuple[int, int]) -> list[Box]:
    named = [((40 + point.x * (box[0] - 60), 40 + point.y * (box[1] - 90)), point.label) for point in points]
    found = placed(named, Box(20, 10, box[0], box[1]))
    return [label.box for label in found]


@pytest.mark.parametrize("box", [WIDE, NARROW])
@pytest.mark.parametrize("seed", range(8))
def test_no_two_names_lie_on_each_other(box: tuple[int, int], seed: int) -> None:
    draw = random.Random(seed)
    xs = [draw.random() for _ in range(5)]  # models often have a size in common
    points = [Point(f"{at:02d}-{'x' * draw.randint(1, 12)}", draw.choice(xs), draw.random()) for at in range(20)]
    found = boxes(points, box)
    assert len(found) > (17 if box == WIDE else 8)
    for at, one in enumerate(found):
        assert one.left >= 20 and one.right <= box[0] and one.top >= 10 and one.bottom <= box[1]
        assert not any(one.meets(other) for other in found[:at])


def test_a_name_that_finds_no_room_is_told_beneath() -> None:
    points = [Point(f"a rather long name {at}", 0.5 + at / 1e6, 0.5) for at in range(60)]
    chart, left = scatter(points, [], (SIZE, "top1", True), NARROW, "narrow")
    named = [shape for shape in chart.shapes if shape.look == "name"]
    assert left and len(named) + len(left) == 60


def test_twenty_models_of_one_place_keep_their_names() -> None:
    rows = [DENSE, *(row(f"{at}-model", 500, 0.8 + at / 1000) for at in range(20))]
    text = str(trade_of(rows))
    for each in rows:
        assert f"<title>{each.name}: " in text, "on hovering, where it has no room"
    assert len([each for each in rows if f">{each.name}</text>" in text]) >= 10


def test_names_of_any_kind_come_out_cut_and_escaped() -> None:
    assert cut("x" * LONGEST) == "x" * LONGEST
    assert len(cut("x" * 99)) == LONGEST
    assert width_of("模型") > 2 * 12 > width_of("ab")
    evil = "<script>&\"'`"
    text = str(trade_of([DENSE, row(evil, 500, 0.8, 1.5)]))
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e300, -5.0])
def test_figures_of_any_size_come_out(value: float) -> None:
    text = str(trade_of([row("dense", 10, value, base=True), row("a", 5, 0.5, 1.5)]))
    assert "inf" not in text and ">nan" not in text
