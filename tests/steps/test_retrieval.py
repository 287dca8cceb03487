"""Dual encoders go through every step: decomposed, calibrated, evaluated against what they were, and timed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftc.calibration.statistics import Collector, Sums
from peftc.data import open_data
from peftc.errors import DataError
from peftc.factors import sequential
from peftc.models import load
from peftc.options import Reading
from peftc.report import Report
from peftc.steps.bench import bench
from peftc.steps.decompose import decompose
from peftc.steps.evaluate import evaluate
from peftc.tasks.table import TASKS

TASK = TASKS["image-text-retrieval"]


@pytest.fixture(params=["tiny_clip", "tiny_blip"])
def dual(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def values(report: Report) -> dict[str, float]:
    return {name: figure["value"] for name, figure in report.data["metrics"].items()}


def compared(report: Report) -> bool:
    return not any("not compared" in each for each in report.warnings)


def test_recall_is_that_of_transformers_own_similarities(tiny_clip: Path, captioned: Path) -> None:
    model = load.load(tiny_clip)
    batch = TASK.encode(model, open_data(captioned, task=TASK.name), Reading()).batch(range(12))
    assert isinstance(batch.inputs, dict)
    assert len(set(batch.targets[:, 0].tolist())) == 12
    with torch.no_grad():
        similarity = model.module(**batch.inputs).logits_per_image.numpy()  # (images, texts)
    own = np.arange(12)
    assert values(evaluate(tiny_clip, data=captioned)) == {
        "text_to_image_r1": pytest.approx((similarity.argmax(0) == own).mean()),
        "image_to_text_r1": pytest.approx((similarity.argmax(1) == own).mean()),
        "text_to_image_r5": pytest.approx((np.argsort(-similarity, 0)[:5] == own).any(0).mean()),
        "image_to_text_r5": pytest.approx((np.argsort(-similarity, 1)[:, :5] == own[:, None]).any(1).mean()),
    }


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_no_figure(dual: Path, captioned: Path, batch_size: int) -> None:
    assert values(evaluate(dual, data=captioned, batch_size=batch_size)) == values(evaluate(dual, data=captioned))


def test_a_model_equals_itself_and_is_known_for_what_it_does(dual: Path, captioned: Path) -> None:
    report = evaluate(dual, data=captioned, against=dual)
    expected = [metric.name for metric in TASK.metrics][: 5 if dual.name.startswith("tiny_blip") else 4]
    assert list(report.data["metrics"]) == expected
    assert [each["value"] for each in report.data["against"]["difference"].values()] == [0] * len(expected)
    assert report.notes[0].startswith("task: `image-text-retrieval`, guessed from the class `")


def test_the_gate_judges_the_recall_of_images(dual: Path, captioned: Path) -> None:
    report = evaluate(dual, data=captioned, min_quality=0)
    assert [gate.value for gate in report.gates] == [values(report)["text_to_image_r1"]]


def test_an_image_with_three_captions_is_one_query_of_twelve(tmp_path: Path, tiny_clip: Path, captioned: Path) -> None:
    rows = (captioned / "test.csv").read_text().splitlines()[1:]
    rows += [f"{rows[0].split(',')[0]},{text}" for text in ("the big red house", "a blue tree")]
    lines = ["file_name,caption", *(f"{captioned}/{row}" for row in rows)]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    for name, share in values(evaluate(tiny_clip, data=tmp_path / "test.csv")).items():
        queries = 14 if name.startswith("text") else 12
        assert share * queries == pytest.approx(round(share * queries))


@pytest.mark.parametrize("options", [{}, {"method": "whitened"}, {"sequential": True}, {"joint": True}], ids=str)
def test_a_calibrated_dual_encoder_is_written_checked_and_measured(
    tmp_path: Path, dual: Path, captioned: Path, options: dict[str, Any]
) -> None:
    data = f"{captioned}@train"
    report = decompose(dual, output_dir=tmp_path / "small", ratio=0.5, data=data, device="cpu", **options)
    assert compared(report)
    assert report.data["quality"]["task"] == "image-text-retrieval"
    assert len({row["name"].split(".")[0] for row in report.data["modules"] if row["rank"]}) == 2  # both towers
    against = evaluate(tmp_path / "small", data=captioned, against="base").data["against"]
    assert against["name"] == dual.name


def test_a_pass_over_blip_ends_after_the_last_use_of_a_module(
    tmp_path: Path, tiny_blip: Path, captioned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of its text encoder sees the texts twice, fused with an image and alone."""
    rows: dict[str, int] = {}

    class Counting(Collector):
        @contextmanager
        def watching(self) -> Iterator[Sums]:
            with super().watching() as sums:
                yield sums
            rows.update(dict.fromkeys(self.sites, next(iter(sums.running.values())).count))

    monkeypatch.setattr(sequential, "Collector", Counting)
    data = f"{captioned}@train"
    decompose(tiny_blip, output_dir=tmp_path / "small", rank=4, data=data, sequential=True, device="cpu")
    layer = "text_encoder.encoder.layer.0"
    assert rows[f"{layer}.attention.self.query"] == 2 * rows[f"{layer}.crossattention.self.query"]


def test_a_plain_dual_encoder_is_written_checked_and_timed(tmp_path: Path, dual: Path) -> None:
    report = decompose(dual, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    assert compared(report)
    timed = bench(tmp_path / "small", against="base", device="cpu", batch_size=2, rounds=5).data
    assert timed["model"]["macs"] < timed["against"]["macs"]
    assert set(timed["input"]) == {"input_ids", "attention_mask", "pixel_values"}


def test_images_without_captions_are_refused_before_any_work(tmp_path: Path, tiny_clip: Path, captioned: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read[\s\S]*reads image-text inputs, and the data holds image"):
        decompose(tiny_clip, output_dir=tmp_path / "small", ratio=0.5, data=str(captioned / "images"), device="cpu")
    assert not (tmp_path / "small").exists()
