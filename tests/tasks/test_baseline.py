"""A drop is judged against the earliest model of a chain with the same head, on samples that no step has read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftc as package
from peftc.errors import ArtifactError, DataError
from peftc.report import figure
from peftc.store import artifact
from tests.conftest import rewritten
from tests.networks import INPUT, VIT, save_timm

FEW: dict[str, Any] = {"data": "sklearn:digits", "steps": 2, "num_samples": 40, "held_out": 0, "device": "cpu"}
DIGITS: dict[str, Any] = {"data": "sklearn:digits", "num_samples": 40, "device": "cpu"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain whose second step gives a new head: dense (5 classes) > small > tuned (10 classes) > cut."""
    site = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(site)
        Path("dense").mkdir()
        save_timm(Path("dense"), "vit_tiny_patch16_224", VIT, INPUT)
        package.decompose("dense", ratio=0.7, output_dir="small")
        package.finetune("small", output_dir="tuned", **FEW)
        package.prune_layers("tuned", keep=3, score="magnitude", output_dir="cut")
        package.prune_layers("cut", keep=2, score="magnitude", output_dir="shorter")
    return site


@pytest.fixture
def chain(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(written, tmp_path / "chain")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["cut", "shorter"])
def test_the_base_is_what_gave_the_head(chain: Path, name: str) -> None:
    report = package.evaluate(chain / name, against="base", **DIGITS)
    assert report.data["against"]["name"] == "tuned"
    assert any("tuned`, the earliest model of the chain with the same head and task" in note for note in report.notes)


def test_speed_and_comparisons_take_the_base_that_quality_takes(chain: Path) -> None:
    package.evaluate("cut", against="base", **DIGITS)
    assert package.bench("cut", against="base", rounds=5, batch_size=2, device="cpu").data["against"]["name"] == "tuned"
    package.export("cut", format="torch-export", output_dir="release")
    for named in (["cut", "release"], ["tuned", "cut", "release"]):
        models = package.compare(named).data["models"]
        assert [model["name"] for model in models] == ["tuned", "cut", "release"], "and no row for what no head is of"
        assert [model["base"] for model in models] == [None, "tuned", "tuned"]
        tuned, cut, release = models
        assert tuned["quality"] and tuned["speed"] and cut["change"] and cut["speedup"]
        assert cut["share"] == release["share"] == cut["parameters"] / tuned["parameters"] < 1


def test_what_has_a_head_of_its_own_is_timed_beside_the_recorded_base(chain: Path) -> None:
    found = package.bench("tuned", against="base", rounds=5, batch_size=2, device="cpu")
    assert found.data["against"]["name"] == "dense"
    notes = package.compare(["tuned"]).notes
    assert not any("peftc evaluate tuned" in note for note in notes), "nothing before it answers the same question"


def test_without_a_new_head_the_base_is_the_recorded_one(chain: Path) -> None:
    report = package.evaluate(chain / "small", against="base", data=str(few_classes(chain)), device="cpu")
    assert report.data["against"]["name"] == "dense"


def few_classes(folder: Path) -> Path:
    """Return images of five classes, as the dense model tells them apart."""
    from PIL import Image

    for name in range(5):
        (folder / "few" / str(name)).mkdir(parents=True)
        for shade in (10, 90):
            Image.new("RGB", (32, 32), (shade, 40 * name, 200)).save(folder / "few" / str(name) / f"{shade}.png")
    return folder / "few"


