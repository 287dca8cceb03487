"""Artifacts > what their files say and what was measured of them > one page that needs nothing else: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftc.errors import OutputError
from peftc.pages import places, records
from peftc.pages.analysis import plan_text, read_analysis
from peftc.pages.sections import page_of
from peftc.pages.tables import MISSING
from peftc.report import Report
from peftc.steps import compare
from peftc.store import documents
from peftc.store.source import Source


def report(
    models: Sequence[str | Path | Source], *, output: str | Path = "report.html", analysis: str | Path | None = None
) -> Report:
    """Write a page that shows what was gained and lost, and how each artifact came to be.

    Args:
        models: folders of artifacts and exports, in the order in which they are to stand; the verdict is on the end of
            the chain, in whatever order.
        output: the file to write; one that is there is replaced.
        analysis: what `peftc analyze --json` printed of the base, for its rank spectra and its plan.

    Raises:
        ArtifactError: one of the models is neither.
        UsageError: none is named, or ``analysis`` is no report of `analyze`.
        OutputError: the file cannot be written, or is named as another kind of file.
    """
    file = Path(output)
    problems = {  # a page replaces no file of an artifact
        "it is a folder": file.is_dir(),
        f"there is no folder `{file.parent}`": not file.parent.is_dir(),
        "the report is HTML": file.suffix.lower() not in (".html", ".htm"),
    }
    for why, is_so in problems.items():
        if is_so:
            raise OutputError(f"cannot write `{file}`", why=why, hint="name a file: `-o report.html`")
    found = records.read(models)  # type: ignore[arg-type]
    analyzed = None if analysis is None else read_analysis(Path(analysis))
    compared = compare.compared(found, records.rows(found), analyzed)
    shown, planned = places.hidden(found), places.without_places(analyzed)
    rows = records.rows(shown)
    said = compare.compared(shown, rows, planned).notes[1:]  # without the verdict and the plan, which stand apart
    notes = [note for note in said if planned is None or note != plan_text(planned)]
    text = page_of(rows, shown, planned, notes)
    documents.write_whole(file, text)
    outcome = Report("report", {"file": str(file), "bytes": len(text.encode()), **compared.data})
    outcome.lines = [str(file)]
    outcome.notes += [note for note in compared.notes if note.startswith(MISSING)]
    return outcome
