"""distill: the student learns what its teacher gives, the result reloads, and what does not fit is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import peftc
from peftc.data.augment import Seeds
from peftc.errors import ArtifactError, DataError, DivergenceError, PeftcError, UsageError
from peftc.models import load
from peftc.models.place import runnable
from peftc.nn import surgery
from peftc.options import Augment, Reading, Recipe
from peftc.report import figure
from peftc.store import manifest
from peftc.training import imitation, journal, loop, samples
from peftc.training.imitation import Imitation
from tests.calibration.test_memory import alone, launch
from tests.conftest import TEXTS
from tests.networks import save_timm

SHORT: dict[str, Any] = {"steps": 10, "batch_size": 16, "device": "cpu", "learning_rate": 1e-3}
DIGITS = "sklearn:digits"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes that differ in colour and place, 96 to learn from and 48 to test on."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", 96), ("test", 48)):
        labels = np.arange(number) % 10
        pixels = random.normal(size=(number, 3, 32, 32)).astype(np.float32)
        for at, label in enumerate(labels):
            pixels[at, label % 3, 3 * label : 3 * label + 3] += 2
        splits |= {f"x_{split}": pixels, f"y_{split}": labels}
    np.savez(folder / "images.npz", **splits)
    return folder / "images.npz"


@pytest.fixture(scope="module")
def student(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "small"
    peftc.decompose(tiny_vit, output_dir=folder, ratio=0.5, device="cpu")
    return folder


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(["text", *(f'"{text}"' for text in texts)]))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in surgery.tensors_of(load.load(model).module).items()}


def imitate(model: Any, teacher: Any, images: Path, asked: dict[str, float], labels: bool = True) -> Imitation:
    held = imitation.trainable(load.load(model))
    guide = runnable(load.load(teacher), device="cpu")
    given = samples.read(held, str(images), Reading(), labels=labels, held_out=0.1)
    return Imitation(held, guide, given, imitation.terms(asked, {}), asked.get("task", 0), imitation.pair(held, guide))


def test_the_result_reloads_and_everything_but_the_teacher_has_learnt(
    student: Path, tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    dense, before = (tiny_vit / "model.safetensors").read_bytes(), tensors(student)
    report = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), held_out=0, **SHORT)
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert (tiny_vit / "model.safetensors").read_bytes() == dense
    made = load.load(tmp_path / "out")
    assert made.manifest is not None
    assert [step["request"]["command"] for step in made.manifest.steps] == ["decompose", "distill"]
    assert made.manifest.modules == manifest.read(student).modules
    assert set(report.data["terms"]) == {"features", "perturbation", "task"}
    assert report.data["steps"] == 10 and report.data["quality"]["data"]["split"] == "test"
    lines = [json.loads(line) for line in (tmp_path / "out" / journal.LOG).read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 10
    with torch.no_grad():
        assert made.module(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_student_comes_nearer_to_its_teacher(student: Path, tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    peftc.distill(student, output_dir=tmp_path / "out", data=str(images), loss="features=1", **SHORT | {"steps": 60})
    gaps = []
    for model in (student, tmp_path / "out"):
        work = imitate(model, tiny_vit, images, {"features": 1.0})
        with torch.no_grad():
            work.student.module.eval()
            gaps.append(float(work.loss(work.student.module, work.batch(range(40)))["features"]))
    assert gaps[1] < 0.75 * gaps[0]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    peftc.decompose(tiny_vit, output_dir=tmp_path / "full", rank=32, device="cpu", include=["*"], skip=["head"])
    work = imitate(tiny_vit, tiny_vit, images, {"features": 1.0, "logits": 1.0, "embeddings": 1.0, "perturbation": 1.0})
    work.student.module.eval()
    found = work.loss(work.student.module, work.batch(range(8)))
    assert {name: float(value.detach()) for name, value in found.items()} == pytest.approx(
        dict.fromkeys(found, 0.0), abs=1e-6
    )


def test_the_perturbation_at_the_start_is_that_of_the_decomposition(
    student: Path, tiny_vit: Path, images: Path
) -> None:
    work = imitate(student, tiny_vit, images, {"perturbation": 1.0})
    found = float(work.loss(work.student.module, work.batch([0, 1]))["perturbation"].detach())
    dense, small = peftc.load(tiny_vit), peftc.load(student)
    gaps = []
    for name in manifest.read(student).modules:
        low, whole = small.get_submodule(name), dense.get_submodule(name)
        product = low.up.weight @ low.down.weight
        gaps.append(float((product - whole.weight).abs().max().detach()))
    assert found == pytest.approx(float(np.mean([max(0, gap - 1e-3) ** 2 for gap in gaps])), rel=1e-4)


@pytest.mark.parametrize("conv_method", ["spatial", "channel"])
def test_products_of_convolutions_stand_for_their_weights(
    tiny_resnet: Path, images: Path, tmp_path: Path, conv_method: str
) -> None:
    peftc.decompose(tiny_resnet, output_dir=tmp_path / "small", energy=1.0, conv_method=conv_method, device="cpu")
    peftc.decompose(tiny_resnet, output_dir=tmp_path / "half", ratio=0.5, conv_method=conv_method, device="cpu")
    work = imitate(tmp_path / "half", tiny_resnet, images, {"perturbation": 1.0})
    assert work.originals and work.originals.keys() == imitation.factored(work.student).keys()
    for name, weight in work.originals.items():
        product = imitation.weight_of(work.student, work.student.module, name)
        assert product.shape == weight.shape
        assert (product - weight).norm() < weight.norm()


def test_one_forward_of_each_gives_all_terms(student: Path, tiny_vit: Path, images: Path) -> None:
    asked = {"features": 1.0, "logits": 1.0, "embeddings": 1.0, "perturbation": 1.0, "task": 1.0}
    work = imitate(student, tiny_vit, images, asked)
    assert work.teacher is not None
    calls = {"student": 0, "teacher": 0}
    for name, module in (("student", work.student.module), ("teacher", work.teacher.module)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))  # type: ignore[misc]
    found = work.loss(work.student.module, work.batch(range(4)))
    assert calls == {"student": 1, "teacher": 1}
    assert found.keys() == asked.keys()
    assert not work.teacher.module.training
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in work.teacher.module.parameters())


def test_a_killed_run_resumes_to_the_same_bytes(student: Path, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    peftc.distill(student, output_dir=tmp_path / "whole", data=str(images), **SHORT)
    real, calls = Imitation.loss, iter(range(1000))

    def dying(self: Imitation, module: Any, batch: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(self, module, batch)

    monkeypatch.setattr(Imitation, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        peftc.distill(student, output_dir=tmp_path / "killed", data=str(images), **SHORT)
    monkeypatch.setattr(Imitation, "loss", real)
    assert not (tmp_path / "killed").exists()
    report = peftc.distill(student, output_dir=tmp_path / "killed", data=str(images), **SHORT)
    assert any(note.startswith("resumed at step") for note in report.notes)
    for name in ("model.safetensors", "peftc.json", journal.LOG):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    again = peftc.distill(student, output_dir=tmp_path / "killed", data=str(images), **SHORT)
    assert any("already done" in note for note in again.notes)
    with pytest.raises(ArtifactError, match="another request"):
        peftc.distill(student, output_dir=tmp_path / "killed", data=str(images), **SHORT | {"steps": 11})


def test_minutes_are_kept_as_steps(student: Path, images: Path, tmp_path: Path) -> None:
    options = {name: value for name, value in SHORT.items() if name != "steps"}
    report = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), minutes=0.002, **options)
    request = manifest.read(tmp_path / "out").steps[-1]["request"]
    assert request["minutes"] is None and request["steps"] == report.data["steps"] >= 1
    again = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), minutes=0.002, **options)
    assert any("already done" in note for note in again.notes)


def test_half_precision_is_trained_in_single_and_stored_as_it_was(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vit, tmp_path / "half")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "half" / "model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(path).items()}, path, metadata={"format": "pt"})
    peftc.distill(
        tmp_path / "half", output_dir=tmp_path / "out", teacher=tiny_vit, data=str(images), loss="features=1", **SHORT
    )
    assert {each.dtype for each in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_text_without_labels_teaches_vectors(tiny_bert: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.csv", TEXTS * 12)
    peftc.decompose(tiny_bert, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    options = SHORT | {"steps": 40, "learning_rate": 3e-4}
    report = peftc.distill(tmp_path / "small", output_dir=tmp_path / "out", data=str(tmp_path / "texts.csv"), **options)
    assert set(report.data["terms"]) == {"features", "perturbation", "embeddings"}
    assert "quality" not in report.data
    scores = dict(report.data["held_out"]["scores"])
    assert scores[40] > scores[0]


@pytest.mark.parametrize("fixture", ["tiny_bert_mlm", "tiny_llama"])
def test_language_models_learn_from_windows(fixture: str, request: Any, tmp_path: Path) -> None:
    model = request.getfixturevalue(fixture)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 40))
    peftc.decompose(model, output_dir=tmp_path / "small", ratio=0.6, device="cpu")
    report = peftc.distill(
        tmp_path / "small", output_dir=tmp_path / "out", data=str(tmp_path / "texts.txt"), max_length=16,
        loss={"features": 1, "logits": 1, "task": 1}, **SHORT,
    )  # fmt: skip
    assert set(report.data["terms"]) == {"features", "logits", "task"}
    scores = dict(report.data["held_out"]["scores"])
    assert scores[10] > scores[0]


def test_padding_does_not_change_the_loss_of_text(tiny_bert: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.csv", [TEXTS[0], " ".join(TEXTS), *TEXTS * 4])
    peftc.decompose(tiny_bert, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    asked = {"features": 1.0, "embeddings": 1.0}
    work = imitate(tmp_path / "small", tiny_bert, tmp_path / "texts.csv", asked)
    work.student.module.eval()
    with torch.no_grad():
        alone, beside = (
            float(work.loss(work.student.module, work.batch(several))["features"]) for several in ([0], [0, 1])
        )
        other = float(work.loss(work.student.module, work.batch([1]))["features"])
    assert beside == pytest.approx((alone + other) / 2, rel=1e-4)


def test_a_validation_split_is_held_out_and_the_test_split_never_read(tiny_vit: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays |= {
            f"x_{split}": random.normal(size=(20, 3, 32, 32)).astype(np.float32),
            f"y_{split}": np.arange(20) % 10,
        }
    np.savez(tmp_path / "images.npz", **arrays)
    model = imitation.trainable(load.load(tiny_vit))
    given = samples.read(model, str(tmp_path / "images.npz"), Reading(), labels=True, held_out=0.1)
    assert len(given.train) == 20 and given.held is not None and len(given.held) == 20
    assert given.about["split"] == "train"
    np.testing.assert_array_equal(given.held.batch([3]).inputs[0].numpy(), arrays["x_val"][3])
    np.savez(tmp_path / "two.npz", **{name: each for name, each in arrays.items() if "val" not in name})
    cut = samples.read(model, str(tmp_path / "two.npz"), Reading(), labels=True, held_out=0.1)
    assert cut.held is not None
    assert sorted([*cut.train.rows, *cut.held.rows]) == list(range(20)) and len(cut.held) == 2


def test_what_a_teacher_cannot_teach_is_said(student: Path, tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    report = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), **SHORT)
    assert any("the teacher is no better than" in warning for warning in report.warnings)  # its weights are random
    held = report.data["held_out"]
    assert held["before"]["student"] == dict(held["scores"])[0] and held["before"]["teacher"] > 0
    assert report.summary["trained"].endswith(f"; the teacher has {figure(held['before']['teacher'])}")


def test_terms_that_hardly_pull_are_named(student: Path, images: Path, tmp_path: Path) -> None:
    report = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), loss="features=1e-6,task=1", **SHORT)
    assert any("`features` weighed under 1%" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"loss": "feature=1"}, UsageError, "did you mean `--loss features`"),
        ({"loss": "features=x"}, UsageError, "write it as `--loss features=1,task=0.5`"),
        ({"loss": "features=-1"}, UsageError, "a weight is at least 0"),
        ({"settings": {"features.scale": True}}, UsageError, "`features` has no setting `scale`"),
        ({"settings": {"scale_free": True}}, UsageError, "names no term"),
        ({"held_out": 1.0}, UsageError, "in \\[0, 1\\)"),
        ({"epochs": 1.0}, UsageError, "say how long to train"),
        ({"data": "nowhere/"}, DataError, "there is no data at `nowhere/`"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_left(
    student: Path, images: Path, tmp_path: Path, options: dict[str, Any], kind: type[PeftcError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        peftc.distill(student, output_dir=tmp_path / "out", **{"data": str(images), **SHORT, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_diverges_stops_with_the_last_checkpoint(
    student: Path, images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    with pytest.raises(DivergenceError, match="the loss became") as refusal:
        peftc.distill(student, output_dir=tmp_path / "out", data=str(images), **SHORT | {"learning_rate": 1e30})
    checkpoint = tmp_path / "out.partial" / "work" / journal.CHECKPOINT
    assert str(checkpoint) in str(refusal.value) and checkpoint.is_file()
    assert not (tmp_path / "out").exists()


def test_a_dense_student_has_no_products_to_hold(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"teacher": tiny_vit, "data": str(images), **SHORT | {"steps": 2}}
    report = peftc.distill(tiny_vit, output_dir=tmp_path / "out", **given)
    assert set(report.data["terms"]) == {"features", "task"}
    with pytest.raises(DataError, match="there is nothing to learn"):
        peftc.distill(tiny_vit, output_dir=tmp_path / "no", loss="perturbation=1", **given)


def test_a_teacher_of_another_width_is_refused_with_the_numbers(student: Path, images: Path, tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, "num_classes": 10}
    preprocess = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    for name, change in (
        ("wide", {"embed_dim": 48}),
        ("deep", {"embed_dim": 32, "depth": 3}),
        ("more", {"num_classes": 7}),
    ):
        (tmp_path / name).mkdir()
        save_timm(tmp_path / name, "vit_tiny_patch16_224", {**arguments, "embed_dim": 32, **change}, preprocess)
    given: dict[str, Any] = {"output_dir": tmp_path / "out", "data": str(images), **SHORT}
    with pytest.raises(DataError, match=r"the student gives \[17, 32\], the teacher \[17, 48\]"):
        peftc.distill(student, teacher=tmp_path / "wide", **given)
    with pytest.raises(DataError, match="has 2, .* has 3"):
        peftc.distill(student, teacher=tmp_path / "deep", **given)
    with pytest.raises(DataError, match=r"the student gives \[10\], the teacher \[7\]"):
        peftc.distill(student, teacher=tmp_path / "more", loss="logits=1", **given)
    with pytest.raises(UsageError, match="name a teacher"):
        peftc.distill(tmp_path / "wide", **given)


def test_data_of_one_class_is_refused(student: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x_train=np.zeros((8, 3, 32, 32), np.float32), y_train=np.full(8, 3))
    with pytest.raises(DataError, match="are all of one class"):
        peftc.distill(student, output_dir=tmp_path / "out", data=str(tmp_path / "one.npz"), **SHORT)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_teacher_that_is_kept_gives_the_same_bytes_and_is_asked_once(
    kind: str, student: Path, tiny_vit: Path, tiny_bert: Path, images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model, data, options = student, images, SHORT | {"loss": "features=1,logits=1", "steps": 12, "held_out": 0}
    if kind == "texts":
        model, data = tmp_path / "small", tmp_path / "texts.csv"
        peftc.decompose(tiny_bert, output_dir=model, ratio=0.5, device="cpu")
        write_texts(data, [*TEXTS * 8, *(" ".join(TEXTS[:2]) for _ in range(8))])
        options["loss"] = "features=1,embeddings=1"
    peftc.distill(model, output_dir=tmp_path / "asked", data=str(data), **options)
    asked, real = [], Imitation.taught

    def watched(self: Imitation, batch: Any) -> Any:
        asked.append(len(batch.targets))
        return real(self, batch)

    monkeypatch.setattr(Imitation, "taught", watched)
    report = peftc.distill(model, output_dir=tmp_path / "kept", data=str(data), cache_teacher=True, **options)
    number = 96 if kind == "images" else 32
    assert sum(asked) <= number + 16 + 1 < 12 * 16
    one, two = (json.loads((tmp_path / name / journal.LOG).read_text().splitlines()[-1]) for name in ("asked", "kept"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert report.artifact is not None and not (tmp_path / "kept" / "teacher").exists()


def test_the_largest_logits_of_a_teacher_are_kept_alone(tiny_llama: Path, tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("\n".join(TEXTS * 20))
    peftc.decompose(tiny_llama, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    options: dict[str, Any] = SHORT | {"data": str(story), "loss": "logits=1", "held_out": 0, "max_length": 16}
    losses = {}
    for number in (None, 4, 8000):
        report = peftc.distill(tmp_path / "small", output_dir=tmp_path / f"{number}", cache_top=number, **options)
        losses[number] = report.data["losses"]
        assert ("cache_top" in manifest.read(tmp_path / f"{number}").steps[-1]["request"]) == (number is not None)
    assert losses[8000] == pytest.approx(losses[None], rel=1e-3)  # all but one word
    assert losses[4][0] < losses[None][0]
    assert any("of its probability" in note for note in report.notes)


@pytest.mark.parametrize("loss", ["features=1", "logits=1"])
def test_logits_that_are_not_compared_by_their_divergence_are_not_kept_in_part(
    loss: str, student: Path, images: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = SHORT | {"loss": loss, "settings": {"logits.form": "mse"} if "logits" in loss else {}}
    with pytest.raises(UsageError, match="--cache-top"):
        peftc.distill(student, output_dir=tmp_path / "out", data=str(images), cache_top=4, **options)
    assert not (tmp_path / "out").exists()


def test_augmented_images_differ_each_time_and_are_the_same_again(tiny_vit: Path, tmp_path: Path) -> None:
    model = imitation.trainable(load.load(tiny_vit))
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(10 * label + number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{number}.png")

    def read(augment: Augment) -> samples.Samples:
        return samples.read(model, str(tmp_path / "data"), Reading(), labels=True, held_out=0, augment=augment)

    def drawn(augment: Augment, seed: int) -> Any:
        before = torch.get_rng_state()
        found = read(augment).train.drawn([0, 1, 2, 3], Seeds([4 * seed + at for at in range(4)], seed))
        assert torch.equal(torch.get_rng_state(), before)
        return found

    plain = read(Augment()).train.batch([0, 1, 2, 3])
    for augment in (Augment("crop"), Augment("rand-m9-mstd0.5"), Augment(mixup=0.8), Augment("crop", 0.8, 1.0)):
        one, same, other = (drawn(augment, seed) for seed in (1, 1, 2))
        assert torch.equal(one.inputs, same.inputs) and torch.equal(one.targets, same.targets)
        assert not torch.equal(one.inputs, other.inputs) and not torch.equal(one.inputs, plain.inputs)
        assert one.inputs.shape == plain.inputs.shape == (4, 3, 32, 32)
        assert one.targets.shape == (4, 10)
        torch.testing.assert_close(one.targets.sum(1), torch.ones(4))
    mixed = drawn(Augment(mixup=0.8), 1).targets
    assert 0 < mixed[0, 0] < 1 and mixed[0, 0] + mixed[0, 1] == 1  # the first is mixed with the third
    assert drawn(Augment("crop"), 1).targets[3].argmax() == 1


def test_a_student_learns_from_augmented_images(student: Path, images: Path, tmp_path: Path) -> None:
    report = peftc.distill(student, output_dir=tmp_path / "out", data=str(images), mixup=0.8, cutmix=1.0, **SHORT)
    assert set(report.data["terms"]) == {"features", "perturbation", "task"}
    options = {"mixup": 0.8, "loss": "features=1,logits=1", **SHORT}  # labels of the data are of no use to these
    report = peftc.distill(student, output_dir=tmp_path / "alone", data=str(images), **options)
    assert set(report.data["terms"]) == {"features", "logits"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"augment": "crop", "cache_teacher": True}, "`--cache-teacher` keeps one answer"),
        ({"augment": "crop"}, "changes images of a known size"),  # the data are tensors
        ({"mixup": 1.0, "batch_size": 15}, "mix images in pairs"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(
    student: Path, images: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        peftc.distill(student, output_dir=tmp_path / "out", data=str(images), **SHORT | options)


def by_one_and_by_two(folder: Path, *words: Any) -> list[list[dict[str, float]]]:
    """Train in one process and in two; return the log of each, as a list of lines."""
    words = (*words, "--device", "cpu", "-o")
    one = alone(*words, folder / "one")
    first, second = launch(*words, folder / "two")
    assert (one[0], first[0], second[0]) == (0, 0, 0), one[2] + first[2] + second[2]
    assert second[1:] == ("", "")
    logs = [(folder / name / journal.LOG).read_text().splitlines() for name in ("one", "two")]
    return [[json.loads(line) for line in lines] for lines in logs]


def test_two_processes_learn_what_one_does(student: Path, images: Path, tmp_path: Path) -> None:
    one, two = by_one_and_by_two(tmp_path, "distill", student, "--data", images, "--steps", 6, "--batch-size", 16)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_blip", "tiny_bert"])
def test_losses_of_a_whole_batch_see_the_samples_of_every_process(
    kind: str, request: Any, captioned: Path, tmp_path: Path
) -> None:
    """Every image meets every text, and every pair of sentences every other, whichever process holds them."""
    peftc.decompose(request.getfixturevalue(kind), output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    data, extra = captioned, []
    if kind == "tiny_bert":
        data, extra = tmp_path / "pairs.csv", ["--task", "sentence-similarity"]
        words = " ".join(TEXTS).replace(",", "").split()
        texts = [" ".join(words[at : at + 3 + at % 5]) for at in range(20)]  # of all lengths
        rows = [f"{one},{other},{at * 3 % 7}" for at, (one, other) in enumerate(pairwise(texts))]
        data.write_text("\n".join(["sentence1,sentence2,score", *rows]))
    asked = ["distill", tmp_path / "small", "--data", data, "--loss", "task=1,embeddings=1", "--held-out", 0, *extra]
    one, two = by_one_and_by_two(tmp_path, *asked, "--steps", 5, "--batch-size", 6, "--learning-rate", 0.01)
    for term in ("task", "embeddings"):
        values = [[line[term] for line in lines] for lines in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), term
        assert abs(values[0][-1] / values[0][0] - 1) > 0.01, values  # the steps between were worth something


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_a_launcher_was_asked_for_and_cannot_be_is_refused(
    student: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Without GPUs Accelerate itself says nothing of it, and would train as if it had not been asked."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(PeftcError, match=f"does not train under {kind} yet"):
        peftc.distill(student, output_dir=tmp_path / "out", data=str(images), **SHORT)
    assert not (tmp_path / "out").exists()


SIGNALLED = """
import os, signal, sys
from peftc.training.imitation import Imitation
loss, calls = Imitation.loss, iter(range(100))
def signalled(self, module, given):
    if next(calls) == {step} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.{signal})
    return loss(self, module, given)
