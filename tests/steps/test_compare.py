"""What `compare` says of artifacts: what their files hold, and nothing that was measured otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

import peftc as package
from peftc.errors import ArtifactError, UsageError
from peftc.report import UNCHANGED
from peftc.steps.report import report as report_page
from peftc.store import artifact
from peftc.store.header import encode_header
from peftc.store.manifest import Manifest, digest
from peftc.store.manifest import read as read_manifest

LAYERS = {"data": None, "drop": None}  # what a request of prune-layers has to have


def write(
    folder: Path,
    *commands: str,
    after: Path | None = None,
    head: bool = False,
    source: str = "models/dense",
    data: str | None = None,
    parameters: int = 100,
    report: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write an artifact that holds one byte of weights and says what a test wants.

    Args:
        folder: to write.
        commands: that made it.
        after: what it was made from.
        head: whether its last step gave it one.
        source, data: what it says that its base and the samples of its steps were.
        parameters: how many it says that it has.
        report: figures of its last step.
        more: fields of its manifest.
    """
    folder.mkdir()
    steps = [] if after is None else read_manifest(after).steps
    steps += [
        {"id": digest([folder.name, at]), "request": {"command": word, **LAYERS, "data": data}}
        for at, word in enumerate(commands)
    ]
    steps[-1] |= {"new_head": True} if head else {}
    identity = steps[-1]["id"]
    weights = encode_header({"w": ("U8", (1,))}, {"peftc": identity}) + b"\0"
    files = {"model.safetensors": artifact.write_bytes(folder / "model.safetensors", weights)}
    base = {"library": "timm", "architecture": "vit", "source": {"spec": source}}
    Manifest(identity, base, steps, files, parameters, **more).write(folder)
    artifact.write_json(folder / "result.json", {"report": {"data": report or {}}})
    return folder


def quality(value: float, *, of: str = "digits", against: float | None = None, at: int = 1) -> dict[str, Any]:
    metrics = {"top1": {"value": value, "low": value - 0.1, "high": value + 0.1}}
    entry = {
        "task": "image-classification", "metric": "top1", "higher_is_better": True, "metrics": metrics, "at": at,
        "data": {"spec": f"{of}@test", "split": "test", "samples": 360, "digest": of}, "question": f"{of} {at}",
    }  # fmt: skip
    if against is not None:
        theirs = {"top1": {"value": against, "low": against, "high": against}}
        change = {"top1": {"value": value - against, "low": value - against - 0.05, "high": value - against + 0.05}}
        entry["against"] = {"name": "dense", "metrics": theirs, "difference": change}
    return entry


def speed(rate: float, *, machine: str = "one", batch: int = 64, at: int = 1) -> dict[str, Any]:
    def figures(rate: float, parameters: int) -> dict[str, Any]:
        times = {"batch_1": {"median_seconds": 1 / rate}, "saturating": {"batch": batch, "samples_per_second": rate}}
        return {"name": "dense", "dtype": "float32", "parameters": parameters, "macs": 10 * parameters,
                "bytes_on_disk": 4 * parameters, **times}  # fmt: skip

    times = rate / 1000
    known = {"value": times, "low": times - 0.05, "high": times + 0.05, "noise_low": 0.98, "noise_high": 1.02}
    verdict = (
        UNCHANGED if abs(times - 1) < 0.02 else f"{max(times, 1 / times):.2f}x {'faster' if times > 1 else 'slower'}"
    )
    return {
        "model": figures(rate, 100), "against": figures(1000.0, 400), "at": at, "question": f"{machine} {at}",
        "speedup": {"saturating": known | {"verdict": verdict}},
        "input": {"input": [3, 8, 8]}, "environment": {"device_name": machine, "threads": 1},
    }  # fmt: skip


def measure(folder: Path, **kinds: list[dict[str, Any]]) -> None:
    result = json.loads((folder / "result.json").read_text())
    artifact.write_json(folder / "result.json", {**result, "measured": kinds})


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    sizes = {"before": {"parameters": 400, "bytes": 1600, "macs": 4000}, "after": {"macs": 1234}}
    small = write(Path("small"), "decompose", report={"size": sizes}, modules={"fc": {"form": "linear", "rank": 3}})
    healed = write(Path("healed"), "distill", after=small, modules={"fc": {"form": "linear", "rank": 3}})
    shorter = write(Path("shorter"), "prune-layers", after=healed, parameters=60, kept_layers=["b.0"])
    measure(small, evaluate=[quality(0.5, of="other"), quality(0.6, against=0.9)], bench=[speed(1500)])
    measure(healed, evaluate=[quality(0.8)], bench=[speed(1600), speed(9000, machine="two", at=9)])
    assert shorter
    return ["small", "healed", "shorter"]


