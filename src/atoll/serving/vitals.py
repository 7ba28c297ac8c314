"""Is the server well? A thread that is alive may still have stopped working: its engine hangs in a step, or fails whatever it is asked.

Used by service.py; the health routes ask it.
"""

from __future__ import annotations

import time
from collections import deque

from atoll.engine.request import FinishReason


class Vitals:
    """Counts outcomes. stuck_s: seconds without a step that are too many. failing: so many failures in a row are too many; 0 never are.

    Failures count for stuck_s seconds: a server that is asked nothing any more, because it said that it was ill, has to be tried again.
    """

    def __init__(self, stuck_s: float, failing: int) -> None:
        self._stuck_s, self._failing = stuck_s, failing
        self._failed_at = deque[float](maxlen=max(1, failing))  # of the last requests in a row that failed

    def ended(self, reason: FinishReason) -> None:
        """A request ended; one that was cancelled proves nothing."""
        if reason == "error":
            self._failed_at.append(time.monotonic())
        elif reason != "cancelled":
            self._failed_at.clear()

    def trouble(self, stalled_s: float) -> str:
        """What is wrong, "" for nothing. stalled_s: seconds for which the engine has had work and made no step."""
        if stalled_s > self._stuck_s:
            return f"the engine has made no step for {stalled_s:.0f} s"
        if self._failing and len(self._failed_at) == self._failing and time.monotonic() - self._failed_at[-1] < self._stuck_s:
            return f"the last {self._failing} requests all failed"
        return ""
