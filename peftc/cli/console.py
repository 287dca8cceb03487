"""The only printer: data on stdout, everything for people on stderr."""

import itertools
import json as json_module
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peftc import progress
from peftc.cli import layout
from peftc.errors import shown
from peftc.report import GUESSED, LOUD, Gate, Report, Table, cell_text
from peftc.store.documents import escaped

ASCII = str.maketrans(
    dict(zip("–×·²─", "-x.2-", strict=True)) | {"…": "...", "—": "--", "±": "+-", "→": "->", "≤": "<=", "≥": ">="}
)
BOLD, RED, YELLOW = "1", "31", "33"
OURS = re.compile(r"\x1b\[(?:0|1|31|33)m")


# writing


def out(text: str) -> None:
    """Write data to stdout; a reader that has gone away is no error."""
    if sys.stdout is None:
        return
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # a path is bytes, whatever the terminal speaks
            sys.stdout.buffer.write(_bytes(text))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  the interpreter flushes stdout once more at its end


def _bytes(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # no name of a file
        return shown(text).encode()


def say(text: str = "") -> None:
    """Write a line to stderr in whatever characters it takes; a stderr that is closed or full is no error."""
    if sys.stderr is None:
        return
    encoding, text = sys.stderr.encoding or "ascii", _harmless(shown(text))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _harmless(text: str) -> str:
    """Write control characters as escapes: all but our own colours came from a file, or from who named it."""
    parts = [escaped(part) for part in OURS.split(text)]
    return "".join(part + code for part, code in zip(parts, [*OURS.findall(text), ""], strict=True))


def error(text: str) -> None:
    """Say why nothing more will happen; ``cause:`` and ``hint:`` lines follow the first."""
    say(f"{_styled('error:', RED)} {text}")


def warn(text: str) -> None:
    """Say what was not done, or not as asked."""
    say(_wrapped(f"{_styled('warning:', YELLOW)} {text}"))


def note(text: str) -> None:
    """Say something that is no problem."""
    say(_wrapped(text))


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _styled(text: str, code: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not _is_terminal()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def title(text: str) -> str:
    """Return a heading for stdout, bold where that is a terminal."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or sys.stdout is None
    return text if plain or not sys.stdout.isatty() else f"\x1b[{BOLD}m{text}\x1b[0m"


def width(*, of_stdout: bool = False) -> int | None:
    """Return the columns of stderr, or of stdout; None where there is no end to a line."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    stream = sys.stdout if of_stdout else sys.stderr
    try:
        return (os.get_terminal_size(stream.fileno()).columns or None) if stream and stream.isatty() else None
    except (OSError, ValueError):
        return None


def _wrapped(text: str, indent: int = 2) -> str:
    columns = width()
    if columns is None or len(text) <= columns:
        return text
    words: Any = {"break_long_words": False, "break_on_hyphens": False}
    first, rest = (text[:indent], text[indent:]) if indent > 2 else ("", text)
    return textwrap.fill(rest, columns, initial_indent=first, subsequent_indent=" " * indent, **words)


# reports


def report(outcome: Report, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Print a report: for people on stderr, then the path or the JSON object on stdout."""
    tell(outcome, quiet=quiet, verbose=verbose)
    deliver(outcome, json=json)


def tell(outcome: Report, *, quiet: bool = False, verbose: bool = False) -> None:
    """Print what a report has for people: where it has a summary that, and all of it and its details if ``verbose``."""
    brief = bool(outcome.summary) and not verbose
    if not quiet:
        shown = (
            [*outcome.tables, *outcome.details]
            if verbose
            else [each for each in outcome.tables if each.main or not brief]
        )
        for table in shown:
            say("\n".join([*table_lines(table, width()), ""]))
        tell_summary(outcome.summary)
    for text in dict.fromkeys(outcome.notes):
        if text.startswith(GUESSED if quiet else LOUD if brief else "") and text not in outcome.told:
            note(text)
    for text in outcome.warnings:
        warn(text)
    for gate in outcome.gates:
        if not (quiet and gate.passed):
            say(gate_text(gate))


def tell_summary(summary: Mapping[str, str]) -> None:
    """Print a line of each word; what to do next is not said to a program that reads the output."""
    shown = {word: text for word, text in summary.items() if word != "next" or _is_read_by_people()}
    indent = max(map(len, shown), default=0) + 2
    for word, text in shown.items():
        line = f"{word.ljust(indent)}{text}"
        say(line if text.startswith("`peftc ") else _wrapped(line, indent))  # what is typed stays whole, to be copied


def _is_read_by_people() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def deliver(outcome: Report, *, json: bool = False) -> None:
    """Print what a report has for the program that reads on."""
    if json:
        out(json_module.dumps(outcome.to_json(), indent=2, allow_nan=False) + "\n")
    elif outcome.lines:
        out("".join(f"{line}\n" for line in outcome.lines))
    elif outcome.artifact is not None:
        out(f"{outcome.artifact}\n")


def gate_text(gate: Gate) -> str:
    """Return a gate and whether it was met, on one line."""
    told = gate.told()
    return told if gate.passed else told.removesuffix("not met") + _styled("not met", RED)


def table_lines(table: Table, columns: int | None = None) -> list[str]:
    """Lay a table out in at most ``columns``, under its title."""
    rows = [[cell_text(cell) for cell in row] for row in table.rows]
    title = [_styled(line, BOLD) for line in textwrap.wrap(table.title, columns or len(table.title) + 1)]
    return [*title, *layout.laid_out(list(zip(table.columns, *rows, strict=True)), columns)]


# surroundings


def setup(*, quiet: bool = False, verbose: int = 0) -> None:
    """Send progress and logs where the user wants them, and keep other libraries from drawing on stderr."""
    import logging

    bars = _is_terminal() and not quiet
    ours = _Bars()
    progress.set_sink(ours.track if bars else None if quiet else _Lines().track, ours.aside)
    if bars:
        os.register_at_fork(after_in_child=_own_streams)
    root = logging.getLogger()
    if not root.handlers:  # none of ours yet, and no other program's either
        logging.basicConfig(format="%(levelname)s: %(message)s")
    root.setLevel(logging.INFO if verbose > 1 else logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("peftc").setLevel(logging.DEBUG if verbose > 1 else logging.INFO if verbose else root.level)
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if verbose < 2:
        environment |= {
            "TRANSFORMERS_VERBOSITY": "error",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "DATASETS_VERBOSITY": "error",
        }
    if not bars:
        bars_of = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
        environment |= dict.fromkeys(bars_of, "1")
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _own_streams() -> None:
    """Let a forked process write past the display, which another thread may have been drawing at that moment."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


EVERY = 60.0  # seconds between two lines about progress where there is no terminal
AT_ONCE = 0.5  # seconds: parts that are done so soon were done before, as those of a training that goes on


class _Lines:
    """A line from time to time, of whatever moves on then: for the log of a job that nobody watches."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    @contextmanager
    def track(self, title: str, total: int | None) -> Iterator[progress.Advance]:
        """Say how far one work is, while it lasts."""
        began = at = time.monotonic()
        number = before = 0

        def advance(detail: str = "") -> None:
            nonlocal at, number, before
            number, now = number + 1, time.monotonic()
            if now - began < AT_ONCE:
                at, before = now, number
            if now - self.last < EVERY:
                return
            parts = f"{number:,}" if total is None else f"{number:,} of {total:,}"
            if total is not None and number > before:
                parts += f", about {_long((now - at) / (number - before) * (total - number))} left"
            self.last = at = now
            before = number
            say(": ".join(filter(None, (title, parts, detail))))

        yield advance


def _long(seconds: float) -> str:
    minutes = round(max(seconds, 0) / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "1 min"


class _Bars:
    """One display, which nested bars share."""

    def __init__(self) -> None:
        self.display: Any = None

    @contextmanager
    def track(self, title: str, total: int | None) -> Iterator[progress.Advance]:
        """Show one bar while the work lasts."""
        if self.display is None:
            self.display = _display()
            self.display.start()
        display = self.display
        self._show_spinners(False)  # what goes on inside says more
        task = display.add_task(title, total=total, detail="", parts="" if total is None else f"0/{total}")
        done = itertools.count(1)

        def advance(detail: str = "") -> None:
            number = next(done)
            display.update(task, advance=1, detail=detail, parts="" if total is None else f"{number}/{total}")

        try:
            yield advance
        finally:
            display.remove_task(task)
            self._show_spinners(True)
            if not display.tasks:
                display.stop()
                self.display = None

    def _show_spinners(self, visible: bool) -> None:
        """Show the innermost work, where its end is unknown, or hide all such work."""
        spinners = [task.id for task in self.display.tasks if task.total is None]
        last = [task.id for task in self.display.tasks[-1:]]
        for task in spinners:
            self.display.update(task, visible=visible and task in last)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the display off the terminal for a while."""
        display = self.display
        if display is None:
            yield
            return
        display.stop()
        try:
            yield
        finally:
            display.start()


def _display() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class Clock(TimeRemainingColumn):
        """What is left, and of work whose end nobody knows how long it has taken."""

        def render(self, task: Any) -> Any:
            return super().render(task) if task.total is not None else TimeElapsedColumn().render(task)

    narrow = (width() or 80) < 60
    middle = [Clock()] if narrow else [BarColumn(20), Clock(compact=True)]
    words = ("{task.description}", "{task.fields[parts]}", "{task.fields[detail]}")
    text, parts, detail = (TextColumn(each, markup=False) for each in words)
    return Progress(
        SpinnerColumn(),
        text,
        *middle,
        parts,
        detail,
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
