"""How layers are chosen beside SLS's rule: measured drops, Taylor, a loss of quality; and how sure a choice is."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import silhouette_score
from torch import Tensor

import peftc
from peftc.errors import DataError, PeftcError, UsageError
from peftc.methods.importance.tsne_silhouette import with_map
from peftc.models import layers, load
from peftc.models.inputs import outputs
from peftc.options import Reading
from peftc.plans.depth import NOISE, Asked, Decision
from peftc.pruning import evidence
from peftc.pruning import losses as layer_losses
from peftc.pruning import scores as layer_scores
from peftc.pruning.asked import Work
from peftc.pruning.evidence import Choice
from peftc.pruning.losses import Trial
from peftc.store import manifest, maps
from peftc.tasks.unlabelled import divergence
from peftc.training import samples
from tests.calibration.test_memory import alone, launch
from tests.conftest import promised, save_images
from tests.networks import BERT, INPUT, LLAMA, VIT, save_timm, save_transformers
from tests.steps.test_prune_layers import text_of

CPU: dict[str, Any] = {"device": "cpu"}
NAMES = [f"blocks.{at}" for at in range(4)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of four layers, of which the third adds nothing."""
    from safetensors.torch import load_file, save_file

    folder = save_timm(tmp_path_factory.mktemp("idle_vit"), "vit_tiny_patch16_224", VIT, INPUT)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if re.match(r"blocks\.2\.(attn\.proj|mlp\.fc2)", name):
            weights[name].zero_()
        elif name.startswith("blocks.") and name.endswith("fc2.weight"):
            weights[name] *= 40  # far from a fresh network, whose layers all add little
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_labels(images: str, folder: Path) -> Path:
    np.savez(folder / "bare.npz", x_train=np.load(images)["x_train"])
    return folder / "bare.npz"


def read(model: Path, data: Path, *, labels: bool = True, held_out: float = 0.2) -> tuple[Any, samples.Samples]:
    runs = load.load(model)
    return runs, samples.read(runs, str(data), Reading(), labels=labels, held_out=held_out)


def on_all(runs: Any, given: samples.Samples) -> Trial:
    held, _ = layer_losses.measured_on(given, scored_on_the_rest=False)
    return Trial(runs, given, held, 16)


# measured drop


def test_a_drop_is_the_loss_without_the_layer_less_that_with_it(vit: Path, images: str) -> None:
    runs, given = read(vit, images)
    batch = given.train.encoded.batch(range(60))
    found = peftc.prune_layers(vit, data=images, score="drop", keep=4, dry_run=True, **CPU)

    def loss(*dropped: str) -> float:
        with layers.bypassed(runs.module, dropped), torch.no_grad():
            return float(torch.nn.functional.cross_entropy(runs.module(batch.inputs), batch.targets))

    scores = [row["score"] for row in found.data["layers"]]
    assert scores == pytest.approx([loss(name) - loss() for name in NAMES], abs=1e-5)
    assert scores[2] == pytest.approx(0, abs=1e-6)
    assert found.data["measured"]["samples"] == 60 and found.data["measured"]["removals"] == []


def test_layers_go_one_by_one_and_the_others_are_measured_again(vit: Path, images: str) -> None:
    runs, given = read(vit, images)
    trial = on_all(runs, given)
    _, gone = layer_losses.greedy(trial, NAMES, [], keep=1, within=None)
    left, dropped = set(range(4)), []
    for removal in gone:
        rises = {at: trial.loss([*dropped, NAMES[at]]) for at in left}
        assert removal.layer == min(rises, key=lambda at: rises[at])
        assert removal.rise == pytest.approx(rises[removal.layer] - trial.loss(), abs=1e-6)
        left.remove(removal.layer)
        dropped.append(NAMES[removal.layer])
    assert len(gone) == 3
    assert layer_losses.greedy(trial, NAMES, [0, 1, 2, 3], keep=1, within=None)[1] == []


def test_without_labels_a_drop_is_the_divergence_from_the_whole_model(vit: Path, images: str) -> None:
    runs, given = read(vit, images, labels=False)
    trial = on_all(runs, given)
    assert trial.loss() == 0.0
    inputs = given.train.encoded.batch(range(60)).inputs
    whole = outputs(runs, inputs)
    with layers.bypassed(runs.module, NAMES[:1]):
        without = outputs(runs, inputs)
    assert trial.loss(NAMES[:1]) == pytest.approx(
        float(divergence(given.task, whole, without, inputs).mean()), rel=1e-4
    )
    assert trial.loss(NAMES[2:3]) == pytest.approx(0, abs=1e-9)


