"""Show many training jobs on stderr: on a terminal a table that moves, elsewhere a line when a job begins or ends, and one of all every ten seconds.

Used by `atoll train` with several files and by `atoll land`: `with job_table() as table: work(table=table)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from atoll.cli.output import clean, duration, messages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from atoll.workflows import JobLine

EVERY_S = 10.0  # seconds between lines where there is no terminal
MOST_ROWS = 30  # of a table: what waits or has ended gives way to what trains
_ORDER = {"training": 0, "failed": 1, "cancelled": 2, "waiting": 3, "done": 4, "found": 5}

Table = Callable[[Sequence["JobLine"]], None]


@contextmanager
def job_table(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Table]:
    """A `table` function for train_many and land. The last state of a moving table stays on the screen."""
    console = console or messages()
    display = _Moving(console) if console.is_terminal else _Lines(console, clock)
    try:
        yield display
    finally:
        display.close()


class _Moving:
    """For terminals: on the screen from the first job's line until no job waits or trains any more, so that other bars have it to themselves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def __call__(self, lines: Sequence[JobLine]) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(_as_table(lines), refresh=True)
        if all(line.state not in ("waiting", "training") for line in lines):
            self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None


def _as_table(lines: Sequence[JobLine]) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable("adapter", "", "step", "losses", "tokens/s", "left", box=None, pad_edge=False)
    shown = sorted(lines, key=lambda line: _ORDER[line.state])[:MOST_ROWS]
    for line in shown:
        training = line.state == "training"
        table.add_row(
            Text(clean(line.name)),
            line.state,
            f"{line.step}/{line.total_steps}" if line.step else "",
            Text(clean(line.headline)),
            f"{line.tokens_per_s:.0f}" if training else "",
            duration(line.seconds_left) if training and line.seconds_left is not None else "",
        )
    if len(shown) < len(lines):
        table.add_row(f"… {len(lines) - len(shown)} more", "", "", "", "", "")
    return table


class _Lines:
    """For logs."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._states: dict[str, str] = {}
        self._written_at = clock()

    def __call__(self, lines: Sequence[JobLine]) -> None:
        for line in lines:
            if self._states.get(line.name, "waiting") != line.state:
                self._states[line.name] = line.state
                self._print(f"{line.state} {line.name}" + (f": {line.headline}" if line.headline and line.state != "training" else ""))
        training = [line for line in lines if line.state == "training"]
        if training and self._clock() - self._written_at >= EVERY_S:
            self._written_at = self._clock()
            for line in training:
                left = f", {duration(line.seconds_left)} left" if line.seconds_left else ""
                self._print(f"training {line.name}: {line.headline}  {line.step}/{line.total_steps}  {line.tokens_per_s:.0f} tokens/s{left}")

    def close(self) -> None:
        """Nothing is left to write."""

    def _print(self, text: str) -> None:
        self._console.print(clean(" ".join(text.split())), markup=False, highlight=False)
