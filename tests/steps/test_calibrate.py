"""Statistics are collected once, survive a kill, and serve any number of decompositions as if collected by each."""

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc as public
from peftc.calibration import collection
from peftc.calibration.lanes import LANES
from peftc.errors import ArtifactError, DataError, PlanError, UsageError, WeightError
from peftc.methods.weighted import Moment, weighted
from peftc.models import write
from peftc.steps.calibrate import calibrate
from peftc.steps.decompose import decompose
from peftc.steps.evaluate import evaluate
from peftc.steps.show import show
from peftc.store import manifest
from tests.conftest import promised
from tests.forked import forked
from tests.networks import WORDS, ranks

DIGITS: dict[str, Any] = {"data": "sklearn:digits", "calibration_samples": 64}
FACTORS = (".up.weight", ".down.weight", ".up.bias")


@pytest.fixture(scope="module")
def stats(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics for kfac of the small ViT on 64 digits."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    calibrate(tiny_vit, output_dir=folder, **DIGITS)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty texts of two to forty words, so that a batch of them needs padding."""
    path = tmp_path_factory.mktemp("texts") / "train.csv"
    lines = [
        " ".join(WORDS[(3 * row + at * (row + 1)) % len(WORDS)] for at in range(2 + row % 39)) for row in range(60)
    ]
    path.write_text("\n".join(["text", *(line.replace(",", "") for line in lines)]) + "\n")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_factors(ours: Path, theirs: Path) -> None:
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys() and any(name.endswith(FACTORS) for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# -- what is collected ------------------------------------------------------------------------------------------------


def test_statistics_of_every_eligible_module_lie_in_one_folder(tiny_vit: Path, tmp_path: Path) -> None:
    report = public.calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS)
    record = manifest.read(tmp_path / "stats")
    assert set(record.files) == {"statistics.safetensors", "statistics.json"} and record.modules == {}
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]
    note = json.loads((tmp_path / "stats" / "statistics.json").read_text())
    assert note["method"] == "kfac" and note["needs"] == ["output_gradient_gram", "second_moment"]
    assert note["samples"] == 64 and note["data"]["split"] == "train"
    assert {about["rows"] for about in note["modules"].values()} == {64 * 17}  # 16 patches and a class token
    assert len(note["modules"]) == 8 and report.data["modules"] == note["modules"]
    qkv = load_file(tmp_path / "stats" / "statistics.safetensors")["blocks.0.attn.qkv.input.covariance"]
    assert qkv.shape == (32, 32) and torch.linalg.eigvalsh(qkv.double()).min() > -1e-5
    for word in ("`--method kfac`", "split `train`"):
        assert any(word in note for note in report.notes), word
    assert report.summary["next"].startswith(f"`peftc decompose {tiny_vit} --statistics {tmp_path / 'stats'} --ratio")