def test_text_is_measured_by_its_own_loss(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", "LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 3})
    data = str(text_of(tmp_path / "texts.csv"))
    report = peftc.prune_layers(
        tmp_path / "base", data=data, score="drop", keep=2, max_length=8, output_dir=tmp_path / "out", **CPU
    )
    (removal,) = report.data["measured"]["removals"]
    rows = {row["name"]: row for row in report.data["layers"]}
    assert removal["rise"] == rows[removal["name"]]["score"] == min(row["score"] for row in rows.values())
    assert [row["name"] for row in rows.values() if not row["kept"]] == [removal["name"]]
    before, after = (
        peftc.evaluate(each, data=data, max_length=8, **CPU).data["metrics"]["nll"]["value"]
        for each in (tmp_path / "base", tmp_path / "out")
    )
    assert after - before == pytest.approx(removal["rise"], rel=0.05, abs=1e-3)


# Taylor


def test_taylor_is_the_slope_of_the_loss_as_the_layer_fades(vit: Path, images: str) -> None:
    runs, given = read(vit, images)
    found = layer_losses.gradient_products(runs, given, NAMES, 16)
    batch = given.train.batch(range(len(given.train)))

    def losses(name: str, share: float) -> Tensor:
        def fade(_module: Any, args: Any, output: Tensor) -> Tensor:
            return args[0] + (1 - share) * (output - args[0])

        with layers.registered([runs.module.get_submodule(name).register_forward_hook(fade)]), torch.no_grad():
            logits = runs.module.double()(batch.inputs.double())
            return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")

    for name in NAMES:
        slope = (losses(name, 1e-4) - losses(name, -1e-4)) / 2e-4
        torch.testing.assert_close(-found[name], slope, rtol=2e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in runs.module.parameters())


def test_an_idle_layer_goes_first(vit: Path, images: str, tmp_path: Path) -> None:
    for score, data in (("taylor", images), ("drop", without_labels(images, tmp_path))):
        report = peftc.prune_layers(vit, data=str(data), score=score, keep=3, output_dir=tmp_path / score, **CPU)
        assert [row["name"] for row in report.data["layers"] if not row["kept"]] == ["blocks.2"]
        assert (
            peftc.evaluate(tmp_path / score, data=images, against=vit, **CPU).data["against"]["agreement"]["value"] == 1
        )


# within a loss of quality


def cost(trial: Trial, dropped: list[str]) -> tuple[float, float, float]:
    """Return what a loss of hits is, and its interval, of the samples of a trial."""
    found = trial.cost(dropped)
    return found.value, found.low, found.high


def test_as_many_go_as_the_interval_of_what_they_cost_allows(vit: Path, images: str) -> None:
    free = peftc.prune_layers(vit, data=images, within_drop=1.0, dry_run=True, **CPU)
    assert free.data["score"] == "drop" and sum(row["kept"] for row in free.data["layers"]) == 1
    runs, given = read(vit, images)
    trial = on_all(runs, given)
    for limit in (0.0, 0.05, 0.2):
        some = peftc.prune_layers(vit, data=images, within_drop=limit, repair=False, dry_run=True, **CPU)
        found = some.data["measured"]
        gone = [each["name"] for each in found["removals"]]
        assert set(gone) == {row["name"] for row in some.data["layers"] if not row["kept"]}
        for at, each in enumerate(found["removals"], start=1):
            assert tuple(each["cost"].values()) == pytest.approx(cost(trial, gone[:at]))
            assert each["cost"]["high"] <= limit
            assert each["quality"] == pytest.approx(found["before"] - each["cost"]["value"])
        if found["stopped"]:
            assert found["stopped"]["cost"]["high"] > limit
            assert tuple(found["stopped"]["cost"].values()) == pytest.approx(
                cost(trial, [*gone, found["stopped"]["name"]])
            )
        else:
            assert len(gone) == 3
    assert found["metric"] == "top1" and any("before" in note and "after" in note for note in some.notes)


