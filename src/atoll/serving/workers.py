"""Blocking work in threads: a bounded number at once, each for a bounded time.

A thread cannot be stopped. One that is over its time is given up: its place is free for others at once, its result is dropped, and, being a daemon,
it keeps no process from ending. So a server somewhere that hangs costs a thread, never the loading of other adapters.

Used by registry.py, lookups.py and grammars.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from atoll.errors import EngineError, QueueFull

T = TypeVar("T")
MAX_GIVEN_UP = 32  # threads over their time that may still be there


class Workers:
    """`limit` threads at once; `name` is what they are called."""

    def __init__(self, limit: int, name: str) -> None:
        self._places, self._name = asyncio.Semaphore(limit), name
        self.num_given_up = 0

    async def run(self, work: Callable[[], T], timeout_s: float, what: str) -> T:
        """What `work` returns or raises. Raises EngineError, naming `what`, after timeout_s seconds of its running."""
        async with self._places:
            if self.num_given_up >= MAX_GIVEN_UP:
                raise QueueFull(f"{what}: {self.num_given_up} others hang and were given up", hint="the server's log names them", retry_after_s=10)
            done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._work, args=(work, done, done.get_loop()), name=self._name, daemon=True).start()
            finished, _ = await asyncio.wait([done], timeout=timeout_s)
            if finished:
                return done.result()
        self.num_given_up += 1
        done.add_done_callback(self._came_back)
        raise EngineError(f"{what} took longer than {timeout_s:g} s", hint="try again later, or raise load_timeout_s")

    def _came_back(self, done: asyncio.Future[T]) -> None:
        self.num_given_up -= 1
        if not done.cancelled():
            done.exception()  # seen, so that nobody complains of it later

    @staticmethod
    def _work(work: Callable[[], T], done: asyncio.Future[T], loop: asyncio.AbstractEventLoop) -> None:
        try:
            result = work()
        except BaseException as error:
            settle: Callable[[], None] = _setter(done.set_exception, error, done)
        else:
            settle = _setter(done.set_result, result, done)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle)


def _setter(settle: Callable[[T], None], value: T, done: asyncio.Future[Any]) -> Callable[[], None]:
    return lambda: None if done.done() else settle(value)


class Turns:
    """`limit` of one key at once; whoever comes later waits, so that a key with many waits for itself and not others for it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: dict[str, asyncio.Semaphore] = {}
        self._asking = Counter[str]()

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Hold one of the key's turns."""
        self._asking[key] += 1
        try:
            async with self._places.setdefault(key, asyncio.Semaphore(self._limit)):
                yield
        finally:
            self._asking[key] -= 1
            if not self._asking[key]:
                del self._asking[key], self._places[key]
