"""The project: ``peftc.toml``, the ``PEFTC_`` variables, and the chain of artifacts that its steps write.

A value comes from, first found first taken: the command line, `PEFTC_DECOMPOSE_RATIO` (one command), `PEFTC_RATIO`
(every command with that option), the table `[decompose]` of the file, the top of the file, the default. Paths are
relative to the working folder, wherever the file lies. `model`, `runs`, `data` and `teacher` stand at the top::

    model = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    data = "flowers/"

    [decompose]
    ratio = 0.5
    set = { damping = 1e-3 }

`chain = ["decompose", "distill", "distill.longer"]` is what `peftc run` runs. A step that comes twice has a name of its
own behind the dot, and what differs there stands in `[distill.longer]`, over `[distill]`.

The artifacts of the chain are a list, `runs/chain.json`. A step that writes has a place in it: the one it took before,
or the end. It reads what stands before its place and writes `runs/01-decompose`; what stood at its place and after it
leaves the list when another folder takes the place. No folder is ever deleted.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import ChainError, UsageError, did_you_mean, nearest, shown
from peftc.store import documents
from peftc.store.source import MANIFEST

FILE = "peftc.toml"
CHAIN = "chain.json"
INIT = "peftc init MODEL --data DATA"
PREFIX = "PEFTC_"
COMPLETE = "_PEFTC_COMPLETE"  # the variable by which a shell asks how a line may go on
RECIPE = "chain"  # the key that lists the steps of `peftc run`
TOP = ("model", "runs", "data", "teacher", RECIPE)
TRUST = ("allow_code", "trust_remote_code")  # these count only where somebody typed them, or set a variable
# of these a user means one: naming one on a higher level drops the others from the levels below
BUDGET = ("ratio", "rank", "energy", "target_params", "target_macs", "speedup", "plan", "keep_all_ranks")

Options = Mapping[str, Mapping[str, str]]  # command -> spelling -> parameter


@dataclass(frozen=True)
class Project:
    """What the working folder says about a run."""

    file: Path | None = None  # the project file, None where there is none
    model: str | None = None  # the model that the chain starts from
    runs: Path = Path("runs")  # the folder of the chain
    defaults: Mapping[str, Any] = field(default_factory=dict)  # parameter -> value, for the command that runs
    from_file: frozenset[str] = frozenset()  # parameters, and ``model``, whose value the file gave
    origins: Mapping[str, str] = field(default_factory=dict)  # parameter -> what gave its value, in words
    chain: tuple[str, ...] = ()  # the names of the steps of `peftc run`, in order
    place: "Place | None" = None  # where a recipe has put this step; None where it was typed
    warnings: tuple[str, ...] = ()  # variables that name no option

    def origin(self, parameter: str) -> str:
        """Say where the value of a parameter comes from that nobody typed."""
        return self.origins.get(parameter) or f"`{self.file or FILE}` or a `{PREFIX}` variable"


def load(step: str, options: Options, file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Project:
    """Return the project of the working folder as a command sees it.

    Args:
        step: the word that was typed, or the name of a step in the chain, as ``distill.longer``.
        options: the options of every command.
        file: another file than ``peftc.toml``; it must exist.

    Raises:
        UsageError: the file is missing, not TOML, or has a key or table that does not exist.
    """
    asked = file or (Path(environ["PEFTC_CONFIG"]) if environ.get("PEFTC_CONFIG") else None)
    if asked is not None and not asked.is_file():
        raise UsageError(f"there is no project file at `{asked}`", hint=did_you_mean(asked, "check `--config`"))
    path = asked or (Path(FILE) if Path(FILE).is_file() else None)
    tables = _read(path, options) if path else {}
    variables, warnings = _variables(environ, options)
    command = word_of(step)
    own = options[command]
    defaults: dict[str, Any] = {}
    names = list(dict.fromkeys(("", command, step)))
    levels = [tables.get(name, {}) for name in names]
    outside = [variables.get("", {}), variables.get(command, {})]
    for level in (*levels, *outside):
        defaults = override(command, defaults, {own[key]: value for key, value in level.items() if key in own})
    top = {**tables.get("", {}), **variables.get("", {})}
    set_outside = {own.get(key, key) for level in outside for key in level}
    from_file = frozenset({own.get(key, key) for level in levels for key in level} - set_outside)
    origins = {
        own.get(key, key): f"`{key.replace('_', '-')}` in " + (f"`[{name}]` of `{path}`" if name else f"`{path}`")
        for name, level in zip(names, levels, strict=True)
        for key in level
    }
    for prefix, level in zip((PREFIX, f"{PREFIX}{command.replace('-', '_').upper()}_"), outside, strict=True):
        origins |= {own.get(key, key): f"the variable `{prefix}{key.upper()}`" for key in level}
    runs, steps = Path(top.get("runs", "runs")).expanduser(), tuple(top.get(RECIPE, ()))
    return Project(path, top.get("model"), runs, defaults, from_file, origins, steps, warnings=warnings)


def word_of(step: str) -> str:
    """Return the command of a step in the chain: ``distill`` of ``distill.longer``."""
    return step.partition(".")[0]


def override(command: str, lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``higher`` over ``lower``; a budget in it replaces every budget below."""
    budgets = set(BUDGET) - ({"plan"} if command == "analyze" else set())  # `analyze --plan` names the file to write
    dropped = budgets if budgets & higher.keys() else ()
    return {**{name: value for name, value in lower.items() if name not in dropped}, **higher}