def test_the_order_may_be_that_of_another_score(vit: Path, images: str) -> None:
    options: dict[str, Any] = {"within_drop": 0.3, "score": "silhouette", "repair": False, "dry_run": True}
    report = peftc.prune_layers(vit, data=images, **options, **CPU)
    number = sum(row["kept"] for row in report.data["layers"])
    assert [row["kept"] for row in report.data["layers"]] == [at < number for at in range(4)]  # from the end
    assert report.data["samples"] == 48 and report.data["measured"]["samples"] == 12  # none of them scored
    runs, given = read(vit, images)
    assert given.held is not None
    trial = Trial(runs, given, given.held, 16)
    assert all(trial.cost(NAMES[at:]).high <= 0.3 for at in range(number, 4))
    if number > 1:
        assert trial.cost(NAMES[number - 1 :]).high > 0.3


def test_what_is_not_asked_costs_little_by_samples_that_were_held_out(vit: Path, tmp_path: Path) -> None:
    """The layers that may go by the score go one by one, their gaps closed, while the interval stays below 2 points."""
    images = str(save_images(tmp_path / "images.npz", number=1500, noise=0.2))
    peftc.finetune(vit, data=images, method="full", steps=60, output_dir=tmp_path / "tuned", **CPU)
    report = peftc.prune_layers(tmp_path / "tuned", data=images, score="silhouette", output_dir=tmp_path / "out", **CPU)
    rows, found = report.data["layers"], report.data["measured"]
    assert (report.data["alpha"], found["within_drop"], found["metric"]) == (0.3, 0.02, "top1")
    number = sum(row["kept"] for row in rows)
    assert [row["kept"] for row in rows] == [at < number for at in range(4)]
    assert all(each["cost"]["high"] <= 0.02 for each in found["removals"])
    assert [each["name"] for each in found["removals"]] == NAMES[: number - 1 : -1]
    threshold = report.data["threshold"]
    if found["stopped"] is None:
        assert number == 1 or rows[number - 2]["score"] < threshold
    else:
        assert found["stopped"]["cost"]["high"] > 0.02
    asked = manifest.read(tmp_path / "out").steps[-1]["request"]
    assert (asked["alpha"], asked["within_drop"], asked["repair"]) == (0.3, 0.02, None)
    quality = report.data["quality"]
    assert quality["against"]["difference"]["top1"]["value"] > -0.05
    made = peftc.evaluate(tmp_path / "out", data=f"{images}@test", **CPU).data["metrics"]["top1"]["value"]
    assert made == quality["metrics"]["top1"]["value"], "what was measured is what was written"


def test_layers_asked_for_by_number_go_whatever_they_cost_and_that_is_said(vit: Path, tmp_path: Path) -> None:
    images = str(save_images(tmp_path / "images.npz", number=600, noise=0.2))
    peftc.finetune(vit, data=images, method="full", steps=60, output_dir=tmp_path / "tuned", **CPU)
    report = peftc.prune_layers(tmp_path / "tuned", data=images, drop="0,1", output_dir=tmp_path / "out", **CPU)
    assert [row["kept"] for row in report.data["layers"]] == [False, False, True, True]
    assert any("asked to go cost" in warning and "top1" in warning for warning in report.warnings)
    assert report.data.get("measured") is None


# refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"within_drop": 0.1, "keep": 2}, UsageError, "`--keep` and `--within-drop` are both given"),
        ({"within_drop": -0.1}, UsageError, "`--within-drop` is -0.1"),
        ({"within_drop": 0.1, "data": None}, UsageError, "looks at what layers do|needs samples with labels"),
        ({"within_drop": 0.1, "data": "unlabelled"}, UsageError, "needs samples with labels"),
        ({"score": "taylor", "keep": 2, "data": "unlabelled"}, DataError, "needs labels or text"),
        ({"score": "drop", "data": "unlabelled"}, UsageError, "does not say how many to keep"),
        ({"score": "magnitude", "keep": 2, "stability": True}, UsageError, "`magnitude` is none"),
        ({"score": "drop", "keep": 2, "stability": True}, UsageError, "`drop` is none"),
        ({"drop": "1", "data": None, "stability": True}, UsageError, "repeats scores of features"),
        ({"drop": "1", "data": None, "repair": True}, UsageError, "fits what closes the gap to samples"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused(
    vit: Path, images: str, tmp_path: Path, options: dict[str, Any], kind: type[PeftcError], message: str
) -> None:
    data: Any = images
    if options.get("data") == "unlabelled":
        data = without_labels(images, tmp_path)
    elif "data" in options:
        data = None
    options = {key: value for key, value in options.items() if key != "data"}
    with pytest.raises(kind, match=message):
        peftc.prune_layers(vit, data=data and str(data), output_dir=tmp_path / "out", **CPU, **options)
    assert not (tmp_path / "out").exists()


# how sure a choice is

MAPPED: dict[str, Any] = {"settings": {"perplexity": 5.0}, **CPU}


def test_repeats_say_how_many_would_stay_and_other_scores_which(vit: Path, images: str, tmp_path: Path) -> None:
    report = peftc.prune_layers(vit, data=images, stability=True, output_dir=tmp_path / "out", **MAPPED)
    repeats = report.data["stability"]
    assert [each["what"] for each in repeats] == [
        "seed 1", "seed 2", "seed 3", "half 1 of the samples", "half 2 of the samples"
    ]  # fmt: skip
    scores = [row["score"] for row in report.data["layers"]]
    for repeat in repeats:
        if repeat["kept"] is not None:
            threshold = 0.3 * repeat["scores"][-1]
            assert repeat["margins"] == pytest.approx([each - threshold for each in repeat["scores"]])
    assert repeats[3]["scores"] != repeats[4]["scores"] != scores
    others = {each["score"]: each for each in report.data["agreement"]}
    assert list(others) == ["silhouette", "block-influence", "angular", "cka", "magnitude"]
    assert -1 <= others["silhouette"]["spearman"] <= 1 and others["silhouette"]["kept"] >= 1
    assert others["magnitude"]["kept"] is None
    again = peftc.prune_layers(vit, data=images, stability=True, output_dir=tmp_path / "out", **MAPPED)
    assert any("already done" in note for note in again.notes) and again.data["stability"] == repeats
    lines = peftc.show(tmp_path / "out", commands=True).lines
    assert "--stability" in lines[-1]


def test_halves_are_all_samples_once_and_have_every_class() -> None:
    labels = torch.arange(31) % 3
    seen = layer_scores.Seen(labels=[labels], figures={("a", "features"): [torch.zeros(31, 2)]})
    one, other = evidence.halves(seen, 0)
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(31))
    for half in (one, other):
        assert labels[half].bincount(minlength=3).min() >= 4


def test_layers_near_the_threshold_or_beyond_it_in_a_repeat_are_named(vit: Path) -> None:
    scores = [0.1, 0.3 + NOISE / 2, 0.6, 1.0]
    stored, score = load.load(vit), layer_scores.named("silhouette", {})
    work, choice = Work(stored, stored, NAMES, score, None, Asked()), Choice(Decision((0, 1), 0.3), [], scores)
    evidence.gather(work, choice, score, lambda *_: Decision((0,), 0.3))
    assert choice.unsure == [1]
    assert "`blocks.1`" in str(evidence.doubt(choice, NAMES))
    choice.repeats = [{"margins": [-0.1, 0.1, -0.01, 0.7]}, {"margins": None}, {}]
    assert evidence._flipping(choice) == {2}


def test_rank_correlation_and_overlap_are_those_of_their_definition(vit: Path, images: str) -> None:
    report = peftc.prune_layers(vit, data=images, score="block-influence", keep=2, dry_run=True, **CPU)
    ours = [row["score"] for row in report.data["layers"]]
    gone = {row["number"] for row in report.data["layers"] if not row["kept"]}
    for other in report.data["agreement"]:
        assert other["spearman"] == pytest.approx(float(spearmanr(ours, other["scores"]).statistic))
        worst = {2, 3} if other["score"] == "silhouette" else set(torch.tensor(other["scores"]).argsort()[:2].tolist())
        assert other["same"] == len(gone & worst) / 2


# the picture


def maps_in(picture: Path) -> int:
    return len(re.findall(r'<rect[^>]*class="(?:frame|gone)"', picture.read_text()))


