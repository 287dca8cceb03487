"""Every way to end: the message on stderr, the exit code, and nothing else on stdout."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import PeftcError, PlanError, UsageError
from peftc.report import Report, Table


def raising(problem: BaseException):
    def step(model: Any, **options: Any) -> Report:
        raise problem

    return step


def reporting(**fields: Any):
    return lambda model, **options: Report("decompose", **fields)


def test_a_refusal_says_what_why_and_what_to_do(peftc, stub) -> None:
    refusal = PlanError("cannot decompose `fc` at rank 600", why="its weight is 8 x 8", hint="lower `--rank` to 3")
    stub("decompose", raising(refusal))
    result = peftc("decompose", "m", "--rank", 600)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: cannot decompose `fc` at rank 600\n  cause: its weight is 8 x 8\n  hint: lower `--rank` to 3\n"
    )


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (UsageError("unknown value"), 2, "error: unknown value"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model"), 1, "`out/model`"),
        (OSError(errno.EACCES, "Permission denied", "out"), 1, "permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 1, "read-only file system"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "free some space"),
        (MemoryError(), 1, "error: out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: out of memory"),
        (RuntimeError("unable to mmap 96 bytes from file <w>: Cannot allocate memory (12)"), 1, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: out of memory"),
        (RuntimeError("can't start new thread"), 1, "error: out of memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, "error: out of memory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 1, "`ulimit -u`"),
        (UnicodeEncodeError("utf-8", 'a "caf\udce9" b', 6, 7, "surrogates not allowed"), 1, "error: `caf\\xe9` cannot"),
        (UnicodeEncodeError("ascii", "caf\u00e9", 3, 4, "ordinal not in range"), 70, "this is a bug in peftc"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "error: out of memory"),
        (ZeroDivisionError("division by zero"), 70, "this is a bug in peftc"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 70, "this is a bug in peftc"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_exception_becomes_a_message_and_a_code(peftc, stub, problem, code, text) -> None:
    stub("decompose", raising(problem))
    result = peftc("decompose", "m", "--ratio", 0.5)
    assert (result.exit_code, result.stdout) == (code, "")
    assert text in result.stderr
    assert ("Traceback" in result.stderr) == (code == 70)


def test_what_came_of_a_refused_allocation_is_one_too_and_names_the_limit(peftc, stub, monkeypatch) -> None:
    problem = KeyError("x")
    problem.__cause__ = MemoryError("Unable to allocate 9 GiB")
    stub("decompose", raising(problem))
    limits = {resource.RLIMIT_AS: (4_000_000_000, -1), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits[kind])
    result = peftc("decompose", "m", "--ratio", 0.5)
    assert result.exit_code == 1 and "`ulimit -v` gives this process 4 GB" in result.stderr


def test_the_program_ends_with_one_error_where_the_memory_is_limited(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20)); "
    words = f"import sys; sys.argv = ['peftc', 'analyze', {str(tmp_path)!r}]; from peftc.cli.app import main; main()"
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    done = subprocess.run([sys.executable, "-c", limit + words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "ulimit -v" in done.stderr, done.stderr


NAME = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "words",
    [
        ["decompose", NAME, "--ratio", "0.5"],
        ["decompose", "m", "--ratio", "0.5", "-o", NAME],
        ["decompose", "m", "--plan", NAME],
        ["decompose", "m", "--ratio", "0.5", "--weights", NAME],
        ["evaluate", "m", "--data", NAME],
        ["analyze", "m", "--plot", NAME],
        ["compare", "m", NAME],
    ],
    ids=lambda words: " ".join(words).replace(NAME, "NAME"),
)
def test_a_name_that_is_not_utf8_is_refused_before_any_work(peftc, stub, words: list[str]) -> None:
    stub(words[0], raising(AssertionError("it began to work")))
    result = peftc(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "`caf\\xe9` is not UTF-8" in result.stderr and result.stderr.count("error: ") == 1


def test_a_variable_that_is_not_utf8_is_refused(peftc, stub, monkeypatch) -> None:
    stub("evaluate", raising(AssertionError("it began to work")))
    monkeypatch.setenv("PEFTC_DATA", NAME)
    result = peftc("evaluate", "m")
    assert result.exit_code == 2 and "`--data`, `caf\\xe9` is not UTF-8" in result.stderr


def test_a_report_with_such_a_name_is_printed(peftc, stub) -> None:
    stub("decompose", lambda model, **options: Report("decompose", artifact=Path(NAME), notes=[f"{NAME} \ud800"]))
    result = peftc("decompose", "m", "--ratio", 0.5)
    assert result.exit_code == 0 and r"caf\xe9 \ud800" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--ratio", "0"],
        ["--ratio", "1.5"],
        ["--ratio", "nan"],
        ["--ratio", "2/0"],
        ["--ratio", "half"],
        ["--ratio", ""],
        ["--ratio=-0.5"],
        ["--rank", "1.5"],
        ["--energy", "inf"],
        ["--target-params", "22X"],
        ["--speedup", "1"],
        ["--speedup", "nan"],
        ["--rank-multiple", "0"],
        ["--target-params", "nan"],
        ["--target-macs", "-3G"],
        ["--max-bytes", "1 elephant"],
        ["--max-shard-size", "big"],
        ["--max-drop", "nan"],
        ["--min-quality", "inf"],
        ["--allocation", "fair"],
        ["--device", "tpu"],
        ["--seed", "-1"],
        ["--batch-size", "0"],
        ["--set", "alpha"],
        ["--set", "a=1", "--set", "a=2"],
        ["--preprocess", "=1"],
        ["--raito", "0.5"],
        ["--ratio"],
        ["--config", "nowhere.toml"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2(peftc, stub, words: list[str]) -> None:
    stub("decompose", reporting())
    result = peftc("decompose", "m", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert words[0].split("=")[0] in result.stderr


def test_a_rank_that_no_model_has_is_refused_before_one_is_looked_for(peftc) -> None:
    result = peftc("decompose", "m", "--rank", 0)
    assert result.exit_code == 2 and "`--rank 0` is out of range" in result.stderr


def test_an_unknown_command_is_refused_with_the_nearest(peftc) -> None:
    result = peftc("decompos")
    assert result.exit_code == 2
    assert "did you mean `peftc decompose`?" in result.stderr


def test_no_command_shows_the_help(peftc) -> None:
    result = peftc()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_underscores_serve_as_well(peftc, stub) -> None:
    seen: dict[str, Any] = {}
    stub("decompose", lambda model, **options: seen.update(options) or Report("decompose"))
    assert peftc("decompose", "m", "--target_params", "22M", "--set", "up_to=0.5").exit_code == 0
    assert (seen["target_params"], seen["settings"]) == (22_000_000, {"up_to": 0.5})


def test_options_arrive_as_numbers(peftc, stub) -> None:
    seen: dict[str, Any] = {}
    stub("decompose", lambda model, **options: seen.update(options, model=model) or Report("decompose"))
    words = ["--ratio", "2/3", "--max-bytes", "100MB", "--max-params", "1.5e9", "--skip", "head", "--skip", "*.fc1"]
    words += ["--preprocess", "mean=0.5,0.4,0.3", "--arch-set", "pad_type=same", "--arch-set", "bn_eps=1e-3"]
    result = peftc("decompose", "m", *words)
    assert result.exit_code == 0, result.stderr
    assert seen["ratio"] == "2/3"
    assert (seen["max_bytes"], seen["max_params"]) == (100_000_000, 1_500_000_000)
    assert (seen["skip"], seen["include"], seen["settings"]) == (("head", "*.fc1"), (), None)
    assert seen["model"].preprocess == {"mean": [0.5, 0.4, 0.3]}
    assert seen["model"].arch_set == {"pad_type": "same", "bn_eps": 0.001}


def test_a_gate_that_is_not_met_ends_with_3_and_leaves_the_artifact(peftc, stub) -> None:
    report = Report("decompose", artifact=Path("small"))
    report.at_most("max_params", 10, 12)
    stub("decompose", lambda model, **options: report)
    result = peftc("decompose", "m", "-q")
    assert (result.exit_code, result.stdout) == (3, "small\n")
    assert "gate --max-params 10: 12, not met" in result.stderr


def test_json_is_one_object_that_any_reader_takes(peftc, stub) -> None:
    rows = [[f"blocks.{i}", float("nan"), i] for i in range(300)]
    data = {"modules": [{"name": n, "error": e, "rank": r} for n, e, r in rows], "path": Path("x"), "ü": "é"}
    stub("decompose", reporting(data=data, tables=[Table("modules", ["name", "error", "rank"], rows)]))
    result = peftc("decompose", "m", "--json")
    read = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (read["schema_version"], len(read["modules"]), read["modules"][0]["error"]) == (1, 300, None)
    assert "blocks.299" in result.stderr


def test_tables_fit_narrow_terminals_and_plain_characters(stub, peftc) -> None:
    rows = [["blocks.0.attn.qkv", 64, "22.9 MB → 11.4 MB", 0.01234567], ["head", None, "—", 1.0]]
    table = Table("modules", ["name", "rank", "bytes", "error"], rows)
    stub("decompose", reporting(tables=[table], notes=["a note of some length that goes on for more than a line"]))
    narrow = peftc("decompose", "m", env={"COLUMNS": "40"}).stderr
    assert max(map(len, narrow.splitlines())) <= 40
    assert {"22.9", "MB", "→", "11.4"} <= {*narrow.split()}
    wide = peftc("decompose", "m").stderr
    assert "blocks.0.attn.qkv    64  22.9 MB → 11.4 MB  0.01235" in wide
    assert "\x1b" not in wide


PROGRAM = """
import sys, types
from pathlib import Path
from peftc.report import Report, Table
def decompose(model, **options):
    {body}
    return Report("decompose", artifact=Path("small é"), tables=[Table("t", ["a × b"], [["→ é"]])])
