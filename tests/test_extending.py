"""The examples of the page on extending, in a package of their own installed beside peftc."""

import importlib
import json
import re
from pathlib import Path

import pytest

from peftc.plans import allocate
from peftc.steps.decompose import decompose
from peftc.tasks import table

try:
    import tomllib
except ImportError:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "peftc" / "docs" / "extending.md").read_text(encoding="utf-8")
FEW = "--data sklearn:digits --num-samples 32 --batch-size 16 --steps 2 --held-out 0"
CASES = {
    "decompose": "decompose vit --ratio 0.5 --method gram --set damping=0.0 -o out",
    "statistic": "decompose vit --ratio 0.5 --method scaled_gram --data sklearn:digits --calibration-samples 16 -o out",
    "score": "prune-layers vit --score turning --keep 2 --data sklearn:digits --num-samples 32 -o out",
    "adapter": f"finetune vit --method gain --head keep {FEW} -o out",
    "loss": f"distill vit --teacher vit --loss cosine=1 {FEW} -o out",
    "format": "export vit --format npz --rounds 5 -o out",
}
TASK = f"finetune vit --task graded-classification --head keep {FEW} -o out"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a package manager leaves it: the module, and what it says of its entry points."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "peftc_mine.py").write_text("from __future__ import annotations\n\n" + "\n\n".join(blocks("python")))
    about = folder / "peftc_mine-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: peftc-mine\nVersion: 0.1.0\n")
    groups = tomllib.loads("\n".join(blocks("toml")))["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items())
        for group, each in groups.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("line", CASES.values(), ids=CASES)
def test_the_examples_of_the_page_run(
    peftc, package: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.chdir(tmp_path)
    Path("vit").symlink_to(tiny_vit)
    done = peftc(*line.split())
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out").is_dir()
    words = peftc("methods").stdout.split()
    assert {"gram", "turning", "gain", "cosine", "npz"} <= set(words)


def test_the_task_of_the_page_trains_and_is_evaluated(
    peftc, package: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.chdir(tmp_path)
    task = importlib.import_module("peftc_mine").TASK
    monkeypatch.setitem(table.TASKS, task.name, task)
    Path("vit").symlink_to(tiny_vit)
    assert peftc(*TASK.split()).exit_code == 0
    line = f"evaluate out --task {task.name} --data sklearn:digits --num-samples 32 --against vit --json"
    found = json.loads(peftc(*line.split()).stdout)
    assert found["metrics"]["near"]["value"] >= found["metrics"]["top1"]["value"]
    assert found["against"]["divergence"]["value"] > 0


def test_the_rule_of_the_page_shares_a_budget(
    package: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setitem(allocate.ALLOCATIONS, "root", importlib.import_module("peftc_mine").ROOT)
    found = [
        decompose(tiny_vit, ratio=0.5, allocation=rule, output_dir=tmp_path / rule, device="cpu").data["modules"]
        for rule in ("root", "global")
    ]
    root, usual = ([row["rank"] for row in rows] for rows in found)
    assert root != usual


def test_what_one_changes_inside_peftc_is_there() -> None:
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", PAGE, re.M)
    assert len(rows) == 8
    for path, text in rows:
        there = (REPOSITORY / path).read_text(encoding="utf-8")
        assert [word for word in re.findall(r"`([^`]+)`", text) if word not in there] in ([], ["graded.TASK"]), path


def test_each_example_is_short() -> None:
    assert all(len(block.strip().splitlines()) <= 25 for block in blocks("python"))
