"""The program: its commands, and the one boundary where an error becomes a message and an exit code.

0    done, or already done
1    refused or failed for a stated reason
2    the command line is wrong
3    done, but a gate was not met
70   a bug in peftc
130  interrupted; run again to resume
"""

import errno
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from typer import Exit, Option, Typer
from typer._click.exceptions import ClickException, NoArgsIsHelpError  # typer exports no base class
from typer.core import TyperGroup
from typer.main import get_command

from peftc import processes
from peftc.cli import console, help, steps, suggestions
from peftc.cli.methods import methods
from peftc.cli.run import run
from peftc.errors import LostProcessError, PeftcError, shown
from peftc.project import config
from peftc.report import size
from peftc.version import __version__

INSTALL = "make this shell complete commands, options and values"
FULL = "free some space, or write to another disk with `-o`"
CLOSED = "check the permissions, or write to another folder with `-o`"
REFUSALS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "check the path: its links go round in a circle",
    errno.EMFILE: "raise the limit on open files with `ulimit -n`",
    errno.EAGAIN: "raise the limit on processes with `ulimit -u`, or stop some",
    errno.EIO: "the disk reports an error: check it, and use another one with `-o`",
}
NO_MEMORY = (  # how torch, safetensors and other libraries say it, and the loader of shared libraries
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "failed to map segment from shared object",
    "can't start new thread",
    "error return without exception set",
)


WHOLE = 200  # characters of a summary, longer than any of them: none is cut
GROUPS = {  # what one does with commands -> these
    "make it smaller": "analyze calibrate decompose truncate prune_layers",
    "train it": "distill finetune merge extract_lora",
    "hand it on": "export",
    "measure and compare": "evaluate bench show compare report",
    "run a whole chain": "init run",
    "find your way": "demo methods env",
}


class NoMemoryExit(SystemExit):
    """The end of a process that has no memory left, and may not even have enough to end in order."""


class Boundary(TyperGroup):
    """Run a command line and end with one of the exit codes above."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by what one does with them, and then the options."""
        found = {
            heading: [(name, self.commands[name].get_short_help_str(WHOLE)) for name in words.replace("_", "-").split()]
            for heading, words in GROUPS.items()
        }
        own = [(", ".join(param.opts), str(getattr(param, "help", ""))) for param in self.params]
        help.write(formatter, found)
        help.write(formatter, {"options": [*own, help.last(ctx)]})

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any) -> NoReturn:  # type: ignore[override]
        """Run ``args``; every exception ends here."""
        words = list(sys.argv[1:] if args is None else args)
        if config.COMPLETE in os.environ:  # by which a shell asks how a line may go on
            from peftc.cli import completion

            sys.exit(completion.reply(self, os.environ[config.COMPLETE]))
        try:
            with self.make_context("peftc", words) as ctx:
                self.invoke(ctx)
            code = 0
        except Exit as end:
            code = end.exit_code
        except NoArgsIsHelpError as problem:
            problem.show()
            code = 2
        except ClickException as problem:
            console.error(str(suggestions.refusal(problem)))
            code = 2
        except PeftcError as problem:
            if processes.rank() == 0 or isinstance(problem, LostProcessError):  # the first hears what the others met
                console.error(str(problem))
            code = problem.exit_code
        except KeyboardInterrupt:
            console.error("interrupted\n  hint: run the same command again to resume")
            code = 130
        except BaseException as problem:
            if isinstance(problem, SystemExit):
                raise
            code = _unplanned(problem)
        processes.leave()
        sys.exit(code)


def _unplanned(problem: BaseException) -> int:
    """Explain what the machine refused; anything else is a bug and keeps its traceback."""
    if _is_out_of_memory(problem):
        hint = "lower `--batch-size`, use `--device cpu`, or stop what else uses the memory"
        cause = str(problem).splitlines()[0] if str(problem) else "an allocation failed"
        problem.__traceback__ = None  # lets go of what the calls held
        console.error(str(PeftcError("out of memory", why=f"{cause}{_memory_limit()}", hint=hint)))
        raise NoMemoryExit(1)
    if (refusal := _refusal(problem)) is not None:
        console.error(str(refusal))
        return 1
    import traceback

    console.say("".join(traceback.format_exception(problem)).rstrip())
    hint = "report it with the lines above and the command you typed"
    console.error(str(PeftcError(f"this is a bug in peftc {__version__}", hint=hint)))
    return 70


