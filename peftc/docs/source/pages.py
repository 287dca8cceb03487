"""Write the pages of peftc/docs that say what commands and methods are: `make docs`.

What is declared elsewhere is taken from there: options with their defaults, the keys of JSON, papers and settings of
methods. Prose and examples stand in `commands.md` and `methods.md` beside this file; other pages are written by hand.
Wheels hold the pages and leave this folder out.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer.main

from peftc.cli import app as program
from peftc.cli import help
from peftc.docs.source import api, results
from peftc.docs.source.writing import PROSE, arguments, page, prose, table
from peftc.methods import registry
from peftc.steps.methods import KINDS, page_of

WRITTEN = Path(__file__).parent
DOCS = WRITTEN.parent
PROGRAM: Any = typer.main.get_command(program.app)
COMMANDS: dict[str, Any] = dict(PROGRAM.commands)
FUNCTIONS = {word: command.callback for word, command in COMMANDS.items()}
SCHEMA = json.loads((DOCS.parent / "report.schema.json").read_text(encoding="utf-8"))

LINKS = dict(zip(help.SHARED, ("how a MODEL is built", "where it is pushed", "what is printed"), strict=True))
SHARED = dict(
    zip(
        help.SHARED,
        (
            "For every command that takes one MODEL; see [what MODEL takes](models.md).",
            "For every command that writes an artifact or an export; see [hubs](hub.md).",
            "",
        ),
        strict=True,
    )
)
GUIDES = {
    "glossary.md": "What these pages call things, a line each",
    "models.md": "What MODEL takes: folders, timm, transformers, a network of your own",
    "data.md": "What --data takes, splits, tasks and metrics",
    "artifact.md": "The folder that is written, and what is promised of it",
    "trust.md": "What runs when, what is compared when, and what a stranger's folder can do",
    "hub.md": "What goes to a hub and comes from one, and the card",
    "automation.md": "Pipes, projects, gates, exit codes, JSON, and completion in your shell",
    "scale.md": "Models larger than memory, and several processes",
    "extending.md": "A method of your own",
    "versions.md": "Which versions of Python, torch and transformers the tests have passed with",
    "api.md": "Every function and class of `import peftc`, with parameters and defaults",
    "results.md": "What to expect on which kind of model: size, speed and quality, as measured",
    "loading.md": "What else loads what peftc writes: transformers, sentence-transformers, vLLM, timm, lm-eval",
    "migration.md": "Coming from Torch-Pruning, SVD-LLM, peft, mergekit, AIMET or Olive",
}
VERSIONS = """\
peftc should work with every version that its `pyproject.toml` admits. `make matrix` runs the tests with three sets of
them, each in a virtual environment of its own, and this page tells what it saw.

- `lowest`: every library in the lowest version that is admitted. What these need in turn is as new as they allow.
- `between`: versions about half-way.
- `newest`: all as new as it was that day. What a library has deprecated is an error here; elsewhere it is shown."""


def sections(file: str) -> dict[str, str]:
    """Return heading -> what stands under it, of a file beside this one."""
    found: dict[str, list[str]] = {}
    inside, fenced = "", False
    for line in (WRITTEN / file).read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            inside = line[3:]
            assert inside not in found, f"`{inside}` stands twice in {file}"
            found[inside] = []
        elif inside:  # what stands above the first heading is for those who write
            found[inside].append(line[1:] if line.startswith("###") and not fenced else line)
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


def titled(heading: str) -> str:
    """Return a heading as it begins a section."""
    return heading[0].upper() + heading[1:]


# commands


def said(word: str) -> list[str]:
    """Return the paragraphs of a command's help, without the example."""
    text = inspect.cleandoc(FUNCTIONS[word].__doc__ or "").split("\b")[0]
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]


def option_row(param: Any) -> list[str]:
    """Return how an option is typed, what it does, and its default."""
    names, value, default = help.typed(param)
    spelled = ", ".join(f"`{each}`" for each in names or [value])
    return [spelled + (f" `{value}`" if names and value else ""), param.help or "", f"`{default}`" if default else ""]


