"""The values that a project file and `PEFTC_` variables give to options, as if they had been typed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer import Context

from peftc.errors import UsageError
from peftc.project import config


def configure(ctx: Context, file: Path | None) -> None:
    """Read the project before any other option, so that it sets their defaults."""
    group: Any = ctx.parent.command if ctx.parent else None
    if group is None or ctx.resilient_parsing:
        return
    project = ctx.obj or config.load(str(ctx.info_name), known(group), file)  # a recipe has read its own already
    ctx.obj = project
    params = {param.name: param for param in ctx.command.params}
    ctx.default_map = {name: _typed(project, params[name], value) for name, value in project.defaults.items()}


def _typed(project: config.Project, param: Any, value: Any) -> Any:
    """Return a value of a file or a variable as it would be typed, several for a repeated option; refuse any other."""
    repeated, pairs = getattr(param, "multiple", False), param.opts[0] in PAIRS
    found = _texts(value, pairs=pairs) if repeated else _text(value)
    if found is None:
        takes = "a list of texts" if repeated else "one value"
        what = f"`{param.opts[0].lstrip('-')}` in `{project.file or config.FILE}` is {str(value)[:60]}"
        raise UsageError(what, why=f"the option takes {takes}" + (", or a table of its settings" if pairs else ""))
    return value if isinstance(value, bool) and param.is_flag else found


PAIRS = ("--set", "--arch-set", "--preprocess")  # options of KEY=VALUE, which a file may say as a table


def known(group: Any) -> dict[str, dict[str, str]]:
    """Return of every command what a project file may call its options, and the parameters that these are."""
    return {
        word: {
            opt.lstrip("-").replace("-", "_"): param.name
            for param in command.params
            for opt in param.opts
            if opt.startswith("--") and param.name not in ("model", "models", "config")
        }
        for word, command in group.commands.items()
    }


def _texts(value: Any, *, pairs: bool) -> list[str] | None:
    """Return a repeated option as it would be typed: a list, a table, words in one string; else None."""
    if isinstance(value, str):
        from shlex import split

        try:
            return split(value)
        except ValueError:
            return None
    if isinstance(value, Mapping) and pairs:
        found = {key: _text(item, lists=True) for key, item in value.items()}
        return None if None in found.values() else [f"{key}={text}" for key, text in found.items()]
    texts = [_text(item) for item in value] if isinstance(value, list) else [None]
    return [text for text in texts if text is not None] if None not in texts else None


def _text(value: Any, *, lists: bool = False) -> str | None:
    if lists and isinstance(value, list):
        texts = [_text(item) for item in value]
        return None if None in texts else ",".join(map(str, texts))
    return str(value) if isinstance(value, str | int | float) else None
