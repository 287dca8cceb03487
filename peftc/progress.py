"""Where steps say how far they are; the one piece of global state, set by the console.

A step writes::

    with progress.track("factoring modules", len(names)) as advance:
        for name in names:
            ...
            advance(name)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[str], None]
Sink = Callable[[str, int | None], AbstractContextManager[Advance]]
Aside = Callable[[], AbstractContextManager[None]]


@contextmanager
def _silent(title: str, total: int | None) -> Iterator[Advance]:
    def advance(detail: str = "") -> None:
        pass

    yield advance


_sink: Sink = _silent
_aside: Aside = nullcontext


def set_sink(sink: Sink | None, aside: Aside = nullcontext) -> None:
    """Send progress to ``sink``, which is put ``aside`` while others draw; None makes it silent again."""
    global _sink, _aside
    _sink, _aside = sink or _silent, aside


def others() -> AbstractContextManager[None]:
    """Leave the terminal to bars of another library, as those of a download."""
    return _aside()


def track(title: str, total: int | None = None) -> AbstractContextManager[Advance]:
    """Announce work of ``total`` parts (None: unknown); the yielded function says that one is done, with a detail."""
    return _sink(title, total)
