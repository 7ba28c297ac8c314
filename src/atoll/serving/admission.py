"""How many requests there may be at once, in all and of one key: the queue in front of the engine is bounded, and no key fills it alone.

Used by service.py.
"""

from __future__ import annotations

import time
from collections import Counter

from atoll.errors import QueueFull, RequestRefused
from atoll.serving.keys import Caller

MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0


class Places:
    """Places for requests that run or wait."""

    def __init__(self, limit: int, limit_per_key: int) -> None:
        self._limit, self._limit_per_key = limit, limit_per_key
        self._by_key = Counter[str]()
        self._between_s = MIN_RETRY_S  # mean seconds between two places that come free, smoothed
        self._last = time.monotonic()
        self.taken = 0

    def take(self, num: int, caller: Caller) -> None:
        """Take `num` places, all or none. Raises QueueFull, which says when to ask again; RequestRefused for more than there ever are."""
        self.check(num)
        own = self._by_key[caller.key_id]
        if own + num > self._limit_per_key:
            raise QueueFull(
                f"this key has {own} requests running or waiting and asks for {num} more; {self._limit_per_key} are allowed",
                hint="wait until some have ended",
                retry_after_s=self._retry_after_s,
            )
        if self.taken + num > self._limit:
            raise QueueFull("Model is overloaded", hint="try again later", retry_after_s=self._retry_after_s)
        self.taken += num
        self._by_key[caller.key_id] += num

    def check(self, num: int) -> None:
        """Raise RequestRefused for more places than one key can ever have."""
        most = min(self._limit, self._limit_per_key)
        if num > most:
            raise RequestRefused(f"the request asks for {num} answers at once, but {most} are allowed", hint="ask for less in one request")

    def give_back(self, num: int, caller: Caller, *, done: bool = True) -> None:
        """Free places. done: what took them has run, which tells how fast the queue moves."""
        self.taken -= num
        self._by_key[caller.key_id] -= num
        if not self._by_key[caller.key_id]:
            del self._by_key[caller.key_id]
        if not done:
            return
        now = time.monotonic()
        self._between_s += 0.1 * (min(now - self._last, MAX_RETRY_S) - self._between_s)
        self._last = now

    @property
    def _retry_after_s(self) -> float:
        return max(MIN_RETRY_S, min(MAX_RETRY_S, self._between_s))
