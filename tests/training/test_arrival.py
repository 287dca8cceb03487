"""A step learns from the same bytes, however many processes read ahead, share it, or were killed before it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import peftc
from peftc.errors import DataError
from peftc.models import load
from peftc.options import Augment, Reading, Recipe
from peftc.training import imitation, journal, loop, samples
from peftc.training.arrival import Stream
from peftc.training.imitation import Imitation
from tests.calibration.test_memory import alone, launch_freshly
from tests.conftest import TEXTS

SIZE, CLASSES = 40, 10
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 8, "device": "cpu", "learning_rate": 1e-2, "evaluations": 2}
CHANGED: dict[str, Any] = {"augment": "rand-m9-mstd0.5", "mixup": 0.8, "cutmix": 1.0}
RECIPE = Recipe(steps=5, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes as files, in sizes of their own."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, number in (("train", SIZE), ("test", 20)):
        for at in range(number):
            path = folder / split / str(at % CLASSES) / f"{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 160, (40 + at % 5, 40, 3), dtype=np.uint8)
            pixels[..., at % 3] += 90
            Image.fromarray(pixels).save(path)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return what an artifact is known by: its weights, its manifest without times, the log of its training."""
    names = ("model.safetensors", "peftc.json", journal.LOG)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def same_artifact(one: Path, other: Path) -> None:
    assert digests(one) == digests(other)


# which samples, and by which seeds


def parts(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, step: int, number: int) -> list[tuple[list[int], Any]]:
    """Return the parts of a step in each of so many processes."""
    stream, found = Stream(SIZE, recipe, lambda indices, seeds: None), []
    for rank in range(number):
        monkeypatch.setenv("WORLD_SIZE", str(number))
        monkeypatch.setenv("RANK", str(rank))
        found += [stream.part(step * recipe.accumulate + part) for part in range(recipe.accumulate)]
    return found


