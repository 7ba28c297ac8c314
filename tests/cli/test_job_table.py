"""cli/job_table.py: many jobs on a terminal, and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from atoll.cli.job_table import job_table
from atoll.workflows import JobLine

FIRST = [JobLine("dates", "training", "loss 0.512, validation 0.600", 3, 75, 812.4, 61.0), JobLine("sql", "waiting", total_steps=40)]
LAST = [JobLine("dates", "done", "loss 0.100", 75, 75), JobLine("sql", "failed", "the loss at step 1 is nan", 0, 40)]


def test_a_log_says_who_begins_and_ends_and_now_and_then_how_far_all_are() -> None:
    """Not a line a step: eight jobs of a hundred steps would bury everything."""
    stream, now = io.StringIO(), [0.0]
    with job_table(Console(file=stream, width=120), lambda: now[0]) as table:
        table(FIRST)
        table(FIRST)
        now[0] = 11.0
        table(FIRST)
        table(LAST)
    assert stream.getvalue().splitlines() == [
        "training dates",
        "training dates: loss 0.512, validation 0.600 3/75 812 tokens/s, 1 min 1 s left",
        "done dates: loss 0.100",
        "failed sql: the loss at step 1 is nan",
    ]


def test_a_terminal_shows_every_job_and_keeps_the_last_state() -> None:
    """Names come from users: what looks like markup is shown as it is."""
    stream = io.StringIO()
    with job_table(Console(file=stream, width=120, force_terminal=True)) as table:
        table([*FIRST, JobLine("[red]", "waiting")])
        table(LAST)
    shown = stream.getvalue()
    assert all(text in shown for text in ("dates", "3/75", "812", "1 min 1 s", "[red]", "the loss at step 1 is nan"))
