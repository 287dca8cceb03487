"""export: what no format holds is refused with options that then work, before anything is written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftc
from peftc.errors import ExportError, PeftcError, UsageError
from tests.conftest import TEXTS
from tests.networks import BERT

QUICK: dict[str, Any] = {"rounds": 5, "batch_size": 1}
CPU: dict[str, Any] = {"steps": 1, "held_out": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    labels = ["negative", "neutral", "positive"]
    path.write_text("text,label\n" + "".join(f'"{text}",{labels[at % 3]}\n' for at, text in enumerate(TEXTS * 8)))
    return str(path)


@pytest.fixture(scope="module")
def models(
    tiny_vit: Path, tiny_bert_classifier: Path, tiny_clip: Path, texts: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Artifacts that some formats cannot hold: factored ones, and ones with updates that stay."""
    place = tmp_path_factory.mktemp("models")
    peftc.decompose(tiny_vit, ratio=0.6, output_dir=place / "factors")
    peftc.decompose(tiny_clip, ratio=0.5, output_dir=place / "two networks")
    peftc.decompose(tiny_bert_classifier, ratio=0.5, output_dir=place / "text")
    images: dict[str, Any] = {"data": "sklearn:digits", "num_samples": 40, "image_size": 32, **CPU}
    for method in ("adapter", "convpass"):
        peftc.finetune(tiny_vit, method=method, output_dir=place / method, **images)
    peftc.finetune(
        place / "text", method="adapter", skip=["*pooler*"], data=texts, output_dir=place / "beside factors", **CPU
    )  # fmt: skip
    return {path.name: path for path in place.iterdir()}


def refused(model: Any, tmp_path: Path, **options: Any) -> PeftcError:
    """Return the refusal of an export that leaves nothing behind."""
    with pytest.raises(PeftcError) as caught:
        peftc.export(model, output_dir=tmp_path / "refused", **{**QUICK, **options})
    assert not list(tmp_path.glob("refused*"))
    return caught.value


@pytest.mark.parametrize("name", ["adapter", "convpass", "beside factors"])
def test_updates_that_stay_are_not_said_to_be_multiplied_out(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    hints = set()
    for word in ("timm", "hf", "hf-code", "onnx", "safetensors"):
        for dense in (False, True):
            if word in ("onnx", "safetensors") and not dense:
                continue
            error = refused(models[name], tmp_path, format=word, dense=dense)
            hints.add(str(error.hint))
            if dense:
                assert "cannot be merged into a weight" in str(error)
    assert hints == {"use `--format onnx`", "leave `--dense` out, and use `--format onnx`"}


@pytest.mark.parametrize("name", ["convpass", "beside factors"])
def test_and_the_format_that_is_named_instead_holds_them(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = peftc.export(models[name], format="onnx", output_dir=tmp_path / "out", **QUICK)
    assert report.data["deviation"] < 1e-5


def test_plain_weights_are_said_to_belong_to_updates(models: dict[str, Path], tmp_path: Path) -> None:
    peftc.export(models["convpass"], format="safetensors", output_dir=tmp_path / "out", **QUICK)
    names = load_file(tmp_path / "out/model.safetensors")
    updates = json.loads((tmp_path / "out/export.json").read_text())["about"]["updates"]
    assert updates.keys() == {name.partition(".update.")[0] for name in names if ".update." in name}
    assert {each["method"] for each in updates.values()} == {"convpass"}


@pytest.mark.parametrize(
    ("name", "word", "plain", "kept"),
    [
        ("factors", "hf", "timm", "`--format timm` or `--format onnx`"),
        ("two networks", "onnx", "hf", "`--format hf` or `--format hf-code`"),
        ("text", "timm", "hf", "`--format hf`, `--format hf-code` or `--format onnx`"),
    ],
)
@pytest.mark.usefixtures("quick_exports")
def test_factors_are_multiplied_out_or_kept(
    name: str, word: str, plain: str, kept: str, models: dict[str, Path], tmp_path: Path
) -> None:
    hint = str(refused(models[name], tmp_path, format=word).hint)
    assert hint == f"multiply the factors out with `--format {plain} --dense`, or keep them with {kept}"
    if name == "two networks":  # the formats of the others have tests of their own
        for at, (other, dense) in enumerate(re.findall(r"`--format ([a-z-]+)( --dense)?`", hint)):
            peftc.export(models[name], format=other, dense=bool(dense), output_dir=tmp_path / str(at), **QUICK)
            assert (tmp_path / str(at) / "export.json").is_file()


def test_updates_alone_have_no_factors_to_multiply_out(models: dict[str, Path], tmp_path: Path) -> None:
    error = refused(models["adapter"], tmp_path, format="peft", dense=True)
    assert isinstance(error, UsageError) and error.hint == "leave one of them out"
    assert refused(models["adapter"], tmp_path, format="peft").hint == "export the whole model: `--format safetensors`"


class Drawing(torch.nn.Module):
    """It hides some of what it reads, other things each time."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x * (torch.rand_like(x) > 0.5))


def test_a_network_that_draws_at_random_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftc.formats.safetensors.artifact.write_weights", lambda *_: pytest.fail("written"))
    error = refused(Drawing(), tmp_path, format="safetensors")
    assert isinstance(error, ExportError) and "draws at random in its forward pass" in error.what
    assert error.why and error.why.startswith("two runs on the same input differ by")
    assert error.hint and error.hint.startswith("no format takes it as it is")


def test_so_is_a_masked_autoencoder_of_transformers(tmp_path: Path) -> None:
    import transformers

    sizes = {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    config = transformers.ViTMAEConfig(**BERT, **sizes, decoder_num_attention_heads=2, decoder_intermediate_size=32)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    for word in ("hf", "torch-export"):
        assert "draws at random in its forward pass" in refused(tmp_path / "mae", tmp_path, format=word).what


def test_dropout_that_acts_while_it_trains_is_no_drawing(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train()
    report = peftc.export(network, format="torch-export", output_dir=tmp_path / "out", **QUICK)
    assert report.data["deviation"] < 1e-6


def test_outputs_that_are_no_numbers_are_not_laid_at_the_door_of_the_export(tmp_path: Path) -> None:
    class Endless(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).abs().log().log()

    error = refused(Endless(4, 4), tmp_path, format="safetensors")
    assert error.what.endswith("it gives NaN or infinite outputs itself")
