"""The page that `report` writes: whole, escaped, without a network, and readable where it is opened."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftc as package
from peftc.errors import ArtifactError, OutputError, UsageError
from peftc.pages import charts, html
from peftc.pages.charts import Scale
from peftc.report import UNCHANGED
from peftc.steps.report import report
from peftc.store import artifact
from peftc.store import maps as layer_maps
from tests.steps.test_compare import measure, quality, speed, write

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Every element with its attributes, and what of them is not closed as it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.text = ""
        self.parts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        self.parts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


LAYERS = [
    {"number": at, "name": f"b.{at}", "score": 0.1 * at, "kept": at < 2, "close": False} for at in range(3)
]  # fmt: skip
MODULES = [
    {"name": f"b.{at}.fc", "form": "linear", "shape": [8, 8], "rank": at or None, "reason": None if at else "no gain",
     "parameters_before": 64, "parameters_after": 16 * at or 64, "error": 0.1 * at or None}
    for at in range(3)
]  # fmt: skip
LOG = [{"step": 0, "score": 0.1}, *({"step": n, "loss": 2 / n, "task": 1 / n, "rate": 1.0} for n in range(1, 600))]
SPECTRUM = {
    "rank_90": 2,
    "rank_95": 3,
    "rank_99": 4,
    "max_rank": 8,
    "break_even_rank": 4,
    "spectrum": [[1, 1.0], [8, 0.0]],
}
PLAN = {"budget": "--ratio 1/2", "allocation": "convex", "parameters": 200, "predicted": 0.25}
ANALYSIS = {
    "command": "analyze",
    "plan": PLAN,
    "modules": [{"name": f"b.{at}.fc", "shape": [8, 8], **SPECTRUM} for at in range(3)],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sizes = {"before": {"parameters": 400, "bytes": 1600, "macs": 4000}, "after": {"macs": 1234}}
    small = write(Path("small"), "decompose", report={"size": sizes, "modules": MODULES})
    healed = write(Path("healed"), "decompose", "distill")
    shorter = write(Path("shorter"), "decompose", "prune-layers", parameters=60,
                    report={"layers": LAYERS, "score": "block-influence", "threshold": 0.15})  # fmt: skip
    for at, each in enumerate((small, healed, shorter)):
        measure(each, evaluate=[quality(0.6 + at / 10, against=0.9)], bench=[speed(1500 + at)])
    (healed / "log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in LOG))
    Path("analysis.json").write_text(json.dumps(ANALYSIS))
    return tmp_path


def words(found: Page) -> str:
    """Return the text of a page, with one blank between the cells of its tables."""
    return " ".join(found.parts).replace("  ", " ")


def written(**options: Any) -> Page:
    outcome = report(["small", "healed", "shorter"], **options)
    return Page(Path(outcome.lines[0]).read_text(encoding="utf-8"))


def test_the_page_has_every_part_and_all_of_it_is_closed(folder) -> None:
    found = written(analysis="analysis.json")
    assert (found.wrong, found.open) == ([], [])
    links = [link["href"] for link in found.all("a")]
    parts = "models trade speed plan spectra modules layers training provenance".split()
    assert links == [f"#{part}" for part in parts]
    identifiers = [each["id"] for tag, each in found.elements if "id" in each and tag != "input"]
    assert [f"#{name}" for name in identifiers] == links, "every part can be reached, and no name stands twice"


def test_what_there_is_nothing_of_is_left_out(folder) -> None:
    for name in ("small", "healed", "shorter"):
        measure(Path(name))
    Path("healed/log.jsonl").unlink()
    assert [link["href"] for link in written().all("a")] == ["#models", "#modules", "#layers", "#provenance"]


def test_nothing_is_loaded_and_nothing_runs(folder) -> None:
    text = Path(report(["small", "healed"]).lines[0]).read_text()
    assert "default-src 'none'" in text
    for word in ("http://", "https://", "src=", "url(", "@import", "<script", "<link"):
        assert word not in text
    assert {href for href in re.findall(r'href="([^"]*)"', text) if not href.startswith("#")} == set()


def test_every_drawing_says_in_words_what_it_shows(folder) -> None:
    found = written(analysis="analysis.json")
    drawings = found.all("svg")
    assert len(drawings) == 4 * 2 + 4, "trade-offs in two sizes, a spectrum, ranks, scores, a curve"
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 30
    said = " ".join(str(drawing["aria-label"]) for drawing in drawings)
    assert "top1 against parameters. dense: 400, top1 0.9; small: 100, top1 0.6" in said
    assert "b.0: 0; b.1: 0.1; b.2: 0.2 (gone)" in said
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", said.lower())


# t-SNE maps


def mapped(folder: Path, layers: int = 3, points: int = 40, classes: int = 10) -> list[str]:
    """Let an artifact keep maps in which every class is a heap of its own; return the names of the classes."""
    names = [f"class <{at}>" for at in range(classes)]
    labels = [at % classes for at in range(points)]
    drawn = [(label / classes, (at % 7) / 7) for at, label in enumerate(labels)]
    layer_maps.write(folder, {f"b.{at}": drawn for at in range(layers)}, labels, names)
    result = json.loads((folder / "result.json").read_text())
    result["report"]["data"] |= {
        "score": "tsne-silhouette",
        "layers": [
            {**LAYERS[0], "name": f"b.{at}", "score": at / layers, "kept": at < layers - 1} for at in range(layers)
        ],
    }
    artifact.write_json(folder / "result.json", result)
    return names


def test_the_map_of_every_layer_is_drawn_with_its_score(folder) -> None:
    names = mapped(folder / "shorter")
    found = written()
    assert (found.wrong, found.open) == ([], [])
    maps = [drawing for drawing in found.all("svg") if drawing.get("class") == "map"]
    assert [drawing["aria-label"] for drawing in maps] == [
        f"t-SNE map after b.{at}. 40 samples of 10 classes; score {score}, {state}."
        for at, (score, state) in enumerate([("0.00", "kept"), ("0.33", "kept"), ("0.67", "dropped")])
    ]
    text = (folder / "report.html").read_text()
    drawn = re.findall(r'<svg[^>]*class="map".*?</svg>', text, re.S)
    assert [len(re.findall(r"M\d", each)) for each in drawn] == [40, 40, 40], "as many marks as samples"
    for name in names:
        assert name in found.text
    assert "b.2 0.67, dropped" in found.text


def test_an_artifact_without_maps_says_why(folder) -> None:
    assert "No t-SNE maps: block-influence is taken of none, as tsne-silhouette is." in written().text
    mapped(folder / "shorter")
    (folder / "shorter" / layer_maps.FILE).write_text('{"maps": ')
    assert "No t-SNE maps: there is no maps.json of these layers in the artifact." in written().text
    mapped(folder / "shorter", layers=2)
    result = json.loads(Path("shorter/result.json").read_text())
    result["report"]["data"]["layers"] = LAYERS
    artifact.write_json(Path("shorter/result.json"), result)
    assert "there is no maps.json of these layers" in written().text, "the maps of other layers"


def test_maps_of_a_deep_network_keep_the_page_small(folder) -> None:
    written()
    without = (folder / "report.html").stat().st_size
    mapped(folder / "shorter", layers=12, points=2000)
    assert "300 of 2,000 samples" in written().text
    assert (folder / "report.html").stat().st_size - without < 80_000
    mapped(folder / "shorter", classes=charts.MARKS + 1)
    assert f"With {charts.MARKS + 1} classes several share a mark." in written().text


def test_no_two_classes_have_the_same_mark() -> None:
    found = [charts.marks(at, [(0, 0)]).svg() for at in range(charts.MARKS)]
    assert len(set(found)) == charts.MARKS
    for at, (one, other) in enumerate(pairwise(found)):
        shapes = [re.search(r'class="c\d (\w+)"', each)[1] for each in (one, other)]  # type: ignore[index]
        assert shapes[0] != shapes[1], f"classes {at} and {at + 1} differ in colour alone"


# how those see who lack one kind of cone, in linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1)
SIGHT = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}  # fmt: skip


def linear(color: str) -> np.ndarray:
    value = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in np.array(to_xyz) @ light.clip(0, 1) / [0.9505, 1, 1.089]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_classes_are_told_apart_by_all_who_see(scheme: str, sight: str) -> None:
    light, dark = html.STYLE.split("@media (prefers-color-scheme: dark)", 1)
    style = light if scheme == "light" else dark
    known = dict(re.findall(r"--(c\d|card): (#[0-9a-f]{6})", style))
    colors = [linear(known[f"c{at}"]) for at in range(8)]
    weights = np.array([0.2126, 0.7152, 0.0722])
    paper = float(weights @ linear(known["card"]))
    for color in colors:
        bright, dim = sorted([float(weights @ color), paper], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, "as WCAG asks of graphics"
    seen = [lab(np.array(SIGHT[sight]) @ color) for color in colors]
    for at in range(8):
        for other in range(at):
            same_shape = (at - other) % 4 == 0
            apart = float(np.linalg.norm(seen[at] - seen[other]))
            assert apart > (30 if same_shape else 20), f"c{other} and c{at} are {apart:.1f} apart"


def test_the_page_opens_with_the_verdict(folder) -> None:
    measure(folder / "shorter", evaluate=[quality(0.8, against=0.9, at=86400)], bench=[speed(1502)])
    found = written(analysis="analysis.json")
    start = found.text[found.text.index("shorter beside dense", 40) :]
    sentence = "shorter has 15.0 % of the parameters of dense, is 1.50x faster, and its top1 is 0.80, worse by 0.10."
    assert start.index(sentence) < start.index("All models")
    assert "timm vit; measured on 2 January 1970; 360 samples" in start
    assert next(each["class"] for each in found.all("dl")) == "figures"


def test_what_was_warned_of_stands_with_the_verdict(folder) -> None:
    text = "the training made nothing better: the weights are those it began with"
    for name in ("shorter", "healed"):
        result = json.loads(Path(name, "result.json").read_text())
        result["report"]["warnings"] = [f"{text}, `{name}`"]
        artifact.write_json(Path(name, "result.json"), result)
    found = written().text
    top = found[: found.index("All models", found.index("shorter beside dense", 40))]
    assert f"Warning: {text}, shorter" in top and f"{text}, healed" not in top
    assert "There are warnings of healed, too: see how they came to be." in top
    assert found.count(text) == 3, "and again where it is told how each came to be"


def test_speed_at_batch_1_and_the_noise_are_on_the_page(folder) -> None:
    assert "small 64 1.50x faster [1.45, 1.55] 0.98x to 1.02x" in words(written())
    single = {"value": 1.01, "low": 0.97, "high": 1.03, "verdict": UNCHANGED}
    timed = speed(1500)
    timed["speedup"]["batch_1"] = single | {"noise_low": 0.96, "noise_high": 1.05}
    measure(Path("small"), evaluate=[quality(0.8, against=0.9)], bench=[timed])
    text = words(written())
    assert "small 1 within noise [0.97, 1.03] 0.96x to 1.05x small 64 1.50x faster [1.45, 1.55] 0.98x to" in text
    text = words(Page(Path(report(["small"]).lines[0]).read_text()))
    assert "batch 64; noise of that run 0.98x to 1.02x; at batch 1 within noise [0.97, 1.03]" in text


def test_what_is_the_same_of_several_models_is_shown_once(folder) -> None:
    write(Path("twin"), "decompose", report={"modules": MODULES})
    write(Path("other"), "decompose", report={"modules": MODULES[:2]})
    text = Path(report(["small", "other", "twin"]).lines[0]).read_text()
    assert "<h3>small, twin (the same)</h3>" in text and "<h3>other</h3>" in text
    assert text.count("all 3 modules") == 1 and text.count("all 2 modules") == 1


def test_words_of_the_table_are_explained(folder) -> None:
    text = words(written())
    for said in ("MACs multiply-adds: how often one sample", "top1 share of samples whose most likely class"):
        assert said in text
    assert "perplexity" not in text, "only those that stand there"


def test_a_plan_stands_apart_from_models(folder) -> None:
    found = written(analysis="analysis.json")
    assert "analysis.json is a plan, no model" in found.text
    assert "200 (50.0 % of the dense model's)" in found.text
    names = [name["aria-label"] for name in found.all("svg")]
    assert not any("analysis.json" in str(name) for name in names)
    artifact.write_json(Path("analysis.json"), {**ANALYSIS, "plan": None})
    assert "planned nothing" in written(analysis="analysis.json").text


def test_a_curve_is_a_mean_over_its_raw_points(folder) -> None:
    smooth, over = charts.smoothed([(float(at), float(at % 2)) for at in range(400)])
    assert over == 21 and len(smooth) == 400
    assert {round(value, 1) for _, value in smooth} == {0.5}, "its ends are means, too"
    assert charts.smoothed([(0.0, 1.0), (1.0, 9.0)]) == ([(0.0, 1.0), (1.0, 9.0)], 1), "of few nothing is averaged"
    found = written()
    assert "mean of 29 steps" in found.text and "one step" in found.text
    Path("healed/log.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1}\n{"step": 3, "loss": 2}\n')
    assert written().wrong == []


def test_why_a_layer_stays_is_said_in_the_picture(folder) -> None:
    result = json.loads(Path("shorter/result.json").read_text())
    result["report"]["data"] |= {"alpha": 0.3}
    artifact.write_json(Path("shorter/result.json"), result)
    found = written(analysis="analysis.json")
    assert "threshold 0.15, 0.3 of the last layer's score" in found.text
    for text in ("dropped", "stays dense: no gain", "break-even, rank 4: above it factors hold", "90 %"):
        assert text in found.text
    result["report"]["data"] |= {"alpha": "high"}
    artifact.write_json(Path("shorter/result.json"), result)
    assert written().wrong == [], "a damaged result harms nothing"


def test_twenty_models_fold_what_is_long(folder) -> None:
    for at in range(17):
        write(Path(f"model-{at}"), "decompose", report={"modules": MODULES})
        measure(Path(f"model-{at}"), evaluate=[quality(0.5 + at / 50, against=0.9)], bench=[speed(1200 + 10 * at)])
    names = ["small", "healed", "shorter", *(f"model-{at}" for at in range(17))]
    text = Path(report(names).lines[0]).read_text()
    found = Page(text)
    assert (found.wrong, found.open) == ([], [])
    assert text.count("<details") > 20
    assert len(text) < 600_000


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_lines_are_told_apart_by_all_who_see(scheme: str, sight: str) -> None:
    light, dark = html.STYLE.split("@media (prefers-color-scheme: dark)", 1)
    known = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    weights = np.array([0.2126, 0.7152, 0.0722])
    seen = {name: lab(np.array(SIGHT[sight]) @ linear(known[name])) for name in ("mark", "other", "ink", "faint")}
    for (one, a), (other, b) in combinations(seen.items(), 2):
        assert float(np.linalg.norm(a - b)) > 15, f"{one} and {other}"
    for name in ("mark", "other", "ink"):
        bright, dim = sorted(
            [float(weights @ linear(known[name])), float(weights @ linear(known["card"]))], reverse=True
        )
        assert (bright + 0.05) / (dim + 0.05) >= 3, f"{name}, as WCAG asks of graphics"


def test_figures_and_commands_stand_in_the_text(folder) -> None:
    found = written()
    for text in (
        "0.9 [0.9, 0.9]",
        "25.0 %",
        "peftc decompose models/dense -o 01-decompose",
        "1.50x faster [1.45, 1.55]",
    ):
        assert text in found.text, text
    assert "/s" not in found.text, "rates of several runs"
    assert "no gain" in found.text


def test_what_comes_from_outside_cannot_become_markup(folder) -> None:
    evil = "<script>alert('x')</script>&\"'"
    bad = write(Path("a<b>&\"'"), "decompose", report={"modules": [{**MODULES[1], "name": evil}], "size": {}})
    result = json.loads((bad / "result.json").read_text())
    result["report"]["notes"] = result["report"]["warnings"] = [f"`{evil}` {evil}"]
    result["versions"] = {evil: evil}
    artifact.write_json(bad / "result.json", result)
    text = Path(report([bad]).lines[0]).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 3
    found = Page(text)
    assert (found.wrong, found.open) == ([], [])
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert str(bad) in found.text


def test_the_same_files_give_the_same_page(folder) -> None:
    first = Path(report(["small", "healed"], output="one.html").lines[0]).read_bytes()
    assert Path(report(["small", "healed"], output="two.html").lines[0]).read_bytes() == first


def test_files_that_say_less_do_no_harm(folder) -> None:
    Path("healed/log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "los')
    Path("shorter/result.json").unlink()
    Path("small/result.json").write_text("[]")
    found = written()
    assert (found.wrong, found.open) == ([], [])
    artifact.write_json(Path("small/result.json"), {"report": {"data": {"modules": [], "layers": LAYERS[:1]}}})
    assert written().wrong == []


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 10**400, "x", None])
def test_figures_that_are_none_do_no_harm(folder, wrong: Any) -> None:
    result = json.loads(Path("small/result.json").read_text())
    for kind, keys in (
        ("evaluate", ("metrics", "top1", "value")),
        ("evaluate", ("against", "difference", "top1", "low")),
        ("bench", ("speedup", "saturating", "high")),
    ):
        damaged = json.loads(json.dumps(result))
        *inner, last = keys
        functools.reduce(dict.__getitem__, inner, damaged["measured"][kind][0])[last] = wrong
        Path("small/result.json").write_text(json.dumps(damaged))
        assert written().wrong == []
        assert "nan" not in " ".join(map(str, package.compare(["small"]).tables[0].rows[1]))


def test_what_cannot_be_written_or_read_is_refused(folder) -> None:
    with pytest.raises(OutputError, match="there is no folder `nowhere`"):
        report(["small"], output="nowhere/report.html")
    with pytest.raises(OutputError, match="it is a folder"):
        report(["small"], output="healed")
    before = Path("small/peftc.json").read_bytes()
    for name in ("small/peftc.json", "report.pdf"):
        with pytest.raises(OutputError, match="the report is HTML"):
            report(["small"], output=name)
    assert Path("small/peftc.json").read_bytes() == before
    with pytest.raises(UsageError, match="holds no report of `peftc analyze`"):
        report(["small"], analysis="small/peftc.json")
    with pytest.raises(ArtifactError, match="`nowhere` does not exist"):
        report(["nowhere"])
    assert not list(folder.glob("report.html*"))


def test_it_is_a_command(folder, peftc) -> None:
    result = peftc("report", "small", "healed", "-o", "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["file"], found["bytes"]) == ("page.html", Path("page.html").stat().st_size)
    assert [each["name"] for each in found["models"]] == ["dense", "small", "healed"]
    assert peftc("report", "small").stdout == "report.html\n"


def test_a_real_chain_has_every_part(tmp_path, monkeypatch, tiny_vit: Path, peftc) -> None:
    monkeypatch.chdir(tmp_path)
    analyzed = peftc("analyze", tiny_vit, "--json")
    Path("analysis.json").write_text(analyzed.stdout)
    on = {"data": "sklearn:digits", "num_samples": 40}
    package.decompose(tiny_vit, ratio=0.5, output_dir="small", calibration_samples=32, **on)
    package.distill("small", steps=3, output_dir="healed", **on)
    package.prune_layers("healed", score="block-influence", keep=1, output_dir="shorter", **on)
    for name in ("small", "healed", "shorter"):
        package.bench(name, against="base", rounds=5, batch_size=2)
        package.evaluate(name, data="sklearn:digits", against="base", num_samples=40)
    found = written(analysis="analysis.json")
    assert (found.wrong, found.open) == ([], [])
    assert len({link["href"] for link in found.all("a")}) == 9


# charts


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert charts.ticks(3, 3) == [3]
    for low, high in ((0.9612, 0.9871), (-7, 1e6), (1e-9, 3e-9)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 7 and all(low <= tick <= high for tick in found)


def test_charts_stay_inside_their_frame_whatever_the_figures() -> None:
    for values in ([0.0], [1.0, 1.0], [1e-30, 1e30], [-1.0, 2.0], [float(n) for n in range(5000)]):
        curve = [(float(at), value) for at, value in enumerate(values)]
        for log in (False, True):
            if log and not any(value > 0 for value in values):
                continue
            text = charts.lines("t", [curve], "x", "y", text="t", log=log).svg()
            numbers = [float(n) for pair in re.findall(r'points="([^"]*)"', text) for n in re.split("[ ,]", pair)]
            assert all(-0.01 <= number <= charts.WIDTH for number in numbers)
            assert len(numbers) < 4 * charts.MOST + 10
        bars = charts.bars("t", [(str(at), value, "") for at, value in enumerate(values)], "y", text="t").svg()
        assert "nan" not in bars and "inf" not in bars
    assert Scale(1, 1, 0, 10)(1) == 0


def test_markup_is_made_by_tags_alone() -> None:
    assert html.tag("p", "a < b", html.tag("b", "&"), class_='"') == '<p class="&quot;">a &lt; b<b>&amp;</b></p>'
    assert html.prose("`a<b>` and c") == "<code>a&lt;b&gt;</code> and c"


# a real browser, where there is one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with library.sync_playwright() as driver:
        shown = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield shown
        shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_a_phone_and_a_desk(folder, browser, width: int, scheme: str) -> None:
    mapped(folder / "shorter", layers=12)
    write(Path("一个名字很长的模型-<b>&amp;"), "decompose", parameters=300)
    names = ["small", "healed", "shorter", "一个名字很长的模型-<b>&amp;"]
    for at, name in enumerate(names):
        measure(Path(name), evaluate=[quality(0.6 + at / 10, against=0.9)], bench=[speed(1500 + at)])
    report(names, analysis="analysis.json")
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto((folder / "report.html").as_uri())
    assert said == []
    assert asked == [(folder / "report.html").as_uri()]
    for view in ("parameters", "bytes", "multiply-adds", "speed"):
        shown.click(f"label:text-is('{view}')")
        assert shown.locator(".switch figure:visible").count() == 1, "one chart, and a switch"
        assert shown.locator(f"figure[aria-label='top1 against {view}']:visible").count() == 1
        assert shown.locator(".switch svg:visible").count() == 1
        assert shown.evaluate(OVERLAPS, ".switch svg") == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width, "nothing has to be pushed sideways"
    assert shown.evaluate(OVERLAPS, "svg[role=img]:not(.map)") == [], "no text of a chart lies on another"
    drawn = ".map(s => s.getBoundingClientRect()).filter(box => box.width)"
    sizes = shown.evaluate(f"[...document.querySelectorAll('svg[role=img]:not(.map)')]{drawn}.map(box => box.width)")
    assert min(sizes) > 280, "a chart is large enough to be read"
    maps = shown.evaluate(f"[...document.querySelectorAll('svg.map')]{drawn}.map(box => box.width)")
    assert len(maps) == 12 and min(maps) > 130, "two beside each other on a phone"
    text = shown.evaluate(f"[...document.querySelectorAll('svg text')]{drawn}.map(box => box.height)")
    assert min(text) > 9
    ink, paper = (
        shown.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )  # fmt: skip
    dark = sum(map(int, re.findall(r"\d+", ink)[:3])) > sum(map(int, re.findall(r"\d+", paper)[:3]))
    assert dark == (scheme == "dark")
    shown.close()


OVERLAPS = """selector => {
  const found = [];
  for (const svg of document.querySelectorAll(selector)) {
    const edge = svg.getBoundingClientRect();
    if (!edge.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([name, a], at) => {
      if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.bottom > edge.bottom + 1) found.push(name);
      for (const [other, b] of texts.slice(at + 1)) {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 3) found.push(name + ' / ' + other);
      }
    });
  }
  return found;
}"""