def option_tables(word: str) -> str:
    """Return the options of a command alone, under the headings that they are declared under."""
    found = help.sections(COMMANDS[word])
    own = {heading: params for heading, params in found.items() if heading not in help.SHARED}
    parts = []
    for heading, params in own.items():
        parts += [f"### {titled(heading)}"] if len(own) > 1 else []
        parts.append(table(("option", "what it does", "default"), map(option_row, params)))
    shared = [LINKS[heading] for heading in found if heading in help.SHARED]
    if shared:
        parts.append(f"And the [options of every command](../options.md): {' and '.join(shared)}.")
    return "\n\n".join(parts)


def keys(word: str) -> str:
    """Return what stands in the JSON object of a command alone."""
    own = SCHEMA["$defs"][word]["properties"]
    rows = [[f"`{name}`", about(entry)] for name, entry in own.items() if name not in SCHEMA["properties"]]
    return table(("key", "what it holds"), rows)


def about(entry: Mapping[str, Any]) -> str:
    """Return what the schema says of a key, or of what it refers to."""
    if "description" not in entry and "$ref" in entry:
        entry = SCHEMA["$defs"][entry["$ref"].rpartition("/")[2]]
    return str(entry.get("description", ""))


def function_of(word: str) -> str:
    """Return how a command is called from Python."""
    name = word.replace("-", "_")
    same = "the same words in the same order, with the same defaults"
    return f"In Python [`peftc.{name}`](../api.md#peftc{name}) takes {same}, and returns a report."


def command_page(word: str, written: Mapping[str, str]) -> str:
    """Return the page of a command."""
    first, *more = said(word)
    json_ = (
        f"## JSON\n\nWith `--json` you get, beside the [keys of every command](../automation.md#json):\n\n{keys(word)}"
    )
    return page(
        PROSE.format("commands"),
        f"# peftc {word}",
        first,
        *more,
        written[word],
        "## Options",
        option_tables(word),
        function_of(word),
        json_ if keys(word) else "",
    )


def options_page() -> str:
    """Return the page of the options that commands share."""
    found = help.sections(COMMANDS["decompose"])
    parts = []
    for heading, text in SHARED.items():
        rows = map(option_row, found[heading])
        parts += [f"## {titled(heading)}", text, table(("option", "what it does", "default"), rows)]
    first = "Underscores do where a dash stands, and `--help` lists them too."
    return page(PROSE.format("commands"), "# Options of every command", first, *parts)


# methods


def method_page(kind: str, name: str, written: Mapping[str, str]) -> str:
    """Return the page of a method."""
    _, command, typed = KINDS[kind]
    function, word = (
        registry.find(kind, name, kind),
        name.replace("_", "-") if kind in ("importance", "format") else name,
    )
    told = arguments(function)
    first, _, rest = prose(inspect.cleandoc(sys.modules[function.__module__].__doc__ or "")).partition("\n\n")
    settings = table(
        ("setting", "default", "what it is"),
        (
            [f"`{key}`", f"`{registry.literal(value)}`", prose(told.get(key, ""))]
            for key, value in registry.settings_of(function).items()
        ),
    )
    how = f"Each is `--set {f'{word}.' if kind == 'loss' else ''}KEY=VALUE`."
    if kind == "decompose_conv":  # `--set` is for the method of the matrices
        how = "They are what they are: no option sets them."
    needs = registry.needs_of(function) if kind in ("decompose", "importance") else []
    reads = table(("statistic", "what it is"), ([f"`{need}`", prose(told.get(need, ""))] for need in needs))
    recipe = " and ".join(f"`--{key.replace('_', '-')} {value}`" for key, value in registry.recipe_of(function).items())
    taken = f"`peftc {command} {typed.format(word)}`, of [peftc {command}](../../commands/{command}.md)."
    return page(
        PROSE.format("methods"),
        f"# {word}",
        first,
        taken,
        written[f"{kind}/{name}"],
        f"It trains with {recipe} unless you say otherwise." if kind == "adapter" else "",
        f"## Settings\n\n{how}\n\n{settings}" if settings else "It has no settings.",
        f"## How it works\n\n{rest}" if rest else "",
        f"## What it reads\n\nCollected as the samples go through the model.\n\n{reads}" if reads else "",
    )


# versions


