"""What was perhaps meant: the right word, in a line that works when typed, and none where nothing is near."""

import re
from pathlib import Path

import pytest

from peftc.cli import suggestions
from peftc.docs.source.pages import COMMANDS
from peftc.errors import did_you_mean, meant, nearest


def hint(result) -> str:
    assert result.exit_code != 0
    return result.stderr.partition("hint: ")[2].strip()


@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        ("decompose m --ratio 50", "`--ratio 0.5`"),
        ("decompose m --ratio 50%", "`--ratio 0.5`"),
        ("decompose m --ratio 0,5", "`--ratio 0.5`"),
        ("decompose m --energy 99", "`--energy 0.99`"),
        ("finetune m --data x --lr 1e-4", "`--learning-rate`"),
        ("finetune m --data x --bs 4", "`--batch-size`"),
        ("finetune m --data x --num_epochs 4", "`--epochs`"),
        ("finetune m --data x --rank 4", "`--set rank=16`"),
        ("finetune m --data x --lora-alpha 4", "`--set alpha=16`"),
        ("decompose m --sparsity 0.5", "`--ratio`"),
        ("decompose m --nsamples 5", "`--num-samples`"),
        ("calibrate m --data x --nsamples 5", "`--calibration-samples`"),
        ("decompose m --raito 0.5", "`--ratio`"),
        ("decompose m --calib 5", "`--calibration-samples`"),
        ("decompose m --gpu", "`--device cuda`"),
        ("decompose --model m", "`peftc decompose MODEL`"),
        ("decompose m --device gpu", "`--device cuda`"),
        ("evaluate m --data x --dtype fp16", "`--dtype float16`"),
        ("distill m --data x --mixed-precision bfloat16", "`--mixed-precision bf16`"),
        ("distill m --data x --schedule cos", "`--schedule cosine`"),
        ("prune m", "`peftc prune-layers`"),
        ("prunelayers m", "`peftc prune-layers`"),
        ("eval m", "`peftc evaluate`"),
        ("compress m", "`peftc decompose`"),
        ("decompsoe m", "`peftc decompose`"),
        ("quantize m", f"{suggestions.QUANTIZE}"),
        ("int8 m", f"{suggestions.QUANTIZE}"),
        ("export m --format onnx --quantize int8", f"{suggestions.QUANTIZE}"),
    ],
)
def test_a_word_of_another_tool_or_a_misspelt_one(line: str, suggested: str, peftc) -> None:
    assert suggested in hint(peftc(*line.split()))


@pytest.mark.parametrize(
    "line",
    [
        "bogus m", "tornado", "x", "--data x", "decompose m --qwerty 1", "decompose m --ratio 0",
        "decompose m --ratio -1",
        "decompose m --ratio 1.5", "decompose m --ratio many", "decompose m --ratio 1e9", "decompose m --device tpu",
        "merge m --lr 1", "show m --ratio 0.5",
    ],
)  # fmt: skip
def test_nothing_is_suggested_where_nothing_is_near(line: str, peftc) -> None:
    assert re.fullmatch(r"`peftc[ a-z-]* --help` lists what there is", hint(peftc(*line.split())))


def test_every_word_of_the_tables_leads_to_something_that_is_there() -> None:
    assert {word for words in suggestions.COMMANDS.values() for word in words} <= set(COMMANDS)
    known = {name.lstrip("-") for command in COMMANDS.values() for param in command.params for name in param.opts}
    assert {word for words in suggestions.OPTIONS.values() for word in words} <= known
    assert not set(suggestions.COMMANDS) & set(COMMANDS)


def test_words_are_near_by_spelling_parts_and_beginnings() -> None:
    tasks = ["image-classification", "text-classification", "masked-lm"]
    assert meant("classification", tasks) == tasks[:2]
    assert meant("Masked_LM", tasks) == ["masked-lm"]
    assert nearest("tsne", ["silhouette", "tsne_silhouette"]) == "tsne_silhouette"
    assert nearest("int8", ["init", "run"]) is None
    assert nearest("lr", ["full", "loss"]) is None


def test_an_option_of_other_commands_is_said_to_be_theirs(peftc) -> None:
    assert hint(peftc("decompose", "vit", "--within-drop", "0.02")) == "it is an option of `prune-layers`"
    assert "--help` lists what there is" in hint(peftc("decompose", "vit", "--xyzzyx", "0.02"))


def test_a_task_that_is_half_a_name_gets_both(tiny_vit: Path, peftc) -> None:
    result = peftc("evaluate", tiny_vit, "--data", "sklearn:digits", "--task", "classification")
    assert hint(result) == "did you mean `--task image-classification` or `--task text-classification`?"


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("phottos", "photos"),
        ("photos/cat", "photos/cats"),
        ("phots/cats", "photos/cats"),
        ("./photos/CATS", "photos/cats"),
    ],
)
def test_a_misspelt_path_gets_the_name_in_its_folder(typed: str, near: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(typed) == f"did you mean `{near}`?"


@pytest.mark.parametrize("typed", ["bicycles", "photos/bicycles", "a/b/c", "/", "", ".", "x" * 5000, "phots/dogs"])
def test_a_path_that_is_near_nothing_gets_none(typed: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(typed) is None


@pytest.mark.parametrize(
    "line",
    ["decompose smal --ratio 0.5", "show smal", "compare smal", "decompose . --ratio 0.5 --plan smal", "run smal"],
)
def test_every_command_that_reads_a_path_does_so(line: str, tmp_path: Path, monkeypatch, peftc) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    if "--plan" not in line:
        assert hint(peftc(*line.split())) == "did you mean `small`?"


def test_names_of_timm(peftc) -> None:
    right = "vit_tiny_patch16_224"
    wrong = right.replace("tiny", "tinny")
    assert hint(peftc("analyze", f"timm:{wrong}")) == f"did you mean `timm:{right}`?"
    tag = "augreg_in21k_ft_in1k"
    assert hint(peftc("analyze", f"timm/{wrong}.{tag}", "--offline")) == f"did you mean `timm/{right}.{tag}`?"
    assert "did you mean" not in peftc("analyze", "timm:nothing_like_it").stderr
    assert "did you mean" not in peftc("analyze", f"timm/{right}.{tag}", "--offline").stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rank=x", "setting `rank` of `lora` is `x`\n  cause: it takes a whole number, as 8"),
        ("alpha=true", "setting `alpha` of `lora` is `true`\n  cause: it takes a number, as 16.0"),
        ("rnak=4", "did you mean `rank`?"),
        ("layout=pef", "did you mean `--set layout=peft`?"),
    ],
)
def test_settings_in_words(setting: str, said: str, tiny_vit: Path, peftc) -> None:
    result = peftc("finetune", tiny_vit, "--data", "sklearn:digits", "--set", setting)
    assert result.exit_code == 2
    assert said in result.stderr
