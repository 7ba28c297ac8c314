"""Coroutines that nobody waits for: kept alive until they end or the service stops, and what they raise is logged.

Used by service.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from atoll.errors import AtollError

_log = logging.getLogger(__name__)


class Background:
    """Runs coroutines on the event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """End all that still runs."""
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            is_ours = isinstance(error, AtollError)
            _log.error("background work failed%s", f": {error}" if is_ours else "", exc_info=None if is_ours else error)
