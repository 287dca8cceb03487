"""Figures for machines, sentences for people, limits for CI."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftc.report import UNCHANGED, Report, Table, count, duration, figure, percent, ranged, short, size, speedup_text


def test_json_holds_the_figures_beside_the_frame() -> None:
    report = Report("bench", data={"size": {"after": 3}}, artifact=Path("small"), notes=["n"], warnings=["w"])
    report.at_least("min_speedup", 1.2, 1.3)
    assert json.loads(json.dumps(report.to_json())) == {
        "schema_version": 1,
        "command": "bench",
        "artifact": "small",
        "size": {"after": 3},
        "notes": ["n"],
        "warnings": ["w"],
        "gates": [{"option": "min_speedup", "limit": 1.2, "value": 1.3, "passed": True}],
    }


@pytest.mark.parametrize(
    ("limit", "value", "most", "least"),
    [(1.0, 1.0, True, True), (1.0, 0.5, True, False), (1.0, 2.0, False, True), (1.0, None, False, False)],
)
def test_a_gate_compares_and_an_unmeasured_value_fails(limit, value, most, least) -> None:
    report = Report("evaluate")
    report.at_most("max_drop", limit, value)
    report.at_least("min_quality", limit, value)
    assert [gate.passed for gate in report.gates] == [most, least]
    assert report.passed == (most and least)


def test_a_limit_that_nobody_asked_for_is_no_gate() -> None:
    report = Report("evaluate")
    report.at_most("max_drop", None, 3.0)
    report.at_least("min_quality", None, None)
    assert report.gates == [] and report.passed


def test_reports_do_not_share_their_lists() -> None:
    Report("a").notes.append("x")
    assert Report("b").notes == []


def test_numbers_in_words() -> None:
    assert count(5717416) == "5,717,416"
    assert [size(n) for n in (0, 999, 22_883_376, 2e9, 5e12)] == ["0 B", "999 B", "22.9 MB", "2 GB", "5 TB"]
    assert [short(n) for n in (12, 1.26e9, -3e6)] == ["12", "1.26 G", "-3 M"]
    assert percent(0.5331) == "53.3 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000586, "0.0586 ms"),
        (0.01234, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.99951, "1 s"),
        (1.41, "1.41 s"),
        (2000, "2,000 s"),
    ],
)
def test_a_time_is_written_without_a_power_of_ten(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.12345, "0.1235"),
        (9999.4, "9999"),
        (12345.6, "12,346"),
        (-12345.6, "-12,346"),
        (1e20, "1e+20"),
        (1e-9, "1e-09"),
    ],
)
def test_a_figure_keeps_what_stands_before_the_point(number: float, text: str) -> None:
    assert figure(number) == text
    assert figure(float("nan")) == "nan"


def test_sizes_and_counts_go_on_to_the_next_unit_in_time() -> None:
    assert size(999_900) == "1 MB" and size(999.4) == "999 B"
    assert short(999_900) == "1 M" and short(-999_900) == "-1 M"


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ((0.9317, 0.8886, 0.9589), "0.932 [0.889, 0.959]"),
        ((0.361, 0.2983, 0.4287), "0.36 [0.30, 0.43]"),
        ((68.64, 65.1, 72.3), "68.6 [65.1, 72.3]"),
        ((12345.6, 12000.0, 12700.0), "12,346 [12,000, 12,700]"),
        ((0.9, 0.9, 0.9), "0.9 [0.9, 0.9]"),
        ((0.99991, 0.99990, 0.99992), "0.999910 [0.999900, 0.999920]"),
    ],
)
def test_a_figure_has_the_digits_that_its_interval_allows(figures: tuple[float, ...], text: str) -> None:
    assert ranged(*figures) == text


def test_a_change_has_a_sign_and_nothing_is_minus_zero() -> None:
    assert ranged(0.048, 0.01, 0.089, sign=True) == "+0.048 [0.010, 0.089]"
    assert ranged(-0.048, -0.089, -0.01, sign=True) == "-0.048 [-0.089, -0.010]"
    assert ranged(-0.0001, -0.02, 0.02, sign=True) == "0.000 [-0.020, 0.020]"
    assert ranged(float("inf"), 0.0, float("inf")) == "inf [0, inf]"


def test_a_speed_up_stands_with_its_range_in_the_direction_of_its_word() -> None:
    def text(value: float, low: float, high: float, verdict: str) -> str:
        return speedup_text({"value": value, "low": low, "high": high, "verdict": verdict})

    assert text(1.5, 1.45, 1.55, "1.50x faster") == "1.50x faster [1.45, 1.55]"
    assert text(0.8, 0.75, 0.85, "1.25x slower") == "1.25x slower [1.18, 1.33]"
    assert text(1.01, 0.96, 1.06, UNCHANGED) == "no measurable change [0.96, 1.06]"
    assert text(0.8, 0.0, 0.85, "1.25x slower") == "1.25x slower [0.00, 0.85]", "nothing is divided by"


def full(**more: Any) -> Report:
    quality = {"metric": "accuracy", "metrics": {"accuracy": {"value": 0.8125, "low": 0.7, "high": 0.9}}}
    data = {"size": {"after": {"parameters": 1234567, "bytes": 4_900_000}}, "quality": quality}
    report = Report("decompose", data, artifact=Path("small"), notes=["a <b>note</b>"], warnings=["x & y"], **more)
    report.tables.append(Table("a < b", ["name", "n"], [["<script>", 1234], [None, 0.5]]))
    report.at_least("min_quality", 0.9, 0.8125)
    return report


def test_a_report_is_a_short_line_as_text() -> None:
    line = "decompose small: 1,234,567 parameters, 4.9 MB, accuracy 0.8125, 1 warning, "
    line += "gate --min-quality 0.9: 0.8125, not met"
    assert str(full()) == line and repr(full()) == f"<Report of {line}>"
    assert str(Report("methods")) == "methods"


def test_attributes_are_figures_with_units() -> None:
    report = full()
    assert (report.parameters, report.bytes, report.quality, report.quality_unit) == (
        1234567,
        4_900_000,
        0.8125,
        "accuracy",
    )
    nothing = Report("methods", {"methods": {}})
    assert (nothing.parameters, nothing.bytes, nothing.quality, nothing.quality_unit) == (None, None, None, None)
    bench = Report("bench", {"model": {"parameters": 5, "bytes_on_disk": 20}})
    assert (bench.parameters, bench.bytes) == (5, 20)


def test_a_notebook_shows_tables_and_nothing_that_a_model_could_write_as_html() -> None:
    text = full()._repr_html_()
    assert "<td>&lt;script&gt;</td><td>1,234</td>" in text and "<td>-</td><td>0.5</td>" in text
    assert "a &lt;b&gt;note&lt;/b&gt;" in text and "x &amp; y" in text and "a &lt; b" in text
    assert "<script" not in text and "not met" in text
    brief = full(summary={"kept": "half < all", "next": "peftc evaluate small"})._repr_html_()
    assert "<td>kept</td><td>half &lt; all</td>" in brief and "peftc evaluate" not in brief
