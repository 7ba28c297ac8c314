"""How much of the processor went to others while a measurement ran.

Two threads that meet at a barrier hundreds of times a step become many times slower when a third process takes one of two cores, and a hypervisor may
take them too. So every measurement is printed with what it did not get.

Used by workers.py. Linux only; elsewhere nothing is known and nothing is claimed.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_PROC = Path("/proc")


class Watch:
    """Started before a measurement; `foreign_cores` after it."""

    def __init__(self, process_group: int) -> None:
        self._group, self._started = process_group, time.monotonic()
        self._busy, self._own = _busy_s(), _group_s(process_group)

    def foreign_cores(self) -> float | None:
        """Cores' worth of time that went to other processes or was stolen by the hypervisor, on average since the start; None if not known."""
        if self._busy is None:
            return None
        busy, own, seconds = _busy_s(), _group_s(self._group), time.monotonic() - self._started
        assert busy is not None
        return max(0.0, round((busy - self._busy - (own - self._own)) / seconds, 3))


def _busy_s() -> float | None:
    """Seconds all cores together have been busy or stolen since boot."""
    stat = _PROC / "stat"
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _group_s(group: int) -> float:
    """Processor seconds of a process group's living members."""
    ticks = 0
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended in between
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
