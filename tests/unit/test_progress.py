"""Progress goes where the console sends it, and nowhere by default."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from peftc import progress


@pytest.fixture
def seen() -> Iterator[list[str]]:
    lines: list[str] = []

    @contextmanager
    def sink(title: str, total: int | None) -> Iterator[progress.Advance]:
        lines.append(f"{title} {total}")
        yield lines.append
        lines.append("end")

    progress.set_sink(sink)
    yield lines
    progress.set_sink(None)


def test_without_a_sink_it_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("factoring", 3) as advance:
        advance("one")
    assert capsys.readouterr() == ("", "")


def test_a_sink_sees_title_total_details_and_end(seen: list[str]) -> None:
    with progress.track("factoring", 2) as advance:
        advance("fc1")
        advance("fc2")
    assert seen == ["factoring 2", "fc1", "fc2", "end"]


def test_none_makes_it_silent_again(seen: list[str]) -> None:
    progress.set_sink(None)
    with progress.track("factoring") as advance:
        advance("fc1")
    assert seen == []


def test_without_a_terminal_a_line_comes_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftc.cli import console

    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    try:
        console.setup()
        with progress.track("peftc distill"), progress.track("training on photos", 1000) as advance:
            for _ in range(600):
                clock[0] += 20
                advance("loss 0.5")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 200
        assert lines[0] == "training on photos: 3 of 1,000, about 5 h 32 min left: loss 0.5"
        assert lines[-1] == "training on photos: 600 of 1,000, about 2 h 13 min left: loss 0.5"
        with progress.track("training on photos", 1000) as advance:
            for _ in range(900):  # of a training that goes on
                advance("")
            clock[0] += 60
            advance("")
        assert capsys.readouterr().err == "training on photos: 901 of 1,000, about 1 h 39 min left\n"
        console.setup(quiet=True)
        with progress.track("training on photos", 2) as advance:
            clock[0] += 1000
            advance("")
        assert capsys.readouterr().err == ""
    finally:
        progress.set_sink(None)


def test_bars_of_the_console_nest_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.cli import console

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", told := Terminal())
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor, while there is a display
    console.setup()
    try:
        with progress.track("[outer]", 2) as outer, progress.track("inner", 5) as inner:
            inner("[a]")
            outer("blocks.0")
            with progress.track("third", 1):  # all are drawn anew
                assert told.getvalue().count(hidden) == 1, "one display for all"
        for text in ("[outer] ", "1/2", "blocks.0", "inner ", "[a]"):
            assert text in told.getvalue()
        assert told.getvalue().count(shown) == 1
        with pytest.raises(ZeroDivisionError), progress.track("failing", 1):
            _ = 1 / 0
        assert told.getvalue().count(hidden) == told.getvalue().count(shown) == 2
    finally:
        progress.set_sink(None)


def test_work_without_an_end_gives_way_to_what_goes_on_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.cli import console

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", told := Terminal())
    console.setup()
    try:
        with progress.track("peftc finetune"):
            assert "peftc finetune" in told.getvalue()
            with progress.track("training", 2) as advance:
                told.truncate(0)
                advance("a loss")
                with progress.others():  # nothing of ours is drawn while another library does
                    assert "\x1b[?25h" in told.getvalue()
        assert "peftc finetune" not in told.getvalue() and "training" in told.getvalue()
    finally:
        progress.set_sink(None)