def versions_page() -> str:
    """Return the page of the versions that `make matrix` saw, with what became of the tests."""
    seen = json.loads((WRITTEN / "versions.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(name for row in seen.values() for name in row["versions"])
    rows = [[name, *(row["versions"].get(name, "") for row in seen.values())] for name in names]
    rows.append(["tests passed", *(f"{row['passed']:,}" for row in seen.values())])
    rows.append(["tests failed", *(f"{row['failed']:,}" for row in seen.values())])
    rows.append(["seen on", *(row["date"] for row in seen.values())])
    rows.append(["system", *(row["system"] for row in seen.values())])
    note = "<!-- `make matrix` writes this page, from peftc/docs/source/versions.json -->"
    return f"{note}\n\n# Versions\n\n{VERSIONS}\n\n{table(('', *seen), rows)}\n"


# loading


def loading_page() -> str:
    """Return the page on loading, with the rows that the tests run."""
    rows = json.loads((DOCS.parents[1] / "tests/runtimes/loads.json").read_text(encoding="utf-8"))
    there = (DOCS / "loading.md").read_text(encoding="utf-8")
    start, end = re.findall(r"^<!-- .*rows.* -->$", there, re.M)
    before, after = there.split(start)[0], there.split(end)[1]
    cells = []
    for row in rows:
        imports = f"`import {row['imports']}`: " if row["imports"] else ""
        since = f" {row['since']} and later" if row["since"] else ""
        cells.append([row["what"], row["by"] + since, f"{imports}`{row['line']}`"])
    return f"{before}{start}\n\n{table(('what', 'is loaded by', 'with'), cells)}\n\n{end}{after}"


# the index


def first_sentence(kind: str, name: str) -> str:
    """Return what a method is, in a line."""
    return prose(str(registry.described(kind, name)["source"]))


def index_page() -> str:
    """Return the index of all pages."""
    commands = []
    for heading, words in program.GROUPS.items():
        rows = ([f"[{word}](commands/{word}.md)", said(word)[0]] for word in words.replace("_", "-").split())
        commands.append(f"### {titled(heading)}\n\n{table(('command', 'what it does'), rows)}")
    guides = table(("page", "what it says"), ([f"[{file[:-3]}]({file})", text] for file, text in GUIDES.items()))
    parts = []
    for kind, (heading, command, typed) in KINDS.items():
        rows = (
            [f"[{name.replace('_', '-')}]({page_of(kind, name)})", first_sentence(kind, name)]
            for name in registry.METHODS[kind]
        )
        parts.append(
            f"### {heading}\n\n`peftc {command} {typed.format('NAME')}`\n\n{table(('name', 'what it is'), rows)}"
        )
    return page(
        PROSE.format("commands"),
        "# The pages of peftc",
        sections("commands.md")["index"],
        "## Guides",
        guides,
        "## Commands",
        *commands,
        "## Methods",
        *parts,
    )


def pages() -> dict[str, str]:
    """Return every page that is written here, by its path under peftc/docs."""
    of_commands, of_methods = sections("commands.md"), sections("methods.md")
    found = {"README.md": index_page(), "options.md": options_page(), "versions.md": versions_page()}
    found |= {"api.md": api.written(), "results.md": results.written()}
    found["loading.md"] = loading_page()
    found |= {f"commands/{word}.md": command_page(word, of_commands) for word in COMMANDS}
    for kind, names in registry.METHODS.items():
        found |= {page_of(kind, name): method_page(kind, name, of_methods) for name in names}
    unknown = of_commands.keys() - COMMANDS.keys() - {"index"}
    unknown |= of_methods.keys() - {f"{kind}/{name}" for kind, names in registry.METHODS.items() for name in names}
    assert not unknown, f"there are no such commands or methods: {sorted(unknown)}"
    return found


def there() -> dict[str, str]:
    """Return every page that is there, by its path under peftc/docs."""
    paths = sorted(path for path in DOCS.rglob("*.md") if WRITTEN not in path.parents)
    return {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def main() -> None:
    """Write the pages, and take away those of commands and methods that are gone."""
    found = pages()
    for name in there().keys() - found.keys() - GUIDES.keys():
        (DOCS / name).unlink()
    for name, text in found.items():
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