def table(report: package.Report) -> dict[str, list[Any]]:
    return {str(row[0]): list(row[1:]) for row in report.tables[0].rows}


def test_a_row_holds_what_the_files_say(chain) -> None:
    report = package.compare(chain)
    rows = table(report)
    assert list(report.tables[0].columns) == [
        "name", "last stage", "parameters", "share", "top1", "change against dense", "speed-up",
    ]  # fmt: skip
    assert rows["dense"] == ["dense", "400", "1.6 kB", "0.9 [0.9, 0.9]", "", ""]
    assert rows["small"] == [
        "decompose", "100", "25.0 %, 161 B", "0.60 [0.50, 0.70]", "-0.30 [-0.35, -0.25]",
        "1.50x faster [1.45, 1.55]",
    ]  # fmt: skip
    assert rows["healed"][0] == "distill"
    assert rows["healed"][3:] == ["0.80 [0.70, 0.90]", "not measured", "1.60x faster [1.55, 1.65]"]
    assert rows["shorter"] == ["prune-layers", "60", "15.0 %, 161 B", *["not measured"] * 3]


def test_raw_times_stand_behind_v_beside_those_of_the_same_run(chain, peftc) -> None:
    shown = peftc("compare", *chain, env={"COLUMNS": "100"}).stderr
    assert "/s" not in shown and " ms" not in shown
    more = peftc("compare", *chain, "-v", env={"COLUMNS": "160"}).stderr
    assert "1,500/s" in more and "1,000/s" in more and "no measure of each other" in more
    assert "it is the median of the ratios of their rounds" in " ".join(more.split()), "not the ratio of those times"
    (details,) = package.compare(chain).details
    assert list(details.rows[1]) == ["small", "161 B", "1.23 k", "0.667 ms", "1 ms", "1,500/s", "1,000/s"]
    assert list(details.rows[0])[3:] == [""] * 4, "the base alone was in no run"


def test_a_speed_up_against_another_model_is_none_against_dense(chain) -> None:
    other = speed(1500)
    other["against"] |= {"name": "another"}
    measure(Path("small"), bench=[other])
    assert table(package.compare(["small"]))["small"][-1] == "not measured"
    measure(Path("small"), bench=[speed(1400, at=1), other | {"at": 2}])
    assert table(package.compare(["small"]))["small"][-1] == "1.40x faster [1.35, 1.45]", "though the other is newer"


def test_what_the_noise_may_have_made_has_no_number_of_its_own(chain) -> None:
    measure(Path("small"), bench=[speed(1010)])
    measure(Path("healed"), bench=[speed(800)])
    rows = table(package.compare(chain))
    assert rows["small"][-1] == "within noise [0.96, 1.06]"
    assert rows["healed"][-1] == "1.25x slower [1.18, 1.33]", "a range in the direction of the word"


@pytest.mark.parametrize("width", [60, 100, 160])
def test_it_is_a_table_in_every_terminal(chain, peftc, width: int) -> None:
    measure(Path("shorter"), evaluate=[quality(0.5, against=0.9)], bench=[speed(1010)])
    lines = peftc("compare", *chain, env={"COLUMNS": str(width)}).stderr.splitlines()
    table_lines = lines[: next(at for at, line in enumerate(lines) if "has 15.0 %" in line)]
    assert max(map(len, table_lines)) <= width
    heads = [line for line in table_lines if line.startswith("name ")]
    assert len(heads) == (1 if width >= 100 else 3), "one table, and in a narrow terminal blocks of it"
    names = [line.split()[0] for line in table_lines if line.startswith(("dense", "small", "healed", "shorter"))]
    assert names == ["dense", *chain] * len(heads)
    if width == 160:
        assert len(table_lines) == 8, "title, head, rule, four models and a blank"
    for line in table_lines:
        assert line.count("[") == line.count("]"), "no interval is broken"


