"""Processes of their own that cost no second start: forked from one that has imported the libraries, and no more.

A fresh interpreter imports torch, timm and transformers for seconds before a command does anything. These children
find them in place, but nothing of peftc and nothing that a test computed. Two things are not as in a fresh interpreter:
variables that a library reads while it is imported say nothing any more (`_run` mends two), and the end of the
interpreter is skipped. A test of either starts `sys.executable` itself.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["accelerate", "sklearn.datasets", "sklearn.metrics", "timm", "torch.distributed", "transformers", "typer"]
)
STREAMS = ("stdin", "stdout", "stderr")
ENVIRONMENT = dict(os.environ)  # before any test


class Forked:
    """A command line of peftc, or a program, at work in a process of its own.

    Args:
        words: what follows ``peftc``, or the arguments of the program.
        code: the program, as for ``python -c``.
        stdin: what it reads.
        cwd: where it works; here when None.
        env: its environment; that of this process when None.
    """

    def __init__(
        self, *words: Any, code: str | None = None, stdin: str = "", cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        for name in STREAMS:
            self.path(name).write_text(stdin if name == "stdin" else "", encoding="utf-8")
        line = [str(word) for word in words]
        variables = dict(os.environ if env is None else env)
        given = ([str(self.path(name)) for name in STREAMS], line, code, str(cwd or Path.cwd()), variables)
        self.process = CONTEXT.Process(target=_run, args=given, daemon=True)
        _start(self.process)

    def path(self, stream: str) -> Path:
        """Return the file that stands for a stream."""
        return Path(self.folder.name, stream)

    def done(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and return what there is to know of it; it is killed if it does not come."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired("forked", seconds, *(self.path(name).read_bytes() for name in STREAMS[1:]))
        out, err = (self.path(name).read_text(encoding="utf-8", errors="replace") for name in STREAMS[1:])
        self.folder.cleanup()
        return subprocess.CompletedProcess(["forked"], self.process.exitcode or 0, out, err)


def forked(*words: Any, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line of peftc, or a program, to its end in a process of its own; see `Forked`."""
    return Forked(*words, **how).done()


class ForkedScript:
    """What `subprocess.Popen` makes of a script, as far as `peftc.formats.exported` asks for it: pipes and an end."""

    def __init__(self, line: Sequence[str], *, stderr: TextIO, env: Mapping[str, str], **pipes: Any) -> None:
        theirs, ours = zip(CONTEXT.Pipe(duplex=False), reversed(CONTEXT.Pipe(duplex=False)), strict=True)
        self.stdin, self.stdout = (
            os.fdopen(os.dup(end.fileno()), mode) for end, mode in zip(ours, ("w", "r"), strict=True)
        )
        code = f"import runpy; runpy.run_path({line[-1]!r}, run_name='__main__')"
        given = ((*theirs, stderr.name), [], code, str(Path.cwd()), dict(env))
        self.process = CONTEXT.Process(target=_run, args=given, daemon=True)
        _start(self.process)
        for end in (*theirs, *ours):
            end.close()

    def wait(self) -> None:
        """Wait for its end."""
        self.process.join()


def _start(process: BaseProcess) -> None:
    """Start a process; what it is forked from, if that is still to start, sees no variable of one test."""
    now = dict(os.environ)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(now)


def _run(
    streams: Sequence[str | Connection], words: list[str], code: str | None, cwd: str, variables: dict[str, str]
) -> None:
    """Be the process: the target of the fork."""
    for number, stream in enumerate(streams):
        if isinstance(stream, str):
            file = os.open(stream, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        else:
            file = os.dup(stream.fileno())
            stream.close()
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in range(3)
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    if "HF_MODULES_CACHE" in variables:
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = variables["HF_MODULES_CACHE"]
    if code is None:
        sys.argv = ["peftc", *words]
        from peftc.cli.app import main

        main()
    else:
        sys.argv = ["-c", *words]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
