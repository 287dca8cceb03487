"""The parts of the page that `report` writes, from records alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftc.pages import charts, html, pictures
from peftc.pages.charts import Point
from peftc.pages.html import Html, details, facts, joined, prose, tag
from peftc.pages.records import Record, Row, table_of
from peftc.report import grouped, percent, rank_text, short, size, span
from peftc.store import maps
from peftc.store.commands import command_lines
from peftc.version import __version__


def page_of(rows: list[Row], found: list[Record], analyzed: Mapping[str, Any] | None, notes: Sequence[str]) -> str:
    """Return the page on models: their rows and records, what `analyze` found of the base, and notes of `compare`."""
    bases = ", ".join(row.name for row in rows if not row.stages)
    title = f"{bases}: {len(found)} compressed {'model' if len(found) == 1 else 'models'}"
    parts = [
        ("stages", "Stages", _stages(rows, notes)),
        ("trade", "What it costs, what it brings", _trade(rows)),
        ("spectra", f"Rank spectra of {bases}", _spectra(analyzed) if analyzed else None),
        ("modules", "Ranks", _each(found, _modules)),
        ("layers", "Layer scores", _each(found, _layers)),
        ("training", "Training", _each(found, _training)),
        ("provenance", "How it came to be", joined(map(_provenance, found))),
    ]
    links, body = [], []
    for name, heading, inside in parts:
        if inside:
            links.append(tag("li", tag("a", heading, href=f"#{name}")))
            body.append(tag("section", tag("h2", heading, id=name), inside, aria_labelledby=name))
    nav = tag("nav", tag("ul", *links), aria_label="parts")
    foot = tag("p", f"Written by peftc {__version__} from the files of the artifacts alone.", class_="soft")
    return html.document(title, tag("main", tag("h1", title), nav, *body, foot))


def _each(found: Sequence[Record], show: Any) -> Html | None:
    """Return what there is to show of each record, under its name."""
    parts = [(record, inside) for record in found if (inside := show(record))]
    if not parts:
        return None
    return joined(joined([tag("h3", str(record.folder)), inside]) for record, inside in parts)


def _stages(rows: Sequence[Row], notes: Sequence[str]) -> Html:
    table = table_of(rows)
    columns = [name.removeprefix("throughput, ") for name in table.columns]
    whole = {row.name: row.parameters for row in rows if not row.stages}
    base = next(iter(whole.values())) if len(whole) == 1 else None
    cells = []
    for at, (row, line) in enumerate(zip(rows, table.rows, strict=True), 1):
        kept = f" ({percent(row.parameters / base)})" if row.stages and base and row.parameters else ""
        cells.append([f"{at}. {row.name}", " > ".join(row.stages) or "as it was", f"{line[2]}{kept}", *line[3:]])
    said = tag("ul", *(tag("li", prose(note)) for note in notes), class_="soft")
    return joined([html.table("stages", columns, cells, names=2), said])


def _trade(rows: Sequence[Row]) -> Html | None:
    """Draw quality against each size and against speed, of the models that have both."""
    measured = [(str(at), row, row.quality) for at, row in enumerate(rows, 1) if row.quality]
    if len(measured) < 2:
        return None
    metric, higher = measured[0][2]["metric"], bool(measured[0][2]["higher_is_better"])
    drawn = []
    for label, of, text in KINDS:
        points = []
        for number, row, quality in measured:
            value, x = quality["metrics"][quality["metric"]], of(row)
            if x is not None:
                points.append(Point(number, x, value["value"], value["low"], value["high"], base=not row.stages))
        if len({point.x for point in points}) > 1:
            better = {"less_is_better": label != SPEED, "higher_is_better": higher}
            drawn.append(charts.scatter(points, label, metric, text, **better).figure())
    if not drawn:
        return None
    said = tag("p", "The numbers are those of the table; the bars are 95 % intervals.", class_="soft")
    return joined([said, tag("div", *drawn, class_="charts")])


SPEED = "samples per second"
KINDS: list[tuple[str, Callable[[Row], float | None], charts.Text]] = [
    ("parameters", lambda row: row.parameters, short),
    ("bytes", lambda row: row.bytes, size),
    ("multiply-adds", lambda row: row.macs, short),
    (SPEED, lambda row: row.speed["model"]["saturating"]["samples_per_second"] if row.speed else None, short),
]


def _spectra(analyzed: Mapping[str, Any]) -> Html:
    """Draw the spectra of modules of one kind together, and list at which ranks their energy is kept."""
    rows = {row["name"]: row for row in analyzed["modules"]}
    cells = []
    for kind, names in grouped(rows).items():
        some = [rows[name] for name in names]
        ranks = [span([str(n) for n in sorted(row[f"rank_{level}"] for row in some)]) for level in (90, 95, 99)]
        full = ["x".join(map(str, some[0]["shape"])), some[0]["max_rank"], some[0]["break_even_rank"]]
        cells.append([kind, len(some), *full, *ranks, some[0].get("reason") or ""])
    columns = ["module", "count", "shape", "full rank", "break-even", "90 % energy", "95 %", "99 %", "stays dense"]
    drawn = [chart.figure() for chart in pictures.spectra(analyzed["modules"])]
    return joined([html.table("ranks of the base", columns, cells), tag("p"), tag("div", *drawn, class_="charts")])


def _modules(record: Record) -> Html | None:
    """Draw what each module keeps, one chart for each kind, with a table of all of them."""
    entries = [row for row in record.data.get("modules", []) if isinstance(row, dict) and row.get("parameters_before")]
    if not entries:
        return None
    kept = {row["name"]: row["parameters_after"] / row["parameters_before"] for row in entries}
    ranks = {row["name"]: "dense" if row["rank"] is None else rank_text(row["rank"]) for row in entries}
    drawn = []
    for kind, names in grouped(kept).items():
        values = [(name, kept[name], "dense" if ranks[name] == "dense" else "") for name in names]
        text = f"Share of the entries that each keeps; ranks: {', '.join(ranks[name] for name in names)}."
        drawn.append(charts.bars(kind, values, "share kept", text=text, top=1.0).figure())
    cells = []
    for row in entries:
        name, error = row["name"], "-" if row.get("error") is None else f"{row['error']:.3g}"
        shape = "x".join(map(str, row["shape"]))
        cells.append([name, shape, ranks[name], percent(kept[name]), error, row.get("reason") or ""])
    whole = html.table("modules", ["module", "shape", "rank", "kept", "relative error", "why dense"], cells)
    return joined([tag("div", *drawn, class_="charts"), details(f"all {len(cells)} modules", whole)])


def _layers(record: Record) -> Html | None:
    """Draw the score of every layer that `prune-layers` saw."""
    rows = record.data.get("layers") or []
    if not rows:
        return None
    cells = []
    for row in rows:
        score = "" if row["score"] is None else f"{row['score']:.4g}"
        cells.append([row["name"], score, "kept" if row["kept"] else "dropped"])
    whole = html.table("layers", ["layer", "score", ""], cells)
    drawn = pictures.scores(record.data)
    parts = [tag("p", pictures.dropped(record.data)), whole]
    if drawn is not None:
        parts = [tag("div", drawn.figure(), class_="charts"), details(f"all {len(rows)} layers", whole)]
    return joined([*parts, _maps(record, rows)])


def _maps(record: Record, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Draw the t-SNE map after each layer, or say why there is none."""
    score, kept = record.data.get("score"), maps.read(record.folder)
    why = None
    if score != "tsne-silhouette":
        why = f"`{score}` is taken of none, as `tsne-silhouette` is" if score else "no layer was scored"
    elif kept is None or not kept.points.keys() >= {row["name"] for row in rows}:
        why = f"there is no `{maps.FILE}` of these layers in the artifact"
    if why or kept is None:
        return tag("p", prose(f"No t-SNE maps: {why}."), class_="soft")
    drawn = []
    for row, picture in zip(rows, pictures.maps(rows, kept), strict=True):
        said = tag("figcaption", tag("strong", row["name"]), f" {pictures.state_of(row)}")
        drawn.append(tag("figure", said, picture.svg(), class_=None if row["kept"] else "gone"))
    classes = len(kept.classes)
    told = f"t-SNE maps of {pictures.samples_of(kept)} after each layer, marked by class; above each its score, "
    told += "which all samples count for."
    shared = f" With {classes} classes several share a mark." if classes > charts.MARKS else ""
    key = None if shared else charts.legend(kept.classes)
    return joined([tag("p", told + shared), key, tag("div", *drawn, class_="maps")])


