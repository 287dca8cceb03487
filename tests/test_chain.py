"""The project's chain and the pipe, with steps that write a name instead of weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import ArtifactError, PlanError
from peftc.report import Report
from peftc.store.source import Source


def spec(model: Any) -> str:
    return model.spec if isinstance(model, Source) else str(model)


def writer(word: str, calls: list[tuple[str, str]]) -> Callable[..., Report]:
    """Return a step that keeps the rules of a job: done already, another request, overwrite."""

    def step(model: Any, *, output_dir: Path | None = None, **options: Any) -> Report:
        request = f"{abs(hash((word, spec(model), options.get('ratio')))):016x}"
        folder = Path(output_dir or f"{Path(spec(model)).name}-{word}")
        calls.append((spec(model), str(folder)))
        if options.get("ratio") == "0.001":
            raise PlanError("the ratio is too small")
        if options.get("dry_run"):
            return Report(word)
        manifest = folder / "peftc.json"
        if manifest.exists() and not options.get("overwrite"):
            if json.loads(manifest.read_text())["id"] != request:
                raise ArtifactError(f"`{folder}` holds the artifact of another request", request=request)
            return Report(word, artifact=folder, notes=["already done"])
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"id": request}))
        return Report(word, artifact=folder)

    return step


@pytest.fixture
def calls() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub, calls, peftc) -> Callable[..., Any]:
    """Run command lines in a folder with a project file; `decompose` writes, `bench` reads."""
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text('model = "base"\n')
    stub("decompose", writer("decompose", calls))
    stub("bench", lambda model, **options: calls.append((spec(model), "")) or Report("bench"))
    return peftc


def chain() -> list[str]:
    return [entry["folder"] for entry in json.loads(Path("runs/chain.json").read_text())]


def test_a_step_reads_what_stands_before_it_and_writes_its_numbered_folder(project, calls) -> None:
    result = project("decompose", "--ratio", 0.5)
    assert (result.exit_code, result.stdout) == (0, "runs/01-decompose\n"), result.stderr
    assert calls == [("base", "runs/01-decompose")]
    assert chain() == ["01-decompose"]


def test_a_step_never_compresses_its_own_output(project, calls) -> None:
    for _ in range(3):
        assert project("decompose", "--ratio", 0.5).exit_code == 0
    assert {model for model, _ in calls} == {"base"}
    assert chain() == ["01-decompose"]


def test_a_step_that_reads_takes_the_last_artifact_or_the_model(project, calls) -> None:
    project("bench")
    project("decompose")
    project("bench")
    assert [model for model, folder in calls if not folder] == ["base", "runs/01-decompose"]


def test_a_path_of_the_chain_goes_on_from_there(project, calls) -> None:
    project("decompose", "--ratio", 0.5)
    assert project("decompose", "runs/01-decompose", "--ratio", 0.7).stdout == "runs/02-decompose\n"
    assert chain() == ["01-decompose", "02-decompose"]


@pytest.mark.parametrize("where", ['text-column = "tweet"', '[decompose]\ntext-column = "tweet"', "variable"])
def test_columns_of_the_project_hold_for_every_command(
    peftc, stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    for word in ("decompose", "evaluate"):
        stub(word, lambda model, **options: seen.update(options) or Report("bench"))
    text = 'label-column = "mood"' if where == "variable" else where
    Path("peftc.toml").write_text(f'model = "base"\ndata = "a.csv@dev"\n{text}\n')
    if where == "variable":
        monkeypatch.setenv("PEFTC_TEXT_COLUMN", "tweet")
    label = "mood" if where == "variable" else None
    assert peftc("decompose").exit_code == 0
    assert (seen["data"], seen["text_column"], seen["label_column"]) == ("a.csv@dev", "tweet", label)
    assert peftc("decompose", "--data", "b.csv?text=own").exit_code == 0
    assert (seen["text_column"], seen["label_column"]) == (None, label), "typed wins"
    if not where.startswith("["):
        assert peftc("evaluate").exit_code == 0
        assert (seen["data"], seen["text_column"]) == ("a.csv@dev", "tweet")


def test_another_request_rewinds_and_deletes_nothing(project) -> None:
    project("decompose", "--ratio", 0.5)
    project("decompose", "runs/01-decompose", "--ratio", 0.7)
    result = project("decompose", "--ratio", 0.25)
    folder = result.stdout.strip()
    assert folder.startswith("runs/01-decompose-")
    assert len(folder) == len("runs/01-decompose-") + 8
    assert chain() == [Path(folder).name]
    assert "no longer part of it, and kept: `runs/01-decompose`, `runs/02-decompose`" in result.stderr
    assert Path("runs/01-decompose/peftc.json").exists()
    assert Path("runs/02-decompose/peftc.json").exists()
    again = project("decompose", "--ratio", 0.25)
    assert again.stdout == result.stdout
    assert "no longer" not in again.stderr
    assert project("decompose", "--ratio", 0.5).stdout == "runs/01-decompose\n"
    assert chain() == ["01-decompose"]


def test_the_same_request_keeps_what_comes_after(project) -> None:
    project("decompose", "--ratio", 0.5)
    project("decompose", "runs/01-decompose", "--ratio", 0.7)
    result = project("decompose", "--ratio", 0.5)
    assert "already done" in result.stderr
    assert chain() == ["01-decompose", "02-decompose"]


def test_an_overwritten_artifact_ends_the_chain_at_its_place(project) -> None:
    project("decompose", "--ratio", 0.5)
    project("decompose", "runs/01-decompose", "--ratio", 0.7)
    result = project("decompose", "--ratio", 0.25, "--overwrite")
    assert result.stdout == "runs/01-decompose\n"
    assert chain() == ["01-decompose"]
    assert "`runs/02-decompose`" in result.stderr


@pytest.mark.parametrize("words", [["--ratio", "0.001"], ["--dry-run"], ["--ratio", "7"]], ids=" ".join)
def test_a_step_that_writes_nothing_leaves_the_chain_as_it_is(project, words: list[str]) -> None:
    project("decompose", *words)
    assert not Path("runs").exists()
    project("decompose", "--ratio", 0.5)
    before = Path("runs/chain.json").read_bytes()
    project("decompose", *words)
    assert Path("runs/chain.json").read_bytes() == before


def test_an_output_folder_of_the_users_own_joins_the_chain(project, calls, tmp_path: Path) -> None:
    assert project("decompose", "-o", "small").stdout == "small\n"
    project("bench")
    assert Path(calls[-1][0]).resolve() == tmp_path / "small"


def test_a_model_from_elsewhere_stays_outside_the_chain(project, calls) -> None:
    assert project("decompose", "other/model").stdout == "model-decompose\n"
    assert not Path("runs").exists()
    assert project("decompose", "base").stdout == "runs/01-decompose\n"


def test_a_folder_that_is_gone_ends_the_chain_before_it(project, calls) -> None:
    project("decompose", "-o", "small")
    Path("small").rename("elsewhere")
    result = project("bench")
    assert calls[-1][0] == "base"
    assert "is gone: the chain ends before it" in result.stderr


def test_a_damaged_chain_is_refused(project) -> None:
    Path("runs").mkdir()
    Path("runs/chain.json").write_text("[1, 2")
    result = project("decompose")
    assert result.exit_code == 1
    assert "cannot read `runs/chain.json`" in result.stderr


@pytest.mark.parametrize("word", ["decompose", "bench", "analyze"])
def test_no_model_and_no_project_is_a_wrong_command_line(word, tmp_path, monkeypatch, peftc, stub) -> None:
    monkeypatch.chdir(tmp_path)
    stub(word, lambda model, **options: Report(word))
    result = peftc(word)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "needs a MODEL" in result.stderr
    assert "peftc.toml" in result.stderr


def test_without_a_project_the_step_names_its_folder(tmp_path, monkeypatch, peftc, stub, calls) -> None:
    monkeypatch.chdir(tmp_path)
    stub("decompose", writer("decompose", calls))
    assert peftc("decompose", "models/vit").stdout == "vit-decompose\n"


def test_a_pipe_hands_on_a_path_or_a_report(project, calls) -> None:
    path = project("decompose").stdout
    report = project("decompose", "--json").stdout
    for text in (path, report):
        assert project("bench", "-", input=text).exit_code == 0
        assert calls[-1] == ("runs/01-decompose", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n \n",
        "garbage",
        "runs\nruns",
        "{",
        "{}",
        '{"artifact": null}',
        '{"artifact": 3}',
        "[1]",
        "\0",
        "x" * 9999,
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_pipe_without_an_artifact_is_never_the_last_one(project, calls, text) -> None:
    project("decompose")
    calls.clear()
    for word in ("decompose", "bench"):
        result = project(word, "-", input=text)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: standard input names no artifact")
    assert calls == []


def test_the_last_folder_is_kept_when_a_later_step_fails(project) -> None:
    project("decompose")
    assert project("decompose", "runs/01-decompose", "--ratio", "0.001").exit_code == 1
    assert chain() == ["01-decompose"]
    assert not list(Path("runs").glob("*partial*"))


def test_the_steps_themselves_keep_these_rules(tmp_path, monkeypatch, peftc, tiny_vit) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(f'model = "{tiny_vit}"\n[decompose]\nratio = 0.5\ninclude = ["*.mlp.*"]\n')
    assert peftc("decompose").stdout == "runs/01-decompose\n"
    other = peftc("decompose", "--ratio", 0.25)
    assert other.stdout.startswith("runs/01-decompose-"), other.stderr
    assert "no longer part of it, and kept: `runs/01-decompose`" in other.stderr
    assert peftc("show").stdout == other.stdout
    again = peftc("decompose", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["artifact"] == "runs/01-decompose"
    assert peftc("show", "-", input=again.stdout).stdout == "runs/01-decompose\n"
    before = Path("runs/chain.json").read_bytes()
    assert peftc("decompose", "--ratio", 0.5, "--include", "nothing.like.this").exit_code == 2
    assert Path("runs/chain.json").read_bytes() == before


def test_unfinished_work_of_another_request_is_left_alone(tmp_path, monkeypatch, peftc, tiny_vit) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(f'model = "{tiny_vit}"\n')
    partial = Path("runs/01-decompose.partial")
    partial.mkdir(parents=True)
    (partial / "job.json").write_text('{"id": "of another request"}')
    result = peftc("decompose", "--ratio", 0.5)
    assert result.stdout.startswith("runs/01-decompose-"), result.stderr
    assert (partial / "job.json").read_text() == '{"id": "of another request"}'