def _read(path: Path, options: Options) -> dict[str, dict[str, Any]]:
    """Return the values of a project file per command, those at its top under the empty word."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read `{path}`", why=str(error)) from None
    except RecursionError:
        raise UsageError(f"cannot read `{path}`", why="its tables and lists stand in one another too deep") from None
    words = {word.replace("-", "_"): word for word in options}
    tables: dict[str, dict[str, Any]] = {"": {}}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name == RECIPE:
            tables[""][RECIPE] = _steps(path, value, words)
        elif name in words and isinstance(value, dict):
            tables |= _tables(path, words[name], value, options[words[name]])
        else:
            tables_too = options if isinstance(value, dict) else ()
            _known(path, key, [*TOP, *itertools.chain(*options.values()), *tables_too])
            if name in ("model", "runs") and not (isinstance(value, str) and value):
                raise UsageError(f"`{key}` in `{path}` is not a string", hint=f'write it as `{key} = "..."`')
            tables[""][name] = value
    for step in tables:
        if "." in step and step not in tables[""].get(RECIPE, ()):
            what = f"`{path}` has an unknown name `{step.partition('.')[2]}` in `[{word_of(step)}]`"
            why = f"it is no option, and no step `{step}` stands in `{RECIPE}`"
            raise UsageError(what, why=why, hint="remove it, or add the step")
    return tables


def _tables(path: Path, word: str, table: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the table of a command and those inside it, which belong to single steps of the chain."""
    found: dict[str, dict[str, Any]] = {word: {}}
    for key, value in table.items():
        if key.replace("-", "_") not in own and isinstance(value, dict):
            where = f" in `[{word}.{key}]`"
            found[f"{word}.{key}"] = {_known(path, inner, own, where): item for inner, item in value.items()}
        else:
            found[word][_known(path, key, own, f" in `[{word}]`")] = value
    return found


def _steps(path: Path, value: Any, words: Mapping[str, str]) -> list[str]:
    """Return the names of the steps of the chain, each once, each of a command."""
    if not isinstance(value, list) or not value or not all(isinstance(step, str) for step in value):
        hint = f'write it as `{RECIPE} = ["decompose", "distill"]`'
        raise UsageError(f"`{RECIPE}` in `{path}` is not a list of steps", hint=hint)
    steps: list[str] = []
    for step in value:
        word, dot, name = step.partition(".")
        steps.append(words[_known(path, word, words, f" in `{RECIPE}`")] + dot + name)
        if steps[-1] in steps[:-1] or (dot and not name):
            raise UsageError(
                f"`{step}` stands twice in the `{RECIPE}` of `{path}`" if name or not dot else f"`{step}` has no name",
                hint=f"give it a name of its own, as `{word}.again`; `[{word}.again]` takes what differs there",
            )
    return steps


