"""Every way peftc refuses, drawn as a tree.

PeftcError                 exit 1: refused or failed for a stated reason
  SourceError              a model that cannot be found, built or trusted
  WeightError              a tensor that is missing, foreign, mis-shaped, NaN or infinite
  ArtifactError            a folder that is no artifact, is damaged, or belongs to another request
  PlanError                ranks and budgets that do not fit the model
  MethodError              a decomposition that failed at every rung of its ladder
  DataError                samples that cannot be read or do not fit the model
    ClassesError           classes that are not those of the model
    ShortError             a text with fewer tokens than one window has
  ChainError               a pipe or a project with nothing to hand on
  ExportError              a model that a format cannot hold, or an export that computes something else
  OutputError              a folder, or a repository of the hub, that cannot be written
    TakenError             a folder whose name somebody took while the work was done
  LostProcessError         another process of a launch, or one that reads samples ahead, that ended
  DivergenceError          a training whose loss is no number any more
  UsageError               exit 2: a value no run could accept, whatever the model
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


class PeftcError(Exception):
    """A refusal that says what happened, why, and what to type next.

    Args:
        what: one line with names and numbers, lower case, no full stop.
        why: the cause, when it is not in ``what``.
        hint: what to do, with the command or option to type.
        request: the id of the request that was refused because the folder holds another one.
    """

    exit_code = 1
    keeps_work = False  # whether what was done before it serves the same command again

    def __init__(
        self, what: str, *, why: str | None = None, hint: str | None = None, request: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.hint, self.request = what, why, hint, request

    def __str__(self) -> str:
        more = {"cause": self.why, "hint": self.hint}
        return "\n".join([self.what, *(f"  {word}: {text}" for word, text in more.items() if text)])


class SourceError(PeftcError):
    """A model cannot be found, built or trusted."""


class WeightError(PeftcError):
    """A tensor is missing, foreign, mis-shaped, NaN or infinite."""


class ArtifactError(PeftcError):
    """A folder is no artifact, is damaged, or belongs to another request."""


class PlanError(PeftcError):
    """Ranks or budgets do not fit the model."""


class MethodError(PeftcError):
    """A decomposition failed at every rung of its ladder."""


class DataError(PeftcError):
    """Samples cannot be read or do not fit the model."""


class ClassesError(DataError):
    """The classes of samples are not those of the model."""


class ShortError(DataError):
    """A text has fewer tokens than one window."""


class ChainError(PeftcError):
    """A pipe or a project has nothing to hand on."""


class ExportError(PeftcError):
    """A model cannot be written in a format, or what was written computes something else."""


class OutputError(PeftcError):
    """A folder, or a repository of the hub, cannot be written."""


class TakenError(OutputError):
    """What was computed cannot get its name, which somebody took in the meantime; the work is kept."""

    keeps_work = True


class LostProcessError(PeftcError):
    """Another process of the same launch, or one that reads samples ahead, ended."""

    keeps_work = True


class DivergenceError(PeftcError):
    """The loss of a training is NaN or infinite; its last checkpoint is kept."""

    keeps_work = True


class UsageError(PeftcError):
    """An option has a value that no run could accept."""

    exit_code = 2


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def told_as(kind: type[PeftcError], what: str, hint: str | None = None) -> Iterator[None]:
    """Refuse what a library raises inside, or its Rust code panics on, as a kind of error that says ``what``."""
    try:
        yield
    except (PeftcError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(what, why=reason_of(error), hint=hint) from error


def shown(name: object) -> str:
    r"""Return a name as people can read it and a terminal can print it: bytes that are no UTF-8 as `\xe9`."""
    text = str(name)
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes, as Python decodes those of file names, or half a character, as JSON can have it
        text = "".join(f"\\x{ord(each) - 0xDC00:02x}" if "\udc80" <= each <= "\udcff" else each for each in text)
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_not_utf8(what: str, name: object, kind: type[PeftcError] = UsageError) -> None:
    """Refuse a name that is not UTF-8: JSON, which records it, has no way to write it.

    Raises:
        PeftcError: of the kind, with the bytes escaped.
    """
    if shown(name) != str(name):
        why = "peftc records names in JSON, which holds UTF-8 alone"
        hint = "rename it, or reach it through a link with another name"
        raise kind(f"{what} `{shown(name)}` is not UTF-8", why=why, hint=hint)


NEAR = 0.76  # of what difflib calls the same, so that nothing is suggested where nothing is near


def meant(word: str, known: Collection[str]) -> list[str]:
    """Return the words among those known that were perhaps meant, often one, best first.

    They are written otherwise (`prune_layers`), begin so or have it as a part (`classification`), or have a few letters
    more, less, swapped or changed.
    """
    import difflib

    spelled = {_bare(each): each for each in known}
    bare = _bare(word)
    if bare in spelled:
        return [spelled[bare]]
    if len(bare) > 2:
        begun = [each for each in known if _bare(each).startswith(bare) or word.lower() in re.split("[-_]", each)]
        if begun:
            return begun[:3]
    swapped = [each for key, each in spelled.items() if sorted(key) == sorted(bare)]  # `rnak`, which difflib calls far
    return swapped[:1] or [spelled[each] for each in difflib.get_close_matches(bare, spelled, 1, NEAR)]


def _bare(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the word among those known that was perhaps meant."""
    return next(iter(meant(word, known)), None)


def nearest_path(name: str | Path) -> Path | None:
    """Return the path that was perhaps meant where there is none: one part of it is called nearly so; else None."""
    path = Path(name).expanduser()
    missing: list[str] = []
    try:
        while not path.exists():
            if path == path.parent:
                return None
            missing.insert(0, path.name)
            path = path.parent
        near = nearest(missing[0], [each.name for each in path.iterdir()]) if missing else None
    except (OSError, ValueError):  # a text that is no path, or a folder that may not be read
        return None
    found = path.joinpath(near, *missing[1:]) if near else None
    return found if found and found.exists() else None


def did_you_mean(name: str | Path, otherwise: str | None = None) -> str | None:
    """Return a hint for a path that is not there: the one that is nearly called so, or ``otherwise``."""
    near = nearest_path(name)
    return f"did you mean `{shown(near)}`?" if near else otherwise


def one_of(option: str, value: str, known: Collection[str]) -> None:
    """Refuse ``value`` unless it is one of ``known``, naming them and the nearest."""
    if value not in known:
        space = "" if option.endswith("=") else " "
        near = " or ".join(f"`{option}{space}{each}`" for each in meant(value, known)) or None
        why = f"it is one of {', '.join(f'`{name}`' for name in known)}"
        hint = near and f"did you mean {near}?"
        raise UsageError(f"unknown value `{value}` for `{option}`", why=why, hint=hint)


def named(names: list[str], most: int = 5) -> str:
    """Write up to ``most`` names in backticks, and how many more there are."""
    text = ", ".join(f"`{name if len(name) < 100 else name[:97] + '...'}`" for name in map(shown, names[:most]))
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
