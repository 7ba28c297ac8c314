"""The one thread that owns the engine: whatever is asked of it arrives as a command, and what came of a step goes to the event loop in one call.

    event loop ── add, cancel, call ──► queue ──► this thread: commands, then Engine.step ── events of the step ──► event loop

Commands keep their order, so a cancel always finds its request. Scores and embeddings are the engine's jobs, which it computes a batch a step beside
everything else. Nothing here knows of HTTP, callers or adapters.

Used by service.py alone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.engine.request import Request, TokenEvent
from atoll.errors import AtollError, EngineError
from atoll.serving.entries import Unavailable

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.engine.jobs import Job

T = TypeVar("T")
Command = Callable[["Engine"], None]
STATS_EVERY_S = 0.25  # how old the engine's counts may get while it computes

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """What a step brought: events in order, requests that were refused with their errors, and the seconds of the steps since the last batch."""

    events: list[TokenEvent] = field(default_factory=list)
    refused: list[tuple[str, AtollError]] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)


class EngineThread:
    """Runs an engine. Made, started and called on the event loop; `deliver` and `crashed` are called there too."""

    def __init__(self, make: Callable[[], Engine], deliver: Callable[[Batch], None], crashed: Callable[[BaseException], None]) -> None:
        self._make, self._deliver, self._crashed = make, deliver, crashed
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._jobs: list[tuple[Job[Any], asyncio.Future[Any]]] = []
        self._calls: set[asyncio.Future[Any]] = set()  # what the event loop waits for
        self._streaming: set[str] = set()  # requests whose every token is wanted; of the others only the last event is
        self._refused: list[tuple[str, AtollError]] = []
        self._steps_s: list[float] = []
        self._stopping = False
        self._started, self._ended = self._loop.create_future(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="atoll-engine", daemon=True)
        self._stats_at = 0.0
        self.stats: dict[str, int] = {}  # replaced whole, so that any thread may read it
        self._working_since: float | None = None  # the last step's end, or when work came; None: there is none
        self.dead: BaseException | None = None  # why there is no engine any more

    @property
    def stalled_s(self) -> float:
        """Seconds for which there has been work and no step has ended."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    async def start(self) -> None:
        """Make the engine on its thread; raises what making it raised."""
        self._thread.start()
        await self._started

    def add(self, request: Request, *, tokens: bool) -> None:
        """Queue a request that has an id. tokens: deliver every event, not the last alone."""

        def command(engine: Engine) -> None:
            assert request.request_id is not None
            try:
                engine.add(request)
            except AtollError as error:
                self._refused.append((request.request_id, error))
            except Exception as error:  # a bug of ours that one request met must not end the others
                _log.exception("request %s could not be queued", request.request_id)
                self._refused.append((request.request_id, EngineError(f"the request could not be queued: {type(error).__name__}")))
            else:
                if tokens:
                    self._streaming.add(request.request_id)

        self._commands.put(command)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; its last event still comes."""
        self._commands.put(lambda engine: _ignore(engine.cancel(request_id)))

    async def call(self, fn: Callable[[Engine], T]) -> T:
        """Run `fn`, which is short, between two steps; return what it returned or raise what it raised."""
        result: T = await self._asked(lambda engine, future: self._resolve(future, fn(engine)))
        return result

    async def job(self, begin: Callable[[Engine], Job[T]]) -> list[T]:
        """The results of a job that `begin` gave to the engine. Cancelling this ends the job before its next batch."""
        results: list[T] = await self._asked(lambda engine, future: self._jobs.append((begin(engine), future)))
        return results

    async def _asked(self, ask: Callable[[Engine, asyncio.Future[Any]], None]) -> Any:
        """Run `ask` on the thread, with the future that it, or what it began, settles."""
        if self.dead is not None:
            raise _gone(self.dead)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.add(future)

        def command(engine: Engine) -> None:
            if future.cancelled():
                return
            try:
                ask(engine, future)
            except AtollError as error:
                self._reject(future, error)
            except Exception as error:
                self._reject(future, error)
                engine.check()  # a bug of ours: go on only if nothing leaked

        self._commands.put(command)
        try:
            return await future
        finally:
            self._calls.discard(future)

    async def stop(self) -> None:
        """End the thread when it has nothing left to compute. Cancel first what should not be finished."""

        def command(engine: Engine) -> None:
            self._stopping = True

        self._commands.put(command)
        await self._ended.wait()
        self._thread.join()

    # ---- on the thread ----

    def _run(self) -> None:
        error: BaseException = EngineError("the engine was stopped")
        try:
            engine = self._make()
            self._resolve(self._started, None)
            while not (self._stopping and not engine.has_work):
                self._take_commands(engine)
                if engine.has_work:
                    self._step(engine)
                elif self._refused:
                    self._post(Batch(refused=self._refused))
                    self._refused = []
        except BaseException as problem:
            error = problem
        self.dead = error
        self._call_soon(self._end, error)

    def _take_commands(self, engine: Engine) -> None:
        """Run all commands that are there; wait for one when there is nothing else to do."""
        idle = not engine.has_work and not self._refused
        if idle:
            self._count(engine)
            self._working_since = None
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return
            if idle:
                idle, self._working_since = False, time.monotonic()
            command(engine)
            if self._stopping:
                return

    def _step(self, engine: Engine) -> None:
        started = time.perf_counter()
        events = engine.step()
        if self._jobs:
            self._settle_jobs(engine)
        ended, self._working_since = time.perf_counter(), time.monotonic()
        self._steps_s.append(ended - started)
        streaming = self._streaming
        wanted = [event for event in events if event.completion is not None or event.request_id in streaming]
        for event in wanted:
            if event.completion is not None:
                streaming.discard(event.request_id)
        if wanted or self._refused:
            if ended - self._stats_at > STATS_EVERY_S:
                self._count(engine)
            self._post(Batch(wanted, self._refused, self._steps_s))
            self._refused, self._steps_s = [], []

    def _settle_jobs(self, engine: Engine) -> None:
        """Hand over what has finished, end what nobody waits for any more."""
        left = []
        for job, future in self._jobs:
            if future.cancelled():
                engine.cancel_job(job)
            elif not job.finished:
                left.append((job, future))
            else:
                try:
                    self._resolve(future, job.result())
                except Exception as error:
                    self._reject(future, error)
        self._jobs = left

    def _count(self, engine: Engine) -> None:
        self.stats, self._stats_at = engine.stats(), time.perf_counter()

    def _post(self, batch: Batch) -> None:
        self._call_soon(self._deliver, batch)

    def _resolve(self, future: asyncio.Future[T], result: T) -> None:
        self._call_soon(lambda: None if future.done() else future.set_result(result))

    def _reject(self, future: asyncio.Future[Any], error: Exception) -> None:
        self._call_soon(lambda: None if future.done() else future.set_exception(error))

    def _call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop was closed first: nobody is left to be told
            _log.debug("the event loop is closed")

    # ---- on the event loop ----

    def _end(self, error: BaseException) -> None:
        """The thread has ended: nobody may wait for it any longer."""
        self._ended.set()
        if not self._started.done():
            self._started.set_exception(error)
            return
        for future in self._calls:
            if not future.done():
                future.set_exception(_gone(error))
        if not self._stopping:
            self._crashed(error)


def _gone(error: BaseException) -> Unavailable:
    what = error.message if isinstance(error, AtollError) else f"it met a bug ({type(error).__name__}: {error})"
    return Unavailable(f"the engine does not run any more: {what}", hint="restart the server; its log says what happened")


def _ignore(result: object) -> None:
    """For a command whose result nobody waits for."""