def _known(path: Path, key: str, known: Iterable[str], where: str = "") -> str:
    """Return a key as options are called; refuse one that is not known, or not taken from a file."""
    name, word = key.replace("-", "_"), key.replace("_", "-")
    if name in TRUST:
        why = "whoever wrote the file would decide that code runs on this machine"
        hint = f"type `--{word}`, or set `{PREFIX}{name.upper()}=1`"
        raise UsageError(f"`{key}` in `{path}` is not taken from a file", why=why, hint=hint)
    words = list(dict.fromkeys(each.replace("_", "-") for each in known))
    if word not in words:
        near = nearest(word, words)
        why = f"the names are {', '.join(f'`{each}`' for each in words)}"
        hint = f"did you mean `{near}`?" if near else "remove it"
        raise UsageError(f"`{path}` has an unknown name `{key}`{where}", why=why, hint=hint)
    return name


def _variables(environ: Mapping[str, str], options: Options) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Return the values of ``PEFTC_`` variables per command, and a warning for each that names no option."""
    found: dict[str, dict[str, str]] = {}
    warnings = []
    anywhere = {*TOP, *itertools.chain(*options.values())} - {RECIPE}
    for variable, value in sorted(environ.items()):
        name = variable[len(PREFIX) :].lower()
        if not variable.startswith(PREFIX) or not value or name == "config":
            continue
        starts = (word for word in options if name.startswith(word.replace("-", "_") + "_"))
        home = next((word for word in starts if name[len(word) + 1 :] in options[word]), None)
        if home is not None:
            found.setdefault(home, {})[name[len(home) + 1 :]] = value
        elif name in anywhere:
            found.setdefault("", {})[name] = value
        else:
            warnings.append(f"the variable `{variable}` names no option and is ignored")
    return found, tuple(warnings)


# the chain


@dataclass(frozen=True)
class Link:
    """One step of the chain and the folder it wrote."""

    step: str
    folder: Path


@dataclass(frozen=True)
class Chain:
    """The artifacts of a project, oldest first."""

    runs: Path  # the folder in which the list lies
    links: tuple[Link, ...] = ()  # the steps whose folders are there, up to the first that is not
    gone: Path | None = None  # the first folder of the list that is no longer an artifact

    @property
    def last(self) -> Path | None:
        """The newest artifact."""
        return self.links[-1].folder if self.links else None

    def own_place(self, step: str) -> int:
        """Return where ``step`` writes: the first place it took before, or the end."""
        return next((index for index, link in enumerate(self.links) if link.step == step), len(self.links))

    def place_after(self, folder: str) -> int | None:
        """Return the place after ``folder``, None where it is not in the chain."""
        path = Path(folder).resolve()
        return next((index + 1 for index, link in enumerate(self.links) if link.folder.resolve() == path), None)

    def record(self, index: int, link: Link, *, rewritten: bool = False) -> tuple[Link, ...]:
        """Put ``link`` at its place on disk, and return the links that are no longer part of the chain.

        Args:
            index: 0 <= index <= number of links.
            rewritten: the folder holds another artifact than before, so that what follows is out of date.
        """
        old = self.links[index] if index < len(self.links) else None
        if old and old.folder.resolve() == link.folder.resolve() and not rewritten:
            return ()
        links = (*self.links[:index], link)
        text = json.dumps([{"step": one.step, "folder": self._name(one.folder)} for one in links], indent=2) + "\n"
        self.runs.mkdir(parents=True, exist_ok=True)
        documents.write_whole(self.runs / CHAIN, text)
        return self.links[index:] if old and old.folder.resolve() != link.folder.resolve() else self.links[index + 1 :]

    def _name(self, folder: Path) -> str:
        path, runs = folder.resolve(), self.runs.resolve()
        return path.relative_to(runs).as_posix() if path.is_relative_to(runs) else str(path)


def read_chain(runs: Path) -> Chain:
    """Return the chain of a project, empty where nothing was written yet; a `ChainError` where it is damaged."""
    path = runs / CHAIN
    if not path.is_file():
        return Chain(runs)
    shape, hint = [{"step": str, "folder": str}], "remove the file to start a new chain"
    entries = documents.read_shaped(path, shape, ChainError, hint)
    links = [Link(entry["step"], runs / entry["folder"]) for entry in entries]
    gone = next((at for at, link in enumerate(links) if not (link.folder / MANIFEST).is_file()), None)
    return Chain(runs, tuple(links[:gone]), None if gone is None else links[gone].folder)


@dataclass(frozen=True)
class Place:
    """Where one run stands: the model it reads, and what it writes if that belongs to the chain."""

    model: str
    chain: Chain | None = None
    index: int = 0
    folder: Path | None = None


def place(project: Project, step: str, model: str | None, *, writes: bool) -> Place:
    """Find what ``step`` reads and where it writes.

    Args:
        model: MODEL as typed, ``-`` already read from standard input; None takes the chain's.
        writes: the step writes an artifact.

    Raises:
        UsageError: there is no MODEL and no project to take one from.
        ChainError: the list of the chain is damaged.
    """
    if project.place is not None:
        return project.place
    chain = read_chain(project.runs) if project.file else None
    if model is not None:
        if not writes or chain is None:
            return Place(model)
        index = 0 if model == project.model else chain.place_after(model)
        return Place(model) if index is None else place_at(chain, index, step, model)
    if chain is None:
        if project.model is not None:
            return Place(project.model)
        hint = f"name one, as in `peftc {step} MODEL`, or start a project: `{INIT}` writes its `{FILE}`"
        raise UsageError(f"`peftc {step}` needs a MODEL", why=f"there is no `{FILE}` in this folder", hint=hint)
    index = chain.own_place(step) if writes else len(chain.links)
    found = str(chain.links[index - 1].folder) if index else project.model
    if found is None:
        why = f"`{project.file}` names no `model`, and nothing in `{project.runs}` comes before this step"
        raise UsageError(f"`peftc {step}` needs a MODEL", why=why, hint='add `model = "..."` to it')
    return place_at(chain, index, step, found) if writes else Place(found, chain)


def artifacts(project: Project, step: str) -> list[str]:
    """Return every artifact of the chain, for a step that looks at them together; a `UsageError` where none is."""
    chain = read_chain(project.runs) if project.file else Chain(project.runs)
    if not chain.links:
        why = f"the chain in `{project.runs}` is empty" if project.file else f"there is no `{FILE}` in this folder"
        raise UsageError(f"`peftc {step}` needs artifacts", why=why, hint=f"name them: `peftc {step} small healed`")
    return [str(link.folder) for link in chain.links]


def place_at(chain: Chain, index: int, step: str, model: str) -> Place:
    """Return the place of a step that writes, with the folder that belongs to it."""
    return Place(model, chain, index, chain.runs / f"{index + 1:02d}-{step}")


def artifact_from(text: str) -> str:
    """Return the artifact that a step before named in a pipe: a path on one line, or the ``artifact`` of a JSON report.

    Raises:
        ChainError: the text is empty, or names no folder.
    """
    text = text.strip()
    hint = (
        "put a step that writes an artifact before the `|`, as in `peftc decompose MODEL --ratio 0.5 | peftc bench -`"
    )
    named: Any = text
    if text.startswith("{"):
        try:
            named = documents.parsed(text)["artifact"]
        except (ValueError, KeyError):
            named = None
    if not text:
        why = "it is empty: the step before it failed"
    elif shown(text) != text:
        why = f"`{shown(text[:80])}` is not UTF-8"
    elif not isinstance(named, str):
        why = "the JSON on it has no `artifact`"
    elif "\n" in named or "\0" in named or len(named) > 4096 or not Path(named).is_dir():
        why = f"there is no folder `{named.splitlines()[0][:80]}`"
    else:
        return named
    raise ChainError("standard input names no artifact", why=why, hint=hint)
