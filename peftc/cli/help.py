"""What `--help` prints: options under the headings of the pages, commands by what one does with them.

Headings are those of the groups in `peftc.options`, and the comments that options stand under in `peftc.cli.options`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from typer.core import TyperCommand

from peftc.cli import console, options

FIRST = "what it reads and writes"  # the heading of options that are declared nowhere else
HARD = "\xa0"  # a space at which no line ends
SHARED = {  # of the options that every command of a kind has
    "how a MODEL is built": options.SOURCE,
    "where it is pushed": options.PUSH,
    "what is read first, and what is printed": options.OUTPUT,
}
COLUMN = 28  # characters of the longest option beside which an explanation stands
LEAST = 40  # columns that an explanation takes; where fewer are left it stands below its option


class Grouped(TyperCommand):
    """A command whose help lists its options by headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options."""
        found = {heading: [*map(_line, params)] for heading, params in sections(self).items()}
        found[[*found][-1]].append(last(ctx))
        write(formatter, found)


def last(ctx: Any) -> tuple[str, str]:
    """Return the option of the help itself, and what it does."""
    return ", ".join(ctx.help_option_names), "print this"


def write(formatter: Any, found: Mapping[str, Iterable[tuple[str, str]]]) -> None:
    """Write lists of what can be typed and what it does, each under its heading, all of them aligned."""
    lists = {heading: list(lines) for heading, lines in found.items()}
    column = 4 + max(len(name) for lines in lists.values() for name, _ in lines if len(name) <= COLUMN)
    is_beside = formatter.width - column >= LEAST
    for heading, lines in lists.items():
        formatter.write(f"\n{console.title(_headed(heading))}\n")
        for name, text in lines:
            start = column if is_beside else 6
            formatter.write("\n".join(_laid_out(name, text, start, formatter.width)) + "\n")


def _headed(heading: str) -> str:
    return f"{heading[0].upper()}{heading[1:]}" + ("" if ":" in heading else ":")


def _laid_out(name: str, text: str, start: int, width: int) -> Iterator[str]:
    """Yield what can be typed, with what it does beside it where there is room; a default stays on one line."""
    whole = re.sub(r"\[.*\]$", lambda found: found[0].replace(" ", HARD), text)
    lines = [line.replace(HARD, " ") for line in textwrap.wrap(whole, width - start, break_on_hyphens=False)]
    first = lines.pop(0) if lines and len(name) + 4 <= start else ""
    yield f"  {name:<{start - 2}}{first}".rstrip()
    yield from (f"{'':{start}}{line}" for line in lines)


def _line(param: Any) -> tuple[str, str]:
    names, value, default = typed(param)
    if param.param_type_name == "argument":
        return value, param.help or ""
    default = "required" if param.required else default and f"default: {default}"
    return f"{', '.join(names)} {value}".strip(), f"{param.help or ''}  [{default}]" if default else param.help or ""


def typed(param: Any) -> tuple[list[str], str, str]:
    """Return the names of an option, what stands for its value, and its default; empty where there is none."""
    if param.param_type_name == "argument":
        return [], str(param.metavar or param.human_readable_name), ""
    value = "" if param.is_flag or param.count else str(param.metavar)
    none = param.default is None or param.default is False or param.default in ((), []) or param.count
    default = "" if none else str(param.default)
    if param.is_flag and param.secondary_opts:
        default = {True: param.opts[0], False: param.secondary_opts[0]}.get(param.default, "")
    return [*param.opts, *param.secondary_opts], value, default


def sections(command: Any) -> dict[str, list[Any]]:
    """Return the options of a command under their headings, those that it shares with others last."""
    params = {param.name: param for param in command.params}
    shared = {name: heading for heading, group in SHARED.items() for name in group}
    known = _declared()
    found: dict[str, list[Any]] = {}
    for name, parameter in inspect.signature(inspect.unwrap(command.callback), eval_str=True).parameters.items():
        group = options.of_group(parameter.annotation)
        if group is not None:
            kind, *_ = get_args(parameter.annotation) or (parameter.annotation,)
            found.setdefault(kind.HEADING, []).extend(params[each] for each in group)
        elif name in params and name not in shared:
            found.setdefault(known.get(id(parameter.annotation), FIRST), []).append(params[name])
    for heading, group in SHARED.items():
        some = [params[name] for name in group if name in params]
        found |= {heading: some} if some else {}
    return found


def _declared() -> dict[int, str]:
    """Return the heading of every declared option, by the identity of its declaration."""
    heading, found = FIRST, {}
    for line in Path(options.__file__).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            heading = line[2:]
        elif name := re.match(r"(\w+)(?:: Any)? = (?:Annotated|\()", line):
            found[id(getattr(options, name[1]))] = heading
    return found
