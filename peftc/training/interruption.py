"""Ctrl-C, and SIGTERM as a spot machine sends it, held back while a step is made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """Whether one was asked for, and whether it may come at once.

    Attributes:
        asked: a signal came, and the training is to end at the next step that is whole.
        at_once: nothing is half done, and no other process waits for this one.
    """

    asked: bool = False
    at_once: bool = True

    def signalled(self, *_: Any) -> None:
        """Remember a signal, or end here: at a point where that does no harm, and always at the second."""
        if self.asked or self.at_once:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Watch for signals; outside of the main thread, where Python allows no handlers, nothing is held back."""
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {each: signal.signal(each, found.signalled) for each in SIGNALS}
    try:
        yield found
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