def test_the_picture_has_a_map_for_every_layer_with_its_score(vit: Path, images: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.svg"
    report = peftc.prune_layers(vit, data=images, plot=path, dry_run=True, **MAPPED)
    text = path.read_text()
    assert maps_in(path) == 4
    for row in report.data["layers"]:
        assert f">{row['number']}: {row['score']:.2f}, {'kept' if row['kept'] else 'dropped'}</text>" in text
    assert re.search(r">threshold [\d.]+, 0\.3 of the last layer", text)
    again = tmp_path / "again.svg"
    peftc.prune_layers(vit, data=images, plot=again, dry_run=True, **MAPPED)
    assert again.read_bytes() == path.read_bytes()
    quick = tmp_path / "quick.svg"
    peftc.prune_layers(vit, data=images, score="silhouette", plot=quick, dry_run=True, **CPU)
    assert maps_in(quick) == 0


def test_an_artifact_keeps_the_maps_that_it_was_scored_by(vit: Path, images: str, tmp_path: Path) -> None:
    on = {"data": images, "output_dir": tmp_path / "out", **MAPPED}
    first = peftc.prune_layers(vit, plot=tmp_path / "first.svg", **on)
    kept = maps.read(tmp_path / "out")
    assert kept is not None and first.data["samples"] == kept.samples == len(kept.labels)
    assert list(kept.points) == [row["name"] for row in first.data["layers"]] == NAMES
    for row in first.data["layers"]:
        found = silhouette_score(np.array(kept.points[row["name"]]), kept.labels)
        assert found == pytest.approx(row["score"], abs=0.01), "the points are those of the score, with their classes"
    again = peftc.prune_layers(vit, plot=tmp_path / "again.svg", **on)
    assert any("already done" in note for note in again.notes)
    assert maps_in(tmp_path / "again.svg") == 4
    peftc.decompose(tmp_path / "out", ratio=0.5, output_dir=tmp_path / "next")
    assert not (tmp_path / "next" / maps.FILE).exists(), "they are not those of the next artifact"
    quick = peftc.prune_layers(vit, data=images, score="silhouette", output_dir=tmp_path / "quick", **CPU)
    assert quick.artifact is not None and maps.read(quick.artifact) is None


def test_maps_are_those_that_the_scores_are_taken_of(vit: Path, images: str) -> None:
    runs, given = read(vit, images, held_out=0)
    seen = layer_scores.see(runs, given, NAMES, 16)
    score = layer_scores.named("tsne-silhouette", {"perplexity": 5.0})
    found = layer_scores.scored(runs, NAMES, score, seen)
    for name, value in zip(NAMES, found, strict=True):
        known = seen.of(name, score.needs)
        assert (with_map(**known, perplexity=5.0)[1] == seen.maps[name]).all()
        assert score.function(**known, perplexity=5.0) == value


# several processes


@pytest.mark.parametrize("options", [["--alpha", 0.3, "--set", "perplexity=5.0"], ["--score", "drop", "--keep", 2]])
def test_two_processes_score_and_choose_what_one_does(
    vit: Path, images: str, tmp_path: Path, options: list[Any]
) -> None:
    words = ["prune-layers", vit, "--data", images, *options, "--device", "cpu", "--json", "-o"]
    found = alone(*words, tmp_path / "one")
    first, second = launch(*words, tmp_path / "two")
    assert (found[0], first[0], second[0]) == (0, 0, 0), first[2] + second[2]
    assert second[1:] == ("", "")
    one, two = (json.loads(each[1]) for each in (found, first))
    for key in ("layers", "threshold", "agreement", "size", "quality", "data"):
        assert one.get(key) == two.get(key), key
    assert promised(tmp_path / "one") == promised(tmp_path / "two")


def test_two_processes_evaluate_what_one_does(vit: Path, images: str, tmp_path: Path) -> None:
    peftc.prune_layers(vit, drop="2", output_dir=tmp_path / "out", **CPU)
    words = ["evaluate", tmp_path / "out", "--data", images, "--against", "base", "--device", "cpu", "--json"]
    found, (first, second) = alone(*words), launch(*words)
    assert json.loads(found[1]) == json.loads(first[1]) and second[1:] == ("", "")


def test_what_one_process_cannot_score_ends_all(vit: Path, tmp_path: Path) -> None:
    data = save_images(tmp_path / "few.npz", number=20)
    first, second = launch("prune-layers", vit, "--data", data, "--device", "cpu", "-o", tmp_path / "out")
    assert (first[0], second[0]) == (1, 1)
    assert "too few for t-SNE" in first[2] and "Traceback" not in first[2] + second[2]
    assert not (tmp_path / "out").exists()


def test_a_bert_of_pairs_is_measured_by_its_task(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_transformers(tmp_path / "base", "BertModel", **{**BERT, "num_hidden_layers": 3})
    rows = ["sentence1,sentence2,score"]
    rows += [f"the cat sat {'big ' * at},a dog ran {'red ' * (at % 4)},{at % 6 / 5}" for at in range(1, 25)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    report = peftc.prune_layers(
        tmp_path / "base", data=str(tmp_path / "pairs.csv"), within_drop=2.0, output_dir=tmp_path / "out", **CPU
    )
    assert report.data["measured"]["metric"] == "spearman" and len(report.data["measured"]["removals"]) == 2
