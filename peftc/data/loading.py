"""Samples that are there before they are needed: read by processes of their own, in the order in which they are asked.

What is read, and in which order, does not depend on how many processes read it. They are forked: what encodes samples
are closures, which no other process could be sent. So nothing that reads may hold a file whose place processes share.
"""

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from peftc import processes
from peftc.errors import LostProcessError, PeftcError, UsageError, reason_of

Key = TypeVar("Key")
Value = TypeVar("Value")
AHEAD = 2  # batches that each process reads ahead
QUICK = 0.002  # seconds: to hand a batch over takes about as long,
HANDED = 1e9  # and a second for so many bytes, which are written anew
START = 1.0  # seconds: to start and end the processes takes a part of it
LONGEST = 75  # of a temporary folder's name: the sockets in it have 107 characters at most, 32 of them their own
SHARED, CONTROL = Path("/dev/shm"), Path("/sys/fs/cgroup")
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
HINT = "read in this process: `--workers 0`"


def ahead(
    read: Callable[[Key], Value], asked: Sequence[Key], workers: int | None = None
) -> Generator[Value, None, None]:
    """Yield ``read(key)`` for every key, in order; end the iteration, or close it, to end the processes.

    Args:
        read: gives a batch; what is random about it follows from the key.
        asked: the keys.
        workers: how many processes read ahead. With None the first batch is read here, and tells whether any pay.

    Raises:
        PeftcError: as ``read`` does, in whichever process.
        LostProcessError: a process was killed.
        UsageError: processes were asked for where there can be none.
    """
    first: list[Value] = []
    by_choice = workers is not None
    if workers and (reason := _why_not()):
        raise UsageError(f"`--workers` is {workers}", why=reason, hint=HINT)
    if workers is None and asked:
        begun = time.perf_counter(), time.process_time()
        first, asked = [read(asked[0])], asked[1:]
        seconds = max(time.perf_counter() - begun[0], time.process_time() - begun[1])  # of all its threads, or waited
        workers = _worthwhile(seconds, first[0], len(asked))
    workers = min(workers or 0, len(asked)) if len(asked) > 1 else 0  # one batch is as soon read here
    with _arriving(read, asked, workers, by_choice=by_choice) as rest:
        while first:
            yield first.pop()
        yield from rest


def is_alone() -> bool:
    """Return whether this process is one of those that read ahead, and reads in one thread."""
    return get_worker_info() is not None


def usual() -> int:
    """Return how many processes may read ahead here: this process's share of the cores, less its own."""
    return max(0, int(_cores()) // processes.on_machine() - 1)


def _cores() -> float:
    """Return on how many cores this process may run: of those it is bound to, as many as its control group pays."""
    cores = float(processes.cores())
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
    except OSError:
        return cores
    here = CONTROL / group.strip("/")
    for folder in (here, *here.parents):
        try:
            limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            cores = min(cores, int(limit) / int(period))
    return cores


def _why_not() -> str | None:
    """Return why this process can have none that read ahead; None where it can."""
    if sys.platform != "linux":
        return "they are forked, which is safe on Linux alone"
    if multiprocessing.current_process().daemon:
        return "this process is a daemon of another, and may start none"
    if len(tempfile.gettempdir()) > LONGEST:
        return f"their sockets lie in the temporary folder, and `{tempfile.gettempdir()}` is too long a name for that"
    return None


def _worthwhile(seconds: float, first: object, left: int) -> int:
    """Return how many processes to start, where a batch took so long and so many are left."""
    sizes: list[int] = []
    mapped(first, lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    if seconds < QUICK + sum(sizes) / HANDED or seconds * left < START or _why_not():
        return 0
    room = shutil.disk_usage(SHARED).free // processes.on_machine() // 2
    workers = min(usual(), room // max(1, (AHEAD + 1) * sum(sizes)))
    logging.getLogger(__name__).info("processes that read ahead: %d; a batch takes %.3g s", workers, seconds)
    return workers


@contextmanager
def _arriving(
    read: Callable[[Key], Value], asked: Sequence[Key], workers: int, *, by_choice: bool
) -> Iterator[Iterator[Value]]:
    """Give an iterator over what is read, by so many processes, which are gone afterwards."""
    iterator: Any = None
    if workers:
        try:
            iterator = _started(_Asked(read), asked, workers)
        except OSError as error:  # there is no room for another process
            if by_choice:
                what = f"no process can be started to read ahead, of {workers}"
                raise PeftcError(what, why=reason_of(error), hint=HINT) from error
    if iterator is None:
        yield map(read, asked)
        return
    try:
        yield _received(iterator)
    finally:
        iterator._shutdown_workers()


def _started(samples: "_Asked", asked: Sequence[Any], workers: int) -> Any:
    """Return torch's iterator, whose processes are at work.

    Its handler of SIGCHLD, which raises wherever the program is when a process is killed, is not left in place: that
    one is gone is then seen where its batch is waited for, within seconds.
    """
    handler, is_main = signal.getsignal(signal.SIGCHLD), threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more processes than cores, and of a fork beside threads: see `_settled`
        loader = DataLoader(
            samples,
            sampler=asked,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=AHEAD,
            pin_memory=torch.cuda.is_initialized(),
            multiprocessing_context="fork",
            worker_init_fn=_settled(os.getpid()),
            generator=torch.Generator(),  # or it would draw from the random state of the process
        )
        iterator = iter(loader)
    if is_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def _settled(parent: int) -> Callable[[int], None]:
    """Return what a process does first: it starts no threads of a library's, and ends when its parent does.

    A signal to all of a group, as of Ctrl-C, is for the parent, which may have to finish its step with what is read.
    """

    def settle(_: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them, and has handlers of its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # torch has gone down to one thread
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return settle


def _received(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yield what processes read, and raise what they refused."""
    while True:
        try:
            value = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            why = f"as a system does where memory, or shared memory (`{SHARED}`), runs out"
            raise LostProcessError("a process that reads samples ahead was killed", why=why, hint=HINT) from error
        if isinstance(value, _Refused):
            raise value.error
        yield value


@dataclass(frozen=True)
class _Refused:
    """A refusal on its way from one process to another, which as an exception would get another text."""

    error: PeftcError


@dataclass(frozen=True)
class _Asked(Dataset[Any]):
    """What torch's loader takes for a data set."""

    read: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        try:
            value = self.read(key)
        except PeftcError as error:
            return _Refused(error)
        try:
            return mapped(value, _shared)  # here, where an error is seen, and not in a thread that sends
        except (RuntimeError, OSError) as error:
            return _Refused(PeftcError("a batch does not fit into shared memory", why=reason_of(error), hint=HINT))


def _as_it_is(value: Value) -> Value:
    return value


def _shared(tensor: Tensor) -> Tensor:
    """Return a tensor in shared memory; of one that is a part of another, that part alone."""
    whole = tensor.untyped_storage().nbytes()
    return (tensor.clone() if whole > tensor.nbytes else tensor).share_memory_()


def mapped(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """Return a batch with its tensors changed, however they lie in one another."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, dict):
        found = {name: mapped(each, change) for name, each in value.items()}
    elif isinstance(value, list | tuple):
        parts = [mapped(each, change) for each in value]
        found = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{each.name: mapped(getattr(value, each.name), change) for each in fields(value)})
    return found  # type: ignore[no-any-return]
