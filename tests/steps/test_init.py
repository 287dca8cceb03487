"""The project file that `init` writes: true to what was asked, accepted as it stands and with every proposal taken."""

import re
import sys
from pathlib import Path

import pytest

import peftc as package
from peftc.errors import DataError, OutputError, SourceError
from peftc.report import AMOUNTS, scaled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content() -> dict:
    return tomllib.loads(Path("peftc.toml").read_text())


def test_the_file_names_model_data_and_a_chain_that_can_run(peftc, tiny_vit: Path) -> None:
    result = peftc("init", tiny_vit, "--data", "sklearn:digits")
    assert (result.exit_code, result.stdout) == (0, "peftc.toml\n"), result.stderr
    assert "is a VisionTransformer of timm" in result.stderr
    assert "`sklearn:digits` has `train`, `test`" in result.stderr
    found = content()
    assert (found["model"], found["data"]) == (str(tiny_vit), "sklearn:digits")
    assert found["chain"] == ["decompose", "distill"], "which measures on the test split"
    foreseen = peftc("run", "--dry-run")
    assert foreseen.exit_code == 0, foreseen.stderr
    done = peftc("decompose", "--ratio", 0.5, "--calibration-samples", 32, "--num-samples", 20)
    assert done.stdout == "runs/01-decompose\n", done.stderr


def test_without_a_test_split_a_step_of_its_own_measures(tiny_vit: Path) -> None:
    Path("rows.csv").write_text("text,label\na,b\n")
    package.init(tiny_vit, data="rows.csv")
    assert content()["chain"] == ["decompose", "distill", "evaluate"]
    assert content()["evaluate"] == {"against": "base"}


def test_the_gate_that_is_proposed_fits_the_model(tiny_vit: Path) -> None:
    package.init(tiny_vit)
    most = scaled(re.findall(r'#max-params = "(.*?)"', Path("peftc.toml").read_text())[0], AMOUNTS)
    whole = sum(each.numel() for each in package.load(tiny_vit).parameters())
    assert 0.5 * whole < most < whole


@pytest.mark.parametrize(
    "words",
    [[], ["--data", "sklearn:digits"], ["--data", "sklearn:digits@test"]],
    ids=["without data", "with data", "with one split"],
)
def test_every_proposal_is_one_that_the_commands_take(peftc, tiny_vit: Path, words: list[str]) -> None:
    assert peftc("init", tiny_vit, *words).exit_code == 0
    text = Path("peftc.toml").read_text()
    proposals = re.findall(r"^#(?=[\[a-z])", text, re.M)
    assert len(proposals) >= 5
    text = re.sub(r"^#(?=[\[a-z])", "", text, flags=re.M)
    Path("peftc.toml").write_text(text.replace('chain = ["decompose",', 'chain = ["decompose", "prune-layers",'))
    result = peftc("run", "--dry-run")
    assert result.exit_code == 0, result.stderr


def test_without_data_the_chain_reads_none(peftc, tiny_vit: Path) -> None:
    assert peftc("init", tiny_vit).exit_code == 0
    assert content()["chain"] == ["decompose", "bench"]
    assert "data" not in content()


def test_a_file_that_is_there_is_kept(peftc, tiny_vit: Path) -> None:
    Path("peftc.toml").write_text('model = "mine"\n')
    result = peftc("init", tiny_vit)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "`peftc.toml` is there already" in result.stderr
    assert "--overwrite" in result.stderr
    assert content() == {"model": "mine"}
    assert peftc("init", tiny_vit, "--overwrite").exit_code == 0
    assert content()["model"] == str(tiny_vit)


def test_what_is_not_there_is_refused_before_anything_is_written(tiny_vit: Path) -> None:
    with pytest.raises(SourceError, match="there is no model at `./nowhere`"):
        package.init("./nowhere")
    with pytest.raises(DataError, match="there is no data at `nowhere`"):
        package.init(tiny_vit, data="nowhere")
    assert list(Path().iterdir()) == []


def test_how_to_build_the_model_is_kept(peftc, tiny_vit: Path) -> None:
    folder = Path('a "b" \\ é')
    folder.mkdir()
    (folder / "w.safetensors").write_bytes((tiny_vit / "model.safetensors").read_bytes())
    sizes = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "num_classes=10"]
    words = [word for size in sizes for word in ("--arch-set", size)]
    words += ["--arch", "timm:vit_tiny_patch16_224", "--preprocess", "mean=0.5,0.4,0.3"]
    result = peftc("init", folder / "w.safetensors", *words)
    assert result.exit_code == 0, result.stderr
    found = content()
    assert found["model"] == str(folder / "w.safetensors")
    assert (found["arch"], found["arch-set"]["depth"]) == ("timm:vit_tiny_patch16_224", 2)
    assert found["preprocess"] == {"mean": [0.5, 0.4, 0.3]}
    assert peftc("decompose").stdout == "runs/01-decompose\n"


def test_it_is_a_function_too(tiny_vit: Path) -> None:
    Path("peftc.toml").write_text("")
    with pytest.raises(OutputError, match="is there already"):
        package.init(tiny_vit)
    report = package.init(tiny_vit, data="sklearn:digits", overwrite=True)
    assert (report.lines, report.data["splits"]) == (["peftc.toml"], ["train", "test"])
