"""The only printer: data on stdout, everything for people on stderr."""

import json as json_module
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftc import progress
from peftc.cli import layout
from peftc.errors import shown
from peftc.report import GUESSED, Cell, Gate, Report, Table, figure
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


def _wrapped(text: str) -> str:
    columns = width()
    if columns is None or len(text) <= columns:
        return text
    return textwrap.fill(text, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


# reports


def report(outcome: Report, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Print a report: for people on stderr, then the path or the JSON object on stdout."""
    tell(outcome, quiet=quiet, verbose=verbose)
    deliver(outcome, json=json)


def tell(outcome: Report, *, quiet: bool = False, verbose: bool = False) -> None:
    """Print what a report has for people, with ``verbose`` its details as well."""
    if not quiet:
        for table in [*outcome.tables, *(outcome.details if verbose else [])]:
            say("\n".join([*table_lines(table, width()), ""]))
    for text in outcome.notes:
        if not quiet or text.startswith(GUESSED):
            note(text)
    for text in outcome.warnings:
        warn(text)
    for gate in outcome.gates:
        if not (quiet and gate.passed):
            say(gate_text(gate))


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
    measured = "not measured" if gate.value is None else _cell(gate.value)
    verdict = "met" if gate.passed else _styled("not met", RED)
    option = "--" + gate.option.lstrip("-").replace("_", "-")
    return f"gate {option} {_cell(gate.limit)}: {measured}, {verdict}"


def table_lines(table: Table, columns: int | None = None) -> list[str]:
    """Lay a table out in at most ``columns``, under its title."""
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    title = [_styled(table.title, BOLD)] if table.title else []
    return [*title, *layout.laid_out(list(zip(table.columns, *rows, strict=True)), columns)]


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return figure(cell)
    return f"{cell:,}" if isinstance(cell, int) else cell


# surroundings


def setup(*, quiet: bool = False, verbose: int = 0) -> None:
    """Send progress and logs where the user wants them, and keep other libraries from drawing on stderr."""
    import logging

    bars = _is_terminal() and not quiet
    progress.set_sink(_Bars().track if bars else None)
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
        task = display.add_task(title, total=total, detail="")

        def advance(detail: str = "") -> None:
            display.update(task, advance=1, detail=detail)

        try:
            yield advance
        finally:
            display.remove_task(task)
            if not display.tasks:
                display.stop()
                self.display = None


def _display() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    middle = [] if (width() or 80) < 60 else [BarColumn(20), TimeRemainingColumn(compact=True)]
    text, detail = (TextColumn(each, markup=False) for each in ("{task.description}", "{task.fields[detail]}"))
    return Progress(text, *middle, MofNCompleteColumn(), detail, console=Console(stderr=True), transient=True)
