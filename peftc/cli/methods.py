"""peftc methods."""

from typing import Annotated

from typer import Argument

from peftc.cli import console
from peftc.cli import options as o
from peftc.errors import one_of

Kind = Annotated[str | None, Argument(metavar="[KIND]", help="one kind of method (default: all)")]


def methods(kind: Kind = None, json: o.Json = False) -> None:
    """List the methods that `--method`, `--conv-method` and `--loss` accept.

    \b
    Example:
      peftc methods decompose
    """
    found = known()
    if kind is not None:
        kind = kind.replace("-", "_")
        one_of("KIND", kind, list(found))
    chosen = {word: names for word, names in found.items() if kind in (None, word)}
    if json:
        from peftc.report import Report

        console.report(Report("methods", data={"methods": chosen}), json=True)
    else:
        lines = (name if kind else f"{word} {name}" for word, names in chosen.items() for name in names)
        console.out("".join(f"{line}\n" for line in lines))


def known() -> dict[str, dict[str, str]]:
    """Return every method by kind and name with the module it lives in, those of other packages included."""
    from peftc.methods import METHODS, outsiders

    others = {kind: {name: point.value for name, point in outsiders(kind).items()} for kind in METHODS}
    return {
        kind: {**own, **{name: value for name, value in others[kind].items() if name not in own}}
        for kind, own in METHODS.items()
    }
