"""The page of what `import peftc` offers: made from signatures and docstrings."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import peftc
from peftc.docs.source.writing import arguments, page, prose, table

FIRST = """\
Every command is a function here, with the same words, order and defaults, and returns a `Report`. `import peftc` itself
imports nothing heavy; type checkers see every name. What `data` takes in Python stands in
[data](data.md#in-python), what `model` takes in [models](models.md#networks-in-memory)."""
GROUPS = {  # what one does with names -> these; the commands are the rest
    "Networks": ("load", "with_adapter"),
    "What comes back, what is named, what is refused": ("Report", "Source", "PeftcError"),
}
WIDTH = 100


def written() -> str:
    """Return the page."""
    others = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "Commands": tuple(name for name in sorted(peftc.__all__) if name not in others)}
    index = [f"- {title}: {', '.join(map(link, names))}" for title, names in groups.items()]
    parts = [each for names in groups.values() for name in names for each in entry(name, getattr(peftc, name))]
    return page(
        "it is made from the docstrings of `peftc.__all__`", "# The Python API", FIRST, "\n".join(index), *parts
    )


def heading(name: str) -> str:
    """Return the heading of a public name: `report` is a function, and `Report` a class."""
    return f"class peftc.{name}" if name[0].isupper() else f"peftc.{name}"


def link(name: str) -> str:
    """Return a link to what is said of a public name."""
    anchor = heading(name).lower().replace(".", "").replace(" ", "-")
    return f"[{name}](#{anchor})"


def entry(name: str, found: Any) -> Iterator[str]:
    """Yield what is said of a public name."""
    yield f"## {heading(name)}"
    signature = inspect.signature(found)
    yield f"```text\n{called(name, signature)}\n```"
    text = inspect.cleandoc(found.__doc__ or "")
    yield prose(re.split(r"\n\n(?:Args|Attributes|Raises):", text)[0])
    told = arguments(found) | arguments(found, "Attributes")
    taken = [each for each in signature.parameters.values() if each.name in told]
    yield table(
        ("parameter", "default", "what it is"), ([f"`{p.name}`", default(p), prose(told[p.name])] for p in taken)
    )
    if isinstance(found, type):
        properties = {key: each for key, each in vars(found).items() if isinstance(each, property) and key[0] != "_"}
        rows = ([f"`.{key}`", prose(inspect.cleandoc(each.__doc__ or ""))] for key, each in properties.items())
        yield table(("attribute", "what it is"), rows)
    raised = re.search(r"\n\nRaises:\n(.*)", text, re.S)
    if raised:
        lines = re.sub(r"\n        +", " ", raised[1])
        reasons = [line.strip().partition(": ") for line in lines.splitlines() if ": " in line]
        yield table(("raises", "when"), ([f"`{kind}`", prose(why)] for kind, _, why in reasons))


def called(name: str, signature: inspect.Signature) -> str:
    """Return a signature as it is written, a parameter a line where it is long."""
    given = []
    starred = False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            given.append("*")
            starred = True
        kind = "" if each.annotation is each.empty else f": {annotated(each.annotation)}"
        value = "" if each.default is each.empty else f" = {shown(each)}" if kind else f"={shown(each)}"
        given.append(f"{each.name}{kind}{value}")
    end = (
        ""
        if signature.return_annotation in (signature.empty, None)
        else f" -> {annotated(signature.return_annotation)}"
    )
    line = f"peftc.{name}({', '.join(given)}){end}"
    return line if len(line) <= WIDTH else f"peftc.{name}(\n" + "".join(f"    {each},\n" for each in given) + f"){end}"


def annotated(kind: Any) -> str:
    """Return an annotation as it is written."""
    if isinstance(kind, str):
        return kind
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(kind))


def shown(parameter: inspect.Parameter) -> str:
    """Return a default as it is written."""
    return "..." if "factory" in repr(parameter.default) else repr(parameter.default)


def default(parameter: inspect.Parameter) -> str:
    """Return a default as a cell, empty where a parameter has none."""
    return "" if parameter.default is parameter.empty else f"`{shown(parameter)}`"
