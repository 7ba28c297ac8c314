"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from atoll.cli.progress import progress_bar


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False, soft_wrap=True)


def test_a_log_gets_a_line_at_the_start_every_ten_seconds_and_at_the_end(clock):
    """A job of an hour must neither fill a log nor be silent in it."""
    log = console(terminal=False)
    with progress_bar(log, clock) as progress:
        for step in range(1, 31):
            progress(f"[1/2] train dates: loss {1 / step:.2f}", step, 30)
            clock.now += 1
        progress("evaluate dates", 1, 200)
    assert log.file.getvalue().splitlines() == [
        "[1/2] train dates: loss 1.00  1/30",
        "[1/2] train dates: loss 0.09  11/30  10 s",
        "[1/2] train dates: loss 0.05  21/30  20 s",
        "[1/2] train dates: loss 0.03  30/30  30 s",
        "evaluate dates  1/200",
    ]


def test_bytes_are_shown_in_percent(clock):
    """Nobody reads 104857600/134515584."""
    log = console(terminal=False)
    with progress_bar(log, clock) as progress:
        progress("downloading", 104_857_600, 134_515_584)
    assert log.file.getvalue() == "downloading  77 %\n"


def test_a_terminal_keeps_a_line_of_each_stage_that_took_a_while(clock):
    """After a land the screen should tell what took how long, without the bars; brackets in a stage are text."""
    screen = console(terminal=True)
    with progress_bar(screen, clock) as progress:
        progress("[1/2] train dates: loss 0.90", 1, 2)
        clock.now += 61
        progress("[1/2] train dates: loss 0.50", 2, 2)
        progress("brief", 1, 1)
    assert "[1/2] train dates: loss 0.50  2/2  1 min 1 s\n" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())


def test_an_error_inside_leaves_the_terminal_as_it_was(clock):
    """A bar that is not stopped hides the cursor for good."""
    screen = console(terminal=True)
    with pytest.raises(ValueError, match="inside"), progress_bar(screen, clock) as progress:
        progress("loading", 0, 1)
        raise ValueError("inside")
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")  # show the cursor
