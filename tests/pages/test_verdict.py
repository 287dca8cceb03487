"""The verdict says what was measured against the dense model, in words that the intervals allow, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftc.pages import records
from peftc.pages.verdict import Verdict, verdict_of
from tests.steps.test_compare import measure, quality, speed, write

SIZES = {"before": {"parameters": 400, "bytes": 1600, "macs": 4000}, "after": {"macs": 1234}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(Path("small"), "decompose", report={"size": SIZES})


def said(*names: str) -> Verdict:
    found = records.read(names or ("small",))
    return verdict_of(records.rows(found))


def test_size_speed_and_quality_in_one_sentence_and_three_figures(folder: Path) -> None:
    measure(folder, evaluate=[quality(0.6, against=0.9, at=86400 * 365)], bench=[speed(1500)])
    found = said()
    assert found.sentence == (
        "`small` has 25.0 % of the parameters of `dense`, is 1.50x faster, and its top1 is 0.60, worse by 0.30."
    )
    size, fast, good = found.figures
    assert (size.of, size.value, size.told) == (
        "size",
        "25.0 %",
        "of the parameters: 100 of 400; on disk 161 B of 1.6 kB",
    )
    assert fast.value == "1.50x faster" and fast.told.startswith(
        "1.45 to 1.55 times faster, timed in turn with `dense`"
    )
    assert good.value == "-0.30 top1"
    assert good.told == "worse: 0.60 [0.50, 0.70] against 0.9 [0.9, 0.9]; paired difference [-0.35, -0.25]"
    assert found.on == ["measured on 1 January 1971", "360 samples of split `test` of `digits@test`", "one, threads: 1"]


@pytest.mark.parametrize(
    ("rate", "words", "value"),
    [
        (1500, "is 1.50x faster", "1.50x faster"),
        (500, "is 2.00x slower", "2.00x slower"),
        (1010, "shows no measurable change of speed", "within noise"),
    ],
)
def test_words_of_speed(folder: Path, rate: float, words: str, value: str) -> None:
    measure(folder, bench=[speed(rate)])
    found = said()
    assert f", {words}, and its quality was not measured." in found.sentence
    assert found.figures[1].value == value
    assert found.figures[2].value == "not measured"
    assert "`peftc evaluate small --data DATA --against base`" in found.figures[2].told


@pytest.mark.parametrize(
    ("value", "higher", "words"),
    [
        (0.99, True, "better by 0.09"),
        (0.80, True, "worse by 0.10"),
        (0.88, True, "no measurable difference"),
        (0.99, False, "worse by 0.09"),
        (0.80, False, "better by 0.10"),
    ],
)
def test_words_of_quality(folder: Path, value: float, higher: bool, words: str) -> None:
    measure(folder, evaluate=[quality(value, against=0.9) | {"higher_is_better": higher}])
    found = said()
    assert found.sentence.endswith(f", {words}.")
    assert "its speed was not measured beside `dense`" in found.sentence
    assert found.figures[2].told.startswith(f"{words.partition(' by ')[0]}: ")


def test_what_was_not_measured_beside_the_dense_model_is_said_in_words(folder: Path) -> None:
    alone = speed(1500) | {"against": None, "speedup": None}
    measure(folder, evaluate=[quality(0.6)], bench=[alone])
    found = said()
    assert "its speed was not measured beside `dense`" in found.sentence
    assert found.sentence.endswith("its top1 is 0.60, which was not compared with `dense`.")
    assert found.figures[1].value == "not measured"
    assert not any(char in found.figures[1].told for char in "x/")


def test_nothing_measured_at_all(folder: Path) -> None:
    (folder / "result.json").unlink()
    found = said()
    assert found.sentence.startswith("`small` has 100 parameters, its speed was not measured")
    assert [each.value for each in found.figures] == ["100 parameters", "not measured", "not measured"]
    assert found.on == []


def test_it_is_on_the_last_model_of_which_most_is_known(folder: Path) -> None:
    for name in ("second", "third"):
        write(Path(name), "decompose", "distill")
    assert said("small", "second", "third").name == "third"
    measure(Path("second"), bench=[speed(1500)])
    measure(Path("small"), evaluate=[quality(0.6, against=0.9)], bench=[speed(1500)])
    assert said("small", "second", "third").name == "small"
    measure(Path("third"), evaluate=[quality(0.6, against=0.9)], bench=[speed(1500)])
    assert said("small", "second", "third").name == "third"


def test_times_that_are_none_do_no_harm(folder: Path) -> None:
    for at in (10**30, -(10**30), 0):
        entry: dict[str, Any] = quality(0.6, against=0.9, at=at)
        measure(folder, evaluate=[entry])
        assert not any("measured on" in each for each in said().on)