def test_the_step_that_gave_the_head_has_no_base(chain: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing before `tuned` has its head") as refusal:
        package.evaluate(chain / "tuned", against="base", **DIGITS)
    assert "--against MODEL" in str(refusal.value)


def gone(chain: Path) -> None:
    shutil.rmtree(chain / "tuned")


def moved(chain: Path) -> None:
    (chain / "tuned").rename(chain.parent / "elsewhere")


def another(chain: Path) -> None:
    shutil.rmtree(chain / "tuned")
    shutil.copytree(chain / "small", chain / "tuned")


def forgotten(chain: Path) -> None:
    artifact.write_json(chain / "cut" / "result.json", {})


@pytest.mark.parametrize("change", [gone, moved, another, forgotten])
def test_a_base_that_is_not_there_is_refused_with_what_to_name(
    peftc: Any, chain: Path, change: Callable[[Path], None]
) -> None:
    change(chain)
    refused = peftc("evaluate", chain / "cut", "--data", "sklearn:digits", "--num-samples", 20, "--against", "base")
    assert refused.exit_code == 1 and "--against MODEL" in refused.stderr, refused.stderr


def test_a_chain_is_found_where_it_was_moved_to(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = chain.rename(chain.parent / "moved")
    monkeypatch.chdir(there.parent)
    assert package.evaluate(there / "cut", against="base", **DIGITS).data["against"]["name"] == "tuned"


def test_a_base_of_another_head_is_refused_where_no_step_says_so(chain: Path) -> None:
    """Artifacts of earlier versions do not say which step gave them a head."""
    rewritten(chain / "tuned" / "peftc.json", lambda value: [step.pop("new_head", None) for step in value["steps"]])
    with pytest.raises(ArtifactError, match="has another head than `tuned`"):
        package.evaluate(chain / "tuned", against="base", **DIGITS)


@pytest.mark.parametrize("step", ["decompose", "distill", "finetune", "prune_layers", "export"])
def test_the_gate_of_every_step_is_judged_against_the_base(chain: Path, step: str) -> None:
    how: dict[str, Any] = {
        "decompose": {"ratio": 0.9, "method": "svd", "data": "sklearn:digits", "num_samples": 30},
        "distill": FEW, "finetune": FEW | {"head": "keep"}, "export": {"format": "torch-export", "rounds": 5},
        "prune_layers": {"keep": 1, "data": "sklearn:digits", "num_samples": 30, "score": "magnitude"},
    }[step]  # fmt: skip
    how = {"data": "sklearn:digits", **how}
    report = getattr(package, step)(chain / "shorter", output_dir=chain / "out", max_drop=1.0, **how)
    assert report.data["quality"]["against"]["name"] == "tuned"
    (gate,) = [gate for gate in report.gates if gate.option == "--max-drop"]
    difference = report.data["quality"]["against"]["difference"]["top1"]["value"]
    assert gate.value == pytest.approx(-difference)
    shutil.rmtree(chain / "tuned")
    with pytest.raises(ArtifactError, match="step 2 of the chain of `shorter` is not there") as refusal:
        getattr(package, step)(chain / "shorter", output_dir=chain / "other", max_drop=1.0, **how)
    named = "--teacher MODEL" if step == "distill" else "--against MODEL"
    assert named in str(refusal.value) and not (chain / "other").exists()


def test_a_gate_that_the_samples_cannot_be_sure_of_says_so(chain: Path) -> None:
    report = package.evaluate("cut", against="base", **DIGITS)
    difference = report.data["against"]["difference"]["top1"]
    drop, most = -difference["value"], -difference["low"]
    assert drop < most, "few samples"
    doubt = f"a drop of up to {figure(most)} is not excluded by 40 samples"
    for limit, said in ((most + 0.01, False), ((drop + most) / 2, True), (drop - 0.01, False)):
        judged = package.evaluate("cut", against="tuned", max_drop=limit, **DIGITS)
        assert judged.passed is (limit > drop)
        assert any(doubt in note for note in judged.notes) is said, (limit, judged.notes)
        assert any(note.endswith("about 160 would") for note in judged.notes) is said, "half as wide takes four times"


def test_a_folder_called_base_is_named(peftc: Any, chain: Path) -> None:
    shutil.copytree("small", "base")
    words = ["cut", "--data", "sklearn:digits", "--num-samples", 20]
    for done in (peftc("evaluate", *words, "--against", "base"), peftc("bench", "cut", "--against", "base")):
        assert done.exit_code == 0 and "the folder here is `--against ./base`" in done.stderr, done.stderr
    assert "./base" not in peftc("evaluate", *words, "--against", "./base").stderr.replace("against ./base", "")


# samples that a model knows


def test_figures_on_samples_that_taught_the_model_are_called_so(peftc: Any, chain: Path) -> None:
    report = package.evaluate(chain / "shorter", data="sklearn:digits@train", num_samples=100, device="cpu")
    assert report.data["seen"] is True
    assert any("`finetune` calibrated or taught the model" in text for text in report.warnings)
    assert "that the model knows" in report.tables[0].title
    assert package.evaluate(chain / "shorter", **DIGITS).data["seen"] is False
    words = ["evaluate", chain / "shorter", "--data", "sklearn:digits@train"]
    refused = peftc(*words, "--min-quality", 0)
    assert refused.exit_code == 1 and "no gate is judged on samples that the model knows" in refused.stderr
    shown = peftc(*words, "-q", "--json", "--num-samples", 20)
    assert json.loads(shown.stdout)["seen"] is True and "warning: " in shown.stderr


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [f"the {'cat' if at % 2 else 'dog'} sat {at} .,{'positive' if at % 2 else 'negative'}" for at in range(60)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "renamed.csv").write_text("text,label\n" + "\n".join(lines[20:]) + "\n")
    others = [f"a {'bird' if at % 2 else 'tree'} ran {at} .,{'positive' if at % 2 else 'negative'}" for at in range(60)]
    (tmp_path / "others.csv").write_text("text,label\n" + "\n".join(others) + "\n")
    return tmp_path


def test_samples_are_known_by_what_they_hold_and_not_by_their_name(texts: Path, tiny_bert_classifier: Path) -> None:
    tuned = texts / "tuned"
    how: dict[str, Any] = {"steps": 1, "held_out": 0, "device": "cpu", "head": "new"}
    package.finetune(tiny_bert_classifier, data=str(texts / "texts.csv"), output_dir=tuned, **how)
    seen = {
        name: package.evaluate(tuned, data=str(texts / name)).data["seen"] for name in ("renamed.csv", "others.csv")
    }
    assert seen == {"renamed.csv": True, "others.csv": False}
    (texts / "texts.csv").write_text((texts / "others.csv").read_text())
    assert package.evaluate(tuned, data=str(texts / "texts.csv")).data["seen"] is False, "the same name, other samples"


def test_what_statistics_were_collected_on_is_known(chain: Path) -> None:
    package.calibrate(chain / "tuned", data="sklearn:digits@test", calibration_samples=32, output_dir=chain / "stats")
    package.decompose(chain / "tuned", statistics=chain / "stats", ratio=0.9, output_dir=chain / "thin")
    assert package.evaluate(chain / "thin", **DIGITS).data["seen"] is True


def test_a_gate_on_what_is_calibrated_on_is_refused_before_the_work(texts: Path, tiny_bert_classifier: Path) -> None:
    how: dict[str, Any] = {"ratio": 0.5, "data": str(texts / "texts.csv"), "task": "text-classification"}
    with pytest.raises(DataError, match="no gate is judged on samples that the model knows: `decompose`"):
        package.decompose(tiny_bert_classifier, output_dir=texts / "no", max_drop=1.0, **how)
    assert not (texts / "no").exists()
    assert package.decompose(tiny_bert_classifier, output_dir=texts / "yes", **how).data["quality"]["seen"] is True


def test_images_are_known_under_other_names(chain: Path) -> None:
    few = few_classes(chain)
    package.decompose("dense", data=str(few), ratio=0.5, output_dir="thin")
    other = chain / "holiday" / "test"
    for path in few.rglob("*.png"):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / path.parent.name / f"copy-{path.name}")
    assert package.evaluate("thin", data=str(other.parent), device="cpu").data["seen"] is True