def test_padding_counts_for_nothing(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    for size in (1, 16):  # alone no text is padded
        calibrate(tiny_bert, data=str(texts), batch_size=size, output_dir=tmp_path / str(size))
    one, many = (load_file(tmp_path / name / "statistics.safetensors") for name in ("1", "16"))
    notes = [json.loads((tmp_path / name / "statistics.json").read_text()) for name in ("1", "16")]
    assert notes[0]["modules"] == notes[1]["modules"] and notes[0]["samples"] == 60
    inputs = [name for name in one if ".input." in name or ".output." in name]
    assert inputs
    for name in inputs:  # gradients are of drawn predictions, and the draws go by batch
        assert torch.allclose(one[name], many[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("data", ["text", "generated:8"])
def test_windows_of_a_language_model(tiny_llama: Path, texts: Path, tmp_path: Path, data: str) -> None:
    spec = str(texts) if data == "text" else data
    report = calibrate(tiny_llama, data=spec, max_length=16, output_dir=tmp_path / "stats")
    rows = {about["rows"] for about in report.data["modules"].values()}
    assert rows == {report.data["samples"] * 16}
    if data != "text":
        assert report.data["samples"] == 8
    cut = decompose(tiny_llama, statistics=tmp_path / "stats", ratio=0.5, output_dir=tmp_path / "small")
    assert any(ranks(cut).values())


def test_images_in_no_class_folders_calibrate_and_measure_nothing(tiny_vit: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for shade in range(6):
        Image.new("RGB", (40, 36), (shade * 40, 90, 200)).save(tmp_path / "photos" / f"{shade}.png")
    report = calibrate(tiny_vit, data=str(tmp_path / "photos"), output_dir=tmp_path / "stats")
    assert report.data["samples"] == 6
    cut = decompose(tiny_vit, data=str(tmp_path / "photos"), ratio=0.5, output_dir=tmp_path / "small")
    assert any(ranks(cut).values()) and "quality" not in cut.data
    with pytest.raises(DataError, match="has no class folders and no label column of"):
        evaluate(tiny_vit, data=str(tmp_path / "photos"))
    with pytest.raises(DataError, match="has no class folders and no label column of"):
        decompose(tiny_vit, data=str(tmp_path / "photos"), ratio=0.5, max_drop=0.1, output_dir=tmp_path / "gated")


def test_generated_text_is_no_longer_than_the_model_takes(tiny_llama: Path, tmp_path: Path) -> None:
    report = calibrate(tiny_llama, data="generated:2", output_dir=tmp_path / "stats")
    assert {about["rows"] for about in report.data["modules"].values()} == {2 * 64}


def test_a_budget_of_tokens_stops_early(tiny_vit: Path, tmp_path: Path) -> None:
    report = calibrate(tiny_vit, output_dir=tmp_path / "stats", calibration_tokens=400, **DIGITS)
    rows = report.data["modules"]["blocks.0.attn.qkv"]["rows"]
    assert 400 <= rows < 64 * 17 and report.data["samples"] == rows // 17
    note = json.loads((tmp_path / "stats" / "statistics.json").read_text())
    assert note["collected"]["statistics"]["request"]["tokens"] == 400


def test_too_few_rows_warn_with_the_number_that_is_needed(tiny_vit: Path, tmp_path: Path) -> None:
    few = calibrate(tiny_vit, data="sklearn:digits", calibration_samples=2, output_dir=tmp_path / "few")
    said = few.warnings
    assert len(said) == 1 and "`blocks.*.attn.proj`, `blocks.*.attn.qkv`, " in said[0]  # one for all of these numbers
    assert "34 calibration rows for 32 features" in said[0]
    assert "about 128 are needed, here 8 samples" in said[0]
    assert not calibrate(tiny_vit, output_dir=tmp_path / "enough", **DIGITS).warnings
    cut = decompose(tiny_vit, statistics=tmp_path / "few", ratio=0.5, dry_run=True)
    assert said[0] in cut.warnings


def test_a_dry_run_writes_nothing(tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = calibrate(tiny_vit, dry_run=True, **DIGITS)
    assert len(report.data["eligible"]) == 8 and report.artifact is None
    assert not list(tmp_path.iterdir())


# -- many decompositions from one folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "whitened"])
def test_factors_are_those_of_a_calibration_on_the_spot(
    tiny_vit: Path, stats: Path, tmp_path: Path, method: str
) -> None:
    for ratio in (0.4, 0.6):
        there = decompose(
            tiny_vit, statistics=stats, method=method, ratio=ratio, output_dir=tmp_path / f"there-{ratio}"
        )
        here = decompose(
            tiny_vit, **DIGITS, method=method, ratio=ratio, sensitivity=0, output_dir=tmp_path / f"here-{ratio}"
        )
        assert ranks(there) == ranks(here) and any(ranks(here).values())
        if method == "auto":
            same_factors(tmp_path / f"there-{ratio}", tmp_path / f"here-{ratio}")
            assert there.data["modules"] == here.data["modules"]


def test_texts_and_convolutions_too(tiny_bert: Path, tiny_resnet: Path, texts: Path, tmp_path: Path) -> None:
    for name, model, options in (
        ("bert", tiny_bert, {"data": str(texts)}),
        ("resnet", tiny_resnet, DIGITS | {"conv_method": "channel"}),
    ):
        conv = {key: value for key, value in options.items() if key == "conv_method"}
        calibrate(model, output_dir=tmp_path / f"{name}-stats", **options)
        decompose(
            model, statistics=tmp_path / f"{name}-stats", ratio=0.5, output_dir=tmp_path / f"{name}-there", **conv
        )
        decompose(model, ratio=0.5, sensitivity=0, output_dir=tmp_path / f"{name}-here", **options)
        same_factors(tmp_path / f"{name}-there", tmp_path / f"{name}-here")


def test_the_same_request_is_already_done_and_another_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    first = calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS)
    before = promised(tmp_path / "stats")
    again = calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS)
    assert any("already done" in note for note in again.notes)
    assert again.data["modules"] == first.data["modules"] and promised(tmp_path / "stats") == before
    with pytest.raises(ArtifactError, match="another request"):
        calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS, seed=1)
    calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS, seed=1, overwrite=True)
    assert promised(tmp_path / "stats") != before


def test_modules_that_were_not_calibrated_stay_dense_and_say_so(tiny_vit: Path, tmp_path: Path) -> None:
    calibrate(tiny_vit, output_dir=tmp_path / "stats", skip=["mlp"], **DIGITS)
    report = decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5, output_dir=tmp_path / "small")
    why = {row["name"]: row["reason"] for row in report.data["dense"]}
    assert why["blocks.0.mlp.fc1"] == "it was left out when statistics were collected"
    assert set(ranks(report)) == {f"blocks.{at}.attn.{name}" for at in (0, 1) for name in ("qkv", "proj")}
    with pytest.raises(ArtifactError, match="none of the modules that are to be factored") as refusal:
        decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5, skip=["attn"], output_dir=tmp_path / "none")
    assert "--include" in str(refusal.value) and not (tmp_path / "none").exists()
    one = decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5, skip=["blocks.0"], output_dir=tmp_path / "one")
    assert one.artifact is not None  # fewer modules than were calibrated


