"""lm-eval asks a factored model the questions of a local task, by `python -m peftc.lm_eval`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peftc
from tests.environments import python_with, run
from tests.networks import LLAMA, save_transformers

LOCAL = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
"""
TASKS = {  # what each says beside that
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["cat", "dog", "tree"]
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "texts": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "words": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "cat"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = ["the small cat sat on the", "a blue bird sang in the", "then it ran under the big"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_transformers(folder, "LlamaForCausalLM", **LLAMA, initializer_range=0.2)
    peftc.decompose(folder, ratio=0.6, output_dir=folder / "small")
    return folder / "small"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": text, "answer": at % 3}) for at, text in enumerate(QUESTIONS)]
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    for name, text in TASKS.items():
        told = (LOCAL + text).replace("NAME", name).replace("QUESTIONS", str(folder / "questions.jsonl"))
        (folder / f"{name}.yaml").write_text(told)
    return folder


def asked(tasks: Path, place: Path, model: str, arguments: str) -> dict[str, Any]:
    """Return what lm-eval says of a model, with the samples that it kept."""
    python = python_with("lm-eval[hf]")
    words = ["--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS), "--include_path", tasks]
    more = ["--output_path", place, "--log_samples", "--device", "cpu", "--batch_size", 2]
    run(python, "-m", "peftc.lm_eval", *words, *more, cwd=place.parent)
    (found,) = place.rglob("results_*.json")
    answers = {path.name.split("_")[1]: path.read_text().splitlines() for path in place.rglob("samples_*.jsonl")}
    samples = {name: [json.loads(line)["filtered_resps"] for line in lines] for name, lines in answers.items()}
    return {"results": json.loads(found.read_text())["results"], "samples": samples}


@pytest.mark.slow
def test_it_asks_a_factored_model_and_gets_what_the_dense_export_answers(
    small: Path, tasks: Path, tmp_path: Path
) -> None:
    found = asked(tasks, tmp_path / "ours", "peftc", f"pretrained={small}")
    assert found["results"].keys() == TASKS.keys() and found["samples"].keys() == TASKS.keys()
    theirs = asked(tasks, tmp_path / "theirs", "hf", f"pretrained={small},dtype=float32")
    assert theirs["samples"] == found["samples"]
    peftc.export(small, format="hf", dense=True, output_dir=tmp_path / "dense", rounds=5, batch_size=1)
    dense = asked(tasks, tmp_path / "whole", "hf", f"pretrained={tmp_path / 'dense'}")
    assert dense["samples"]["words"] == found["samples"]["words"]
    one, other = (each["results"]["texts"]["word_perplexity,none"] for each in (found, dense))
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_a_delta_and_what_is_unknown(small: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(QUESTIONS) + "\n")
    how: dict[str, Any] = {"data": str(tmp_path / "texts.csv"), "steps": 1, "held_out": 0, "device": "cpu"}
    peftc.finetune(small, method="lora", delta=True, output_dir=tmp_path / "delta", **how)
    found = asked(tasks, tmp_path / "ours", "peftc", f"pretrained={tmp_path / 'delta'}")
    assert found["results"].keys() == TASKS.keys()
    python = python_with("lm-eval[hf]")
    for arguments, says in (
        (f"pretrained={small},max_lenght=32", "`--model peftc` does not take `max_lenght`"),
        (f"pretrained={small}/no", "no"),
    ):
        words = ["--model", "peftc", "--model_args", arguments, "--tasks", "choices", "--include_path", str(tasks)]
        done = subprocess.run([python, "-m", "peftc.lm_eval", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode in (1, 2) and says in done.stderr and "Traceback" not in done.stderr


def test_without_it_the_command_says_what_to_install() -> None:
    line = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('peftc.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'lm-eval[hf]'" in done.stderr and "Traceback" not in done.stderr