def _training(record: Record) -> Html | None:
    """Draw the losses of every step and the scores on the held-out samples."""
    log = record.log()
    steps = [entry for entry in log if "loss" in entry]
    scores = [(float(entry["step"]), float(entry["score"])) for entry in log if entry.get("score") is not None]
    terms = [name for name in (steps[0] if steps else {}) if name not in ("step", "rate", "loss", "score")]
    drawn = []
    for name in ["loss", *(terms if len(terms) > 1 else [])]:
        known = [entry for entry in steps if isinstance(entry.get(name), (int, float))]
        curve = [(float(entry["step"]), float(entry[name])) for entry in known]
        if any(value > 0 for _, value in curve):
            text = "The whole loss." if name == "loss" else f"The term `{name}`, as weighted."
            drawn.append(charts.lines(name, [curve], "step", name, text=text, log=True).figure())
    if len(scores) > 1:
        text = "The score on samples not learnt from."
        drawn.append(charts.lines("held out", [scores], "step", "score", text=text).figure())
    return tag("div", *drawn, class_="charts") if drawn else None


def _provenance(record: Record) -> Html:
    """List where an artifact comes from, what made it, on what machine, and what was said of it."""
    own, base, result = record.manifest, record.manifest.base, record.result
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    pairs: list[tuple[str, object]] = [
        ("id", own.id),
        ("base", f"{base['library']} {base['architecture']}"),
        ("from", base.get("source", {}).get("spec", "a live network")),
        *((f"sha256 of {name}", digest) for name, digest in (base.get("files") or {}).items()),
        ("layers kept", ", ".join(own.kept_layers)),
        ("made on", result.get("device")),
        ("platform", result.get("platform")),
        ("threads", result.get("threads")),
        ("seconds, last step", result.get("seconds")),
        ("versions", versions),
    ]
    last = result.get("report") or {}
    said = [tag("p", prose(text), class_="warning") for text in last.get("warnings", [])]
    notes = tag("ul", *(tag("li", prose(text)) for text in last.get("notes", []))) if last.get("notes") else None
    requests = [json.dumps(step["request"], indent=2, sort_keys=True, ensure_ascii=False) for step in own.steps]
    asked = details("what each step was asked", *(tag("pre", text) for text in requests))
    rebuilt = [tag("p", "The commands that rebuild it:"), tag("pre", "\n".join(command_lines(own)))]
    return joined([tag("h3", str(record.folder)), facts(pairs), *said, notes, *rebuilt, asked])
