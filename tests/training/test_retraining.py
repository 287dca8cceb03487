"""prune-layers --retrain: the bytes of `prune-layers` and `finetune` one after the other, in one step that resumes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc.errors import PeftcError, UsageError
from peftc.pruning import choice
from peftc.store import manifest
from peftc.training import retraining

CPU: dict[str, Any] = {"device": "cpu"}
PRUNE: dict[str, Any] = {"score": "block-influence", "keep": 2, **CPU}


def same(one: Path, other: Path) -> bool:
    """Whether all that two folders promise is the same."""
    names = ["peftc.json", *manifest.read(one).files]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_it_is_pruning_and_finetuning_one_after_the_other(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(
        vit, data=images, retrain=True, steps=4, learning_rate=3e-3, output_dir=tmp_path / "out", **PRUNE
    )
    peftc.prune_layers(vit, data=images, output_dir=tmp_path / "pruned", **PRUNE)
    peftc.finetune(
        tmp_path / "pruned", data=images, head="keep", steps=4, learning_rate=3e-3, output_dir=tmp_path / "two", **CPU
    )
    assert same(tmp_path / "out", tmp_path / "two")
    record = manifest.read(tmp_path / "out")
    assert [step["request"]["command"] for step in record.steps] == ["prune-layers", "finetune"]
    assert len(record.kept_layers) == 2 and report.artifact == tmp_path / "out"
    assert not (tmp_path / "out.partial").exists()


def test_the_report_has_the_model_the_pruned_one_and_the_trained_one(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(vit, data=images, retrain=True, steps=30, output_dir=tmp_path / "out", **PRUNE)
    peftc.prune_layers(vit, data=images, output_dir=tmp_path / "pruned", **PRUNE)
    shown = next(table for table in report.tables if table.title == "quality")
    assert [row[0] for row in shown.rows] == [report.data["quality"]["against"]["name"], "pruned", "trained again"]
    tops = [
        peftc.evaluate(each, data=f"{images}@test", **CPU).data["metrics"]["top1"]
        for each in (vit, tmp_path / "pruned", tmp_path / "out")
    ]
    found = report.data["quality"], report.data["retrain"]["before"]
    assert [found[0]["against"]["metrics"]["top1"], found[1]["top1"], found[0]["metrics"]["top1"]] == tops
    assert report.data["retrain"]["steps"] == 30 and len(report.data["layers"]) == 4
    assert report.data["size"]["after"]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert not any(note.startswith(retraining.UNTRAINED) for note in report.notes)
    base, own = peftc.compare([tmp_path / "out"]).data["models"]
    assert [base["parameters"], own["parameters"]] == [
        report.data["size"][when]["parameters"] for when in ("before", "after")
    ]


def test_the_command_says_it_all_and_its_manifest_rebuilds_it(
    vit: Path, images: str, tmp_path: Path, peftc, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "prune-layers", vit, "--data", images, "--keep", 2, "--score", "block-influence", "--retrain", "--steps", 2,
        "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    first = peftc(*words)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{tmp_path / 'out'}\n"
    monkeypatch.setattr("peftc.steps.prune_layers.finetune", lambda *_, **__: pytest.fail("nothing is trained twice"))
    again = peftc(*words, "--json")
    assert again.exit_code == 0, again.output
    assert any("already done" in note for note in json.loads(again.stdout)["notes"])
    refused = peftc(*words[:-4], "--learning-rate", 0.5, *words[-4:])
    assert refused.exit_code == 1 and "retrain was" in refused.output
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    lines = peftc("show", "out", "--commands").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["prune-layers", "finetune"]
    for line in lines:
        assert peftc(*shlex.split(line)[1:]).exit_code == 0
    assert same(tmp_path / "out", tmp_path / "02-finetune")


def test_interrupted_in_the_training_it_does_not_prune_again(
    vit: Path, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"data": images, "retrain": True, "steps": 2, **PRUNE}

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("peftc.steps.prune_layers.finetune", stopped)
        with pytest.raises(KeyboardInterrupt):
            peftc.prune_layers(vit, output_dir=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patched:
        patched.setattr(choice, "choose", stopped)
        report = peftc.prune_layers(vit, output_dir=tmp_path / "out", **asked)
    assert len(report.data["layers"]) == 4 and not any("already done" in note for note in report.notes)
    peftc.prune_layers(vit, output_dir=tmp_path / "whole", **asked)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_delta_is_trained_by_its_own_method_and_stays_a_delta(vit: Path, images: str, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"data": images, "steps": 2, **CPU}
    peftc.finetune(vit, method="adapter", settings={"rank": 2}, delta=True, output_dir=tmp_path / "task", **quick)
    peftc.prune_layers(tmp_path / "task", data=images, retrain=True, steps=2, output_dir=tmp_path / "out", **PRUNE)
    task, out = manifest.read(tmp_path / "task"), manifest.read(tmp_path / "out")
    assert out.steps[-1]["request"]["method"] == "adapter" and out.delta
    assert {entry["settings"]["rank"] for entry in out.adapters.values()} == {2}
    assert out.weight_bytes < task.weight_bytes
    with pytest.raises(UsageError, match="`task` has updates of `adapter`, and `--method` is `head`"):
        peftc.prune_layers(
            tmp_path / "task", data=images, retrain=True, method="head", output_dir=tmp_path / "no", **PRUNE
        )
    peftc.finetune(vit, delta=True, output_dir=tmp_path / "lora", **quick)
    peftc.prune_layers(
        tmp_path / "lora", data=images, retrain=True, method="head", steps=1, output_dir=tmp_path / "whole",
        delta=False, **PRUNE,
    )  # fmt: skip
    whole = manifest.read(tmp_path / "whole")
    assert whole.steps[-1]["request"]["method"] == "head" and not whole.delta and not whole.adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": "1"}, "trains on samples of the task"),
        ({"data": "images", "drop": "1", "method": "loar"}, "unknown value `loar` for `--method`"),
        ({"data": "images", "drop": "1", "epochs": 1, "steps": 2}, "say how long to train"),
        ({"data": "images", "drop": "1", "learning_rate": -1.0}, "`--learning-rate` is -1.0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_pruned(
    vit: Path, images: str, tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "choose", None)
    options = {**options, **({"data": images} if "data" in options else {})}
    with pytest.raises(UsageError, match=message):
        peftc.prune_layers(vit, retrain=True, output_dir=tmp_path / "out", **options, **CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_leaves_nothing(
    vit: Path, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise PeftcError("the loss is not finite")

    monkeypatch.setattr("peftc.steps.prune_layers.finetune", failed)
    with pytest.raises(PeftcError, match="not finite"):
        peftc.prune_layers(vit, data=images, retrain=True, steps=2, output_dir=tmp_path / "out", **PRUNE)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_training_that_is_not_asked_for_are_named(vit: Path, tmp_path: Path) -> None:
    report = peftc.prune_layers(vit, drop="1", epochs=3, method="lora", output_dir=tmp_path / "out", **CPU)
    assert "nothing is trained: `--method`, `--epochs` act with `--retrain`" in report.notes
