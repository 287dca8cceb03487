"""The parts of the page that `report` writes, from records alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftc.pages import charts, html
from peftc.pages.charts import Point
from peftc.pages.html import Html, details, facts, joined, prose, section, tag
from peftc.pages.records import Record, Row, quality_text, speed_texts
from peftc.report import count, grouped, percent, rank_text, short, size, span
from peftc.store import maps
from peftc.version import __version__


def page_of(rows: list[Row], found: list[Record], analyzed: Mapping[str, Any] | None, notes: Sequence[str]) -> str:
    """Return the page on models: their rows and records, what `analyze` found of the base, and notes of `compare`."""
    bases = ", ".join(row.name for row in rows if not row.stages)
    title = f"{bases}: {len(found)} compressed {'model' if len(found) == 1 else 'models'}"
    parts = [("stages", "Stages", _stages(rows, notes)), ("trade", "What it costs, what it brings", _trade(rows))]
    parts += [("spectra", f"Rank spectra of {bases}", _spectra(analyzed) if analyzed else None)]
    parts += [("modules", "Ranks", _each(found, _modules)), ("layers", "Layer scores", _each(found, _layers))]
    parts += [("training", "Training", _each(found, _training))]
    parts += [("provenance", "How it came to be", joined(_provenance(record) for record in found))]
    shown = [(name, heading, inside) for name, heading, inside in parts if inside]
    links = tag(
        "nav", tag("ul", *(tag("li", tag("a", text, href=f"#{name}")) for name, text, _ in shown)), aria_label="parts"
    )
    body = [section(name, heading, inside) for name, heading, inside in shown]
    foot = tag("p", f"Written by peftc {__version__} from the files of the artifacts alone.", class_="soft")
    return html.document(title, tag("main", tag("h1", title), links, *body, foot))


def _each(found: Sequence[Record], show: Any) -> Html | None:
    """Return what there is to show of each record, under its name."""
    parts = [(record, inside) for record in found if (inside := show(record))]
    if not parts:
        return None
    return joined(joined([tag("h3", str(record.folder)), inside]) for record, inside in parts)


def _stages(rows: Sequence[Row], notes: Sequence[str]) -> Html:
    metric = next((row.quality["metric"] for row in rows if row.quality), None)
    timed = next((row.speed for row in rows if row.speed), None)
    columns = ["artifact", "stages", "parameters", "bytes", "MACs", *([metric] if metric else [])]
    columns += ["latency", f"batch {timed['model']['saturating']['batch']}", "speed-up"] if timed else []
    whole = {row.name: row.parameters for row in rows if not row.stages}
    base = next(iter(whole.values())) if len(whole) == 1 else None
    cells = []
    for at, row in enumerate(rows, 1):
        kept = f" ({percent(row.parameters / base)})" if row.stages and base and row.parameters else ""
        line = [f"{at}. {row.name}", " > ".join(row.stages) or "as it was"]
        line += ["-" if row.parameters is None else count(row.parameters) + kept]
        line += ["-" if row.bytes is None else size(row.bytes), "-" if row.macs is None else short(row.macs)]
        cells.append([*line, *([quality_text(row)] if metric else []), *(speed_texts(row) if timed else [])])
    said = tag("ul", *(tag("li", prose(note)) for note in notes), class_="soft")
    return joined([html.table("stages", columns, cells, names=2), said])


def _trade(rows: Sequence[Row]) -> Html | None:
    """Draw quality against each size and against speed, of the models that have both."""
    measured = [(str(at), row) for at, row in enumerate(rows, 1) if row.quality]
    if len(measured) < 2:
        return None
    assert measured[0][1].quality is not None
    metric, higher = measured[0][1].quality["metric"], bool(measured[0][1].quality["higher_is_better"])
    kinds: list[tuple[str, Any, Any, bool]] = [
        ("parameters", lambda row: row.parameters, short, True),
        ("bytes", lambda row: row.bytes, size, True),
        ("multiply-adds", lambda row: row.macs, short, True),
        (
            "samples per second",
            lambda row: row.speed and row.speed["model"]["saturating"]["samples_per_second"],
            short,
            False,
        ),
    ]
    drawn = []
    for label, of, text, less in kinds:
        points = [_point(number, row, of(row)) for number, row in measured if of(row) is not None]
        if len(points) > 1 and len({point.x for point in points}) > 1:
            drawn.append(
                charts.scatter(
                    f"{metric} against {label}",
                    points,
                    label,
                    metric,
                    text,
                    less_is_better=less,
                    higher_is_better=higher,
                )
            )
    return (
        joined(
            [
                tag("p", "The numbers are those of the table; the bars are 95 % intervals.", class_="soft"),
                tag("div", *drawn, class_="charts"),
            ]
        )
        if drawn
        else None
    )


def _point(number: str, row: Row, x: float) -> Point:
    assert row.quality is not None
    value = row.quality["metrics"][row.quality["metric"]]
    return Point(number, x, value["value"], value["low"], value["high"], base=not row.stages)


def _spectra(analyzed: Mapping[str, Any]) -> Html:
    """Draw the spectra of modules of one kind together, and list at which ranks their energy is kept."""
    rows = {row["name"]: row for row in analyzed["modules"]}
    drawn, cells = [], []
    for kind, names in grouped(rows).items():
        some = [rows[name] for name in names]
        curves = [[(rank / row["max_rank"], value) for rank, value in row["spectrum"]] for row in some]
        shape = "x".join(map(str, some[0]["shape"]))
        text = f"{len(some)} of {shape}: singular values in shares of the largest, over the share of the full rank."
        drawn.append(charts.lines(kind, curves, "share of the full rank", "of the largest", text=text, log=True))
        ranks = [span([str(n) for n in sorted(row[f"rank_{level}"] for row in some)]) for level in (90, 95, 99)]
        reason = some[0].get("reason") or ""
        cells.append([kind, len(some), shape, some[0]["max_rank"], some[0]["break_even_rank"], *ranks, reason])
    columns = ["module", "count", "shape", "full rank", "break-even", "90 % energy", "95 %", "99 %", "stays dense"]
    return joined([html.table("ranks of the base", columns, cells), tag("p"), tag("div", *drawn, class_="charts")])


def _modules(record: Record) -> Html | None:
    """Draw what each module keeps, one chart for each kind, with a table of all of them."""
    entries = [row for row in record.data.get("modules", []) if isinstance(row, dict) and row.get("parameters_before")]
    if not entries:
        return None
    rows = {row["name"]: row for row in entries}
    drawn = []
    for kind, names in grouped(rows).items():
        values = [(n, rows[n]["parameters_after"] / rows[n]["parameters_before"], _state(rows[n])) for n in names]
        ranks = [_rank(rows[name]) for name in names]
        text = f"Share of the entries that each keeps; ranks: {', '.join(ranks)}."
        drawn.append(charts.bars(kind, values, "share kept", text=text, top=1.0))
    cells = [[name, *_cells(row)] for name, row in rows.items()]
    whole = html.table("modules", ["module", "shape", "rank", "kept", "relative error", "why dense"], cells)
    return joined([tag("div", *drawn, class_="charts"), details(f"all {len(cells)} modules", whole)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    kept = percent(row["parameters_after"] / row["parameters_before"])
    error = "-" if row.get("error") is None else f"{row['error']:.3g}"
    return ["x".join(map(str, row["shape"])), _rank(row), kept, error, row.get("reason") or ""]


def _state(row: Mapping[str, Any]) -> str:
    return "dense" if row["rank"] is None else ""


def _rank(row: Mapping[str, Any]) -> str:
    rank = row["rank"]
    return "dense" if rank is None else rank_text(rank)


def _layers(record: Record) -> Html | None:
    """Draw the score of every layer that `prune-layers` saw."""
    rows = record.data.get("layers") or []
    scored = [row for row in rows if row["score"] is not None]
    if not rows:
        return None
    gone = ", ".join(row["name"] for row in rows if not row["kept"]) or "none"
    text = f"{record.data.get('score') or 'no score'}; dropped: {gone}."
    cells = [
        [row["name"], "" if row["score"] is None else f"{row['score']:.4g}", "kept" if row["kept"] else "dropped"]
        for row in rows
    ]
    whole = html.table("layers", ["layer", "score", ""], cells)
    if not scored:
        return joined([tag("p", text), whole, _maps(record, rows)])
    values = [(row["name"], row["score"], "" if row["kept"] else "gone") for row in scored]
    drawn = charts.bars(
        "score of each layer",
        values,
        str(record.data.get("score") or "score"),
        text=text,
        limit=record.data.get("threshold"),
    )
    return joined([tag("div", drawn, class_="charts"), details(f"all {len(rows)} layers", whole), _maps(record, rows)])


def _maps(record: Record, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Draw the t-SNE map after each layer, or say why there is none."""
    score, kept = record.data.get("score"), maps.read(record.folder)
    if score != "tsne-silhouette":
        why = f"`{score}` is taken of none, as `tsne-silhouette` is" if score else "no layer was scored"
        return tag("p", prose(f"No t-SNE maps: {why}."), class_="soft")
    if kept is None or not kept.points.keys() >= {row["name"] for row in rows}:
        why = f"there is no `{maps.FILE}` of these layers in the artifact"
        return tag("p", prose(f"No t-SNE maps: {why}."), class_="soft")
    number, classes = len(kept.labels), len(kept.classes)
    what = f"{number:,} of {kept.samples:,} samples" if number < kept.samples else f"{number:,} samples"
    drawn = []
    for row in rows:
        word = "no score" if row["score"] is None else f"{row['score']:.2f}"
        state = f"{word}, {'kept' if row['kept'] else 'dropped'}"
        text = f"{what} of {classes} classes; score {state}."
        picture = charts.cloud(f"t-SNE map after {row['name']}", text, kept.points[row["name"]], kept.labels)
        said = tag("figcaption", tag("strong", row["name"]), f" {state}")
        drawn.append(tag("figure", said, picture, class_=None if row["kept"] else "gone"))
    known = classes <= charts.MARKS
    told = f"t-SNE maps of {what} after each layer, marked by class; above each its score, which all samples count for."
    more = "" if known else f" With {classes} classes several share a mark."
    return joined(
        [tag("p", told + more), charts.legend(kept.classes) if known else None, tag("div", *drawn, class_="maps")]
    )


