"""Rows of a comparison > what became of size, speed and quality against the dense model, in a sentence and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from peftc.pages.records import Row, cut_text
from peftc.pages.tables import MISSING, NOISE, change_text, measured_by, noise_text, quoted, speedups
from peftc.report import UNCHANGED, count, is_better, percent, ranged, size, speedup_range, speedup_text


@dataclass(frozen=True)
class Figure:
    """One of the three figures: what it is of, the figure, and the sentence beneath it."""

    of: str
    value: str
    told: str


@dataclass(frozen=True)
class Verdict:
    """What became of a model.

    Attributes:
        name: of the model.
        base: the dense model's name.
        sentence: what became of size, speed and quality.
        figures: size, speed, quality.
        on: what it was measured on, and when; empty where nothing was.
        why: of several models, why the verdict is on this one.
    """

    name: str
    base: str
    sentence: str
    figures: tuple[Figure, Figure, Figure]
    on: Sequence[str]
    why: str


def verdict_of(rows: Sequence[Row]) -> Verdict:
    """Return the verdict on the model that `headline_of` names, from `records.rows`."""
    row, why = headline_of(rows)
    base = next(each for each in rows if each.base is None and each.name == row.base)
    name = base.name
    parts = [_size_words(row, name), _speed_words(row, name), _quality_words(row, name)]
    sentence = f"{quoted(row.name)} {parts[0]}, {parts[1]}, and {parts[2]}."
    figures = (_size(row, base), _speed(row, name), _quality(row, base))
    return Verdict(row.name, name, sentence, figures, _measured(row), why)


def headline_of(rows: Sequence[Row]) -> tuple[Row, str]:
    """Return the model that a verdict is on, and why; in which order the models were named plays no part.

    It is the end of the chain: of the models of which most was measured against the dense one, that which no other was
    made from. Of several ends it is the smallest that shows no loss or, where each shows one, that which loses least.
    """
    made = [row for row in rows if row.base is not None]

    def known(row: Row) -> tuple[int, bool]:
        return (row.change is not None) + (row.speedup is not None), row.change is not None

    most = max(map(known, made))
    measured = [row for row in made if known(row) == most]
    before = {name for row in measured for name in row.made_from}
    ends = [row for row in measured if row.name not in before]
    chosen = min(ends, key=_rank)
    if len(made) == 1:
        return chosen, ""
    if len(measured) == 1:
        why = f"most was measured of it against {quoted(str(chosen.base))}"
    elif len(ends) == 1:
        lead = "all others lead" if len(measured) == len(made) else "the others that were measured as fully lead"
        why = f"it is the end of the chain, {lead} to it"
    else:
        loses, metric = _rank(chosen)[0], chosen.quality["metric"] if chosen.quality else None
        which = f"it loses least {metric}" if loses else "it is the smallest"
        which += f" that shows no loss of {metric}" if chosen.change and not loses else ""
        why = f"of the {len(ends)} that no other was made from, {which}"
    return chosen, f"the verdict is on this one of {len(made)} models as {why}"


def _rank(row: Row) -> tuple[bool, float, float, float, str]:
    """Return of two ends of chains the less for that which the headline is to be on, as `headline_of` says."""
    size = math.inf if row.parameters is None else row.parameters
    if row.change is None or row.quality is None:
        return False, 0.0, size, 0.0, row.name
    higher = bool(row.quality.get("higher_is_better", True))
    loses, lost = is_better(row.change, higher=higher) is False, float(row.change["value"]) * (-1 if higher else 1)
    return loses, lost if loses else 0.0, size, lost, row.name


def _size_words(row: Row, base: str) -> str:
    if row.share is None:
        return f"has {count(row.parameters or 0)} parameters"
    return f"has {percent(row.share)} of the parameters of {quoted(base)}"


def _speed_words(row: Row, base: str) -> str:
    change = row.speedup
    if change is None:
        return f"its speed was not measured beside {quoted(base)}"
    return f"shows {UNCHANGED} of speed" if change["verdict"] == UNCHANGED else f"is {change['verdict']}"


def _quality_words(row: Row, base: str) -> str:
    if row.quality is None:
        return "its quality was not measured"
    metric = row.quality["metric"]
    value = row.quality["metrics"][metric]
    text = ranged(value["value"], value["low"], value["high"]).partition(" ")[0]
    if row.change is None:
        return f"its {metric} is {text}, which was not compared with {quoted(base)}"
    return f"its {metric} is {text}, {better_or_worse(row)}{_trained(row, base)}"


def _trained(row: Row, base: str) -> str:
    """Say of a model that is better than its base that it was trained further, if so: what else may be the reason."""
    if not row.trained or not better_or_worse(row).startswith("better"):
        return ""
    by = " and ".join(map(quoted, dict.fromkeys(row.trained)))
    return f" (it was trained further by {by}, {quoted(base)} was not)"


def better_or_worse(row: Row) -> str:
    """Say whether a model is better than its base: only where the interval of the difference leaves zero out."""
    assert row.change is not None and row.quality is not None
    better = is_better(row.change, higher=bool(row.quality.get("higher_is_better", True)))
    if better is None:
        return "no measurable difference"
    amount = change_text(row).partition(" ")[0].lstrip("+-")
    return f"{'better' if better else 'worse'} by {amount}"


def _size(row: Row, base: Row) -> Figure:
    stored = (
        "" if row.bytes is None else f"on disk {size(row.bytes)}" + (f" of {size(base.bytes)}" if base.bytes else "")
    )
    if row.share is None:
        whole = MISSING if row.parameters is None else f"{count(row.parameters)} parameters"
        told = f"those of {quoted(base.name)} are not known"
    else:
        whole = percent(row.share)
        told = f"of the parameters: {count(row.parameters or 0)} of {count(base.parameters or 0)}"
    return Figure("size", whole, "; ".join(filter(None, (told, stored))))


def _speed(row: Row, base: str) -> Figure:
    if row.speed is None or row.speedup is None:
        return Figure("speed", MISSING, measured_by(row, "bench"))
    low, high = speedup_range(row.speedup)
    words = NOISE if row.speedup["verdict"] == UNCHANGED else row.speedup["verdict"]
    which = "times the speed" if words == NOISE else f"times {words.rpartition(' ')[2]}"
    batch = row.speed["model"]["saturating"]["batch"]
    told = f"{low:.2f} to {high:.2f} {which}, timed in turn with {quoted(base)} in one run, batch {batch}"
    noise, single = noise_text(row.speedup), speedups(row)[1] if batch > 1 and 1 in speedups(row) else None
    told += f"; noise of that run {noise}" if noise else ""
    told += f"; at batch 1 {speedup_text(single, NOISE)}" if single else ""
    return Figure("speed", words, told)


def _quality(row: Row, base: Row) -> Figure:
    if row.quality is None:
        return Figure("quality", MISSING, measured_by(row, "evaluate --data DATA"))
    metric = row.quality["metric"]
    own = row.quality["metrics"][metric]
    text = ranged(own["value"], own["low"], own["high"])
    if row.change is None:
        return Figure("quality", f"{text.partition(' ')[0]} {metric}", f"{text}; not compared with {quoted(base.name)}")
    theirs = (row.quality["against"]["metrics"]).get(metric)
    against = f" against {ranged(theirs['value'], theirs['low'], theirs['high'])}" if theirs else ""
    value, _, reach = change_text(row).partition(" ")
    words = f"{better_or_worse(row).partition(' by ')[0]}{_trained(row, base.name)}"
    return Figure("quality", f"{value} {metric}", f"{words}: {text}{against}; paired difference {reach}")


def _measured(row: Row) -> list[str]:
    """Say when and on what the figures were measured."""
    told = []
    times = [each["at"] for each in (row.quality, row.speed) if each and each.get("at")]
    if times and (day := _day(max(times))):
        told.append(f"measured on {day}")
    if row.quality:
        data = row.quality["data"]
        told.append(f"{data['samples']:,} samples of split `{data['split']}` of `{data['spec']}`{cut_text(data)}")
    if row.speed:
        where = row.speed["environment"]
        told.append(f"{where['device_name']}, threads: {where['threads']}")
    return told


def _day(seconds: int) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%d %B %Y").lstrip("0")
    except (OverflowError, ValueError, OSError):  # no time that there is
        return None