module = types.ModuleType("peftc.steps.decompose")
module.decompose = decompose
sys.modules[module.__name__] = module
from peftc.cli.app import main
main()
"""


def program(body: str = "pass", **extra: Any) -> Any:
    command = [sys.executable, "-c", PROGRAM.format(body=body), "decompose", "m", "--ratio", "0.5"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **extra)


def test_characters_that_a_stream_lacks_are_replaced() -> None:
    process = program(env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (process.returncode, out) == (0, os.fsencode("small é\n"))
    assert err.splitlines()[1] == b"a x b"
    assert b"-> \\xe9" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = program("import time; time.sleep(0.5)")
    process.stdout.close()
    assert process.stderr.read().endswith("→ é\n\n".encode())
    assert process.wait() == 0
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_one_clear_error() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-c", PROGRAM.format(body="pass"), "decompose", "m"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "no space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed: str) -> None:
    line = f'exec "$0" -c "$1" decompose m {closed}'
    done = subprocess.run(["bash", "-c", line, sys.executable, PROGRAM.format(body="pass")], capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume(number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("a shell that runs the tests in the background lets them ignore Ctrl-C")
    process = program("import time; print('ready', file=sys.stderr, flush=True); time.sleep(30)")
    assert process.stderr.readline() == b"ready\n"
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"run the same command again to resume" in err
    assert b"Traceback" not in err


def test_every_error_class_has_an_exit_code_of_the_list() -> None:
    assert {one.exit_code for one in (PeftcError, *PeftcError.__subclasses__())} == {1, 2}


def test_version_and_methods_are_data(peftc) -> None:
    import peftc as package

    assert peftc("--version").stdout == f"peftc {package.__version__}\n"
    assert "svd" in peftc("methods", "decompose").stdout.split()
    assert json.loads(peftc("methods", "--json").stdout)["methods"]["decompose"]["svd"].endswith(".svd")
    assert peftc("methods", "decompos").exit_code == 2


def test_lines_stand_in_place_of_the_path(peftc, stub) -> None:
    lines = ["peftc decompose m -o 01-decompose", "peftc distill 01-decompose -o 02-distill"]
    stub("show", lambda model, **options: Report("show", {"commands": lines}, artifact=Path("m"), lines=lines))
    assert peftc("show", "m", "--commands").stdout.splitlines() == lines
    assert json.loads(peftc("show", "m", "--commands", "--json").stdout)["commands"] == lines
