"""`evaluate` measures what it says, compares sample by sample, and refuses what would mean nothing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from peftc.errors import DataError, UsageError, WeightError
from peftc.models import load
from peftc.report import Report
from peftc.steps.evaluate import evaluate
from peftc.store.source import Source
from peftc.tasks.classes import macro_f1
from peftc.tasks.sentences import spearman
from peftc.tasks.table import TASKS

CLASSES = [str(digit) for digit in range(10)]


def fill(root: Path, classes: Sequence[str] = CLASSES, each: int = 3, size: tuple[int, int] = (32, 32)) -> str:
    draw = np.random.default_rng(0)
    for name in classes:
        for number in range(each):
            path = root / "test" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return str(root)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("sentences") / "pairs.csv"
    words = "the cat sat on mat a small dog ran under big tree red bird sang blue house in".split()
    draw = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(draw.choice(words, int(draw.integers(3, 9))))

    file.write_text("".join(f"{sentence()},{sentence()},{draw.uniform(0, 5):.2f}\n" for _ in range(24)))
    return str(file)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("the cat sat on the mat . a small dog ran under the big tree !\n" * 20)
    return str(file)


class Says(nn.Module):
    """A network whose logits are the mean of each channel-and-column block, plus a constant."""

    def __init__(self, classes: int = 10, *, favourite: int | None = None, fill: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)
        torch.manual_seed(classes)
        nn.init.normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        if favourite is not None:
            with torch.no_grad():
                self.conv.bias[favourite] = 100.0 * fill

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3))


def values(report: Report) -> dict[str, float]:
    return {name: figure["value"] for name, figure in report.data["metrics"].items()}


# every task


@pytest.mark.parametrize(
    ("model", "data", "task", "metrics"),
    [
        ("tiny_vit", "pictures", "image-classification", ["top1", "top5"]),
        ("tiny_bert", "sentences", "sentence-similarity", ["spearman"]),
        ("tiny_bert_mlm", "story", "masked-lm", ["perplexity", "nll"]),
        ("tiny_llama", "story", "causal-lm", ["perplexity", "nll"]),
    ],
)
def test_a_model_equals_itself(
    request: pytest.FixtureRequest, model: str, data: str, task: str, metrics: list[str]
) -> None:
    folder = request.getfixturevalue(model)
    report = evaluate(folder, data=request.getfixturevalue(data), against=folder, max_drop=0, device="cpu")
    assert report.data["task"] == task
    assert list(report.data["metrics"]) == metrics
    for figure in report.data["metrics"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    against = report.data["against"]
    assert against["metrics"] == report.data["metrics"]
    assert all(figure["value"] == 0 for figure in against["difference"].values())
    if task != "sentence-similarity":
        assert against["agreement"]["value"] == 1
        assert against["divergence"]["value"] == 0
    assert report.passed
    json.dumps(report.to_json(), allow_nan=False)


def test_a_guess_of_the_task_says_what_it_was_made_from(
    pictures: str, story: str, small_vit: Path, tiny_llama: Path
) -> None:
    notes = evaluate(small_vit, data=pictures, device="cpu").notes
    assert "task: `image-classification`, guessed from the architecture `vit_tiny_patch16_224` of timm" in notes
    notes = evaluate(tiny_llama, data=story, num_samples=2, device="cpu").notes
    assert "task: `causal-lm`, guessed from the class `LlamaForCausalLM`" in notes


def test_the_same_seed_gives_the_same_report(tiny_llama: Path, story: str) -> None:
    one, other = (evaluate(tiny_llama, data=story, num_samples=5, max_length=16, device="cpu", seed=3) for _ in "ab")
    assert one.data == other.data
    assert one.data["data"]["samples"] == 5


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_the_batch_size_changes_no_figure(tiny_bert: Path, sentences: str, batch_size: int) -> None:
    report = evaluate(tiny_bert, data=sentences, batch_size=batch_size, device="cpu")
    whole = evaluate(tiny_bert, data=sentences, batch_size=24, device="cpu")
    assert values(report)["spearman"] == pytest.approx(values(whole)["spearman"], abs=2e-3)


# image classification


def test_top1_counts_the_hits(pictures: str) -> None:
    report = evaluate(Says(favourite=4), data=pictures, device="cpu")
    assert values(report)["top1"] == pytest.approx(0.1)
    assert report.data["data"]["split"] == "test"
    assert report.data["data"]["samples"] == 30
    assert any("test" in note for note in report.notes)


def test_five_classes_have_no_top5(tmp_path: Path) -> None:
    assert list(evaluate(Says(5), data=fill(tmp_path, CLASSES[:5]), device="cpu").data["metrics"]) == ["top1"]


def test_the_paired_difference_is_the_difference(pictures: str) -> None:
    report = evaluate(Says(), data=pictures, against=Says(favourite=2), device="cpu")
    against = report.data["against"]
    difference = against["difference"]["top1"]
    assert difference["value"] == pytest.approx(values(report)["top1"] - against["metrics"]["top1"]["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_the_divergence_is_that_of_the_reference_from_the_model(pictures: str) -> None:
    from peftc.data import open_data

    one, other = Says(), Says(favourite=2, fill=0.01)
    measured = evaluate(one, data=pictures, against=other, device="cpu").data["against"]["divergence"]["value"]
    images = torch.stack(
        [torch.from_numpy(np.array(image)) for image, _ in map(open_data(pictures).__getitem__, range(30))]
    )
    with torch.no_grad():
        p, q = (net(images.movedim(-1, 1) / 255).log_softmax(1) for net in (other, one))
    assert measured == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


def test_folders_named_by_wordnet_id_meet_the_imagenet_outputs(tmp_path: Path) -> None:
    data = fill(tmp_path, ["n01443537", "n15075141"], each=2)  # outputs 1 and 999
    assert values(evaluate(Says(1000, favourite=999), data=data, device="cpu"))["top1"] == 0.5
    assert values(evaluate(Says(1000, favourite=0), data=data, device="cpu"))["top1"] == 0


def test_digits_are_not_taken_for_the_first_imagenet_classes(pictures: str) -> None:
    with pytest.raises(DataError, match="cannot match 10 classes with a model of 1000 outputs"):
        evaluate(Says(1000), data=pictures, device="cpu")


def test_a_model_without_input_size_reads_images_at_their_own(tmp_path: Path) -> None:
    assert evaluate(Says(), data=fill(tmp_path, size=(20, 12)), device="cpu").data["data"]["samples"] == 30
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "0" / "odd.png")
    with pytest.raises(DataError, match=r"differ in size[\s\S]*--image-size"):
        evaluate(Says(), data=str(tmp_path), device="cpu")
    assert evaluate(Says(), data=str(tmp_path), image_size=16, device="cpu").data["data"]["samples"] == 31


def test_a_corrupt_image_ends_the_evaluation_by_name(tmp_path: Path, tiny_vit: Path) -> None:
    data = fill(tmp_path)
    (tmp_path / "test" / "7" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="7/1.png` is no whole image"):
        evaluate(tiny_vit, data=data, device="cpu")


def test_grey_images_serve_a_grey_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loaded = load.load(model)
    loaded.preprocess = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
    report = evaluate(loaded, data="sklearn:digits", task="image-classification", num_samples=50, device="cpu")
    assert report.data["data"]["samples"] == 50


def test_outputs_that_are_not_finite_are_refused_and_never_averaged(pictures: str) -> None:
    broken = Says(favourite=3, fill=math.inf)
    with pytest.raises(WeightError, match=r"`says` gives NaN or infinite outputs[\s\S]*float32"):
        evaluate(broken, data=pictures, device="cpu")


# text


def test_classes_of_text_are_matched_by_name(tmp_path: Path, tiny_bert_classifier: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text("text,label\nthe cat,Positive\na dog,NEGATIVE\nred bird,Positive\n")
    report = evaluate(tiny_bert_classifier, data=str(file), device="cpu")
    assert report.data["task"] == "text-classification"
    assert list(report.data["metrics"]) == ["accuracy", "f1"]
    file.write_text("text,label\nthe cat,positive\na dog,furious\n")
    with pytest.raises(DataError, match="`furious`"):
        evaluate(tiny_bert_classifier, data=str(file), device="cpu")


def test_similarity_is_the_rank_correlation_of_pooled_cosines(tiny_bert: Path, sentences: str) -> None:
    from scipy.stats import spearmanr
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    rows = [line.split(",") for line in Path(sentences).read_text().splitlines()]

    def embed(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        with torch.no_grad():
            return nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)

    cosines = (embed([row[0] for row in rows]) * embed([row[1] for row in rows])).sum(1)
    wanted = spearmanr(cosines.numpy(), [float(row[2]) for row in rows]).statistic
    assert values(evaluate(tiny_bert, data=sentences, device="cpu"))["spearman"] == pytest.approx(wanted, abs=2e-3)


def test_perplexity_is_that_of_the_model_itself(tiny_llama: Path, story: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(Path(story).read_text(), add_special_tokens=False)["input_ids"])
    inner = ids[: len(ids) // 31 * 31].view(-1, 31)
    windows = torch.cat(
        [torch.full((len(inner), 1), tokenizer.bos_token_id), inner], 1
    )  # as the tokenizer begins texts
    with torch.no_grad():
        wanted = model(input_ids=windows, labels=windows).loss
    measured = values(evaluate(tiny_llama, data=story, max_length=32, device="cpu"))
    assert measured["nll"] == pytest.approx(float(wanted), abs=1e-5)
    report = evaluate(tiny_llama, data=story, max_length=32, device="cpu")
    assert (
        "data: windows of 32 tokens, each begun by `<s>`, as the tokenizer begins texts; the first of each given"
        in (report.notes)
    )
    assert report.data["data"]["digest"] != evaluate(tiny_llama, data=story, max_length=16).data["data"]["digest"]
    assert measured["perplexity"] == pytest.approx(math.exp(measured["nll"]))


def test_masks_are_the_same_for_both_models(tmp_path: Path, tiny_bert_mlm: Path, story: str) -> None:
    report = evaluate(tiny_bert_mlm, data=story, against=tiny_bert_mlm, max_length=22, seed=5, device="cpu")
    assert report.data["against"]["difference"]["nll"] == {"value": 0, "low": 0, "high": 0}
    assert any("22 tokens, 3 of them masked" in note for note in report.notes)


def test_text_drawn_from_a_model_fits_that_model_best(tiny_llama: Path) -> None:
    other = load.load(tiny_llama)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.data = parameter + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    report = evaluate(other, data="generated:40", against=tiny_llama, max_length=24, device="cpu")
    assert report.data["data"] | {"digest": ""} == {
        "spec": "generated:40", "split": "generated", "samples": 40, "digest": ""
    }  # fmt: skip
    excess, divergence = (report.data["against"][key] for key in ("difference", "divergence"))
    assert excess["nll"]["value"] > 0
    assert excess["nll"]["low"] <= divergence["value"] <= excess["nll"]["high"]


def test_text_drawn_from_the_model_itself_is_called_so(tiny_llama: Path) -> None:
    report = evaluate(tiny_llama, data="generated:4", max_length=8, device="cpu")
    assert any("from" in warning and "itself" in warning for warning in report.warnings)


# gates


def test_gates_judge_the_first_metric(pictures: str) -> None:
    good, bad = Says(favourite=4), Says(favourite=3)
    report = evaluate(good, data=pictures, against=bad, min_quality=0.05, max_drop=0.0, device="cpu")
    assert [(gate.option, gate.passed) for gate in report.gates] == [("--min-quality", True), ("--max-drop", True)]
    assert not evaluate(good, data=pictures, min_quality=0.2, device="cpu").passed


def test_for_perplexity_less_is_better(tiny_llama: Path, story: str) -> None:
    perplexity = values(evaluate(tiny_llama, data=story, device="cpu"))["perplexity"]
    assert evaluate(tiny_llama, data=story, min_quality=perplexity * 1.01, device="cpu").passed
    assert not evaluate(tiny_llama, data=story, min_quality=perplexity * 0.99, device="cpu").passed


def test_a_drop_in_percent_is_refused_where_the_metric_is_a_share(
    pictures: str, story: str, tiny_vit: Path, tiny_llama: Path
) -> None:
    with pytest.raises(UsageError, match=r"`--max-drop 2` could not fail[\s\S]*did you mean `--max-drop 0\.02`"):
        evaluate(tiny_vit, data=pictures, against=tiny_vit, max_drop=2, device="cpu")
    assert evaluate(tiny_llama, data=story, against=tiny_llama, max_drop=2, device="cpu").passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.1}, "`--max-drop` needs something to compare with"),
        ({"min_quality": math.nan}, "`--min-quality` is nan"),
        ({"batch_size": 0}, "`--batch-size` is 0"),
        ({"num_samples": 0}, "`--num-samples` is 0"),
        ({"task": "image-clasification"}, "did you mean `--task image-classification`"),
        ({"data": "generated:many"}, "asks for no number"),
    ],
)
def test_options_that_no_run_could_accept_are_refused(
    pictures: str, tiny_vit: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(tiny_vit, **{"data": pictures, "device": "cpu", **options})


# refusals


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            "tiny_bert",
            "story",
            {},
            r"`sentence-similarity` cannot be evaluated[\s\S]*pairs of texts[\s\S]*single texts",
        ),
        ("tiny_bert", "story", {"task": "text-classification"}, "needs a class for each sample"),
        ("tiny_bert", "sentences", {"task": "text-classification"}, r"does not classify[\s\S]*shape"),
        ("tiny_vit", "sentences", {}, "`image-classification` cannot be evaluated"),
        ("tiny_vit", "generated", {}, "is for causal language models"),
        ("tiny_llama", "story", {"max_length": 65}, "takes at most 64 tokens"),
        ("tiny_llama", "story", {"against": "base"}, "records no base"),
        ("tiny_vit", "pictures", {"image_size": 0}, "`--image-size` is 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    request: pytest.FixtureRequest, model: str, data: str, options: dict[str, Any], message: str
) -> None:
    spec = "generated:4" if data == "generated" else request.getfixturevalue(data)
    with pytest.raises(Exception, match=message) as caught:
        evaluate(request.getfixturevalue(model), data=spec, device="cpu", **options)
    assert caught.value.exit_code in (1, 2)  # type: ignore[attr-defined]


def test_a_task_that_cannot_be_guessed_is_refused_with_the_list(sentences: str) -> None:
    with pytest.raises(DataError, match=r"cannot guess the task of `linear`[\s\S]*sentence-similarity"):
        evaluate(nn.Linear(4, 4), data=sentences, device="cpu")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, tiny_bert: Path, sentences: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
    with pytest.raises(DataError, match="has no tokenizer"):
        evaluate(tmp_path, data=sentences, device="cpu")


def test_constant_scores_cannot_be_ranked(tmp_path: Path, tiny_bert: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("the cat,a dog,1.5\nthe mat,a dog,1.5\nred,blue,1.5\n")
    with pytest.raises(DataError, match="too few scores to rank"):
        evaluate(tiny_bert, data=str(file), device="cpu")


# the table


def test_every_row_of_the_table_is_whole() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.metrics and task.reads
        assert {metric.higher_is_better for metric in task.metrics} == {not task.is_language}
        assert task.objective is not None or name == "image-text-retrieval", "what is learnt from its labels"


def test_macro_f1_and_spearman_agree_with_scikit_learn_and_scipy() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    label, predicted = draw.integers(0, 4, 50), draw.integers(0, 6, 50)
    assert macro_f1({"label": label, "predicted": predicted}) == pytest.approx(
        f1_score(label, predicted, average="macro", zero_division=0)
    )
    cosine, score = draw.integers(0, 9, 50) / 9, draw.integers(0, 6, 50)
    assert spearman({"cosine": cosine, "score": score}) == pytest.approx(spearmanr(cosine, score).statistic)


# real models


def vit(data_folder: Path) -> Source:
    file = data_folder / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
    return Source(str(file), arch="timm:vit_tiny_patch16_224")


def mobilenet(data_folder: Path) -> Source:
    file = data_folder / "weights" / "mobilenetv2_100" / "model.safetensors"
    half = {"mean": 0.5, "std": 0.5}
    return Source(
        str(file), arch="timm:mobilenetv2_100", arch_set={"pad_type": "same", "bn_eps": 1e-3}, preprocess=half
    )


@pytest.mark.real
def test_the_imagenet_sample_meets_the_right_outputs(data_folder: Path) -> None:
    data = str(data_folder / "sets" / "imagenet_sample" / "imagenet_sample_150.zip")
    report = evaluate(vit(data_folder), data=data, against=mobilenet(data_folder), num_samples=60, device="cpu")
    for figures, published in ((report.data["metrics"], 0.82), (report.data["against"]["metrics"], 0.872)):
        assert figures["top1"]["low"] <= published <= figures["top1"]["high"]


@pytest.mark.real
def test_the_sentence_model_reaches_its_published_figure(data_folder: Path, minilm: Path) -> None:
    report = evaluate(minilm, data=str(data_folder / "sets" / "stsb_en"), device="cpu")
    assert values(report)["spearman"] == pytest.approx(0.8203, abs=5e-4)
    assert report.data["data"]["samples"] == 1379


@pytest.mark.real
def test_the_small_llama_knows_its_own_stories(data_folder: Path) -> None:
    folder = data_folder / "weights" / "stories260K"
    own = evaluate(folder, data="generated:16", device="cpu")
    foreign = evaluate(
        folder, data=str(data_folder / "sets" / "tinyshakespeare" / "input.txt"), num_samples=16, device="cpu"
    )
    assert values(own)["perplexity"] < 5 < 50 < values(foreign)["perplexity"]


@pytest.mark.real
def test_the_digits_of_mnist_do_not_fit_an_imagenet_model(data_folder: Path) -> None:
    with pytest.raises(DataError, match="cannot match 10 classes with a model of 1000 outputs"):
        evaluate(vit(data_folder), data=str(data_folder / "sets" / "mnist" / "mnist_10k2k.npz"), device="cpu")


@pytest.mark.parametrize(
    "words", [("evaluate",), ("calibrate", "-o", "stats"), ("finetune", "--steps", 1, "-o", "out")]
)
def test_what_was_guessed_of_a_table_is_said_where_notes_are_not(
    peftc, tiny_bert_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.csv").write_text("".join(f"the cat sat {at},{('negative', 'neutral')[at % 2]}\n" for at in range(20)))
    done = peftc(words[0], tiny_bert_classifier, "--data", "bare.csv", "-q", *words[1:])
    assert done.exit_code == 0, done.stderr
    assert "guessed: the first row of `bare.csv` is data" in done.stderr and "task: " not in done.stderr


def test_texts_of_one_class_are_refused_as_images_are(peftc, tiny_bert_classifier: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.csv"
    file.write_text("text,label\n" + "".join(f"the cat sat {at},happy\n" for at in range(20)))
    refused = peftc("finetune", tiny_bert_classifier, "--data", file, "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "are all of one class" in refused.stderr, refused.stderr
