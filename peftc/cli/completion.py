"""How a line that is being typed may go on: commands, options, values and files, for bash, zsh and fish.

The shell runs `peftc` with two variables: `_PEFTC_COMPLETE`, and `_PEFTC_LINE`, the line up to the cursor. The first
line of the answer says what of the disk may stand there too; each other line is a word and what it does, split by a
tab. Nothing here imports torch or asks a network.
"""

import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peftc.cli import console
from peftc.errors import OutputError, UsageError
from peftc.options import OPTIMIZERS
from peftc.plans.allocate import ALLOCATIONS
from peftc.project import config
from peftc.steps import methods
from peftc.store import documents

VARIABLE, LINE = config.COMPLETE, "_PEFTC_LINE"
NOTHING, FILES, FOLDERS = "nothing", "files", "folders"  # what of the disk may stand at the cursor
WHOLE = 200  # characters of a summary, longer than any

BASH = """\
_peftc() {
    local IFS=$'\\n' line kind word cur=${COMP_LINE:0:COMP_POINT}
    local -a answer=()
    cur=${cur##*[[:space:]]}
    mapfile -t answer < <(_PEFTC_COMPLETE=bash _PEFTC_LINE=${COMP_LINE:0:COMP_POINT} "$1" 2>/dev/null)
    kind=${answer[0]}
    # bash takes what stands before the last = or : for another word
    local before=${cur%"${cur##*[=:]}"}
    COMPREPLY=()
    for line in "${answer[@]:1}"; do
        word=${line%%$'\\t'*}
        COMPREPLY+=("${word#"$before"}")
    done
    case $kind in
        files) compopt -o filenames; COMPREPLY+=($(compgen -f -- "$2")) ;;
        folders) compopt -o filenames; COMPREPLY+=($(compgen -d -- "$2")) ;;
    esac
    case ${COMPREPLY[0]} in *[=:/]) compopt -o nospace ;; esac
}
complete -F _peftc peftc
"""
ZSH = """\
#compdef peftc
_peftc() {
    local line kind
    local -a answer told bare
    line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    answer=("${(@f)$(_PEFTC_COMPLETE=zsh _PEFTC_LINE=$line ${~words[1]} 2>/dev/null)}")
    kind=${answer[1]}
    for line in "${(@)answer[2,-1]}"; do
        if [[ ${line%%$'\\t'*} == *= ]]; then
            bare+=("${line%%$'\\t'*}")
        else
            told+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
        fi
    done
    (( ${#told} )) && _describe peftc told
    (( ${#bare} )) && compadd -S '' -- "${bare[@]}"
    [[ $PREFIX == --*=* ]] && compset -P '--*='
    case $kind in
        files) _files ;;
        folders) _files -/ ;;
    esac
    return 0
}
if [[ $funcstack[1] == _peftc ]]; then _peftc "$@"; else compdef _peftc peftc; fi
"""
FISH = """\
function __peftc_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l answer (_PEFTC_COMPLETE=fish _PEFTC_LINE=(commandline -cp | string collect) $words[1] 2>/dev/null)
    printf '%s\\n' $answer[2..-1]
    switch "$answer[1]"
        case files
            __fish_complete_path (string replace -r -- '^--[^=]*=' '' "$current")
        case folders
            __fish_complete_directories (string replace -r -- '^--[^=]*=' '' "$current")
    end
end
complete -c peftc -f -a '(__peftc_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def reply(group: Any, asked: str) -> int:
    """Answer what a shell asks by the variable: its name for how the line goes on, `source_NAME` for its script."""
    shell = asked.removeprefix("source_")
    if shell not in SCRIPTS:
        console.error(str(_unknown(shell)))
        return 1
    if asked.startswith("source_"):
        console.out(SCRIPTS[shell])
        return 0
    found = answer(group, os.environ.get(LINE, ""))
    lines = [found.disk, *(f"{word}\t{' '.join(about.split())}" for word, about in found.words)]
    console.out("".join(f"{line}\n" for line in lines))
    return 0


def _unknown(shell: str | None) -> UsageError:
    why = f"there is one for {', '.join(f'`{each}`' for each in SCRIPTS)}"
    hint = f"`{VARIABLE}=source_bash peftc` prints the script of bash, wherever you are"
    return UsageError(f"there is no completion for `{shell or 'this shell'}`", why=why, hint=hint)


# installing


def shell_here() -> str:
    """Return the shell that runs this program (UsageError: none that is known)."""
    try:
        from shellingham import ShellDetectionFailure, detect_shell
    except ImportError:  # of typer, which may do without it one day
        found = Path(os.environ.get("SHELL", "")).name
    else:
        try:
            found = detect_shell()[0]
        except ShellDetectionFailure:
            found = Path(os.environ.get("SHELL", "")).name
    if found not in SCRIPTS:
        raise _unknown(found)
    return str(found)


def install(shell: str) -> tuple[Path, Path | None]:
    """Write the script of a shell, and the line that reads it; return both files (OutputError: one cannot be written).

    Fish looks for scripts itself, so that there is no line.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    places = {
        "bash": (data / "bash-completion/completions/peftc", Path("~/.bashrc")),
        "zsh": (data / "zsh/site-functions/_peftc", Path(os.environ.get("ZDOTDIR") or "~") / ".zshrc"),
        "fish": (Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "fish/completions/peftc.fish", None),
    }
    script, rc = places[shell]
    script = script.expanduser()
    needs = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }; " if shell == "zsh" else ""
    line = f"{needs}source {shlex.quote(str(script))}"
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        documents.write_whole(script, SCRIPTS[shell])
        if rc is not None:
            rc = rc.expanduser()
            there = rc.read_text(encoding="utf-8", errors="surrogateescape") if rc.exists() else ""
            if line not in there.splitlines():
                with rc.open("a", encoding="utf-8") as file:
                    file.write(f"{'' if there.endswith(chr(10)) or not there else chr(10)}{line}\n")
    except OSError as error:
        hint = "`peftc --show-completion` prints the script, to put where your shell reads it"
        raise OutputError(f"cannot write `{error.filename or script}`", why=str(error.strerror), hint=hint) from None
    return script, rc


