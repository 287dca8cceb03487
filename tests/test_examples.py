"""The examples run as they stand: two pipelines, a network of your own, a method of another package."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.methods.registry import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGE = EXAMPLES / "third_party_method"
METHOD = "peftc_randomised_svd"


def environment(**extra: str) -> dict[str, str]:
    """Return the variables of a shell in which `peftc` is this interpreter's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def run(script: str, *words: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    line = ["bash", str(EXAMPLES / script), *map(str, words)]
    return subprocess.run(line, cwd=folder, env=environment(ROUNDS="5"), capture_output=True, text=True)


def check_pipeline(done: subprocess.CompletedProcess[str], out: Path, task: str) -> dict[str, Any]:
    """Check what both pipelines leave behind, and return the report on quality."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{out.name}/small"
    plan, quality, speed = (json.loads((out / f"{name}.json").read_text()) for name in ("plan", "quality", "speed"))
    factored = json.loads((out / "small" / "peftc.json").read_text())["modules"]
    assert {name: edit["rank"] for name, edit in factored.items()} == {
        name: rank for name, rank in plan["ranks"].items() if rank is not None
    }
    assert quality["task"] == task and "against" in quality
    assert speed["model"]["parameters"] < speed["against"]["parameters"]
    return quality


# an export in use


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(90, 61), (61, 97), (64, 64)])
def test_the_onnx_example_reads_a_photograph_as_timm_does(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    import runpy

    from PIL import Image
    from timm.data import create_transform

    image = Image.effect_noise(size, 90).convert("RGB")
    image.save(tmp_path / "photo.png")
    how = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "crop_pct": 0.9}
    found = runpy.run_path(str(EXAMPLES / "classify_onnx.py"))["pixels"](
        str(tmp_path / "photo.png"), {**how, "input_size": [3, 48, 48], "crop_mode": mode}
    )
    wanted = create_transform((3, 48, 48), **how, crop_mode=mode, is_training=False)(image)
    torch.testing.assert_close(torch.from_numpy(found)[0], wanted, rtol=0, atol=1e-6)


def test_the_onnx_example_names_the_class_of_an_export(tiny_vit: Path, tmp_path: Path) -> None:
    from PIL import Image

    import peftc

    pytest.importorskip("onnxruntime")
    peftc.export(tiny_vit, format="onnx", output_dir=tmp_path / "out", rounds=5)
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "photo.png")
    line = [sys.executable, str(EXAMPLES / "classify_onnx.py"), str(tmp_path / "out"), str(tmp_path / "photo.png")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = peftc.load(tiny_vit)(torch.from_numpy(_pixels(tmp_path / "photo.png", tmp_path / "out" / "export.json")))
    share = float(logits.detach().softmax(-1).max())
    assert done.stdout.strip().endswith(f": {int(logits.argmax())} ({share:.3f})")


def _pixels(photo: Path, about: Path) -> Any:
    import runpy

    how = json.loads(about.read_text())["about"]["preprocess"]
    return runpy.run_path(str(EXAMPLES / "classify_onnx.py"))["pixels"](str(photo), how)


# pipelines


@pytest.mark.pages
def test_the_timm_pipeline_runs(tiny_vit: Path, tmp_path: Path) -> None:
    done = run("timm_pipeline.sh", tiny_vit, "sklearn:digits", "out", folder=tmp_path)
    check_pipeline(done, tmp_path / "out", "image-classification")


@pytest.mark.pages
def test_the_transformers_pipeline_runs(tiny_bert_classifier: Path, tmp_path: Path) -> None:
    rows = [("the cat sang", "positive"), ("a dog ran", "negative"), ("the bird sat", "neutral")] * 4
    (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    done = run("transformers_pipeline.sh", tiny_bert_classifier, "test.csv", "out", folder=tmp_path)
    check_pipeline(done, tmp_path / "out", "text-classification")


@pytest.mark.pages
@pytest.mark.real
def test_the_transformers_pipeline_halves_a_sentence_model(minilm: Path, data_folder: Path, tmp_path: Path) -> None:
    data = data_folder / "sets/stsb_en/stsb-en-test.csv"
    done = run("transformers_pipeline.sh", minilm, data, "out", folder=tmp_path)
    quality = check_pipeline(done, tmp_path / "out", "sentence-similarity")
    assert quality["against"]["metrics"]["spearman"]["value"] == pytest.approx(0.8203, abs=5e-4)  # as published
    assert quality["metrics"]["spearman"]["value"] > 0.7


def test_a_pipeline_without_its_arguments_says_how_to_call_it(tmp_path: Path) -> None:
    done = run("transformers_pipeline.sh", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr and "MODEL DATA" in done.stderr


@pytest.mark.pages
def test_a_pipeline_stops_where_a_command_fails(tmp_path: Path) -> None:
    done = run("timm_pipeline.sh", "nowhere/at/all", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert [path.name for path in (tmp_path / "timm-pipeline").iterdir()] == []


# what a CI job runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the demo, trained just long enough to have something to lose."""
    from peftc.steps import demo

    folder = tmp_path_factory.mktemp("ci")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", 4)
        patch.setattr(demo, "STAGES", {"decompose": demo.STAGES["decompose"]})
        demo.demo(output_dir=folder, device="cpu")
    (folder / "dense-seed-0").rename(folder / "dense")
    return folder


