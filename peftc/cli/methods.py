"""peftc methods."""

from typing import Annotated, Any

from typer import Argument

from peftc.cli import console
from peftc.cli import options as o
from peftc.errors import one_of

KINDS = {"finetune": "adapter", "distill": "loss", "prune-layers": "importance", "export": "format"}
Kind = Annotated[str | None, Argument(metavar="[KIND]", help="one kind of method (default: all)")]


def methods(kind: Kind = None, json: o.Json = False) -> None:
    """List methods, losses, scores and formats to choose from.

    With one kind, also the defaults of their settings, and where they come from.

    \b
    Example:
      peftc methods finetune
    """
    found = known()
    if kind is not None:
        kind = KINDS.get(kind, kind.replace("-", "_"))
        one_of("KIND", kind, list(found))
    chosen = {word: names for word, names in found.items() if kind in (None, word)}
    if json:
        from peftc.report import Report

        details = {word: {name: details_of(word, name) for name in names} for word, names in chosen.items()}
        console.report(Report("methods", data={"methods": chosen, "details": details}), json=True)
    else:
        lines = (_line(word, name) if kind else f"{word} {name}" for word, names in chosen.items() for name in names)
        console.out("".join(f"{line}\n" for line in lines))


def _line(kind: str, name: str) -> str:
    found = details_of(kind, name)
    settings = " ".join(f"{key}={value}" for key, value in {**found["settings"], **found["recipe"]}.items())
    return "\t".join(filter(None, (name, settings, found["source"])))


def details_of(kind: str, name: str) -> dict[str, Any]:
    """Return what a method is; of another package's, nothing is known before it is imported."""
    from peftc.methods import METHODS, described

    return described(kind, name) if name in METHODS[kind] else {"source": "", "settings": {}, "recipe": {}}


def known() -> dict[str, dict[str, str]]:
    """Return every method by kind and name with the module it lives in, those of other packages included."""
    from peftc.methods import METHODS, home, outsiders

    return {
        kind: {
            **{name: home(kind, name) for name in own},
            **{name: point.value for name, point in outsiders(kind).items() if name not in own},
        }
        for kind, own in METHODS.items()
    }