# answering


class Answer(NamedTuple):
    """What may stand at the cursor."""

    words: list[tuple[str, str]]  # each with what it does
    disk: str = NOTHING


def answer(group: Any, line: str) -> Answer:
    """Return how a line may go on.

    Args:
        group: the program with its commands.
        line: what was typed up to the cursor, the name of the program first.
    """
    _, *words = _split(line) or [""]
    unfinished = words.pop() if words else ""
    at = next((at for at, word in enumerate(words) if not word.startswith("-")), None)
    if at is None:
        if unfinished.startswith("-"):
            return _starting(unfinished, _options(group, words))
        about = ((word, one.get_short_help_str(WHOLE)) for word, one in group.commands.items())
        return _starting(unfinished, about)
    word, words = words[at].replace("_", "-"), words[at + 1 :]
    if word not in group.commands:
        return Answer([])
    return _in_command(word, group.commands[word], words, unfinished)


def _in_command(word: str, command: Any, words: list[str], unfinished: str) -> Answer:
    named = {name: param for param in command.params for name in (*param.opts, *param.secondary_opts)}
    typed: dict[str, str] = {}  # parameter -> its value so far
    places, waiting = 0, None  # arguments that are there, and the option whose value comes next
    for each in words:
        name, equals, value = each.partition("=")
        param = named.get(name.replace("_", "-"))
        if waiting is not None:
            typed[waiting.name], waiting = each, None
        elif param is not None and each.startswith("-"):
            typed[param.name] = value
            waiting = param if not equals and _takes_value(param) else None
        elif not each.startswith("-"):
            places += 1
    if waiting is not None:
        return _values(word, waiting, typed, command, unfinished)
    name, equals, value = unfinished.partition("=")
    if equals and name.replace("_", "-") in named:
        found = _values(word, named[name.replace("_", "-")], typed, command, value)
        return Answer([(f"{name}={each}", about) for each, about in found.words], found.disk)
    if unfinished.startswith("-"):
        return _starting(unfinished, _options(command, words))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    places = min(places, len(arguments) - 1) if arguments and arguments[-1].nargs == -1 else places
    if places >= len(arguments):
        return Answer([])
    return _values(word, arguments[places], typed | {"at": words[-1] if words else ""}, command, unfinished)


def _split(line: str) -> list[str]:
    """Return the words of a line, the last one unfinished; what its quotes or a backslash leave open is closed."""
    for whole in (line, f"{line}'", f'{line}"', line[:-1]):
        try:
            words = shlex.split(whole)
        except ValueError:
            continue
        return [*words, ""] if line[-1:].isspace() or not words else words
    return []


def _takes_value(param: Any) -> bool:
    return param.param_type_name == "option" and not param.is_flag and not param.count


