"""The verdict says what was measured against the dense model, in words that the intervals allow, and nothing else."""

from __future__ import annotations

from itertools import permutations
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


def test_a_gain_of_a_model_that_was_trained_further_is_not_told_without_that(folder: Path) -> None:
    tuned = write(write(Path("healed"), "distill", after=folder).with_name("tuned"), "finetune", after=Path("healed"))
    measure(tuned, evaluate=[quality(0.99, against=0.9)])
    told = "better by 0.09 (it was trained further by `distill` and `finetune`, `dense` was not)"
    found = said("small", "healed", "tuned")
    assert found.sentence.endswith(f"{told}.")
    assert found.figures[2].told.startswith(told.replace(" by 0.09", "") + ": ")
    for value in (0.88, 0.8):
        measure(tuned, evaluate=[quality(value, against=0.9)])
        assert "further" not in said("small", "healed", "tuned").sentence, "nothing to be explained"


def test_training_before_the_dense_model_is_none_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = write(Path("dense"), "finetune", head=True)
    measure(write(Path("small"), "decompose", after=dense), evaluate=[quality(0.99, against=0.9)])
    assert said("dense", "small").sentence.endswith("its top1 is 0.99, better by 0.09.")


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


def on(*names: str) -> str:
    """Return which model the verdict is on, whatever the order in which they are named."""
    (found,) = {said(*order).name for order in permutations(names)}
    return found


def test_it_is_on_the_end_of_the_chain_whatever_the_order(folder: Path) -> None:
    healed = write(Path("healed"), "distill", after=folder)
    write(Path("again"), "finetune", after=healed)
    assert on("small", "healed", "again") == "again"
    assert said("again", "small", "healed").why == (
        "the verdict is on this one of 3 models as it is the end of the chain, all others lead to it"
    )
    measure(healed, bench=[speed(1500)])
    assert on("small", "healed", "again") == "healed"
    assert said("small", "healed", "again").why.endswith("as most was measured of it against `dense`")
    measure(folder, bench=[speed(1500)])
    assert on("small", "healed", "again") == "healed"
    assert "the others that were measured as fully lead to it" in said("again", "healed", "small").why
    assert said("small").why == "", "of one there is no choice"


def test_of_several_ends_it_is_on_the_smallest_without_a_loss(folder: Path) -> None:
    for name, parameters, value in (("large", 90, 0.93), ("little", 50, 0.88), ("tiny", 20, 0.6)):
        measure(write(Path(name), "decompose", parameters=parameters), evaluate=[quality(value, against=0.9)])
    assert on("large", "little", "tiny") == "little"
    assert (
        "of the 3 that no other was made from, it is the smallest that shows no loss of top1"
        in said("large", "little", "tiny").why
    )
    for name, value in (("large", 0.7), ("little", 0.8)):
        measure(Path(name), evaluate=[quality(value, against=0.9)])
    assert on("large", "little", "tiny") == "little"
    assert said("tiny", "little").why.endswith("it loses least top1")
    for name in ("large", "little", "tiny"):
        measure(Path(name), bench=[speed(1500)])
    assert on("large", "little", "tiny") == "tiny"
    assert said("tiny", "little").why.endswith("it is the smallest")


def test_times_that_are_none_do_no_harm(folder: Path) -> None:
    for at in (10**30, -(10**30), 0):
        entry: dict[str, Any] = quality(0.6, against=0.9, at=at)
        measure(folder, evaluate=[entry])
        assert not any("measured on" in each for each in said().on)
