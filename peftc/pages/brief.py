"""What a step says at its end: what was asked, what came of it, and what to do next; `-v` says the rest."""

import re
import shlex
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from peftc.report import Report, count, duration, figure, interval_text, is_better, percent, short, size

DATA = "DATA"  # stands for data that nobody named
NO_TEST = "no test split"  # begins the note of a training whose figures are all of samples that it chose by
DONE = "already done: "  # begins the note of a step that was answered before


def tell(report: Report, asked: str, came: Mapping[str, str] | None = None, *, then: str | None = None) -> None:
    """Say in a few lines what a step was asked, what came of it, and what may be done next.

    Args:
        report: its figures of size, training and quality are said where it has them.
        asked: in the words of the command line.
        came: what else came of it: a word, and what to say of it.
        then: the command to type next.
    """
    done = [note.removeprefix(DONE) for note in report.notes if note.startswith(DONE)]
    said = {"asked": asked, **(came or {}), "already done": "; ".join(done)}
    said["data"] = next((note for note in report.notes if note.startswith(NO_TEST)), "")
    said |= {"size": _size(report.data), "trained": _trained(report.data), "quality": _quality(report.data)}
    report.summary = {word: text for word, text in {**said, "next": then or ""}.items() if text}


def compare(report: Report, then: str) -> None:
    """Say what a difference in quality means; ``then`` is the command that compares, where nothing was compared."""
    found = report.data.get("against")
    if found is None:
        report.summary = {"next": then}
        return
    name, other = report.data["metric"], found["name"]
    difference = found["difference"][name]
    better = is_better(difference, higher=report.data["higher_is_better"])
    if better is None:
        text = f"no difference to `{other}` is shown: 0 is in the interval of the difference"
    else:
        text = f"{'better' if better else 'worse'} than `{other}` by {figure(abs(difference['value']))} of {name}"
    report.summary = {"so": text}


def command(*words: object) -> str:
    """Return a command of peftc as it is typed."""
    return f"`peftc {shlex.join(str(word) for word in words if word is not None)}`"


def decimal(text: str) -> str:
    """Write exact shares as they were probably typed: ``--ratio 0.75`` for ``--ratio 3/4``, but ``2/3`` as it is."""

    def written(found: re.Match[str]) -> str:
        short = f"{int(found[1]) / int(found[2]):.4g}"
        return short if Fraction(short) == Fraction(found[0]) else found[0]

    return re.sub(r"\b(\d+)/([1-9]\d*)\b", written, text)


def heal(artifact: Path | None, data: str | None) -> str:
    """Return what to do with a model that lost some of its weights: train it on samples."""
    return command("distill", artifact or "MODEL", "--data", data or DATA)


def time(artifact: Path | None) -> str:
    """Return what to do with a model that is ready: see whether it is faster."""
    return command("bench", artifact or "MODEL", "--against", "base")


def _size(data: Mapping[str, Any]) -> str:
    sizes = data.get("size") or {}
    after, before = sizes.get("after") or {}, sizes.get("before") or {}
    if not after:
        return ""
    share = f" ({percent(after['parameters'] / before['parameters'])})" if before.get("parameters") else ""
    parts = [f"{_of(after['parameters'], before.get('parameters'), count)} parameters{share}"]
    parts.append(_of(after.get("bytes"), before.get("bytes"), size))
    macs = _of(after.get("macs"), before.get("macs"), short)
    return ", ".join(filter(None, [*parts, f"{macs} multiply-adds" if macs else ""]))


def _of(after: float | None, before: float | None, written: Any) -> str:
    if after is None:
        return ""
    return written(after) if before is None else f"{written(after)} of {written(before)}"


def _trained(data: Mapping[str, Any]) -> str:
    known = data.get("retrain") or data
    if "seconds_per_step" not in known:
        return ""
    text = f"{known['steps']:,} steps in {duration(known['steps'] * known['seconds_per_step'])}"
    held = known["held_out"]
    scores, best, sign = dict(held["scores"]), held["best"], -1 if held.get("negated") else 1
    if not scores:
        return text
    before, after = (figure(sign * scores[step]) for step in (0, best))
    number = f"{held['samples']} " if held.get("samples") else ""
    text += f"; {held.get('metric', 'score')} on {number}held-out samples {before} before, {after} after step {best}"
    text += "" if best else ": unchanged"
    taught = held.get("before", {}).get("teacher")
    if taught is not None and held.get("metric") != "loss":
        text += f"; the teacher has {figure(sign * taught)}"
    return text


def _quality(data: Mapping[str, Any]) -> str:
    found = data.get("quality")
    if not found:
        return ""
    name, used, known = found["metric"], found["data"], " that the model knows" if found["seen"] else ""
    text = f"{name} {_interval(found['metrics'][name])} on {used['samples']:,} samples of split {used['split']}{known}"
    if at := found.get("batch_size"):
        text += ", one at a time" if at == 1 else f", {at} at once"
    against = found.get("against")
    if not against:
        return text
    other, difference = against["metrics"][name], against["difference"][name]
    return f"{text}; `{against['name']}` has {figure(other['value'])}, the difference is {_interval(difference)}"


def _interval(found: Mapping[str, float]) -> str:
    return interval_text(found["value"], found["low"], found["high"])
