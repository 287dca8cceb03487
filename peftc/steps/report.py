"""Artifacts > what their files say and what was measured of them > one page that needs nothing else: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftc.errors import OutputError
from peftc.pages import records
from peftc.pages.sections import page_of
from peftc.report import Report
from peftc.steps.compare import compare
from peftc.store import documents
from peftc.store.source import Source


def report(
    models: Sequence[str | Path | Source], *, output: str | Path = "report.html", analysis: str | Path | None = None
) -> Report:
    """Write a page that shows what was gained and lost, and how each artifact came to be.

    Args:
        models: artifact folders, in the order in which they are to stand.
        output: the file to write; one that is there is replaced.
        analysis: what `peftc analyze --json` printed of the base, for its rank spectra and its plan.

    Raises:
        ArtifactError: one of the models is no artifact.
        UsageError: none is named, or ``analysis`` is no report of `analyze`.
        OutputError: the file cannot be written.
    """
    file = Path(output)
    if file.is_dir() or not file.parent.is_dir():
        why = "it is a folder" if file.is_dir() else f"there is no folder `{file.parent}`"
        raise OutputError(f"cannot write `{file}`", why=why, hint="name a file: `-o report.html`")
    found = records.read(models)  # type: ignore[arg-type]
    analyzed = None if analysis is None else records.read_analysis(Path(analysis))
    rows = records.rows(found, analyzed)
    compared = compare(models, analysis=analysis)
    text = page_of(rows, found, analyzed, compared.notes)
    documents.write_whole(file, text)
    outcome = Report("report", {"file": str(file), "bytes": len(text.encode()), "models": compared.data["models"]})
    outcome.lines = [str(file)]
    outcome.notes += [note for note in compared.notes if note.startswith("no ")]
    return outcome
