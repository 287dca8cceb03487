"""The demo trains once, runs the real steps on what it trained, and shows one table."""

import json
from pathlib import Path

import pytest

import peftc as package
from peftc.errors import SourceError
from peftc.steps import demo as demo_step


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model, a shorter training and the fewest rounds."""
    monkeypatch.setattr(demo_step, "ARGUMENTS", {**demo_step.ARGUMENTS, "embed_dim": 32, "depth": 2})
    monkeypatch.setattr(demo_step, "EPOCHS", 1)
    monkeypatch.setattr(demo_step, "HEALING", 1)
    monkeypatch.setattr(demo_step, "BENCH_ROUNDS", 5)


def test_the_chain_runs_and_ends_in_one_table(quick: None, tmp_path: Path) -> None:
    import timm

    report = demo_step.demo(output_dir=tmp_path, device="cpu")
    (table,) = report.tables
    assert list(table.columns)[-3:] == ["top1", "change against dense", "speed-up"]
    assert [row[1] for row in table.rows] == ["dense", *demo_step.STAGES]
    assert not any("not measured" in str(cell) for row in table.rows for cell in row), "all in one run each"
    assert report.notes[0].startswith("`") and "% of the parameters of `dense-seed-0`" in report.notes[0]
    assert [table.columns[0], len(report.details)] == ["name", 1]
    again_table = package.compare([each["folder"] for each in report.data["stages"][1:]]).tables[0]
    assert [*again_table.rows] == [*table.rows], "what `compare` prints"
    stages = report.data["stages"]
    assert stages[1]["parameters"] < stages[0]["parameters"] and stages[1]["macs"] < stages[0]["macs"]
    schema = json.loads((Path(package.__file__).parent / "report.schema.json").read_text())
    pytest.importorskip("jsonschema").validate(report.to_json(), schema)
    dense = Path(stages[0]["folder"])
    assert all(path.stat().st_mode & 0o044 for path in tmp_path.rglob("*")), "as the user's mask has it"
    config = json.loads((dense / "config.json").read_text())
    network = timm.create_model(config["architecture"], num_classes=10, **config["model_args"])
    timm.models.load_checkpoint(network, str(dense / "model.safetensors"), strict=True)

    before = (dense / "model.safetensors").stat().st_mtime_ns
    again = demo_step.demo(output_dir=tmp_path, device="cpu")
    assert (dense / "model.safetensors").stat().st_mtime_ns == before
    assert any("already trained" in note for note in again.notes)
    assert [stage["accuracy"] for stage in again.data["stages"]] == [stage["accuracy"] for stage in stages]


def test_a_folder_of_something_else_is_left_alone(quick: None, tmp_path: Path) -> None:
    (tmp_path / "dense-seed-0").mkdir()
    (tmp_path / "dense-seed-0" / "thesis.txt").write_text("mine")
    with pytest.raises(SourceError, match="no trained model"):
        demo_step.demo(output_dir=tmp_path, device="cpu")
    assert (tmp_path / "dense-seed-0" / "thesis.txt").read_text() == "mine"
