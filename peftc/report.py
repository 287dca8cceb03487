"""What a step returns: figures for machines, tables for people, gates for CI."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

GUESSED = "guessed: "  # begins a note that is shown with `-q`, too: what it says may be wrong
LOUD = (  # what begins a note that is shown beside a summary
    GUESSED,
    "resumed at ",
    "nothing is ",
    "nothing has ",
    "weights: ",
    "the chain ",
    "pushed ",
    "not kept in ",
    "`--against base` ",
    "gate ",
)
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows for people; cells are already formatted or plain numbers. One is ``main`` that is what was asked for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    main: bool = False


@dataclass(frozen=True)
class Gate:
    """A limit that CI asked for, and whether the measured value keeps it."""

    option: str
    limit: float
    value: float | None
    passed: bool

    def told(self) -> str:
        """Return it in words, and whether it was met."""
        measured = "not measured" if self.value is None else cell_text(self.value)
        option = "--" + self.option.lstrip("-").replace("_", "-")
        return f"gate {option} {cell_text(self.limit)}: {measured}, {'met' if self.passed else 'not met'}"


@dataclass(repr=False)
class Report:
    """The outcome of one step: a line as text, tables in a notebook.

    Attributes:
        command: the step's word, as typed.
        data: JSON-ready figures, merged into the top level of ``--json``; times are in seconds, sizes in bytes, shares
            in [0, 1].
        artifact: the folder written or read, printed on stdout; ``peftc.load(report.artifact)`` loads a model.
        lines: for stdout, in place of the artifact's path.
        summary: a word, and what to say of it, in place of tables that are not main and notes that are not `LOUD`.
        tables: what people see on stderr.
        details: tables that people see on request, with `-v`.
        notes: sentences for people that are no problem; one that begins with `GUESSED` is shown with `-q`, too.
        told: notes that the artifact which was read had already.
        warnings: sentences that say what was not done, or not as asked.
        gates: limits and whether they were kept.
    """

    command: str
    data: dict[str, Any] = field(default_factory=dict)
    artifact: Path | None = None
    lines: list[str] = field(default_factory=list)
    summary: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    told: Collection[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints, in the types of JSON."""
        whole = {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "artifact": None if self.artifact is None else str(self.artifact),
            **self.data,
            "notes": self.notes,
            "warnings": self.warnings,
            "gates": [vars(gate) for gate in self.gates],
        }
        return {name: plain(value) for name, value in whole.items()}

    @property
    def parameters(self) -> int | None:
        """How many parameters the model has that was written or measured; None where the step says nothing of it."""
        return self._of_model("parameters")

    @property
    def bytes(self) -> int | None:
        """How many bytes the weight files take of the model that was written or measured."""
        return self._of_model("bytes") or self._of_model("bytes_on_disk")

    @property
    def quality(self) -> float | None:
        """The first metric of `evaluate`, or of what a step measured of its result; ``quality_unit`` says of what."""
        found = self._measured()
        return found["metrics"][found["metric"]]["value"] if found else None

    @property
    def quality_unit(self) -> str | None:
        """What `quality` counts, as ``accuracy`` (a share in [0, 1]) or ``perplexity`` (less is better)."""
        return self._measured().get("metric")

    def _measured(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data if self.command == "evaluate" else self.data.get("quality") or {}
        return found if found.get("metric") in found.get("metrics", {}) else {}

    def _of_model(self, name: str) -> int | None:
        of_size = self.data.get("size")
        after = of_size.get("after") if isinstance(of_size, Mapping) else self.data.get("model")
        return int(after[name]) if isinstance(after, Mapping) and after.get(name) is not None else None

    def __str__(self) -> str:
        """Return a line: what was written, how large it is, how good, and what is wrong."""
        facts = [] if self.parameters is None else [f"{count(self.parameters)} parameters"]
        facts += [] if self.bytes is None else [size(self.bytes)]
        facts += [] if self.quality is None else [f"{self.quality_unit} {figure(self.quality)}"]
        facts += [f"{len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}"] if self.warnings else []
        facts += [gate.told() for gate in self.gates if not gate.passed]
        where = "" if self.artifact is None else f" {self.artifact}"
        return f"{self.command}{where}{': ' if facts else ''}{', '.join(facts)}"

    def __repr__(self) -> str:
        return f"<Report of {self}>"

    def _repr_html_(self) -> str:
        """Return what the terminal shows, as a notebook shows it: tables, notes, warnings and gates."""
        from html import escape

        brief = [[word, text] for word, text in self.summary.items() if word != "next"]  # which is for terminals
        tables = [*([Table("", ["", ""], brief)] if brief else []), *self.tables]
        parts = [f"<p><b>{escape(str(self))}</b></p>", *(_table_html(table, escape) for table in tables)]
        parts += [f"<p>{escape(text)}</p>" for text in self.notes]
        parts += [f"<p><b>warning:</b> {escape(text)}</p>" for text in self.warnings]
        parts += [f"<p>{escape(gate.told())}</p>" for gate in self.gates]
        return "\n".join(parts)

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return all(gate.passed for gate in self.gates)

    def at_most(self, option: str, limit: float | None, value: float | None) -> None:
        """Add a gate that ``value`` must not exceed; an absent limit adds none, an unmeasured value fails."""
        if limit is not None:
            self.gates.append(Gate(option, limit, value, value is not None and value <= limit))

    def at_least(self, option: str, limit: float | None, value: float | None) -> None:
        """Add a gate that ``value`` must reach; an absent limit adds none, an unmeasured value fails."""
        if limit is not None:
            self.gates.append(Gate(option, limit, value, value is not None and value >= limit))


def cell_text(cell: Cell) -> str:
    """Write a cell: a number with separators, and a dash where there is nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return figure(cell)
    return f"{cell:,}" if isinstance(cell, int) else cell


def _table_html(table: Table, escape: Callable[[str], str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ("".join(f"<td>{escape(cell_text(cell))}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def plain(value: Any) -> Any:
    """Return ``value`` in the types of JSON; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def count(number: float) -> str:
    """Write a count with thousands separators: ``5,717,416``."""
    return f"{number:,.0f}"


def size(number_of_bytes: float) -> str:
    """Write bytes in decimal units with three digits: ``22.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_of_bytes < 999.5:  # beyond, three digits would be 1e+03
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:,.3g} TB"


def short(number: float) -> str:
    """Write a count with three digits and a magnitude: ``1.26 G``."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} P"


def duration(seconds: float) -> str:
    """Write a time with three digits: ``1.26 ms``, ``3.4 s``."""
    if 1000 * seconds < 999.5:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def rate(per_second: float) -> str:
    """Write how often a second: ``353/s``, ``1,452/s``."""
    return f"{per_second:.3g}/s" if per_second < 1000 else f"{per_second:,.0f}/s"


def figure(number: float) -> str:
    """Write a number with four digits, and all before the point where there are more."""
    return f"{number:,.0f}" if 9999.5 <= abs(number) < 1e15 else f"{number:.4g}"


UNCHANGED = "no measurable change"  # the verdict on a speed-up that the noise may have made


def interval_text(value: float, low: float, high: float) -> str:
    """Write a figure with its interval, each in its own digits: ``0.9317 [0.8886, 0.9589]``."""
    return f"{figure(value)} [{figure(low)}, {figure(high)}]"


def is_better(difference: Mapping[str, float], *, higher: bool) -> bool | None:
    """Return whether a difference is for the better; None where its interval does not leave 0 out.

    Args:
        difference: ``value``, ``low``, ``high``.
        higher: more of it is better.
    """
    if difference["low"] <= 0 <= difference["high"]:
        return None
    return (difference["value"] > 0) == higher


def ranged(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """Write a figure with its interval, in the digits that the interval allows: ``0.932 [0.889, 0.959]``."""
    wide = high - low
    if not 0 < wide < math.inf:
        return f"{'+' if sign and value > 0 else ''}{interval_text(value, low, high)}"
    digits = min(max(1 - math.floor(math.log10(wide)), 0), 6)
    shown, *ends = (f"{round(each, digits) + 0.0:,.{digits}f}" for each in (value, low, high))  # + 0.0: no "-0.00"
    return f"{'+' if sign and float(shown.replace(',', '')) > 0 else ''}{shown} [{', '.join(ends)}]"


def speedup_range(change: Mapping[str, Any]) -> tuple[float, float]:
    """Return the range of a speed-up, of one that is slower in times slower."""
    low, high = float(change["low"]), float(change["high"])
    slower = change["verdict"] != UNCHANGED and change["value"] < 1 and min(low, high) > 0
    return (1 / high, 1 / low) if slower else (low, high)


def speedup_text(change: Mapping[str, Any], unchanged: str = UNCHANGED) -> str:
    """Write a speed-up with its range: ``1.36x faster [1.30, 1.42]``; one inside the noise has no number of its own."""
    low, high = speedup_range(change)
    return f"{unchanged if change['verdict'] == UNCHANGED else change['verdict']} [{low:.2f}, {high:.2f}]"


DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
AMOUNTS = {**DECIMAL, "B": 10**9}  # 7B parameters
SIZES = {f"{prefix}{end}": scale for prefix, scale in DECIMAL.items() for end in ("", "B")}
SIZES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def scaled(text: str, units: dict[str, int]) -> int:
    """Read a number with a unit, ``100MB`` or ``1.5e9``: the opposite of `short` and `size`.

    Raises:
        ValueError: it is no such number, or less than 1.
    """
    found = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*(?:[eE]\+?[0-9]{1,2})?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2] not in units:
        raise ValueError("is not a number with a known unit")
    value = round(float(found[1]) * units[found[2]])
    if value < 1:
        raise ValueError("is less than 1")
    return value


def percent(share: float) -> str:
    """Write a share in [0, 1] as ``53.3 %``."""
    return f"{100 * share:.1f} %"


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Return kind of module, its numbers as stars (``blocks.*.attn.qkv``) -> names, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return groups


def by_kind(title: str, modules: Mapping[str, Any], columns: Mapping[str, Callable[[list[Any]], Cell]]) -> Table:
    """Set modules of one kind in a line: the kind, how many there are, and what each column says of their figures."""
    lines = []
    for kind, names in grouped(modules).items():
        some = [modules[name] for name in names]
        lines.append([kind, len(some), *(say(some) for say in columns.values())])
    return Table(title, ["module", "count", *columns], lines)


def span(texts: Sequence[str]) -> str:
    """Write the first and last of ordered texts as ``3 to 9``, or the one where they agree."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def rank_text(rank: Any) -> str:
    """Write a rank: ``16``, and a pair as ``16x8``."""
    return "x".join(map(str, rank)) if isinstance(rank, list | tuple) else str(rank)


def rank_span(ranks: Iterable[Any]) -> str:
    """Write the smallest and the largest of several ranks: ``8 to 16``."""
    return span(
        [rank_text(rank) for rank in sorted(ranks, key=lambda rank: rank if isinstance(rank, list) else [rank])]
    )


def size_table(sizes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Set parameters, multiply-adds and bytes before and after side by side."""
    lines = []
    for name, write_number in (("parameters", count), ("macs", short), ("bytes", size)):
        before, after = sizes["before"][name], sizes["after"][name]
        share = percent(after / before) if before and after is not None else ""
        texts = ["" if value is None else write_number(value) for value in (before, after)]
        lines.append(["multiply-adds" if name == "macs" else name, *texts, share])
    return Table("size", ["", "before", "after", "kept"], lines)


def gate_size(report: Report, max_params: float | None, max_bytes: float | None) -> None:
    """Add the gates on the size of the result."""
    report.at_most("--max-params", max_params, report.data["size"]["after"]["parameters"])
    report.at_most("--max-bytes", max_bytes, report.data["size"]["after"]["bytes"])
