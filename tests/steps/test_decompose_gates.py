"""Decompose on the command line: its gates, and JSON through a pipe."""

import json
from pathlib import Path

from tests.forked import forked
from tests.networks import HERE

REPOSITORY = Path(__file__).parents[2]


def test_gates_leave_the_artifact_and_end_with_3(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    for number, gate in enumerate((["--max-params", "10"], ["--max-bytes", "1kB"])):
        out = tmp_path / str(number)
        result = peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", out, *gate)
        assert (result.exit_code, result.stdout) == (3, f"{out}\n"), result.stderr
        assert (out / "peftc.json").is_file() and gate[0] in result.stderr
        assert peftc("decompose", tiny_vit, "--ratio", 0.5, "-o", out, gate[0], "1G").exit_code == 0


PIPED = """
import os, subprocess, sys
from peftc.cli.app import main
tool = subprocess.Popen([sys.executable, "-m", "json.tool"], stdin=subprocess.PIPE)
os.dup2(tool.stdin.fileno(), 1)
tool.stdin.close()
try:
    main()
finally:
    sys.stdout.flush()
    os.close(1)
    assert tool.wait() == 0
"""


def test_json_of_three_hundred_modules_goes_through_a_pipe(tmp_path: Path) -> None:
    words = ["decompose", f"{HERE}:Deep", "--allow-code", "--ratio", 0.5, "-o", tmp_path / "out", "--json"]
    done = forked(*words, code=PIPED, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["modules"]) == 299
    assert "Traceback" not in done.stderr


def test_gates_judge_the_quality_on_held_out_data_and_leave_the_result_in_place(
    peftc, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "texts"
    data.mkdir()
    rows = ["the cat sat on the mat .,negative", "a small dog ran !,neutral", "the red bird sang .,positive"]
    (data / "test.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (data / "train.csv").write_text("text,label\nthe dog sat .,negative\na cat ran !,neutral\nthe bird .,positive\n")
    words = ("decompose", tiny_bert_classifier, "--ratio", "0.5", "--data", data, "--task", "text-classification")
    met = peftc(*words, "-o", tmp_path / "one", "--max-drop", "1", "--json")
    assert met.exit_code == 0, met.stderr
    assert json.loads(met.stdout)["quality"]["metrics"]["accuracy"]["value"] >= 0
    missed = peftc(*words, "-o", tmp_path / "two", "--min-quality", "1.1")
    assert missed.exit_code == 3 and "not met" in missed.stderr
    assert (tmp_path / "two" / "peftc.json").is_file()


def test_data_of_another_task_calibrate_and_a_gate_on_them_is_refused_before_anything_is_written(
    peftc, tiny_bert_classifier: Path, tmp_path: Path
) -> None:
    data = tmp_path / "other.csv"
    data.write_text("text,label\nthe cat sat .,sport\nthe dog ran .,art\n")
    words = ["decompose", tiny_bert_classifier, "--ratio", "0.5", "--data", data]
    for gate in (["--max-drop", "0.1"], ["--method", "svd"]):
        refused = peftc(*words, *gate, "-o", tmp_path / "no")
        assert refused.exit_code == 1 and "sport" in refused.stderr
        assert not (tmp_path / "no").exists()
    done = peftc(*words, "-o", tmp_path / "yes")
    assert done.exit_code == 0 and "quality was not measured" in done.stderr


def test_a_quality_gate_without_data_is_a_wrong_command_line(peftc, tiny_vit: Path, tmp_path: Path) -> None:
    refused = peftc("decompose", tiny_vit, "--ratio", "0.5", "--max-drop", "0.1", "-o", tmp_path / "no")
    assert refused.exit_code == 2 and "--data DATA" in refused.stderr
