"""Perplexities by a protocol of the field, and in windows that overlap, are those of a straight loop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc as package
from peftc.errors import DataError, PeftcError, UsageError
from peftc.models.load import load
from peftc.models.tokenizer import tokenizer_of
from tests.networks import BERT, GPT2, save_transformers

LINES = [
    "One day a cat saw a red ball .\n",
    " \n",
    " = The big dog = \n",
    "\n",
    "Tim and Lily went to the park .\n",
] * 60
ROWS = [line if line.strip() else "" for line in LINES]  # as the data set of the published scripts gives them


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("story") / "test.txt"
    file.write_text("".join(LINES))
    return file


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text as the rows of a table."""
    file = tmp_path_factory.mktemp("rows") / "test.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return file


def foretold(model: Any, tokens: list[int], scored: range) -> list[float]:
    """Return the negative log-likelihood of some tokens of a window."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return [-float(logits[at - 1].double().log_softmax(0)[tokens[at]]) for at in scored]


def restated(folder: Path, *, length: int, first: str = "window", stride: int | None = None) -> tuple[float, int]:
    """Return the mean negative log-likelihood as the published scripts have it, and the number of tokens."""
    model = load(folder)
    tokenizer, network = tokenizer_of(model), model.module
    text = "\n\n".join(ROWS)
    if first == "text":
        ids, start = tokenizer(text)["input_ids"], []
    else:
        ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], [tokenizer.bos_token_id]
    inner, done, sums = length - len(start), 0, list[float]()
    for at in range(0, len(ids) - inner + 1, stride or inner):
        least = 1 if not start and (at == 0 or stride is None) else 0  # what stands first in a window is given
        new = range(max(least, done - at) + len(start), length)
        sums += foretold(network, start + ids[at : at + inner], new)
        done = at + inner
    return sum(sums) / len(sums), len(sums)


def nll(report: Any) -> float:
    return float(report.data["metrics"]["nll"]["value"])


def check(folder: Path, story: Path, length: int, *, asked: int | None, **how: Any) -> Any:
    report = package.evaluate(folder, data=story, protocol="gptq", max_length=asked, device="cpu", **how)
    renamed = {"first_token": "first", "stride": "stride"}
    wanted, number = restated(folder, length=length, **{renamed[name]: value for name, value in how.items()})
    assert nll(report) == pytest.approx(wanted, abs=1e-5)
    assert report.data["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert report.data["data"]["windows"]["scored"] == number
    return report


HOW: list[dict[str, Any]] = [{}, {"first_token": "text"}, {"stride": 20}, {"stride": 31, "first_token": "text"}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_perplexity_is_that_of_a_straight_loop(tiny_llama: Path, story: Path, how: dict[str, Any]) -> None:
    check(tiny_llama, story, 32, asked=32, **how)


@pytest.mark.real
@pytest.mark.parametrize("how", [{}, {"first_token": "text"}, {"stride": 200}], ids=str)
def test_the_small_llama_has_the_perplexity_of_the_published_scripts(
    data_folder: Path, story: Path, how: dict[str, Any]
) -> None:
    report = check(data_folder / "weights" / "stories260K", story, 512, asked=None, **how)
    assert "data: `stories260K` takes at most 512 tokens; windows of the protocol have 2,048" in report.notes


def test_the_protocol_has_windows_of_2048_tokens(tmp_path: Path, story: Path) -> None:
    long = {**GPT2, "n_positions": 4096}
    folder = save_transformers(tmp_path, "GPT2LMHeadModel", **long)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": 4096}))
    long_story = tmp_path / "long.txt"
    long_story.write_text(story.read_text() * 4)
    report = package.evaluate(folder, data=long_story, protocol="gptq", device="cpu")
    text = "\n\n".join(ROWS * 4)
    tokens = len(tokenizer_of(load(folder))(text, add_special_tokens=False)["input_ids"])
    used = report.data["data"]
    assert used["windows"]["length"] == 2048 and used["samples"] == tokens // 2047
    assert used["windows"]["scored"] == 2047 * used["samples"]
    assert not any("takes at most" in note for note in report.notes)
    plain = package.evaluate(folder, data=story, stride=256, device="cpu").data["data"]["windows"]
    assert plain["length"] == 512 and plain["protocol"] is None


def test_rows_of_a_table_are_lines_of_a_file(tiny_llama: Path, story: Path, rows: Path) -> None:
    how: dict[str, Any] = {"protocol": "gptq", "max_length": 32, "device": "cpu"}
    assert nll(package.evaluate(tiny_llama, data=story, **how)) == nll(package.evaluate(tiny_llama, data=rows, **how))


def test_a_stride_scores_each_token_once(tiny_llama: Path, story: Path) -> None:
    how: dict[str, Any] = {"data": story, "max_length": 32, "device": "cpu"}
    one = package.evaluate(tiny_llama, stride=1, num_samples=40, **how)
    assert one.data["data"]["windows"]["scored"] <= 40 + 30
    whole = package.evaluate(tiny_llama, stride=31, **how)  # windows of 31 tokens of the text, which do not overlap
    apart = package.evaluate(tiny_llama, **how)
    assert nll(whole) == pytest.approx(nll(apart), abs=1e-6)
    assert any("31 tokens" not in note and "without overlap" in note for note in whole.notes)


def test_the_same_seed_keeps_the_same_windows(tiny_llama: Path, story: Path) -> None:
    how: dict[str, Any] = {"data": story, "protocol": "gptq", "max_length": 32, "num_samples": 5, "device": "cpu"}
    one, other, third = (package.evaluate(tiny_llama, **how, seed=seed) for seed in (1, 1, 2))
    assert one.data == other.data
    assert one.data["data"]["samples"] == 5
    assert one.data["data"]["digest"] != third.data["data"]["digest"]


def test_measurements_of_different_protocols_are_told_apart(tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    package.decompose(tiny_llama, ratio=0.6, output_dir=tmp_path / "small")
    asked: list[dict[str, Any]] = [
        {}, {"protocol": "gptq"}, {"stride": 10}, {"protocol": "gptq", "stride": 10}, {"first_token": "text"},
        {"protocol": "gptq", "first_token": "text"},
    ]  # fmt: skip
    known = set()
    for how in asked:
        report = package.evaluate(
            tmp_path / "small", data=story, against="base", max_length=32, num_samples=4, device="cpu", **how
        )
        known.add(report.data["data"]["digest"])
        assert report.data["against"]["divergence"]["value"] > 0
    assert len(known) == len(asked)
    kept = json.loads((tmp_path / "small" / "result.json").read_text())["measured"]["evaluate"]
    assert len(kept) == len(asked)
    note = next(note for note in package.compare([tmp_path / "small"]).notes if note.startswith("quality"))
    assert "protocol gptq, windows of 32 tokens, stride 32, first token: text" in note


def test_a_note_says_how_the_text_was_cut(tiny_llama: Path, story: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"protocol": "gptq", "max_length": 32, "num_samples": 3, "device": "cpu"}
    said = package.evaluate(tiny_llama, data=story, **how).notes
    wanted = (
        "data: protocol `gptq`, rows joined by two new lines; windows of 32 tokens without overlap, "
        "each begun by `<s>`; 93 tokens scored; no `<unk>` in the text"
    )
    assert wanted in said
    (tmp_path / "words.txt").write_text(story.read_text().replace("red", "<unk>"))
    said = package.evaluate(tiny_llama, data=tmp_path / "words.txt", **how, first_token="text", stride=8).notes
    assert any("32 tokens each 8 after the one before, the whole text begun as the tokenizer does" in n for n in said)
    assert any("do not stand beside published ones of the raw text" in note for note in said)


REFUSED: list[tuple[dict[str, Any], type[PeftcError], str]] = [
    ({"stride": 32}, UsageError, "`--stride` is 32"),
    ({"stride": 0}, UsageError, "`--stride` is 0"),
    ({"protocol": "sparsegpt"}, UsageError, "unknown value `sparsegpt` for `--protocol`"),
    ({"first_token": "texts"}, UsageError, "unknown value `texts` for `--first-token`"),
    ({"protocol": "gptq", "data": "generated:2"}, UsageError, "`--protocol` says how text is cut"),
]


@pytest.mark.parametrize(("how", "kind", "told"), REFUSED, ids=str)
def test_what_cannot_be_cut_so_is_refused(
    tiny_llama: Path, story: Path, how: dict[str, Any], kind: type[PeftcError], told: str
) -> None:
    with pytest.raises(kind, match=told):
        package.evaluate(tiny_llama, **{"data": story, "max_length": 32, "device": "cpu"} | how)


def test_a_text_shorter_than_a_window_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat .\n")
    with pytest.raises(DataError, match="is too short for a window of 32 tokens"):
        package.evaluate(tiny_llama, data=tmp_path / "short.txt", protocol="gptq", max_length=32, device="cpu")


def test_other_tasks_have_no_protocol(tmp_path: Path, story: Path) -> None:
    folder = save_transformers(tmp_path, "BertForMaskedLM", **BERT)
    with pytest.raises(UsageError, match="`--protocol` is for causal language models") as refused:
        package.evaluate(folder, data=story, protocol="gptq", device="cpu")
    assert refused.value.why == "the task is `masked-lm`"


def test_the_command_line_takes_it(peftc: Callable[..., Any], tiny_llama: Path, story: Path) -> None:
    line = ["evaluate", tiny_llama, "--data", story, "--protocol", "gptq", "--max-length", 32, "--stride", 16]
    printed = peftc(*line, "--first-token", "text", "--num-samples", 2, "--json")
    assert printed.exit_code == 0, printed.stderr
    used = json.loads(printed.stdout)["data"]["windows"]
    assert used == {
        "protocol": "gptq", "length": 32, "stride": 16, "first_token": "text", "scored": 47, "unknown": False
    }  # fmt: skip
    assert peftc(*line, "--first-token", "never").exit_code == 2
