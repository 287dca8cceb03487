"""The parts of the page that `report` writes, from records alone."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftc.pages import charts, html, pictures
from peftc.pages.analysis import plan_text
from peftc.pages.html import Html, details, facts, joined, prose, tag
from peftc.pages.records import Record, Row
from peftc.pages.tables import MISSING, quoted, speeds_of, table_of
from peftc.pages.trade import trade_of
from peftc.pages.verdict import Verdict, verdict_of
from peftc.report import count, grouped, percent, rank_text, short, size, span
from peftc.store import maps
from peftc.store.commands import command_lines
from peftc.version import __version__

WORDS = {  # columns of the table in plain words; the glossary says more
    "last stage": "the command that made the model, the last of its chain",
    "parameters": "how many numbers the model has learnt",
    "share": "its parameters, of those of the dense model that it was made from; and the size of its "
    "files, where these hold more or fewer bytes for each parameter",
    "bytes": "what its weights take on disk",
    "MACs": "multiply-adds: how often one sample makes the model multiply and add, which is its work",
    "top1": "share of samples whose most likely class is the right one; in brackets the 95 % interval",
    "accuracy": "share of samples whose most likely class is the right one; in brackets the 95 % interval",
    "perplexity": "among how many words, so to speak, a language model hesitates: less is better; in brackets the 95 % "
    "interval",
    "change against dense": "difference from the dense one, on the same samples; with 0 in brackets it may be chance",
    "speed-up": "against the dense model, both timed in turn in one run; within noise is no change that can be seen",
}
MANY = 4  # models: of more than these the parts are shown on request


def page_of(rows: list[Row], found: list[Record], analyzed: Mapping[str, Any] | None, notes: Sequence[str]) -> str:
    """Return the page on models: their rows and records, what `analyze` found of the base, and notes of `compare`."""
    bases = ", ".join(row.name for row in rows if row.base is None)
    verdict = verdict_of(rows)
    parts = [
        ("models", "All models", _models(rows, notes)),
        ("trade", "Quality against what it costs", trade_of(rows)),
        ("speed", "Speed and its noise", _speeds(rows)),
        ("plan", "The plan", _plan(rows, analyzed) if analyzed else None),
        ("spectra", f"Rank spectra of {bases}", _spectra(analyzed) if analyzed else None),
        ("modules", "Ranks", _each(found, _modules)),
        ("layers", "Layer scores", _each(found, _layers)),
        ("training", "Training", _each(found, _training)),
        ("provenance", "How it came to be", _each(found, _provenance)),
    ]
    links, body = [], []
    for name, heading, inside in parts:
        if inside:
            links.append(tag("li", tag("a", heading, href=f"#{name}")))
            body.append(tag("section", tag("h2", heading, id=name), inside, aria_labelledby=name))
    nav = tag("nav", tag("ul", *links), aria_label="parts")
    foot = tag("p", f"Written by peftc {__version__} from the files of the artifacts alone.", class_="soft")
    title = f"{verdict.name} beside {verdict.base}"
    return html.document(title, tag("main", tag("h1", title), _verdict(verdict, found), nav, *body, foot))


def _verdict(verdict: Verdict, found: Sequence[Record]) -> Html:
    """Say what became of size, speed and quality: a sentence, three figures, and on what, where and when."""
    figures = []
    for each in verdict.figures:
        value = tag("dd", each.value, class_="missing" if each.value == MISSING else None)
        figures.append(tag("div", tag("dt", each.of), value, tag("dd", prose(each.told))))
    record = next(each for each in found if each.called == verdict.name)
    base = record.manifest.base
    about = [f"`{base['library']}` `{base['architecture']}`", *verdict.on, *([verdict.why] if verdict.why else [])]
    lead = tag("p", prose(verdict.sentence), class_="lead")
    soft = tag("p", prose("; ".join(about) + "."), class_="soft")
    return joined([lead, tag("dl", *figures, class_="figures"), *_warned(record, found), soft])


def _warned(record: Record, found: Sequence[Record]) -> list[Html]:
    """Say beside the verdict what was warned of its model, and that there is more on others, if there is."""
    said = _warnings(record)
    names = ", ".join(quoted(each.called) for each in found if each is not record and _warnings(each))
    if names:
        where = tag("a", "how they came to be", href="#provenance")
        said.append(tag("p", prose(f"There are warnings of {names}, too: see "), where, ".", class_="soft"))
    return said


def _warnings(record: Record) -> list[Html]:
    """Show the warnings of the last step of a model."""
    told = (record.result.get("report") or {}).get("warnings", [])
    return [tag("p", tag("strong", "Warning: "), prose(text), class_="warning") for text in told]


def _each(found: Sequence[Record], show: Callable[[Record], Html | None]) -> Html | None:
    """Return what there is to show of each record, under its name; what is the same of several once."""
    parts: dict[Html, list[str]] = {}
    for record in found:
        if inside := show(record):
            parts.setdefault(inside, []).append(record.called)
    if not parts:
        return None
    named = [(f"{', '.join(names)}{' (the same)' * (len(names) > 1)}", inside) for inside, names in parts.items()]
    if len(named) > MANY:
        return joined(details(name, inside) for name, inside in named)
    return joined(joined([tag("h3", name), inside]) for name, inside in named)


def _models(rows: Sequence[Row], notes: Sequence[str]) -> Html:
    """Show the table of `compare`, with bytes and multiply-adds, and what it says of the figures."""
    table = table_of(rows)
    columns = [*table.columns[:4], "bytes", "MACs", *table.columns[4:]]
    cells = []
    for row, line in zip(rows, table.rows, strict=True):
        sizes = ["-" if value is None else write(value) for value, write in ((row.bytes, size), (row.macs, short))]
        cells.append([*line[:4], *sizes, *line[4:]])
    said = tag("ul", *(tag("li", prose(note)) for note in notes), class_="soft")
    meant = facts((name, WORDS[name]) for name in columns if name in WORDS)
    words = details("What the words mean", meant)
    return joined([html.table(table.title, columns, cells, names=2), words, said])


def _speeds(rows: Sequence[Row]) -> Html | None:
    """Show the speed-ups of single samples and of batches beside the noise of their runs."""
    table = speeds_of(rows)
    if table is None:
        return None
    told = "A speed-up is against the dense model, timed in turn with it in one run, in brackets its range. Noise is "
    told += "what the dense model shows against itself in that run: a change inside it is called `within noise`."
    return joined([html.table(table.title, table.columns, table.rows), tag("p", prose(told), class_="soft")])


def _plan(rows: Sequence[Row], analyzed: Mapping[str, Any]) -> Html:
    """Say what was planned, apart from what was made and measured."""
    plan = analyzed.get("plan")
    told = tag("p", prose(f"{plan_text(analyzed)}."))
    if not plan:
        return told
    whole = [row.parameters for row in rows if row.base is None and row.parameters]
    kept = f" ({percent(plan['parameters'] / whole[0])} of the dense model's)" if len(whole) == 1 else ""
    pairs = [
        ("asked for", f"{plan['budget']}, {plan['allocation']}"),
        ("parameters, as planned", f"{count(plan['parameters'])}{kept}"),
        ("predicted loss", f"{plan['predicted']:.3g}" if "predicted" in plan else None),
    ]
    return joined([told, facts(pairs)])


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
    stays = {
        row["name"]: f"stays dense: {row.get('reason') or 'no reason kept'}" for row in entries if row["rank"] is None
    }
    drawn = []
    for kind, names in grouped(kept).items():
        values = [(name, kept[name], "dense" if ranks[name] == "dense" else "") for name in names]
        text = f"Share of the entries that each keeps; ranks: {', '.join(ranks[name] for name in names)}."
        keys = [("bar", "bar", "factored")] if any(not look for _, _, look in values) else []
        keys += [("bar", "bar dense", why) for why in dict.fromkeys(stays[name] for name in names if name in stays)]
        drawn.append(charts.bars(kind, values, "share kept (linear)", text=text, top=1.0, keys=keys).figure())
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
        curve = [(float(entry["step"]), float(entry[name])) for entry in known if math.isfinite(entry[name])]
        if any(value > 0 for _, value in curve):
            text = "The whole loss." if name == "loss" else f"The term `{name}`, as weighted."
            drawn.append(_curve(name, curve, text))
    if len(scores) > 1:
        text = "The score on samples not learnt from."
        drawn.append(charts.lines("held out", [scores], "step", "score", text=text).figure())
    return tag("div", *drawn, class_="charts") if drawn else None


def _curve(name: str, curve: Sequence[charts.Place], text: str) -> Html:
    """Draw a curve over the steps that it is the mean of, where they are many enough to need one."""
    smooth, over = charts.smoothed(curve)
    if over == 1:
        return charts.lines(name, [curve], "step", name, text=text, log=True).figure()
    keys = [("round", "raw", "one step"), ("line", "line", f"mean of {over} steps")]
    return charts.lines(name, [smooth], "step", name, text=text, log=True, raw=curve, keys=keys).figure()


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
    notes = tag("ul", *(tag("li", prose(text)) for text in last.get("notes", []))) if last.get("notes") else None
    requests = [json.dumps(step["request"], indent=2, sort_keys=True, ensure_ascii=False) for step in own.steps]
    asked = details("what each step was asked", *(tag("pre", text) for text in requests))
    told = f"The commands that rebuild it; `peftc show {record.called} --commands` prints them with whole paths:"
    rebuilt = [tag("p", prose(told)), tag("pre", "\n".join(command_lines(own)))]
    return joined([facts(pairs), *_warnings(record), notes, *rebuilt, asked])