Imitation.loss = signalled
from peftc.cli.app import main
sys.argv[0] = "peftc"
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_other_says_so_and_ends(
    student: Path, images: Path, tmp_path: Path, rank: int
) -> None:
    words = ["distill", student, "--data", images, "--steps", 6, "--batch-size", 16, "--held-out", 0, "--device", "cpu"]
    ended = launch(*words, "-o", tmp_path / "out", code=SIGNALLED.format(rank=rank, step=4, signal="SIGKILL"))
    assert ended[rank][0] == -9
    left = ended[1 - rank]
    assert left[0] == 1, left[2]
    assert "error: another process of this launch stopped" in left[2]
    assert "Traceback" not in left[2]
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "work" / journal.LOG).is_file()


def test_a_tracker_keeps_its_log_beside_the_artifact(student: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options = SHORT | {"steps": 2, "held_out": 0}
    peftc.distill(student, output_dir=tmp_path / "out", data=str(images), log_with="tensorboard", **options)
    assert list((tmp_path / "out-logs").rglob("events.out.*"))
    assert not (tmp_path / "out.partial").exists()


def test_a_tracker_that_is_not_there_is_refused(student: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="`comet_ml` is not installed"):
        peftc.distill(student, output_dir=tmp_path / "out", data=str(images), log_with="comet_ml", **SHORT)


def test_show_prints_a_line_that_makes_it_again(student: Path, images: Path, tmp_path: Path, peftc: Any) -> None:
    words = ["distill", student, "--data", images, "--steps", 3, "--batch-size", 8, "--device", "cpu", "--dropout"]
    assert peftc(*words, "-o", tmp_path / "out").exit_code == 0
    line = peftc("show", tmp_path / "out", "--commands").stdout.splitlines()[-1]
    for text in ("peftc distill", f"--data {images}", "--steps 3", "--batch-size 8", "--dropout", "task=1"):
        assert text in line, line


def test_recipe_defaults_of_the_command_are_those_of_its_documentation() -> None:
    assert Recipe(steps=1).warmup == 0.1


@pytest.mark.parametrize("fixture", ["tiny_clip", "tiny_blip"])
def test_images_and_texts_learn_by_their_own_loss(
    fixture: str, request: Any, captioned: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    model = request.getfixturevalue(fixture)
    peftc.decompose(model, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    options = SHORT | {"batch_size": 8, "steps": 6}
    report = peftc.distill(tmp_path / "small", output_dir=tmp_path / "out", data=str(captioned), **options)
    assert set(report.data["terms"]) == {"features", "perturbation", "embeddings", "task"}
    assert "text_to_image_r1" in report.data["quality"]["metrics"]
    with pytest.raises(UsageError, match="have no `logits`"):
        peftc.distill(tmp_path / "small", output_dir=tmp_path / "no", data=str(captioned), loss="logits=1", **options)


def test_padding_of_texts_counts_for_nothing_beside_images(tiny_clip: Path, captioned: Path, tmp_path: Path) -> None:
    peftc.decompose(tiny_clip, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    work = imitate(tmp_path / "small", tiny_clip, captioned, {"features": 1.0})
    inputs: Any = work.batch([0, 1]).batch.inputs
    masks = dict(zip((name for name, _ in work.pairs), work.masks(inputs), strict=True))
    for name, mask in masks.items():
        assert (mask is None) == name.startswith("vision_model"), name
    assert len({name.split(".")[0] for name in masks}) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_told_to_end_all_end_with_the_same_step_and_go_on(
    student: Path, images: Path, tmp_path: Path, rank: int
) -> None:
    words = ["distill", student, "--data", images, "--steps", 6, "--batch-size", 16, "--held-out", 0, "--device", "cpu"]
    ended = launch(*words, "-o", tmp_path / "out", code=SIGNALLED.format(rank=rank, step=3, signal="SIGTERM"))
    assert [code for code, _, _ in ended] == [130, 130], ended
    assert all("run the same command again to resume" in stderr for _, _, stderr in ended)
    state = torch.load(tmp_path / "out.partial" / "work" / journal.CHECKPOINT, weights_only=True)
    again = launch(*words, "-o", tmp_path / "out")
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"resumed at step {state['step']} of 6" in again[0][2]
    whole = launch(*words, "-o", tmp_path / "whole")
    assert [code for code, _, _ in whole] == [0, 0]
    assert all(torch.equal(one, tensors(tmp_path / "whole")[name]) for name, one in tensors(tmp_path / "out").items())


def test_after_a_new_head_the_teacher_is_what_that_step_wrote(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base of such a chain is an encoder without a head, which tells no classes apart."""
    monkeypatch.chdir(tmp_path)
    rows = [f"a text of number {at},{('good', 'bad', 'neither')[at % 3]}" for at in range(24)]
    Path("moods.csv").write_text("\n".join(["text,label", *rows]))
    options: dict[str, Any] = {"data": "moods.csv", "steps": 2, "device": "cpu"}
    peftc.finetune(tiny_bert, output_dir="tuned", **options)
    peftc.decompose("tuned", ratio=0.5, output_dir="small", device="cpu")
    report = peftc.distill("small", output_dir="healed", **options)
    held = report.data["held_out"]["before"]
    assert report.summary["asked"].startswith("give what `tuned` gives") and 0 <= held["teacher"] <= 1
    shutil.move("tuned", "elsewhere")
    with pytest.raises(ArtifactError, match="no teacher of `small` is there") as refusal:
        peftc.distill("small", output_dir="again", **options)
    assert "--teacher MODEL" in str(refusal.value)
    peftc.distill("small", teacher="elsewhere", output_dir="again", **options)
