"""What a step says in a few lines: what was asked and what came of it, as it would be typed and read."""

from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc.errors import ArtifactError
from peftc.pages import brief
from peftc.report import Report

TOP1 = {"value": 0.9, "low": 0.85, "high": 0.94}


def quality(low: float, high: float, *, higher: bool = True) -> dict[str, Any]:
    difference = {"top1": {"value": (low + high) / 2, "low": low, "high": high}}
    against = {"name": "dense", "metrics": {"top1": TOP1}, "difference": difference}
    data = {"samples": 1360, "split": "test"}
    return {
        "metric": "top1",
        "metrics": {"top1": TOP1},
        "data": data,
        "seen": False,
        "higher_is_better": higher,
        "against": against,
    }


@pytest.mark.parametrize(
    ("text", "written"),
    [("--ratio 3/4, convex", "--ratio 0.75, convex"), ("--ratio 2/3", "--ratio 2/3"), ("--plan a/1/b", "--plan a/1/b")],
)
def test_shares_are_written_as_they_are_typed(text: str, written: str) -> None:
    assert brief.decimal(text) == written


def test_a_summary_says_what_there_is_and_nothing_else() -> None:
    report = Report("merge", notes=["already done: `x` was written by the same request"])
    brief.tell(report, "make it whole")
    assert report.summary == {"asked": "make it whole", "already done": "`x` was written by the same request"}
    report = Report(
        "decompose", {"size": {"before": {"parameters": 1000}, "after": {"parameters": 250, "bytes": 1000}}}
    )
    brief.tell(report, "a", {"factored": "1 of 2"}, then=brief.heal(Path("a folder"), None))
    assert report.summary["size"] == "250 of 1,000 parameters (25.0 %), 1 kB"
    assert report.summary["next"] == "`peftc distill 'a folder' --data DATA`"
    report = Report("distill", {"quality": quality(-0.03, -0.01)})
    brief.tell(report, "a")
    assert report.summary["quality"] == (
        "top1 0.9 [0.85, 0.94] on 1,360 samples of split test; `dense` has 0.9, the difference is -0.02 [-0.03, -0.01]"
    )


@pytest.mark.parametrize(
    ("low", "high", "higher", "so"),
    [
        (-0.03, -0.01, True, "worse than `dense` by 0.02 of top1"),
        (0.01, 0.03, True, "better than `dense` by 0.02 of top1"),
        (0.01, 0.03, False, "worse than `dense` by 0.02 of top1"),
        (-0.01, 0.03, True, "no difference to `dense` is shown"),
    ],
)
def test_a_difference_is_said_in_words(low: float, high: float, higher: bool, so: str) -> None:
    report = Report("evaluate", quality(low, high, higher=higher))
    brief.compare(report, "`peftc evaluate`")
    assert report.summary["so"].startswith(so)


def test_a_training_that_changed_nothing_says_so() -> None:
    held = {"scores": [[0, 0.9], [5, 0.8]], "best": 0}
    report = Report("distill", {"steps": 5, "seconds_per_step": 0.1, "held_out": held})
    brief.tell(report, "a")
    assert report.summary["trained"].endswith("0.9 before, 0.9 after step 0: unchanged")
    held |= {"scores": [[0, -7.5], [5, -6.0]], "best": 5, "metric": "perplexity", "negated": True}
    brief.tell(report, "a")
    assert report.summary["trained"].endswith("; perplexity on held-out samples 7.5 before, 6 after step 5")
    report.data["held_out"]["samples"] = 33
    report.notes.append("no test split in `photos`: 299 samples are learnt from")
    brief.tell(report, "train")
    assert "; perplexity on 33 held-out samples 7.5 before" in report.summary["trained"]
    assert report.summary["data"] == report.notes[-1]
    held |= {"before": {"student": -7.5, "teacher": -5.25}}
    brief.tell(report, "a")
    assert report.summary["trained"].endswith(" 7.5 before, 6 after step 5; the teacher has 5.25")


@pytest.mark.parametrize("step", ["decompose", "calibrate", "prune_layers"])
def test_a_finished_folder_whose_result_is_gone_is_still_done(step: str, tiny_vit: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"data": "sklearn:digits", "calibration_samples": 8, "device": "cpu"}
    how: dict[str, dict[str, Any]] = {
        "decompose": {"ratio": 0.5},
        "calibrate": few,
        "prune_layers": {"score": "magnitude", "keep": 1},
    }
    for _ in range(2):
        report = getattr(peftc, step)(tiny_vit, output_dir=tmp_path / "out", **how[step])
        (tmp_path / "out" / "result.json").unlink(missing_ok=True)
    assert "already done" in report.summary


def test_an_export_whose_result_is_gone_cannot_be_told(tiny_vit: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"format": "timm", "output_dir": tmp_path / "out", "rounds": 5, "batch_size": 2}
    peftc.export(tiny_vit, **how)
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(ArtifactError, match="its `result.json` is gone"):
        peftc.export(tiny_vit, **how)