def test_a_folder_that_all_lie_in_is_said_once(chain) -> None:
    Path("runs").mkdir()
    for name in chain:
        Path(name).rename(Path("runs") / name)
    report = package.compare([f"runs/{name}" for name in chain])
    assert report.tables[0].title == "models in runs"
    assert [row[0] for row in report.tables[0].rows] == ["dense", *chain]
    assert [each["name"] for each in report.data["models"]] == ["dense", *(f"runs/{name}" for name in chain)]
    Path("dense").mkdir()
    Path("runs/healed").rename("dense/small")
    assert [row[0] for row in package.compare(["runs/small", "dense/small"]).tables[0].rows][1:] == [
        "runs/small", "dense/small"
    ], "of two folders with one name each is called by its path"  # fmt: skip


def test_what_was_measured_on_other_data_or_another_machine_is_not_beside_it(chain) -> None:
    figures = {each["name"]: each for each in package.compare(chain).data["models"]}
    assert figures["small"]["quality"]["data"]["digest"] == "digits"
    assert figures["healed"]["speed"]["environment"]["device_name"] == "one"
    assert figures["shorter"]["speed"] is None


def test_the_same_structure_has_the_same_multiply_adds(chain) -> None:
    for name in chain[:2]:
        measure(Path(name))
    figures = {each["name"]: each["macs"] for each in package.compare(chain).data["models"]}
    assert figures == {"dense": 4000, "small": 1234, "healed": 1234, "shorter": None}


def test_what_was_not_measured_is_named_with_the_command_that_does(chain) -> None:
    notes = package.compare(chain).notes
    start = "not measured against the dense model"
    line = "`peftc evaluate healed --data DATA --against base` measures it"
    assert f"{start} as the others were: quality of `healed` and 1 more; {line}" in notes
    assert f"{start}: speed of `shorter`; `peftc bench shorter --batch-size 64 --against base` measures it" in notes


def test_a_dense_model_that_base_would_not_find_is_named(tmp_path: Path, monkeypatch, peftc) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    dense = write(Path("there/dense"), "finetune", head=True)
    write(Path("small"), "decompose", after=dense)
    (Path("small") / "result.json").unlink()
    shown = " ".join(peftc("compare", "small").stderr.split())
    assert "`peftc evaluate small --data DATA --against DENSE` measures it, where DENSE is the dense model" in shown
    assert "beside `the dense model`" in shown, "and not what that was made from"
    shown = " ".join(peftc("compare", "small", "there/dense").stderr.split())
    assert "`peftc evaluate small --data DATA --against there/dense` measures it" in shown
    assert "`peftc bench small --against there/dense` measures it" in shown
    places = {"places": {read_manifest(dense).id: {"spec": "there/dense"}}}
    artifact.write_json(Path("small/result.json"), places)
    assert "--against base` measures it" in peftc("compare", "small").stderr, "which finds it there"
    write(Path("other"), "decompose", after=dense)
    (Path("other") / "result.json").unlink()
    taken = {each["name"]: each["against"] for each in package.compare(["small", "other"]).data["models"]}
    assert (taken["small"], taken["other"]) == ("base", "there/dense")
    dense.rename("gone")
    taken = {each["name"]: each["against"] for each in package.compare(["small", "other"]).data["models"]}
    assert (taken["small"], taken["other"]) == ("DENSE", "DENSE")


def test_of_two_answers_the_one_against_another_model_counts(chain) -> None:
    measure(Path("small"), evaluate=[quality(0.6, at=1), quality(0.6, against=0.9, at=1), quality(0.6, at=2)])
    assert table(package.compare(["small"]))["dense"][3] == "0.9 [0.9, 0.9]"


def test_without_measurements_there_are_sizes(chain) -> None:
    for name in chain:
        measure(Path(name))
    report = package.compare(chain)
    assert list(report.tables[0].columns) == ["name", "last stage", "parameters", "share"]
    assert list(report.details[0].columns) == ["name", "bytes", "MACs"]
    Path("small/result.json").unlink()
    report = package.compare(["small"])
    assert table(report)["small"] == ["decompose", "100", "-"], "nobody knows the base's parameters now"
    assert list(report.details[0].rows[-1]) == ["small", "161 B", "-"]


