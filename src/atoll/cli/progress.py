"""Show how far long work is, on stderr.

The library tells `progress(stage, done, total)` and knows nothing of terminals. On one, a bar moves and each finished stage leaves a line; elsewhere
(a log file, CI) a line is written when a stage begins, every ten seconds, and when it ends. What stands after the first colon of a stage (the loss)
may change from call to call without beginning a new stage.

Used by every command that loads a base, trains or evaluates: `with progress_bar() as progress: work(progress=progress)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atoll.cli.output import clean, duration, messages

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]
EVERY_S = 10.0  # seconds between lines where there is no terminal
MANY = 100_000  # totals above this are bytes rather than things to count: shown in percent
BRIEF_S = 1.0  # a stage shorter than this leaves no line at its end


@contextmanager
def progress_bar(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """A `progress` function for the library; the bar is gone at the end, the lines of finished stages stay."""
    console = console or messages()
    display = _Bar(console, clock) if console.is_terminal else _Lines(console, clock)
    try:
        yield display
    finally:
        display.close()


class _Stages:
    """Tells stages apart: keeps the last report of the stage at hand, and calls `begin`, `show` and `end`."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._name: str | None = None
        self._text, self._done, self._total = "", 0, 0
        self._started = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.partition(":")[0]
        new = name != self._name
        if new:
            self._finish()
            self._name, self._started = name, self._clock()
        self._text, self._done, self._total = clean(" ".join(stage.split())), done, total
        self.show(new)

    def close(self) -> None:
        self._finish()

    def show(self, new: bool) -> None:
        """The stage at hand has got on; `new`: it has just begun."""

    def end(self) -> None:
        """The stage at hand is over."""

    @property
    def _seconds(self) -> float:
        return self._clock() - self._started

    def _finish(self) -> None:
        if self._name is not None:
            self.end()
        self._name = None

    def _line(self) -> str:
        """`train dates: loss 0.512  75/75  38 s`."""
        took = duration(self._seconds) if self._seconds >= BRIEF_S else ""
        return "  ".join(part for part in (self._text, self._count(), took) if part)

    def _count(self) -> str:
        if self._total > MANY:
            return f"{100 * self._done // self._total} %"
        return f"{self._done}/{self._total}" if self._total > 1 else ""


class _Lines(_Stages):
    """For logs: a line at the beginning of a stage, every EVERY_S seconds, and at its end."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console, clock)
        self._written_at = 0.0
        self._written = ("", 0, 0)

    def show(self, new: bool) -> None:
        if new or self._clock() - self._written_at >= EVERY_S:
            self._write()

    def end(self) -> None:
        if self._seconds >= BRIEF_S and self._written != (self._text, self._done, self._total):
            self._write()

    def _write(self) -> None:
        self._written_at, self._written = self._clock(), (self._text, self._done, self._total)
        self._console.print(self._line())


class _Bar(_Stages):
    """For terminals: one moving bar, and above it a line for each stage that took a while."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(console, clock)
        text, count = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[count]}")
        self._bar = RichProgress(text, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", visible=False, count="")
        self._bar.start()

    def show(self, new: bool) -> None:
        if new:
            self._bar.reset(self._task)
        self._bar.update(self._task, description=self._text, completed=self._done, total=self._total or None, visible=True, count=self._count())

    def end(self) -> None:
        from rich.text import Text

        self._bar.update(self._task, visible=False)
        if self._seconds >= BRIEF_S:
            self._console.print(Text(self._line(), style="dim"))

    def close(self) -> None:
        super().close()
        self._bar.stop()