def _refusal(problem: BaseException) -> PeftcError | None:
    """Return what the machine refused, as people can read it; None for a bug."""
    text = str(problem)
    number = problem.errno if isinstance(problem, OSError) else None
    if number is None and "No space left on device" in text:  # from libraries that write without Python
        number = errno.ENOSPC
    if number in REFUSALS:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else text
        where = shown(getattr(problem, "filename", None) or "the output")
        return PeftcError(f"cannot read or write `{where}`", why=reason.lower(), hint=REFUSALS[number])
    if isinstance(problem, UnicodeEncodeError) and shown(problem.object) != problem.object:
        before, after = problem.object[: problem.end], problem.object[problem.end :]
        word = re.split(r'["\s]', before)[-1] + re.split(r'["\s]', after)[0]
        return PeftcError(
            f"`{shown(word[:200])}` cannot be written: it is not UTF-8",
            why="peftc records names in JSON, which holds UTF-8 alone",
            hint="rename the file or folder that is called so",
        )
    return None


def _is_out_of_memory(problem: BaseException | None) -> bool:
    """Whether memory was refused, or what another library raised came of that: each says so in words of its own."""
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        says_so = any(word in str(problem) for word in NO_MEMORY)
        if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError" or says_so:
            return True
        if isinstance(problem, OSError) and problem.errno == errno.ENOMEM:
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _memory_limit() -> str:
    """Say which limit the process has; that of a container refuses nothing, it ends the process."""
    for kind, command in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY:
            return f" (`ulimit {command}` gives this process {size(most)})"
    return ""


def _show_completion(wanted: bool) -> None:
    if wanted:
        from peftc.cli import completion

        console.out(completion.SCRIPTS[completion.shell_here()])
        raise Exit


def _install_completion(wanted: bool) -> None:
    if wanted:
        from peftc.cli import completion

        shell = completion.shell_here()
        script, rc = completion.install(shell)
        console.note(f"completion for {shell}: `{script}`" + (f", which `{rc}` reads" if rc else ""))
        console.note("it works in shells that start from now on")
        raise Exit


def _version(wanted: bool) -> None:
    if wanted:
        console.out(f"peftc {__version__}\n")
        raise Exit


app = Typer(
    name="peftc",
    cls=Boundary,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # `peftc.cli.suggestions` does
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)


@app.callback()
def peftc(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
    install_completion: Annotated[
        bool, Option("--install-completion", callback=_install_completion, is_eager=True, help=INSTALL)
    ] = False,
    show_completion: Annotated[
        bool, Option("--show-completion", callback=_show_completion, is_eager=True, help="print that script")
    ] = False,
) -> None:
    """Make trained models smaller and faster, and tell the truth about it.

    \b
    Example:
      peftc decompose timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --ratio 0.5 -o small
    """


for words in GROUPS.values():
    for word in words.split():
        app.command(cls=help.Grouped)({**vars(steps), "run": run, "methods": methods}[word])


def context() -> Any:
    """Return what holds the commands, for a chain that Python runs."""
    return get_command(app).make_context("peftc", ["run"])


def _terminate(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the program."""
    signal.signal(signal.SIGTERM, _terminate)  # clean up and say how to resume, as for Ctrl-C
    if not sys.warnoptions:  # what other libraries deprecate is not the user's business; `python -W` shows it
        warnings.simplefilter("ignore")
    try:
        app()
    except NoMemoryExit:
        os._exit(1)  # threads of libraries that could not start bring the usual end to a crash
    raise AssertionError("unreachable: the boundary exits")