def test_the_command_lines_come_on_request(chain, peftc) -> None:
    assert "peftc decompose" not in peftc("compare", *chain).stderr
    assert "peftc decompose models/dense -o 01-decompose" in peftc("compare", *chain, "--commands").stderr
    found = json.loads(peftc("compare", *chain, "--json").stdout)
    assert found["models"][0]["artifact"] is None
    assert found["models"][1]["commands"] == ["peftc decompose models/dense -o 01-decompose"]


def test_in_a_project_it_takes_the_whole_chain(chain, peftc) -> None:
    refused = peftc("compare")
    assert refused.exit_code == 2 and "there is no `peftc.toml`" in refused.stderr
    Path("peftc.toml").write_text('model = "models/dense"\n')
    assert "is empty" in peftc("compare").stderr
    Path("runs").mkdir()
    links = [{"step": "x", "folder": str(Path(name).resolve())} for name in chain[:2]]
    Path("runs/chain.json").write_text(json.dumps(links))
    stages = [each["stages"] for each in json.loads(peftc("compare", "--json").stdout)["models"]]
    assert stages == [[], ["decompose"], ["decompose", "distill"]]
    assert peftc("compare", "-", input="small\n").exit_code == 0


def test_an_export_is_a_row_and_a_note(tmp_path, monkeypatch, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package.decompose(tiny_vit, ratio=0.5, output_dir="small")
    package.export("small", format="safetensors", output_dir="weights", rounds=5, batch_size=1)
    report = package.compare(["small", "weights"])
    small, weights = report.data["models"][-2:]
    assert (small["stages"], weights["stages"]) == (["decompose"], ["decompose", "export safetensors"])
    assert weights["parameters"] == small["parameters"]
    assert weights["bytes"] == sum(each.stat().st_size for each in Path("weights").glob("*.safetensors"))
    assert weights["commands"][-1].startswith("peftc export")
    (note,) = [note for note in report.notes if note.startswith("`weights` in ")]
    assert "beside the same model in PyTorch at batch 1" in note
    assert not any("evaluate weights" in note for note in report.notes)
    assert table(report)["weights"][0] == "export safetensors"
    page = Path(report_page(["small", "weights"], output="page.html").lines[0]).read_text()
    assert "export safetensors" in page, "a row as here"


def test_an_export_with_gates_has_the_quality_that_it_showed(tmp_path, monkeypatch, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package.decompose(tiny_vit, ratio=0.5, output_dir="small")
    package.evaluate("small", data="sklearn:digits", against="base")
    gated = {"data": "sklearn:digits", "max_drop": 0.5}
    package.export("small", format="torch-export", output_dir="graph", rounds=5, batch_size=1, **gated)
    small, graph = package.compare(["small", "graph"]).data["models"][-2:]
    assert graph["quality"]["metrics"] == small["quality"]["metrics"]
    assert graph["quality"]["against"]["name"] == tiny_vit.name, "the gate is judged against what the chain began with"


def test_a_plan_is_no_model(chain) -> None:
    planned = {"budget": "--ratio 1/2", "allocation": "convex", "parameters": 120, "predicted": 0.25, "eligible": 0.5}
    analysis = {"command": "analyze", "modules": [], "plan": planned}
    artifact.write_json(Path("analysis.json"), analysis)
    report = package.compare(chain, analysis="analysis.json")
    assert list(table(report)) == ["dense", *chain]
    assert report.data["plan"]["parameters"] == 120
    assert [each["artifact"] for each in report.data["models"]] == [None, *chain]
    (note,) = [note for note in report.notes if note.startswith("`analysis.json` is a plan, no model: --ratio 1/2")]
    assert "120 parameters; predicted loss 0.25" in note
    artifact.write_json(Path("analysis.json"), {**analysis, "plan": None})
    report = package.compare(chain, analysis="analysis.json")
    assert list(table(report)) == ["dense", *chain] and report.data["plan"] is None
    assert any("planned nothing: give `peftc analyze` a budget" in note for note in report.notes)


def test_what_is_no_artifact_is_refused(chain) -> None:
    with pytest.raises(ArtifactError, match="`nowhere` does not exist"):
        package.compare(["small", "nowhere"])
    Path("plain").mkdir()
    with pytest.raises(ArtifactError, match="`plain` is no artifact"):
        package.compare(["plain"])
    with pytest.raises(UsageError, match="is named twice"):
        package.compare(["small", "./small"])
    with pytest.raises(UsageError, match="nothing to compare"):
        package.compare([])
    with pytest.raises(UsageError, match="holds no report of `peftc analyze`"):
        package.compare(["small"], analysis="small/peftc.json")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def lost(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def swapped(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    own, other = (read_manifest(Path(name)).id.encode() for name in (folder.name, "healed"))
    (folder / "model.safetensors").write_bytes(weights.replace(own, other))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lost, "`small` lacks the file `model.safetensors`"),
        (cut, "`small/model.safetensors` has 160 bytes"),
        (swapped, "`small/model.safetensors` belongs to another artifact"),
    ],
)
def test_weights_that_are_not_those_of_the_manifest_are_refused(chain, peftc, harm: Any, words: str) -> None:
    harm(Path("small"))
    for line in (["compare", *chain], ["report", *chain, "-o", "page.html"]):
        refused = peftc(*line)
        assert refused.exit_code == 1 and f"error: {words}" in refused.stderr, refused.stderr
        assert "hint: delete `small` and make it again" in refused.stderr
    assert not Path("page.html").exists()


@pytest.mark.parametrize(
    ("foreign", "why"),
    [
        ({"id": "0" * 64}, "it was written for `0000000000000000`, and the folder holds"),
        ({"places": {"1" * 64: {"spec": "other"}}}, "its model was made from `1111111111111111`, and the one in the"),
        ({"report": {"data": {"size": {"after": {"parameters": 7}}}}}, "its model has 7 parameters, the one in the"),
    ],
)
def test_a_result_of_another_model_is_refused(chain, peftc, foreign: dict[str, Any], why: str) -> None:
    artifact.write_json(Path("small/result.json"), foreign)
    refused = peftc("report", *chain)
    assert refused.exit_code == 1, refused.stderr
    assert "error: `small/result.json` belongs to another model" in refused.stderr and why in refused.stderr
    assert "put its own back, or remove it" in refused.stderr


def test_a_result_says_which_model_it_is_of(tmp_path, monkeypatch, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package.decompose(tiny_vit, ratio=0.5, output_dir="small")
    package.finetune("small", data="sklearn:digits", steps=1, held_out=0, num_samples=20, output_dir="tuned")
    package.finetune("tuned", data="sklearn:digits", steps=1, held_out=0, num_samples=20, output_dir="again")
    package.export("again", format="safetensors", rounds=5, batch_size=1, output_dir="weights")
    assert len(package.compare(["small", "tuned", "again", "weights"]).data["models"]) == 5
    Path("again/result.json").write_bytes(Path("tuned/result.json").read_bytes())
    with pytest.raises(ArtifactError, match="`again/result.json` belongs to another model"):
        package.compare(["small", "tuned", "again"])


def test_evaluate_and_bench_leave_what_it_reads(tmp_path, monkeypatch, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package.decompose(tiny_vit, ratio=0.5, output_dir="small")
    before = {path.name: path.read_bytes() for path in Path("small").iterdir() if path.name != "result.json"}
    for _ in range(2):
        found = package.evaluate("small", data="sklearn:digits", against="base", num_samples=40)
    package.evaluate("small", data="sklearn:digits", num_samples=20)
    package.bench("small", against="base", rounds=5, batch_size=2)
    after = {path.name: path.read_bytes() for path in Path("small").iterdir() if path.name != "result.json"}
    assert before == after, "nothing that is promised changes"
    measured = json.loads(Path("small/result.json").read_text())["measured"]
    assert [entry["data"]["samples"] for entry in measured["evaluate"]] == [40, 20], "the same question is one entry"
    base, small = package.compare(["small"]).data["models"]
    assert small["speed"]["model"]["saturating"]["batch"] == 2
    assert base["parameters"] > small["parameters"]
    assert found.data["metric"] == "top1"
    again = package.decompose(tiny_vit, ratio=0.5, output_dir="small")
    assert any("already done" in note for note in again.notes)
    assert json.loads(Path("small/result.json").read_text())["measured"] == measured


def test_a_folder_that_may_not_be_written_is_measured_all_the_same(tmp_path, monkeypatch, tiny_vit: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package.decompose(tiny_vit, ratio=0.5, output_dir="small")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artifact, "write_json", refuse)
    report = package.evaluate("small", data="sklearn:digits", num_samples=20)
    assert "not kept in `small/result.json`: permission denied" in report.notes
