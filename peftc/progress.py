"""Where steps say how far they are; the one piece of global state, set by the console.

A step writes::

    with progress.track("factoring modules", len(names)) as advance:
        for name in names:
            ...
            advance(name)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[str], None]
Sink = Callable[[str, int | None], AbstractContextManager[Advance]]


@contextmanager
def _silent(title: str, total: int | None) -> Iterator[Advance]:
    def advance(detail: str = "") -> None:
        pass

    yield advance


_sink: Sink = _silent


def set_sink(sink: Sink | None) -> None:
    """Send progress to ``sink``; None makes it silent again."""
    global _sink
    _sink = sink or _silent


def track(title: str, total: int | None = None) -> AbstractContextManager[Advance]:
    """Announce work of ``total`` parts (None: unknown); the yielded function says that one is done, with a detail."""
    return _sink(title, total)