def compress(folder: Path, out: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", str(EXAMPLES / "ci" / "compress.sh"), "dense", "sklearn:digits", out]
    variables = {"ROUNDS": "5", "STEPS": "2", "SAMPLES": "200", **variables}
    return subprocess.run(line, cwd=folder, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.pages
def test_the_script_of_ci_passes_where_the_gates_are_met(trained: Path) -> None:
    done = compress(trained, "released", MAX_DROP="1", KEEP="3")
    assert (done.returncode, done.stdout) == (0, "released/export\n"), done.stderr
    quality, speed = (json.loads((trained / "released" / f"{name}.json").read_text()) for name in ("quality", "speed"))
    assert quality["gates"] == [
        {"option": "--max-drop", "limit": 1, "value": quality["gates"][0]["value"], "passed": True}
    ]
    assert speed["model"]["parameters"] < 0.6 * speed["against"]["parameters"]


@pytest.mark.pages
def test_the_script_of_ci_fails_with_3_and_one_line_where_the_drop_is_over_the_gate(trained: Path) -> None:
    done = compress(trained, "refused", MAX_DROP="0.05", RATIO="0.05")
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gate --max-drop 0.05: 0.") and last.endswith(", not met")
    assert (trained / "refused" / "2-distill" / "peftc.json").is_file(), "what was made is kept, to look at"
    assert not (trained / "refused" / "export").exists()


def test_the_recipe_of_ci_is_one_that_runs(
    tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc-demo").mkdir()
    Path("peftc-demo/dense-seed-0").symlink_to(tiny_vit)
    foreseen = peftc("run", EXAMPLES / "ci" / "recipe.toml", "--dry-run", "--json")
    assert foreseen.exit_code == 0, foreseen.stderr
    steps = [each["step"] for each in json.loads(foreseen.stdout)["steps"]]
    assert steps == ["decompose", "distill", "prune-layers", "finetune", "evaluate", "bench", "export"]


def act(workflow: Path, workspace: Path, **variables: str) -> tuple[int, set[str]]:
    """Run a workflow's job as GitHub Actions does, but for `pip install` and the steps that are actions of their own.

    Args:
        workflow: its file.
        workspace: what was checked out; the files by which steps speak to each other lie beside it.
        variables: what an earlier step put into the environment.

    Returns:
        the first exit code that was not 0, and which paths were there for `upload-artifact`.
    """
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    files = {f"GITHUB_{name}": workspace.parent / name for name in ("ENV", "OUTPUT", "PATH", "STEP_SUMMARY")}
    files["GITHUB_ENV"].write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    code, kept = 0, set()
    for step in job["steps"]:
        if code and step.get("if") != "always()":
            continue
        if "upload-artifact" in step.get("uses", ""):
            kept = {path for path in step["with"]["path"].split() if (workspace / path).exists()}
        if "run" not in step or step["run"].startswith("pip install"):
            continue
        assert "${{" not in step["run"], "an expression that GitHub fills in"
        (script := workspace.parent / "step.sh").write_text(step["run"])
        earlier = dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
        said = {"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(workspace)}
        said |= {name: str(path) for name, path in files.items()} | job.get("env", {}) | earlier | step.get("env", {})
        options = ["--noprofile", "--norc", "-eo", "pipefail"] if step.get("shell") == "bash" else ["-e"]
        code = subprocess.run(["bash", *options, str(script)], cwd=workspace, env=environment(**said)).returncode
    return code, kept


def checked_out(place: Path, trained: Path) -> Path:
    """Return a repository as the workflow's head asks for it, with the model of the demo."""
    (place / "ci").mkdir(parents=True)
    for name in ("recipe.toml", "compress.sh"):
        (place / "ci" / name).write_bytes((EXAMPLES / "ci" / name).read_bytes())
    (place / "peftc-demo").mkdir()
    (place / "peftc-demo/dense-seed-0").symlink_to(trained / "dense")
    return place


@pytest.mark.pages
def test_the_workflow_of_ci_keeps_its_report_and_what_passed_and_fails_with_3_over_a_gate(
    trained: Path, tmp_path: Path
) -> None:
    small = {"OMP_NUM_THREADS": "1"}  # as every other test
    small |= {f"PEFTC_{word}_NUM_SAMPLES": "200" for word in ("DECOMPOSE", "DISTILL", "PRUNE_LAYERS", "FINETUNE")}
    small |= {f"PEFTC_{word}_STEPS": "2" for word in ("DISTILL", "FINETUNE")}
    small |= {f"PEFTC_{word}_ROUNDS": "5" for word in ("BENCH", "EXPORT")}
    workflow, first = EXAMPLES / "ci" / "compress.yml", checked_out(tmp_path / "first/work", trained)
    assert act(workflow, first, **small, PEFTC_EVALUATE_MAX_DROP="1") == (0, {"report.json", "release/"})
    report = json.loads((first / "report.json").read_text())
    assert [each["state"] for each in report["steps"]] == ["done"] * 7
    assert (first / "release/model.safetensors").is_file()
    gate = next(each for each in report["gates"] if each["option"] == "--max-drop")
    assert gate["passed"] and gate["limit"] == 1

    second = checked_out(tmp_path / "second/work", trained)  # of another change; the cache brings `runs` back
    shutil.copytree(first / "runs", second / "runs")
    limit = str(gate["value"] - 0.01)
    assert act(workflow, second, **small, PEFTC_EVALUATE_MAX_DROP=limit) == (3, {"report.json"})
    states = {each["step"]: each["state"] for each in json.loads((second / "report.json").read_text())["steps"]}
    assert states == {
        **dict.fromkeys(("decompose", "distill", "prune-layers", "finetune"), "up to date"),
        "evaluate": "gate not met", **dict.fromkeys(("bench", "export"), "not run"),
    }  # fmt: skip


# a network of your own


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_a_network_of_your_own_is_decomposed(
    depth: int, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Callable[..., Any]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    from cifar_resnet import CifarResNet

    torch.manual_seed(0)
    network = CifarResNet(depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, "resnet.th")
    words = ["python:cifar_resnet:CifarResNet", "--arch-set", f"depth={depth}", "--weights", "resnet.th"]
    done = peftc("decompose", *words, "--ratio", 0.5, "-o", "small")
    assert (done.exit_code, done.stdout) == (0, "small\n"), done.stderr
    refused = peftc("bench", "small")
    assert refused.exit_code == 1 and "--allow-code" in refused.stderr

    import peftc as package

    images = torch.randn(2, 3, 32, 32)
    assert package.load("small", allow_code=True)(images).shape == (2, 10)


# a method of another package


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The package as an installer leaves it, without one: its folder and its metadata on the path."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / f"{METHOD}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    for folder in (PACKAGE, metadata.parent):
        monkeypatch.syspath_prepend(folder)
    yield f"{PACKAGE}{os.pathsep}{metadata.parent}"
    sys.modules.pop(METHOD, None)


def test_the_method_of_another_package_is_listed(installed: str) -> None:
    line = [sys.executable, "-m", "peftc", "methods", "decompose", "--json"]
    done = subprocess.run(line, env=environment(PYTHONPATH=installed), capture_output=True, text=True, check=True)
    assert list(json.loads(done.stdout)["methods"]["decompose"]) == [*METHODS["decompose"], "randomised_svd"]
    shown = subprocess.run(line[:-1], env=environment(PYTHONPATH=installed), capture_output=True, text=True, check=True)
    assert "randomised-svd" in shown.stdout
    assert [point.name for point in entry_points(group="peftc.decompose")] == ["randomised_svd"]


@pytest.mark.parametrize("allocation", ["uniform", "global", "energy", "convex"])
def test_the_method_of_another_package_decomposes(
    allocation: str, installed: str, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peftc: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--method", "randomised_svd", "--set", "power_iterations=1", "--allocation", allocation]
    done = peftc("decompose", tiny_vit, "--ratio", 0.5, *words, "-o", "small")
    assert (done.exit_code, done.stdout) == (0, "small\n"), done.stderr
    request = json.loads(Path("small/peftc.json").read_text())["steps"][0]["request"]
    assert request["method"] == "randomised_svd" and request["settings"] == {"power_iterations": 1}


def test_its_settings_are_checked(installed: str, tiny_vit: Path, tmp_path: Path, peftc: Any) -> None:
    words = ["--method", "randomised_svd", "--set", "power=1", "-o", tmp_path / "small"]
    done = peftc("decompose", tiny_vit, "--ratio", 0.5, *words)
    assert done.exit_code == 2
    assert "`power_iterations` (2), `oversampling` (8), `seed` (0)" in done.stderr
    assert not (tmp_path / "small").exists()


@pytest.fixture
def randomised_svd(installed: str) -> Callable[..., Any]:
    from importlib import import_module

    return import_module(METHOD).randomised_svd


def with_spectrum(out: int, in_: int, exponent: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out * in_)
    k = min(out, in_)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator).double())[0] for side in (out, in_))
    return (left * torch.arange(1, k + 1).double() ** exponent) @ right.T


@pytest.mark.parametrize("exponent", [0, -0.5, -2])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (300, 20), (1, 32), (32, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_has_an_answer_with_its_true_error(
    shape: tuple[int, int], exponent: float, dtype: torch.dtype, randomised_svd: Callable[..., Any]
) -> None:
    weight = with_spectrum(*shape, exponent).to(dtype)
    spectrum = randomised_svd(weight)
    values = torch.linalg.svdvals(weight.double())
    assert (spectrum.values.diff() <= 0).all()
    for rank in range(1, min(shape) + 1):
        cut = spectrum.truncate(rank)
        assert cut.factors.up.shape == (shape[0], rank) and cut.factors.down.shape == (rank, shape[1])
        error = float(torch.linalg.norm(weight.double() - cut.factors.up.double() @ cut.factors.down.double()))
        assert error == pytest.approx(cut.error * float(torch.linalg.norm(weight)), abs=1e-5)
        assert error == pytest.approx(math.sqrt(float(spectrum.losses()[rank])), abs=1e-5)
        if rank <= shape[0] * shape[1] // sum(shape):  # where the sketch reaches
            assert error <= 1.02 * float(torch.linalg.norm(values[rank:])) + 1e-5
    assert error <= 1e-5, "full rank is not exact"


def test_power_iterations_bring_it_closer_to_the_best(randomised_svd: Callable[..., Any]) -> None:
    weight = with_spectrum(96, 64, -0.5)
    errors = [randomised_svd(weight, power_iterations=q, oversampling=0).truncate(30).error for q in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.001 * errors[-1]


def test_the_same_seed_gives_the_same_factors(randomised_svd: Callable[..., Any]) -> None:
    weight = with_spectrum(48, 32, -1)
    one, same, other = (randomised_svd(weight, seed=seed).truncate(8).factors.up for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# data of one's own


def test_a_folder_of_classes_is_cut_into_samples_to_train_and_to_test_on(tmp_path: Path) -> None:
    from PIL import Image

    from peftc.data import open_data, split_names

    for name in ("one digit", "two"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for at in range(10):
            Image.new("RGB", (8, 8), (20 * at, 0, 0)).save(tmp_path / "all" / name / f"{at}.png")
    script = EXAMPLES / "split.sh"
    done = subprocess.run([script, tmp_path / "all", tmp_path / "photos"], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("photos: 16 train, 4 test\n")
    subprocess.run([script, tmp_path / "all", tmp_path / "photos"], check=True)  # again changes nothing
    assert sorted(split_names(str(tmp_path / "photos"))) == ["test", "train"]
    sizes = {split: len(open_data(f"{tmp_path / 'photos'}@{split}")) for split in ("train", "test")}
    assert sizes == {"train": 16, "test": 4}
    refused = subprocess.run([script, tmp_path / "all"], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage:" in refused.stderr
