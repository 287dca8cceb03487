"""A recipe: the chain of a project file, of which only those steps run whose answer does not stand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import PlanError
from peftc.project import ledger
from peftc.report import GUESSED, Report
from peftc.store import artifact
from peftc.store.header import encode_header
from peftc.store.manifest import Manifest, digest
from peftc.store.source import Source

RECIPE = """
model = "dense"
data = "photos"
chain = ["decompose", "distill", "prune-layers", "distill.again", "evaluate"]

[decompose]
ratio = 0.5

[distill]
epochs = 2
learning-rate = 1e-3

[distill.again]
epochs = 1

[evaluate]
max-drop = 0.1
against = "base"
"""


def spec(model: Any) -> str:
    return model.spec if isinstance(model, Source) else str(model)


def write(folder: Path, identity: str) -> None:
    """Write the least that counts as a whole artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = encode_header({"w": ("U8", (1,))}, {"peftc": identity}) + b"\0"
    files = {"model.safetensors": artifact.write_bytes(folder / "model.safetensors", weights)}
    base = {"library": "timm", "architecture": "vit"}
    Manifest(identity, base, [{"id": identity, "request": {"command": "x"}}], files, 1).write(folder)


class Steps:
    """Steps that write as a job does, and remember that they ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []
        self.given: list[dict[str, Any]] = []
        self.drop = 0.0
        self.fail = ""

    def writer(self, word: str) -> Callable[..., Report]:
        def step(model: Any, *, output_dir: Path | None = None, **options: Any) -> Report:
            from peftc.errors import ArtifactError

            if word == self.fail:
                raise PlanError("the budget does not fit")
            before = Path(spec(model), "peftc.json")
            asked = {name: str(value) for name, value in options.items() if not isinstance(value, Source)}
            identity = digest([word, asked, before.read_text() if before.is_file() else ""])
            folder = Path(output_dir or f"{Path(spec(model)).name}-{word}")
            there = folder / "peftc.json"
            if there.is_file() and json.loads(there.read_text())["id"] != identity:
                raise ArtifactError(f"`{folder}` holds the artifact of another request", request=identity)
            write(folder, identity)
            self.ran.append((word, spec(model)))
            self.given.append(options)
            return Report(word, {"figure": len(self.ran)}, artifact=folder, notes=[f"{GUESSED}a header"] * 2)

        return step

    def evaluate(self, model: Any, **options: Any) -> Report:
        self.ran.append(("evaluate", spec(model)))
        self.given.append(options)
        report = Report("evaluate", {"metrics": {"top1": {"value": 0.9}}})
        report.at_most("--max-drop", options["max_drop"], self.drop)
        return report

    def words(self) -> list[str]:
        """Return which steps ran since the last question."""
        words = [word for word, _ in self.ran]
        self.ran.clear()
        return words


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub, steps: Steps, peftc) -> Callable[..., Any]:
    """Run `peftc run` in a folder with a recipe, a model and data."""
    monkeypatch.chdir(tmp_path)
    for word in ("decompose", "distill", "prune_layers"):
        stub(word, steps.writer(word.replace("_", "-")))
    stub("evaluate", steps.evaluate)
    Path("dense").mkdir()
    Path("dense/model.safetensors").write_text("weights")
    Path("photos").mkdir()
    Path("photos/one.png").write_text("pixels")
    Path("peftc.toml").write_text(RECIPE)
    return lambda *words: peftc("run", *words)


def edit(old: str, new: str) -> None:
    text = Path("peftc.toml").read_text()
    assert old in text
    Path("peftc.toml").write_text(text.replace(old, new))


EVERY = ["decompose", "distill", "prune-layers", "distill", "evaluate"]


def test_the_steps_run_in_order_each_on_what_the_one_before_wrote(run, steps) -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (0, "runs/04-distill\n"), result.stderr
    assert steps.ran == [
        ("decompose", "dense"),
        ("distill", "runs/01-decompose"),
        ("prune-layers", "runs/02-distill"),
        ("distill", "runs/03-prune-layers"),
        ("evaluate", "runs/04-distill"),
    ]


def test_a_guess_about_the_data_is_said_once(run) -> None:
    assert run().stderr.count("guessed: a header") == 1


def test_a_step_that_comes_twice_has_its_own_table_over_the_common_one(run, steps) -> None:
    run()
    first, again = (given for (word, _), given in zip(steps.ran, steps.given, strict=True) if word == "distill")
    assert (first["epochs"], again["epochs"]) == (2.0, 1.0)
    assert first["learning_rate"] == again["learning_rate"] == 1e-3


def test_a_second_run_does_nothing(run, steps) -> None:
    run()
    steps.words()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = run()
    assert (result.exit_code, result.stdout) == (0, "runs/04-distill\n")
    assert steps.words() == []
    assert "nothing to do: all 5 steps are up to date" in result.stderr
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def another_setting() -> None:
    edit("epochs = 1", "epochs = 3")


def another_setting_of_both() -> None:
    edit("learning-rate = 1e-3", "learning-rate = 1e-4")


def another_gate() -> None:
    edit("max-drop = 0.1", "max-drop = 0.2")


def other_data() -> None:
    Path("photos/two.png").write_text("more pixels")


def another_model() -> None:
    Path("dense/model.safetensors").write_text("other weights")


def an_artifact_is_gone() -> None:
    Path("runs/03-prune-layers").rename("elsewhere")


def an_artifact_is_damaged() -> None:
    Path("runs/03-prune-layers/model.safetensors").write_bytes(b"cut")


def a_bit_of_it_is_flipped() -> None:
    path = Path("runs/03-prune-layers/model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def the_same_files_at_another_time() -> None:
    os.utime("photos/one.png", ns=(1, 1))
    os.utime("dense/model.safetensors", ns=(1, 1))


def another_artifact_stands_there() -> None:
    write(Path("runs/03-prune-layers"), "another")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (another_setting, ["distill", "evaluate"]),
        (another_setting_of_both, EVERY[1:]),
        (another_gate, ["evaluate"]),
        (other_data, EVERY),
        (the_same_files_at_another_time, []),  # as a checkout in CI leaves them
        (another_model, ["decompose"]),  # it answers that the artifact is there already: nothing else depends on it
        (an_artifact_is_gone, ["prune-layers"]),
        (an_artifact_is_damaged, ["prune-layers"]),
        (a_bit_of_it_is_flipped, ["prune-layers"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_runs_again_what_depends_on_it(run, steps, change, expected) -> None:
    run()
    steps.words()
    change()
    result = run()
    assert result.exit_code == 0, result.stderr
    assert steps.words() == expected
    run()
    assert steps.words() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (an_artifact_is_gone, "`runs/03-prune-layers` is gone"),
        (
            an_artifact_is_damaged,
            "`runs/03-prune-layers` is damaged: `runs/03-prune-layers/model.safetensors` has 3 bytes",
        ),
        (
            a_bit_of_it_is_flipped,
            "`runs/03-prune-layers` is damaged: `runs/03-prune-layers` was changed after it was written",
        ),
        (another_artifact_stands_there, "another artifact stands in `runs/03-prune-layers`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_became_of_an_artifact_is_said(run, change, why: str) -> None:
    run()
    change()
    state = json.loads(run("--dry-run", "--json").stdout)["steps"][2]
    assert (state["state"], state["why"]) == ("would run", why)


def test_a_setting_that_is_taken_back_finds_its_artifact_again(run, steps) -> None:
    run()
    edit("ratio = 0.5", "ratio = 0.25")
    other = run()
    assert other.stdout.startswith("runs/04-distill-")
    edit("ratio = 0.25", "ratio = 0.5")
    assert run().stdout == "runs/04-distill\n"
    assert len(list(Path("runs").glob("01-decompose*"))) == 2, "nothing is ever deleted"


def test_a_step_that_was_typed_does_not_lead_the_chain_astray(run, steps, peftc) -> None:
    run()
    assert peftc("distill", "--epochs", 9).stdout.startswith("runs/02-distill-")
    edit("epochs = 1", "epochs = 3")
    steps.words()
    assert run().stdout.startswith("runs/04-distill-")
    assert steps.words() == ["distill", "evaluate"]
    chain = [entry["folder"] for entry in json.loads(Path("runs/chain.json").read_text())]
    assert chain[:3] == ["01-decompose", "02-distill", "03-prune-layers"]


def test_a_gate_that_is_not_met_ends_the_chain(run, steps) -> None:
    edit('"distill.again", "evaluate"]', '"evaluate", "distill.again"]')
    steps.drop = 0.25
    result = run()
    assert (result.exit_code, result.stdout) == (3, "runs/03-prune-layers\n")
    assert steps.words() == ["decompose", "distill", "prune-layers", "evaluate"]
    last = result.stderr.splitlines()[-1]
    assert last == "error: `evaluate` ends the chain: gate --max-drop 0.1: 0.25, not met; not run: `distill.again`"
    again = run("-q")
    assert (again.exit_code, again.stderr.splitlines()) == (3, [last])
    assert steps.words() == ["evaluate"], "what was measured may be met the next time"
    steps.drop = 0.05
    assert run().exit_code == 0
    assert steps.words() == ["evaluate", "distill"]


def test_a_step_that_fails_ends_the_chain_and_the_next_run_goes_on_from_there(run, steps) -> None:
    steps.fail = "prune-layers"
    result = run("--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "`prune-layers` ends the chain:\nerror: the budget does not fit" in result.stderr
    steps.fail = ""
    steps.words()
    assert run().exit_code == 0
    assert steps.words() == ["prune-layers", "distill", "evaluate"]


def test_a_dry_run_says_what_would_run_and_why(run, steps) -> None:
    result = run("--dry-run")
    assert (result.exit_code, result.stdout, steps.words()) == (0, "", [])
    assert "it has not run yet" in result.stderr
    assert not Path("runs").exists()
    run()
    steps.words()
    edit("epochs = 1", "epochs = 3")
    result = run("--dry-run", "--json")
    assert steps.words() == []
    states = [(each["step"], each["state"], each["why"]) for each in json.loads(result.stdout)["steps"]]
    assert states == [
        ("decompose", "up to date", None),
        ("distill", "up to date", None),
        ("prune-layers", "up to date", None),
        ("distill.again", "would run", "`epochs` was 1, now it is 3"),
        ("evaluate", "may run", "it reads what `distill.again` writes"),
    ]


def test_json_is_one_object_with_the_report_of_every_step(run, steps) -> None:
    first = json.loads(run("--json").stdout)
    assert (first["command"], first["artifact"], first["recipe"]) == ("run", "runs/04-distill", "peftc.toml")
    assert [each["state"] for each in first["steps"]] == ["done"] * 5
    assert first["steps"][-1]["report"]["metrics"]["top1"]["value"] == 0.9
    assert first["gates"] == [{"option": "--max-drop", "limit": 0.1, "value": 0.0, "passed": True}]
    second = json.loads(run("--json").stdout)
    assert [each["report"] for each in second["steps"]] == [each["report"] for each in first["steps"]]


def test_every_step_is_parsed_before_the_first_one_runs(run, steps) -> None:
    edit("max-drop = 0.1", 'max-drop = "much"')
    result = run()
    assert (result.exit_code, steps.words()) == (2, [])
    assert "invalid value for '--max-drop'" in result.stderr
    assert "the value comes from `max-drop` in `[evaluate]` of `peftc.toml`" in result.stderr
    edit('data = "photos"\n', "")
    edit('max-drop = "much"', "max-drop = 0.1")
    assert "missing option '--data'" in run().stderr
    assert steps.words() == []


def test_another_file_is_a_recipe_too(run, steps) -> None:
    Path("peftc.toml").rename("big.toml")
    refused = run()
    assert refused.exit_code == 2
    assert "there is no recipe at `peftc.toml`" in refused.stderr
    assert "`peftc init MODEL --data DATA`" in refused.stderr
    assert run("big.toml").stdout == "runs/04-distill\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('chain = ["decompos"]', "did you mean `decompose`"),
        ("chain = []", "`chain` in `peftc.toml` is not a list of steps"),
        ('chain = "decompose"', "is not a list of steps"),
        ('chain = ["distill", "distill", "distill.again"]', "`distill` stands twice.*\n.*as `distill.again`"),
        ('chain = ["distill.", "distill.again"]', "`distill.` has no name"),
        ('chain = ["distill"]', "unknown name `again` in `\\[distill\\]`.*\n.*no step `distill.again` stands in"),
        ('chain = ["methods", "distill.again"]', "`methods` is no step of a chain"),
        ('chain = ["run", "distill.again"]', "`run` is no step of a chain"),
        ("", "unknown name `again`"),
    ],
)
def test_a_chain_that_is_wrong_is_refused(run, steps, line: str, message: str) -> None:
    import re

    edit('chain = ["decompose", "distill", "prune-layers", "distill.again", "evaluate"]', line)
    result = run()
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr
    assert steps.words() == []


def test_a_project_file_without_a_chain_or_a_model_says_what_to_add(run) -> None:
    Path("peftc.toml").write_text('model = "dense"\n')
    assert "names no `chain`" in run().stderr
    Path("peftc.toml").write_text('chain = ["decompose"]\n')
    assert 'add `model = "..."`' in run().stderr


def test_a_chain_does_not_change_what_single_commands_take(run, steps, peftc) -> None:
    assert peftc("distill", "--data", "photos").exit_code == 0
    assert steps.given[0]["epochs"] == 2.0


def test_a_damaged_ledger_is_refused(run) -> None:
    run()
    Path("runs/ledger.json").write_text('{"schema_version": 1, "steps": {"decompose": {}}}')
    result = run()
    assert result.exit_code == 1
    assert "cannot read `runs/ledger.json`" in result.stderr
    Path("runs/ledger.json").unlink()
    assert run().exit_code == 0


def test_the_state_of_a_file_follows_its_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a")
    first = ledger.state(str(file))
    assert ledger.state(f"{file}@test") == first
    os.utime(file, ns=(1, 1))
    assert ledger.state(str(file)) != first
    assert ledger.state(str(tmp_path)) != ledger.state(str(file))
    assert ledger.state("hf:org/name@test") is ledger.state("") is ledger.state("x" * 9999) is None


def test_the_content_of_a_file_does_not_follow_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a")
    first, name = ledger.state(str(file)), f"{file}@test"
    assert first is not None
    known = ledger.content(name, first)
    os.utime(file, ns=(1, 1))
    second = ledger.state(name)
    assert second is not None and second != first
    assert ledger.content(name, second) == known is not None
    assert ledger.content(str(tmp_path), first) is None, "it does not look so"
    monkeypatch.setattr(ledger, "READ", 0)
    ledger.content.cache_clear()
    assert ledger.content(name, second) is None, "so much is not read"


def test_the_state_of_an_artifact_is_that_of_its_manifest(tmp_path: Path) -> None:
    write(tmp_path / "small", "one")
    first = ledger.state(str(tmp_path / "small"))
    (tmp_path / "small" / "result.json").write_text("{}")  # what was measured is no change
    assert ledger.state(str(tmp_path / "small")) == first
    write(tmp_path / "small", "other")
    assert ledger.state(str(tmp_path / "small")) != first


def test_a_file_that_a_step_writes_is_made_again_when_it_is_gone(run, stub, steps, peftc) -> None:
    def analyze(model: Any, **options: Any) -> Report:
        steps.ran.append(("analyze", spec(model)))
        Path(options["plan"]).write_text(f"{options['ratio']}")
        return Report("analyze", artifact=Path(options["plan"]))

    stub("analyze", analyze)
    edit('chain = ["decompose",', 'chain = ["analyze", "decompose",')
    edit("[decompose]\nratio = 0.5", '[analyze]\nratio = 0.5\nplan = "plan.json"\n[decompose]\nplan = "plan.json"')
    assert run().stdout == "runs/04-distill\n", "what analyze writes is no artifact of the chain"
    assert steps.words() == ["analyze", *EVERY]
    run()
    assert steps.words() == []
    Path("plan.json").unlink()
    run()
    assert steps.words() == ["analyze"], "the same plan again changes nothing"
    edit("[analyze]\nratio = 0.5", "[analyze]\nratio = 0.75")
    states = json.loads(run("--dry-run", "--json").stdout)["steps"]
    assert [each["state"] for each in states[:2]] == ["would run", "may run"]
    run()
    assert steps.words()[:2] == ["analyze", "decompose"]


def test_the_steps_themselves_run_as_a_chain(tmp_path: Path, monkeypatch, peftc, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text(
        f'model = "{tiny_vit}"\ndata = "sklearn:digits"\nnum-samples = 60\n'
        'chain = ["decompose", "distill", "prune-layers", "distill.again", "evaluate"]\n'
        "[decompose]\nratio = 0.5\ncalibration-samples = 64\n[distill]\nsteps = 2\nlearning-rate = 1e-3\n"
        '[distill.again]\nsteps = 3\n[prune-layers]\nscore = "block-influence"\nkeep = 1\n'
        '[evaluate]\nagainst = "base"\n'
    )
    first = peftc("run", "--json")
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout)["artifact"] == "runs/04-distill"
    result = Path("runs/04-distill/result.json").stat().st_mtime_ns
    second = peftc("run")
    assert "all 5 steps are up to date" in second.stderr
    assert Path("runs/04-distill/result.json").stat().st_mtime_ns == result
    third = peftc("run", env={"PEFTC_EVALUATE_MAX_DROP": "0", "PEFTC_EVALUATE_MIN_QUALITY": "1"})
    assert third.exit_code == 3
    assert "error: `evaluate` ends the chain: gate --min-quality 1: " in third.stderr
    assert peftc("show", "--commands").stdout.count("peftc distill") == 2


def test_a_run_knows_what_a_step_has_done_that_was_typed(run, steps, peftc) -> None:
    def states() -> list[str]:
        return [each["state"] for each in json.loads(run("--dry-run", "--json").stdout)["steps"]]

    assert peftc("decompose").exit_code == 0
    assert states() == ["up to date", "would run", "may run", "may run", "may run"]
    assert peftc("distill").exit_code == peftc("prune-layers").exit_code == 0
    assert states()[:4] == ["up to date"] * 3 + ["would run"]
    steps.words()
    assert run().exit_code == 0
    assert steps.words() == ["distill", "evaluate"]


def test_a_step_that_was_typed_otherwise_is_not_what_the_chain_asks(run, steps, peftc) -> None:
    assert peftc("decompose", "--ratio", 0.25).exit_code == 0
    assert "it has not run yet" in run("--dry-run").stderr


@pytest.mark.parametrize(
    "words", [["decompose", "--dry-run"], ["evaluate", "other"], ["decompose", "other", "-o", "x"]]
)
def test_what_does_not_belong_to_the_chain_is_not_noted(run, peftc, words: list[str]) -> None:
    Path("other").mkdir()
    peftc(*words)
    assert not Path("runs/ledger.json").exists()


def test_a_damaged_ledger_does_not_spoil_a_step_that_was_typed(run, peftc) -> None:
    run()
    Path("runs/ledger.json").write_text("{")
    assert peftc("evaluate").exit_code == 0
    assert Path("runs/ledger.json").read_text() == "{"


@pytest.mark.parametrize("words", [["evaluate"], ["run"]])
def test_a_refusal_says_where_a_value_comes_from_that_nobody_typed(run, stub, peftc, words: list[str]) -> None:
    from peftc.errors import DataError

    def refuse(model: Any, **options: Any) -> Report:
        raise DataError(f"there is no data at `{options['data']}`", why="the path does not exist")

    stub("evaluate", refuse)
    said = peftc(*words).stderr
    assert "cause: the path does not exist; `photos` comes from `data` in `peftc.toml`" in said
    assert "comes from" not in peftc("evaluate", "--data", "pictures").stderr
    said = peftc("evaluate", env={"PEFTC_EVALUATE_DATA": "photos@test"}).stderr
    assert "`photos@test` comes from the variable `PEFTC_EVALUATE_DATA`" in said


def test_a_model_of_the_file_is_said_to_be_from_there(tmp_path: Path, monkeypatch, peftc) -> None:
    monkeypatch.chdir(tmp_path)
    Path("peftc.toml").write_text('model = "./absent"\n[decompose]\nratio = 0.5\n')
    assert "the path does not exist; `./absent` comes from `model` in `peftc.toml`" in peftc("decompose").stderr