def _training(record: Record) -> Html | None:
    """Draw the losses of every step and the scores on the held-out samples."""
    log = record.log()
    steps = [entry for entry in log if "loss" in entry]
    scores = [(float(entry["step"]), float(entry["score"])) for entry in log if entry.get("score") is not None]
    terms = [name for name in (steps[0] if steps else {}) if name not in ("step", "rate", "loss", "score")]
    drawn = []
    for name in ["loss", *(terms if len(terms) > 1 else [])]:
        curve = [
            (float(entry["step"]), float(entry[name])) for entry in steps if isinstance(entry.get(name), (int, float))
        ]
        if any(value > 0 for _, value in curve):
            what = "the whole loss" if name == "loss" else f"the term `{name}`, as weighted"
            drawn.append(charts.lines(name, [curve], "step", name, text=f"{what[0].upper()}{what[1:]}.", log=True))
    if len(scores) > 1:
        drawn.append(charts.lines("held out", [scores], "step", "score", text="The score on samples not learnt from."))
    return tag("div", *drawn, class_="charts") if drawn else None


def _provenance(record: Record) -> Html:
    """List where an artifact comes from, what made it, on what machine, and what was said of it."""
    own, result = record.manifest, record.result
    base = own.base
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
    return joined(
        [
            tag("h3", str(record.folder)),
            facts(pairs),
            *said,
            notes,
            tag("p", "The commands that rebuild it:"),
            tag("pre", "\n".join(record.commands())),
            asked,
        ]
    )