def test_the_id_of_what_is_made_says_how_it_was_calibrated(tiny_vit: Path, stats: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, statistics=stats, ratio=0.5, output_dir=tmp_path / "small")
    calibrate(tiny_vit, output_dir=tmp_path / "other", skip=["mlp"], **DIGITS)
    with pytest.raises(ArtifactError, match="another request"):
        decompose(tiny_vit, statistics=tmp_path / "other", ratio=0.5, output_dir=tmp_path / "small")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_statistics_of_another_model_are_refused(tiny_vit: Path, stats: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(tiny_vit, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["head.bias"] = state["head.bias"] + 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="collected on another model"):
        decompose(other, statistics=stats, ratio=0.5, output_dir=tmp_path / "out")
    decompose(tiny_vit, rank=4, skip=["mlp"], output_dir=tmp_path / "first")  # the base is the same, the model is not
    with pytest.raises(ArtifactError, match="collected on another model") as refusal:
        decompose(tmp_path / "first", statistics=stats, ratio=0.5, output_dir=tmp_path / "out")
    assert "peftc calibrate" in str(refusal.value) and not (tmp_path / "out").exists()


def test_an_artifact_is_calibrated_as_what_it_has_become(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, rank=4, skip=["mlp"], output_dir=tmp_path / "first")
    calibrate(tmp_path / "first", output_dir=tmp_path / "stats", **DIGITS)
    decompose(tmp_path / "first", statistics=tmp_path / "stats", ratio=0.5, output_dir=tmp_path / "there")
    decompose(tmp_path / "first", **DIGITS, ratio=0.5, sensitivity=0, output_dir=tmp_path / "here")
    same_factors(tmp_path / "there", tmp_path / "here")
    with pytest.raises(ArtifactError, match="collected on another model"):
        decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5, output_dir=tmp_path / "out")


def test_a_folder_without_statistics_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, rank=4, output_dir=tmp_path / "small")
    with pytest.raises(ArtifactError, match="holds no statistics") as refusal:
        decompose(tiny_vit, statistics=tmp_path / "small", ratio=0.5)
    assert "peftc calibrate MODEL" in str(refusal.value)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        decompose(tiny_vit, statistics=tmp_path, ratio=0.5)


def test_a_damaged_folder_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    calibrate(tiny_vit, output_dir=tmp_path / "stats", **DIGITS)
    note = tmp_path / "stats" / "statistics.json"
    note.write_text("!" + note.read_text()[1:])
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5)
    note.unlink()
    with pytest.raises(ArtifactError, match=r"(lacks the file|cannot read).*statistics\.json"):
        decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5)


def test_a_method_that_asks_for_more_is_refused(tiny_vit: Path, stats: Path) -> None:
    with pytest.raises(ArtifactError, match="lacks `input_magnitude`") as refusal:
        decompose(tiny_vit, statistics=stats, method="asvd", ratio=0.5)
    assert "`--method kfac`" in str(refusal.value) and "--method METHOD" in str(refusal.value)


