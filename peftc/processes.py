"""The processes of one launch (`accelerate launch`, `torchrun`): who this one is, what it computes, where they meet.

Parts of a job are files in its working folder, so processes share work by names and hand over results on disk; what
they tell each other directly is small. A process on its own is the first of one, and none of this costs it an import.

Where one of them fails or is gone, the others meet a `PeftcError`; the one that failed raises its own error.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from peftc.errors import LostProcessError, PeftcError, reason_of

Value = TypeVar("Value")
NETWORK = ("gloo", "nccl", "tcpstore", "connection", "broken pipe", "socket")  # in what torch says of lost ones
ANY = ("",)  # while processes talk, whatever is said
PATIENCE = 30  # days that one process waits for another, as long as that one lives


def size() -> int:
    """Return how many processes there are."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def rank() -> int:
    """Return the place of this process among them, from 0."""
    return int(os.environ.get("RANK") or 0) if size() > 1 else 0


def place() -> int:
    """Return the place of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK") or 0) if size() > 1 else 0


def on_machine() -> int:
    """Return how many of them share this machine; all, where no launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or size())) if size() > 1 else 1


def cores() -> int:
    """Return on how many cores this process may run: of those of the machine, the ones that it is bound to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machines() -> int:
    """Return over how many machines the processes are spread, evenly, as far as the launcher says it."""
    return max(1, size() // on_machine())


def a_gpu_each() -> bool:
    """Return whether each process of this machine can have a GPU of its own."""
    import torch

    return bool(torch.cuda.device_count() >= on_machine())


def share(names: Sequence[Value]) -> list[Value]:
    """Return what of some work, in an order that all agree on, is this process's."""
    return list(names[rank() :: size()])


def wait() -> None:
    """Go on when all processes are here."""
    with together():
        pass


def leave() -> None:
    """Disconnect from the others; left to the end of the interpreter, the threads of that may abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Compute a share of some work, and go on when all processes have done theirs."""
    try:
        yield
    except Exception as problem:
        gathered([f"{problem}" if isinstance(problem, PeftcError) else f"{type(problem).__name__}: {problem}"])
        raise
    told: list[str | None] = gathered([None])
    for number, text in enumerate(told):
        if text is not None:
            first, *more = text.splitlines() or [""]
            raise PeftcError(f"process {number} of {size()} failed: {first}", why=" ".join(more).strip() or None)


def agreed(find: Callable[[], Value]) -> Value:
    """Return what the first process finds; the others wait for it and do not look themselves."""
    if size() == 1:
        return find()
    held: list[Any] = [None]
    with together():
        if rank() == 0:
            held = [find()]
    from accelerate.utils import broadcast_object_list

    with watched(ANY):
        broadcast_object_list(held)
    return held[0]  # type: ignore[no-any-return]


def gathered(values: Sequence[Value]) -> list[Value]:
    """Return what all processes found, that of the first in front."""
    if size() == 1:
        return list(values)
    from accelerate.utils import gather_object

    _connect()
    with watched(ANY):
        return list(gather_object(list(values)))


def _connect() -> None:
    """Meet the other processes, once."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    patience = timedelta(days=PATIENCE)
    with watched(ANY), _without_output():
        if torch.cuda.is_available() and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=patience)
        PartialState(cpu=True, timeout=patience)  # words travel over the network, not the GPU


@contextmanager
def _without_output() -> Iterator[None]:
    """Drop what is printed below Python: gloo of torch 2.8 tells of its connections on stdout, which is for data."""
    kept = None
    with suppress(OSError):  # closed: there is nothing to keep clean
        kept = os.dup(1)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


@contextmanager
def watched(words: Sequence[str] = NETWORK) -> Iterator[None]:
    """Turn what is said of a process that ended, in one of these words, into a refusal."""
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not any(word in str(error).lower() for word in words):
            raise
        hint = "see what it said, and run the same command again to resume"
        raise LostProcessError("another process of this launch stopped", why=reason_of(error), hint=hint) from error
