"""What a server may not keep: requests, holds, places, pages, tasks, files, and ever more memory.

Plain functions of what process.py measured and what child.py told; each gives sentences, one a finding. Used by soak.py.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from soaking.process import Usage

MAX_GROWTH = 32 << 20  # anonymous bytes between the middle and the end: allocators and caches are never quite done
MAX_NEW_FILES = 24  # open files: the pool of connections to the hub's index
ADAPTERS_APART = 4  # being read, packed or merged at that moment: in memory, and not yet or no longer counted
MIN_SAMPLES = 8

OWN = ("tickets", "places", "keys_with_places", "holds", "users", "loading", "looking", "given_up")
ENGINE = ("running", "waiting", "adapters_in_use")


def left_behind(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is held at rest, when nobody is inside any more. before, after: looks without traffic."""
    stats = after["stats"]
    held = {**{name: after[name] for name in OWN}, **{name: stats[name] for name in ENGINE}, "pages": stats["pages_total"] - stats["pages_free"]}
    tasks = Counter(after["task_names"]) - Counter(before["task_names"])
    return [f"left behind: {value} {name}" for name, value in held.items() if value] + [f"left behind: {n} tasks {name}" for name, n in tasks.items()]


def left_at_end(look: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """The same after the server has stopped; files: those in its temporary folder."""
    held = {**{name: look[name] for name in ("tickets", "places")}, **{name: look["stats"][name] for name in ("running", "waiting")}}
    found = [f"after the end: {value} {name}" for name, value in held.items() if value]
    return found + ([f"temporary files are left: {', '.join(files[:8])}"] if files else [])


def log_problems(text: str) -> list[str]:
    """Lines of the log that tell of a mistake of ours; what clients and damaged adapters cause is a warning."""
    return [line for line in text.splitlines() if "Traceback" in line or any(f" {level} " in line[:24] for level in ("error", "critical"))]


def growth(samples: Sequence[tuple[float, Usage]], adapters: Sequence[tuple[float, int]], adapter_bytes: int) -> dict[str, Any]:
    """Anonymous bytes of the middle and of the end (medians of an eighth of the samples each), and open files; {} for too few samples.

    adapters: (seconds, bytes of the adapters that the server says it holds); what they grew by is no leak. adapter_bytes: the largest one's.
    """
    if len(samples) < MIN_SAMPLES:
        return {}
    eighth, middle = len(samples) // 8, len(samples) // 2
    anonymous = [usage.anonymous_bytes for _, usage in samples]
    at_middle, at_end = statistics.median(anonymous[middle : middle + eighth]), statistics.median(anonymous[-eighth:])
    times = [at for at, _ in samples]
    held = _held_at(adapters, times[-1]) - _held_at(adapters, times[middle])
    unexplained = at_end - at_middle - max(0, held)
    files = [usage.num_files for _, usage in samples]
    return {
        "middle_mb": round(at_middle / 1e6, 1),
        "end_mb": round(at_end / 1e6, 1),
        "growth_mb": round((at_end - at_middle) / 1e6, 1),
        "adapters_grew_mb": round(held / 1e6, 1),
        "resident_mb": round(samples[-1][1].resident_bytes / 1e6, 1),
        "files": [files[0], files[-1]],
        "bounded": unexplained <= MAX_GROWTH + ADAPTERS_APART * adapter_bytes and files[-1] - files[0] <= MAX_NEW_FILES,
    }


def _held_at(adapters: Sequence[tuple[float, int]], at: float) -> int:
    """The last count that is not later."""
    return next((held for when, held in reversed(adapters) if when <= at), 0)