def _options(command: Any, words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield options that may still come."""
    there = {word.partition("=")[0].replace("_", "-") for word in words}
    for param in command.params:
        if param.param_type_name == "option" and (param.multiple or param.count or not there & {*param.opts}):
            yield from ((name, param.help or "") for name in (*param.opts, *param.secondary_opts) if name[:2] == "--")
    yield "--help", "print what there is"


def _starting(unfinished: str, found: Iterable[tuple[str, str]]) -> Answer:
    start = unfinished.replace("_", "-") if unfinished.startswith("-") else unfinished
    return Answer([(word, about) for word, about in found if word.startswith(start)])


# values

TASKS = (  # a test compares them with `peftc.tasks.table`, which imports torch
    "image-classification",
    "text-classification",
    "masked-lm",
    "causal-lm",
    "image-text-retrieval",
    "sentence-similarity",
)
METHODS = {"method": "decompose", "conv_method": "decompose_conv", "score": "importance", "format": "format"}
WORDS = {"allocation": ("auto", *ALLOCATIONS), "optimizer": OPTIMIZERS, "task": TASKS, "augment": ("crop",)}
MODELS = ("model", "models", "against", "teacher", "base")


def _values(word: str, param: Any, typed: dict[str, str], command: Any, unfinished: str) -> Answer:
    """Return the values of an option or an argument that begin as typed."""
    metavar, name = str(param.metavar or ""), str(param.name)
    disk = FOLDERS if metavar == "DIR" else FILES if metavar in ("FILE", "[RECIPE]") else NOTHING
    head = ""
    if name in WORDS:
        found = [(each, "") for each in WORDS[name]]
    elif name in MODELS or name == "data":
        found, disk = _named(name), FILES
    elif word == "methods":
        found = _of_methods(name, typed)
    elif name == "loss":
        head = unfinished[: unfinished.rfind(",") + 1]
        found = [(f"{head}{each}=", about) for each, about in [*_methods("loss"), ("task", "what the data says")]]
    elif name == "settings":
        found = _settings(word, typed, command)
    elif kind := _kind(word, name):
        found = [("auto", "the usual one"), *_methods(kind)] if kind == "decompose" else _methods(kind)
    elif metavar and metavar == metavar.lower():
        found = [(each, "") for each in metavar.split("|")]
    else:
        found = []
    return Answer([(each, about) for each, about in found if each.startswith(unfinished)], disk)


def _kind(word: str, name: str) -> str | None:
    """Return the kind of method that an option of a command takes."""
    return "adapter" if name == "method" and word in ("finetune", "prune-layers") else METHODS.get(name)


def _methods(kind: str) -> list[tuple[str, str]]:
    known = methods.known()[kind]
    return [(name.replace("_", "-"), str(methods.details_of(kind, name)["summary"])) for name in known]


def _of_methods(name: str, typed: dict[str, str]) -> list[tuple[str, str]]:
    if name == "command":
        return [(each, "") for each in dict.fromkeys(one.command for one in methods.KINDS.values())]
    kinds = [kind for kind, one in methods.KINDS.items() if one.command == typed["at"]]
    return [each for kind in kinds for each in _methods(kind)]


def _settings(word: str, typed: dict[str, str], command: Any) -> list[tuple[str, str]]:
    """Return the settings of the method that was typed, or of the one by default."""
    if word == "distill":
        terms = methods.known()["loss"]
        return [(f"{term}.{key}", about) for term in terms for key, about in _keys("loss", term)]
    option = "score" if word == "prune-layers" else "format" if word == "export" else "method"
    kind = str(_kind(word, option))
    chosen = typed.get(option) or next((str(p.default) for p in command.params if p.name == option), "")
    chosen = chosen.replace("-", "_")
    names = [chosen] if chosen in methods.known()[kind] else list(methods.known()[kind])
    return list({key: (key, about) for name in names for key, about in _keys(kind, name)}.values())


def _keys(kind: str, name: str) -> list[tuple[str, str]]:
    found = methods.details_of(kind, name)["settings"]
    return [(f"{key}=", f"{value} by default") for key, value in found.items()]


def _named(name: str) -> list[tuple[str, str]]:
    """Return what is no path: data that is always there, models that the cache of the hub holds."""
    if name == "data":
        return [("sklearn:digits", "1,797 digits of 8 x 8 pixels"), ("hf:", "a data set of the hub")]
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    there = sorted(each.name.split("--", 2)[1:] for each in cache.glob("models--*--*"))
    base = [("base", "the model that it was made from")] if name == "against" else []
    return [*base, *(("/".join(parts), "in the cache of the hub") for parts in there)]