def test_other_forms_of_convolutions_are_refused(tiny_resnet: Path, tmp_path: Path) -> None:
    calibrate(tiny_resnet, output_dir=tmp_path / "stats", conv_method="channel", **DIGITS)
    with pytest.raises(ArtifactError, match="as `channel`, not as `spatial`") as refusal:
        decompose(tiny_resnet, statistics=tmp_path / "stats", ratio=0.5, output_dir=tmp_path / "out")
    assert "--conv-method channel" in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_method_without_statistics_needs_no_calibration(tiny_vit: Path, stats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`--method svd` needs no statistics"):
        calibrate(tiny_vit, output_dir=tmp_path / "stats", method="svd", **DIGITS)
    with pytest.raises(UsageError, match="of no use here"):
        decompose(tiny_vit, statistics=stats, method="svd", ratio=0.5)


@pytest.mark.parametrize(
    ("data", "why"), [("nowhere", "there is no data"), ("generated:8", "cannot draw text"), ("text", "it reads image")]
)
def test_data_that_does_not_fit_is_refused(tiny_vit: Path, texts: Path, tmp_path: Path, data: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        calibrate(tiny_vit, data=str(texts) if data == "text" else data, output_dir=tmp_path / "stats")
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range_and_missing_data_are_refused(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    for option, value in (("calibration_samples", 0), ("calibration_tokens", 0), ("batch_size", 0)):
        with pytest.raises(UsageError, match=f"`--{option.replace('_', '-')}` is 0"):
            calibrate(tiny_vit, data="sklearn:digits", output_dir=tmp_path / "stats", **{option: value})
    result = peftc("calibrate", tiny_vit, "-o", tmp_path / "stats")
    assert result.exit_code == 2 and "--data" in result.stderr
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite_are_refused(tiny_vit: Path, tmp_path: Path) -> None:
    import shutil

    large = shutil.copytree(tiny_vit, tmp_path / "large")
    state = {name: tensor * 1e30 if "mlp" in name else tensor for name, tensor in tensors(tiny_vit).items()}
    save_file(state, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match="NaN or infinite outputs on the calibration set"):
        calibrate(large, output_dir=tmp_path / "stats", **DIGITS)
    assert not (tmp_path / "stats").exists() and not (tmp_path / "stats.partial").exists()


# -- it is no model ---------------------------------------------------------------------------------------------------


def test_statistics_are_no_model(tiny_vit: Path, stats: Path, tmp_path: Path) -> None:
    for use in (
        lambda: public.load(stats),
        lambda: evaluate(stats, data="sklearn:digits"),
        lambda: evaluate(tiny_vit, data="sklearn:digits", against=str(stats)),
        lambda: decompose(stats, ratio=0.5, output_dir=tmp_path / "out"),
        lambda: calibrate(stats, output_dir=tmp_path / "out", **DIGITS),
    ):
        with pytest.raises(ArtifactError, match="holds statistics of a model, not a model") as refusal:
            use()
        assert f"--statistics {stats}" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_show_prints_statistics_and_the_lines_that_collect_them(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    words = ["--data", "sklearn:digits", "--calibration-samples", 24, "--calibration-tokens", 300, "--batch-size", 4]
    made = peftc("calibrate", tiny_vit, *words, "--image-size", 32, "--skip", "fc2", "-o", tmp_path / "stats")
    assert (made.exit_code, made.stdout) == (0, f"{tmp_path / 'stats'}\n"), made.stderr
    shown = show(tmp_path / "stats")
    facts = dict(shown.tables[0].rows)
    assert "samples of split `train` of `sklearn:digits`" in facts["calibrated on"] and "kfac" in facts["for"]
    assert "weights" not in facts and facts["statistics"].endswith("kB")
    assert [row[0] for row in shown.tables[1].rows] == ["blocks.*.attn.proj", "blocks.*.attn.qkv", "blocks.*.mlp.fc1"]
    assert not any("fc2" in name for name in shown.data["statistics"]["modules"])
    decompose(tiny_vit, statistics=tmp_path / "stats", ratio=0.5, bias_correction=False, output_dir=tmp_path / "small")
    for name, again in (("stats", "01-calibrate"), ("small", "01-decompose")):
        lines = show(tmp_path / name, commands=True).lines
        for line in lines:
            done = peftc(*(str(tmp_path / word) if word[:3] == "01-" else word for word in shlex.split(line)[1:]))
            assert done.exit_code == 0, done.stderr
        assert promised(tmp_path / name) == promised(tmp_path / again), lines


def test_a_decomposition_with_data_is_rebuilt_by_its_line(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    decompose(tiny_vit, **DIGITS, ratio=0.5, output_dir=tmp_path / "small")
    (line,) = show(tmp_path / "small", commands=True).lines
    assert "--data sklearn:digits --calibration-samples 64" in line and "--batch-size" not in line
    done = peftc(*(tmp_path / "again" if word == "01-decompose" else word for word in shlex.split(line)[1:]))
    assert done.exit_code == 0, done.stderr
    assert promised(tmp_path / "again") == promised(tmp_path / "small")


def test_a_limited_memory_collects_the_same_and_is_part_of_the_line(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    words = ["--data", "sklearn:digits", "--calibration-samples", 24, "--max-memory", "4GB", "-o", tmp_path / "bound"]
    made = peftc("calibrate", tiny_vit, *words)
    assert made.exit_code == 0, made.stderr
    calibrate(tiny_vit, output_dir=tmp_path / "free", data="sklearn:digits", calibration_samples=24)
    bound, free = (load_file(tmp_path / name / "statistics.safetensors") for name in ("bound", "free"))
    assert bound.keys() == free.keys() and all(torch.equal(bound[key], free[key]) for key in free)
    (line,) = show(tmp_path / "bound", commands=True).lines
    assert "--max-memory 4000000000" in line
    done = peftc(*(tmp_path / "again" if word == "01-calibrate" else word for word in shlex.split(line)[1:]))
    assert done.exit_code == 0, done.stderr
    assert promised(tmp_path / "again") == promised(tmp_path / "bound")
    with pytest.raises(PlanError, match="`--max-memory` 1 MB is too little to calibrate"):
        calibrate(tiny_vit, output_dir=tmp_path / "no", data="sklearn:digits", max_memory="1MB")
    assert not (tmp_path / "no").exists()


def test_the_project_names_model_and_data(peftc, tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(f'model = "{tiny_vit}"\ndata = "sklearn:digits"\ncalibration-samples = 16\n')
    done = peftc("calibrate", "-o", "stats")
    assert (done.exit_code, done.stdout) == (0, "stats\n"), done.stderr
    assert json.loads(Path("stats/statistics.json").read_text())["samples"] == 16
    assert not Path("runs").exists()  # no model comes out, so it has no place in the chain


# -- interruptions ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from peftc.calibration import lanes
from peftc.steps.calibrate import calibrate
save, left = lanes.save, int(sys.argv[3])
def kill(path, sums):
    global left
    save(path, sums)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
lanes.save = kill
calibrate(sys.argv[1], output_dir=sys.argv[2], data="sklearn:digits", calibration_samples=64)
"""


def test_a_kill_loses_no_finished_part_and_changes_no_byte(
    tiny_vit: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = forked(tiny_vit, tmp_path / "out", 2, code=KILLED)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "out.partial" / "work").iterdir()) == [
        "lane-0-0.safetensors", "lane-0-1.safetensors",
    ]  # fmt: skip
    lanes, collector = [], collection.Collector
    monkeypatch.setattr(collection, "Collector", lambda *given, **keep: lanes.append(keep) or collector(*given, **keep))
    calibrate(tiny_vit, output_dir=tmp_path / "out", **DIGITS)
    assert lanes.count({}) == LANES - 2
    assert promised(tmp_path / "out") == promised(stats)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_after_the_last_part_needs_no_forward_pass(
    tiny_vit: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_vit, output_dir=tmp_path / "out", **DIGITS)
    monkeypatch.setattr(collection, "Collector", interrupted)
    calibrate(tiny_vit, output_dir=tmp_path / "out", **DIGITS)
    assert promised(tmp_path / "out") == promised(stats)


def test_bytes_that_change_on_the_way_are_noticed(tiny_vit: Path, tmp_path: Path, monkeypatch) -> None:
    from peftc.store import artifact

    write_json = artifact.write_json

    def flipped(path: Path, value: Any) -> dict[str, Any]:
        entry = write_json(path, value)
        if path.name == "statistics.json":
            path.write_bytes(b" " + path.read_bytes()[1:])
        return entry

    monkeypatch.setattr(artifact, "write_json", flipped)
    with pytest.raises(ArtifactError, match="does not reload as it was written"):
        calibrate(tiny_vit, output_dir=tmp_path / "out", **DIGITS)
    assert not list(tmp_path.iterdir())


# -- modules that the outputs hardly depend on ------------------------------------------------------------------------


def test_a_multiple_of_the_identity_scales_the_losses_and_no_gradient_leaves_next_to_none() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, 9, generator=generator), torch.randn(40, 9, generator=generator)
    moment = Moment((rows.T @ rows).double())
    plain = weighted(weight, moment)
    four, none = (
        weighted(weight, moment, torch.tensor(4.0).double()),
        weighted(weight, moment, torch.zeros(6, 6).double()),
    )
    assert torch.allclose(four.losses(), 4 * plain.losses())
    assert not none.losses().any()
    for found in (four, none):
        assert torch.equal(found.truncate(3).factors.up, plain.truncate(3).factors.up)
        assert torch.equal(found.truncate(3).factors.down, plain.truncate(3).factors.down)
