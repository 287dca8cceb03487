"""What a page shows of where things lie: names, as a page is passed on, and where they lie is nobody's business."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peftc.pages.records import Record
from peftc.store.manifest import Manifest

# an absolute path of two names or more within a text: no address of the web, no `a/b`, no share `1/2`
WITHIN = re.compile(r"(?<![\w.~/*)\]-])~?(?:/[^\s/`'\",;:?@()<>=|]+){2,}/?")
QUOTED = re.compile(r"(?<=`)~?/[^`]*(?=`)")  # with blanks in it
WHOLE = re.compile(r"(~?/[^\n]*?)([?@][^/\n]*)?")  # as data are named: with columns and a split after it


def hidden(records: Sequence[Record]) -> list[Record]:
    """Return records that say of every absolute path only its last name, also of the folders that were typed so."""
    names = _names([record.folder for record in records])
    return [
        replace(
            record,
            called=name,
            against=without_places(record.against),
            manifest=Manifest(**without_places(asdict(record.manifest))),
            result=without_places(record.result),
            about=without_places(record.about),
        )
        for record, name in zip(records, names, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return what folders are called: as they were typed; of an absolute path as many last names as tell them apart."""
    parts = max((len(folder.parts) for folder in folders), default=1)
    for kept in range(1, parts + 1):
        names = [str(Path(*each.parts[-kept:]) if each.is_absolute() else each) for each in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def without_places(value: Any) -> Any:
    """Return what a file said, with the last name in place of each absolute path; other paths stay as typed."""
    if isinstance(value, Mapping):
        return {without_places(name): without_places(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if found := WHOLE.fullmatch(value):
        return _last(found[1]) + (found[2] or "")
    return WITHIN.sub(lambda found: _last(found[0]), QUOTED.sub(lambda found: without_places(found[0]), value))


def _last(path: str) -> str:
    return Path(path).name or path