@pytest.mark.parametrize(("number", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_a_sample_has_its_seed_and_a_pair_stays_together_whoever_shares_a_step(
    monkeypatch: pytest.MonkeyPatch, number: int, accumulate: int
) -> None:
    for step in range(9):  # over the end of two epochs
        ((whole, seeds),) = parts(monkeypatch, RECIPE, step, 1)
        pairs = {frozenset([seeds.samples[at], seeds.samples[at + 4]]) for at in range(4)}
        found, told = set(), {}
        for some, own in parts(monkeypatch, replace(RECIPE, accumulate=accumulate), step, number):
            assert own.step == seeds.step and len(some) * number * accumulate == len(whole)
            told |= dict(zip(own.samples, some, strict=True))
            half = len(some) // 2
            found |= {frozenset([own.samples[at], own.samples[at + half]]) for at in range(half)}
        assert told == dict(zip(seeds.samples, whole, strict=True)) and found == pairs


def test_no_two_samples_of_a_training_share_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [parts(monkeypatch, RECIPE, step, 1)[0][1] for step in range(60)]
    every = [seed for each in seeds for seed in (*each.samples, each.step)]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("augment", [Augment("crop"), Augment(mixup=0.8), Augment("rand-m9-mstd0.5", 0.8, 1.0)])
def test_images_are_changed_and_mixed_alike_in_one_process_and_in_shares(
    tiny_vit: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, augment: Augment
) -> None:
    model = imitation.trainable(load.load(tiny_vit))
    train = samples.read(model, str(photos), Reading(), labels=True, held_out=0, augment=augment).train

    def drawn(recipe: Recipe, number: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return image and target of each sample of a step, by its seed."""
        found = {}
        for some, seeds in parts(monkeypatch, recipe, 2, number):
            batch = train.drawn(some, seeds)
            assert isinstance(batch.inputs, torch.Tensor)
            found |= dict(zip(seeds.samples, zip(batch.inputs, batch.targets, strict=True), strict=True))
        return found

    whole = drawn(RECIPE, 1)
    for number, accumulate in ((2, 1), (1, 4), (2, 2)):
        shared = drawn(replace(RECIPE, accumulate=accumulate), number)
        assert whole.keys() == shared.keys()
        for seed, (image, target) in whole.items():
            assert torch.equal(image, shared[seed][0]) and torch.equal(target, shared[seed][1])


# whole trainings


def test_a_training_on_changed_images_is_the_same_for_any_number_of_processes(
    tiny_vit: Path, photos: Path, tmp_path: Path
) -> None:
    for workers in (0, 1, 3):
        output = tmp_path / str(workers)
        peftc.finetune(tiny_vit, output_dir=output, data=str(photos), workers=workers, **SHORT, **CHANGED)
    same_artifact(tmp_path / "0", tmp_path / "1")
    same_artifact(tmp_path / "0", tmp_path / "3")
    again = peftc.finetune(tiny_vit, output_dir=tmp_path / "0", data=str(photos), workers=2, **SHORT, **CHANGED)
    assert any("already done" in note for note in again.notes), again.notes


class Killed(Exception):
    pass


def test_a_training_on_changed_images_goes_on_to_the_same_bytes(
    tiny_vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(name: str, workers: int) -> None:
        peftc.finetune(
            tiny_vit, output_dir=tmp_path / name, data=str(photos), workers=workers, accumulate=2, **SHORT, **CHANGED
        )

    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)  # a checkpoint after every step
    tune("whole", 2)
    with monkeypatch.context() as patch:
        calls, real = iter(range(100)), Imitation.loss

        def killed(self: Imitation, module: Any, given: Any, *more: Any) -> Any:
            if next(calls) == 7:  # the second part of the fourth step
                raise Killed
            return real(self, module, given, *more)

        patch.setattr(Imitation, "loss", killed)
        with pytest.raises(Killed):
            tune("killed", 2)
    tune("killed", 1)
    same_artifact(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_with_readers_of_their_own_learn_what_one_does(
    tiny_vit: Path, photos: Path, tmp_path: Path
) -> None:
    words = ["finetune", tiny_vit, "--data", photos, "--steps", 4, "--batch-size", 8, "--device", "cpu", "--delta"]
    words += ["--augment", "crop", "--mixup", 0.8, "--cutmix", 1.0, "--learning-rate", 0.01, "--accumulate", 2]
    one = alone(*words, "--workers", 0, "-o", tmp_path / "one")
    first, second = launch_freshly(*words, "--workers", 1, "-o", tmp_path / "two")
    assert (one[0], first[0], second[0]) == (0, 0, 0), one[2] + first[2] + second[2]
    lines = [(tmp_path / name / journal.LOG).read_text().splitlines() for name in ("one", "two")]
    losses = [[each["loss"] for each in map(json.loads, log) if "loss" in each] for log in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_a_teacher_gave_is_remembered_of_samples_that_others_read(
    tiny_vit: Path, photos: Path, tmp_path: Path
) -> None:
    peftc.decompose(tiny_vit, output_dir=tmp_path / "small", ratio=0.5, device="cpu")
    for workers in (0, 2):
        options = SHORT | {"cache_teacher": True, "workers": workers, "loss": "features=1,logits=1"}
        peftc.distill(tmp_path / "small", output_dir=tmp_path / str(workers), data=str(photos), **options)
    same_artifact(tmp_path / "0", tmp_path / "2")


def test_minutes_are_timed_with_those_who_read_ahead(tiny_vit: Path, photos: Path, tmp_path: Path) -> None:
    options = {**SHORT, "steps": None, "minutes": 0.002, "held_out": 0}
    report = peftc.finetune(tiny_vit, output_dir=tmp_path / "out", data=str(photos), workers=2, **options)
    assert report.data["steps"] >= 1


def test_a_damaged_image_ends_a_training_with_its_own_error(
    tiny_vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = samples.Held.drawn

    def drawn(self: Any, indices: Any, seeds: Any) -> Any:
        if 7 in indices:
            raise DataError("`7.png` is no whole image")
        return real(self, indices, seeds)

    monkeypatch.setattr(samples.Held, "drawn", drawn)
    with pytest.raises(DataError, match=r"^`7\.png` is no whole image$"):
        peftc.finetune(tiny_vit, output_dir=tmp_path / "out", data=str(photos), workers=2, **SHORT)
    assert not (tmp_path / "out").exists()


# what else reads samples


def test_figures_statistics_and_factors_are_the_same_for_any_number_of_processes(
    tiny_vit: Path, photos: Path, tmp_path: Path
) -> None:
    found = []
    for workers in (0, 3):
        asked: dict[str, Any] = {"data": f"{photos}@train", "device": "cpu", "workers": workers}
        figures = peftc.evaluate(tiny_vit, batch_size=4, **asked).data["metrics"]
        folder = tmp_path / str(workers)
        peftc.calibrate(tiny_vit, output_dir=folder / "all", batch_size=4, **asked)
        peftc.calibrate(tiny_vit, output_dir=folder / "some", calibration_tokens=200, batch_size=2, **asked)
        peftc.decompose(tiny_vit, output_dir=folder / "cut", ratio=0.5, method="whitened", sequential=True, **asked)
        weights = sorted([*folder.rglob("*.safetensors"), *folder.rglob("peftc.json")])
        assert len(weights) == 6
        found.append((figures, [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert_mlm"])
def test_windows_of_text_are_the_same_for_any_number_of_processes(kind: str, request: Any, tmp_path: Path) -> None:
    """They are views of a file, which every process has mapped into its memory."""
    model, data = request.getfixturevalue(kind), tmp_path / "story.txt"
    data.write_text("\n".join(TEXTS * 40))
    task = "causal-lm" if kind == "tiny_llama" else "masked-lm"
    options = {**SHORT, "steps": 3, "loss": "task=1", "task": task, "max_length": 16, "held_out": 0.2, "head": "keep"}
    found = []
    for workers in (0, 3):
        asked: dict[str, Any] = {"data": str(data), "workers": workers, "max_length": 16, "device": "cpu", "task": task}
        figures = peftc.evaluate(model, batch_size=2, **asked).data["metrics"]
        peftc.finetune(model, output_dir=tmp_path / str(workers), **{**options, **asked})
        found.append((figures, digests(tmp_path / str(workers))))
    assert found[0] == found[1]


def test_layers_are_chosen_alike(tiny_vit: Path, photos: Path, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "scored": {"keep": 1, "score": "block-influence"},
        "repaired": {"drop": "1", "repair": True},
    }
    for way, options in ways.items():
        found = []
        for workers in (0, 2):
            output = tmp_path / f"{way}-{workers}"
            asked: dict[str, Any] = {"data": str(photos), "device": "cpu", "batch_size": 4, "workers": workers}
            peftc.prune_layers(tiny_vit, output_dir=output, **asked, **options)
            found.append((output / "model.safetensors").read_bytes())
        assert found[0] == found[1], way


# what is said


def test_how_fast_it_was_and_how_long_it_waited_is_told(
    tiny_bert: Path, tiny_vit: Path, photos: Path, tmp_path: Path
) -> None:
    report = peftc.finetune(tiny_vit, output_dir=tmp_path / "images", data=str(photos), **SHORT)
    speed = report.data["speed"]
    assert speed.keys() == {"samples_per_second", "waiting"}
    assert speed["samples_per_second"] > 0 and 0 < speed["waiting"] < 1
    assert any("samples/s" in note and "% of it waiting for data" in note for note in report.notes)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "\n".join(f"the cat sat {'on the mat ' * (at % 3)},{at % 2}" for at in range(30)))
    report = peftc.finetune(
        tiny_bert, output_dir=tmp_path / "texts", data=str(texts), task="text-classification", **SHORT
    )
    speed = report.data["speed"]
    assert speed["tokens_per_second"] > speed["samples_per_second"]


def test_the_number_is_no_part_of_a_request(
    tiny_vit: Path, photos: Path, tmp_path: Path, peftc: Callable[..., Any]
) -> None:
    words = ["finetune", tiny_vit, "--data", photos, "--steps", 2, "--batch-size", 4, "--device", "cpu", "--workers", 2]
    done = peftc(*words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "--workers" not in peftc("show", tmp_path / "out", "--commands").stdout
    refused = peftc(*words[:-1], -1, "-o", tmp_path / "other")
    assert refused.exit_code == 2 and "--workers" in refused.stderr and "at least 0" in refused.stderr, refused.stderr
