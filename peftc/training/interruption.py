"""Ctrl-C, and SIGTERM as a spot machine sends it, held back while a step is made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from peftc import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """Whether an end was asked for, and whether it may come at once.

    Attributes:
        asked: a signal came to this process.
        agreed: one came to any process, as all of them know since their last step.
        at_once: nothing is half done, and no other process waits for this one.
        whole: it ended where nothing was half done.
    """

    asked: bool = False
    agreed: bool = False
    at_once: bool = False
    whole: bool = False

    @property
    def due(self) -> bool:
        """Whether to end now that a step is whole."""
        return self.asked if processes.size() == 1 else self.agreed

    def signalled(self, *_: Any) -> None:
        """Remember a signal, or end here: at a point where that does no harm, and always at the second."""
        if self.at_once:
            self.end()
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def end(self) -> NoReturn:
        """End the training here, where nothing is half done."""
        self.whole = True
        raise KeyboardInterrupt

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let a signal end this process at once within a context, in which nothing of the training changes."""
        self.at_once = processes.size() == 1
        try:
            if self.at_once and self.asked:
                self.end()
            yield
        finally:
            self.at_once = False


@contextmanager
def interruption(save: Callable[[], None]) -> Iterator[Interruption]:
    """Watch for signals, and save where one ended what is done inside with nothing half done.

    Outside of the main thread, where Python allows no handlers, nothing is held back.
    """
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {each: signal.signal(each, found.signalled) for each in SIGNALS}
    try:
        yield found
    except KeyboardInterrupt:
        if found.whole:
            save()
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
