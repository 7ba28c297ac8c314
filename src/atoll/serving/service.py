"""The service: one base, its adapters and one continuous batch, for any number of callers at once.

    open ──► Served ──► generate / stream / score / embed ──► admission ──► engine thread ──► events ──► ticket of each request

Admission comes first: a request beyond the limits is refused before anything is queued. A request that was admitted holds its adapter and its place
until the engine has said its last word, whatever becomes of the client. Draining admits nothing and lets the rest finish.

Used by server/ and `atoll serve`. Everything is called on one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.engine.request import Completion, EmbedRequest, Limits, Request, ScoreRequest, TokenEvent
from atoll.errors import AtollError, EngineError
from atoll.serving.admission import Places
from atoll.serving.background import Background
from atoll.serving.engine_thread import Batch, EngineThread
from atoll.serving.entries import AdapterRef, Served, TimedOut, Unavailable
from atoll.serving.grammars import Grammars
from atoll.serving.keys import Caller, Keys
from atoll.serving.observer import Kind, Observer
from atoll.serving.operator import Operator
from atoll.serving.registry import AdapterRegistry
from atoll.serving.tickets import Ticket, TokenStream
from atoll.serving.vitals import Vitals

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.engine.jobs import Job
    from atoll.hub.store import Hub
    from atoll.model.base import Base
    from atoll.serving.config import ServeConfig

__all__ = ["AdapterRef", "Caller", "Served", "Service", "TokenStream", "Unavailable"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Service:
    """Serves `base` and the adapters of `hub` and the configured sources. `observers` are told of requests and loads."""

    def __init__(self, base: Base, config: ServeConfig, hub: Hub | None = None) -> None:
        self.base, self.config, self.hub = base, config, hub
        self.keys = Keys(config.keys_file, allow_anonymous=config.allow_anonymous)
        self.observers: list[Observer] = []
        self.registry = AdapterRegistry(base, config, hub, self.run, self.observers)
        self.operator = Operator(self)
        self.limits = Limits(base.decoder.shape.vocabulary, config.engine.row_tokens(base.context_length))
        self.kernel = ""  # the forward that computes, once it is chosen
        self.ready = self.draining = False
        self.failed: AtollError | None = None
        self.started_at = time.time()
        self.counts = Counter[str]()  # requests since the start, by how they ended; refusals by class
        self._thread: EngineThread | None = None
        self._grammars: Grammars  # once there is an engine
        self._vitals = Vitals(config.stuck_s, config.failing_requests)
        self._tickets: dict[str, Ticket] = {}
        self._numbers = itertools.count(1)
        self.places = Places(config.max_concurrent_requests, config.per_key_requests)
        self._background = Background()
        self._stop_at = math.inf
        self._stopping: asyncio.Task[None] | None = None

    # ---- life ----

    async def start(self) -> None:
        """Make the engine, load what is preloaded, and begin to load what was pinned. Raises what preloading raises. Starting twice is harmless."""
        if self._thread is not None:
            return
        from atoll.engine.engine import Engine

        self._thread = EngineThread(lambda: Engine(self.base, self.config.engine), self._deliver, self._crashed)
        try:
            await self._thread.start()
            self.limits, self.kernel, compiler, self.registry.loader.pack = await self.run(
                lambda engine: (engine.limits, engine.kernel, engine.grammars, engine.pack)
            )
            self._grammars = Grammars(compiler)
            await self.operator.preload()
        except BaseException:
            self.draining = True
            await self._thread.stop()
            raise
        self.spawn(self.operator.restore())
        self.spawn(self._grammars.warm_up())
        self.ready = True

    def drain(self) -> None:
        """Admit nothing more from now on; what runs goes on. `stop` ends it."""
        self.draining, self.ready = True, False

    async def stop(self, drain_s: float | None = None) -> None:
        """Admit nothing more, give what runs drain_s seconds (default: the config's), cancel the rest, end the engine's thread.

        Called again while it waits, it waits no longer than the shorter of the two.
        """
        self.drain()
        if self._thread is None:
            return
        self._stop_at = min(self._stop_at, time.monotonic() + (self.config.drain_s if drain_s is None else drain_s))
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(self._thread))
        await asyncio.shield(self._stopping)

    async def _stop(self, thread: EngineThread) -> None:
        while self.places.taken and time.monotonic() < self._stop_at and self.failed is None:
            await asyncio.sleep(0.02)
        for ticket in list(self._tickets.values()):
            self.counts["cut"] += 1
            thread.cancel(ticket.request_id)
        self._background.cancel()
        await thread.stop()
        self._end_all("the server stopped")

    # ---- requests ----

    async def open(self, ref: AdapterRef, caller: Caller) -> Served:
        """The adapter that `ref` means, ready to be asked; see AdapterRegistry.open. Raises Unavailable and QueueFull too.

        Waiting for an adapter takes a place like waiting for the engine, and no longer than a request may take.
        """
        self._check_up()
        self.places.take(1, caller)
        try:
            async with self._in_time("the adapter was not ready"):
                return await self.registry.open(ref, caller)
        finally:
            self.places.give_back(1, caller, done=False)

    async def generate(self, requests: Sequence[Request], caller: Caller) -> list[Completion]:
        """Answer requests side by side; completions in their order. If this is cancelled, or one is refused, all are cancelled within a step.

        Raises QueueFull, RequestRefused and Unavailable; a request that fails later has finish_reason "error".
        """
        tickets = self._admit(requests, caller, "generate")
        try:
            for ticket in tickets:
                self._begin(ticket)
            return [await ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                self._cancel(ticket)

    def stream(self, request: Request, caller: Caller) -> TokenStream:
        """The events of one request as they come. What can be refused at once is refused here; `TokenStream.accepted` tells of the rest."""
        [ticket] = self._admit([request], caller, "stream")
        self._begin(ticket)
        return TokenStream(ticket, self._cancel)

    async def score(self, items: Sequence[ScoreRequest], caller: Caller) -> list[list[float]]:
        """Log-probabilities, see Engine.score; computed beside everything else. Raises as `generate` does, and EngineError."""
        return await self._job(lambda engine, asked: engine.begin_score(asked), items, caller, "score")

    async def embed(self, items: Sequence[EmbedRequest], caller: Caller) -> list[list[float]]:
        """Pooled hidden states, see Engine.embed; computed beside everything else. Raises as `score` does."""
        return await self._job(lambda engine, asked: engine.begin_embed(asked), items, caller, "embed")

    async def run(self, fn: Callable[[Engine], T]) -> T:
        """Run something short on the engine's thread, between two steps."""
        if self._thread is None:
            raise Unavailable("the server has not started yet")
        return await self._thread.call(fn)

    # ---- what it says of itself ----

    @property
    def healthy(self) -> bool:
        """Whether requests may be sent here: it is ready, and its engine works and succeeds."""
        return self.ready and self.failed is None and self._thread is not None and not self._vitals.trouble(self._thread.stalled_s)

    @property
    def max_total_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        return min(self.limits.row_tokens, self.config.max_total_tokens or self.limits.row_tokens)

    @property
    def max_input_tokens(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.max_total_tokens - 1, self.config.max_input_tokens or self.max_total_tokens - 1)

    @property
    def tokens_admitted(self) -> int:
        """Tokens that the requests at hand may have together, prompts and answers."""
        return sum(len(ticket.request.prompt_ids) + self.limits.max_new_tokens(ticket.request) for ticket in self._tickets.values())

    def stats(self) -> dict[str, Any]:
        """Counts of the service and, under "engine", of the engine, a quarter of a second old at most."""
        return {
            "ready": self.ready,
            "draining": self.draining,
            "active_requests": self.places.taken,
            "loading_adapters": self.registry.num_loading,
            "uptime_s": time.time() - self.started_at,
            **{f"requests_{name}": count for name, count in self.counts.items()},
            "engine": dict(self._thread.stats) if self._thread is not None else {},
        }

    def spawn(self, work: Any) -> None:
        """Run a coroutine in the background until the service stops; what it raises is logged."""
        self._background.spawn(work)

    # ---- admission ----

    def _check_up(self) -> None:
        if self.failed is not None:
            raise Unavailable(self.failed.message, hint=self.failed.hint)
        if self.draining:
            raise Unavailable("the server is stopping", hint="ask another one, or later")
        if self._thread is None:
            raise Unavailable("the server has not started yet", hint="ask again in a moment")

    def _admit(self, requests: Sequence[Request], caller: Caller, kind: Kind) -> list[Ticket]:
        """Tickets for requests that fit and find room. Nothing is queued yet."""
        with self._refusals(kind):
            self._check_up()
            caller.require("infer")
            for request in requests:
                self.limits.check(request)
            self.places.take(len(requests), caller)
        deadline = self.config.request_timeout_s
        return [
            Ticket(
                replace(
                    request,
                    request_id=f"s{next(self._numbers)}",
                    scope=caller.key_id,
                    deadline_s=deadline if request.deadline_s is None else min(deadline, request.deadline_s),
                ),
                caller,
                kind,
            )
            for request in requests
        ]

    @contextmanager
    def _refusals(self, kind: Kind) -> Iterator[None]:
        """Count what is refused."""
        try:
            yield
        except AtollError as error:
            self._count_refusal(kind, error)
            raise

    def _count_refusal(self, kind: Kind, error: AtollError) -> None:
        self.counts[f"refused_{type(error).__name__}"] += 1
        for observer in self.observers:
            observer.refused(kind, error)

    # ---- a request's way ----

    def _begin(self, ticket: Ticket) -> None:
        """Queue an admitted request with the engine; at once, unless its grammar is new or its adapter was unloaded since the request opened it."""
        self._tickets[ticket.request_id] = ticket
        grammar = ticket.request.sampling.grammar
        if self.registry.is_ready(ticket.request.adapter) and (grammar is None or self._grammars.knows(grammar)):
            self._queue(ticket)
        else:
            self.spawn(self._begin_later(ticket))

    async def _begin_later(self, ticket: Ticket) -> None:
        request, grammar = ticket.request, ticket.request.sampling.grammar
        try:
            if grammar is not None:
                await self._grammars.check(grammar, request.scope)
            if request.adapter is not None and not self.registry.is_ready(request.adapter):
                await self.registry.again(request.adapter)
        except AtollError as error:
            self._refuse(ticket, error)
        else:
            if not ticket.is_done:
                self._queue(ticket)

    def _queue(self, ticket: Ticket) -> None:
        assert self._thread is not None
        self.registry.hold(ticket.request.adapter)
        ticket.holds = True
        self._tell_accepted(ticket.kind, ticket.request.adapter)
        self._thread.add(ticket.request, tokens=ticket.kind == "stream")

    def _tell_accepted(self, kind: Kind, key: str | None) -> None:
        for observer in self.observers:
            observer.accepted(kind, self.registry.name_of(key))

    def _cancel(self, ticket: Ticket) -> None:
        """End a request that is not done; its place is free when the engine has let go of it."""
        if ticket.is_done or self._thread is None:
            return
        if ticket.holds:
            self._thread.cancel(ticket.request_id)
        else:  # it never reached the engine
            self._refuse(ticket, EngineError("the request was cancelled"))

    def _deliver(self, batch: Batch) -> None:
        """What a step brought, to those who wait for it. Called on the event loop, once a step."""
        tickets = self._tickets
        for event in batch.events:
            if (ticket := tickets.get(event.request_id)) is None:
                continue
            ticket.events.append(event)
            if event.completion is not None:
                self._finish(ticket, event.completion)
            ticket.wake()
        for request_id, error in batch.refused:
            if (ticket := tickets.get(request_id)) is not None:
                self._refuse(ticket, error)
        if batch.steps_s:
            for observer in self.observers:
                observer.stepped(batch.steps_s)

    def _finish(self, ticket: Ticket, completion: Completion) -> None:
        ticket.completion = completion
        self._let_go(ticket)
        self.counts[completion.finish_reason] += 1
        self._vitals.ended(completion.finish_reason)
        if (entry := self.registry.entries.get(completion.adapter or "")) is not None:
            entry.counters.count(completion)
        for observer in self.observers:
            observer.finished(ticket.kind, self.registry.name_of(completion.adapter), time.monotonic() - ticket.started, completion)

    def _refuse(self, ticket: Ticket, error: AtollError) -> None:
        if ticket.is_done:
            return
        ticket.error = error
        self._let_go(ticket)
        self._count_refusal(ticket.kind, error)
        ticket.wake()

    def _let_go(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request_id]
        if ticket.holds:
            self.registry.release(ticket.request.adapter)
        self.places.give_back(1, ticket.caller)

    # ---- scores and embeddings ----

    async def _job(self, begin: Callable[[Engine, Any], Job[T]], items: Sequence[Any], caller: Caller, kind: Kind) -> list[T]:
        """One job of the engine over the items, which holds their adapters and a place for each."""
        with self._refusals(kind):
            self._check_up()
            caller.require("infer")
            self.places.take(len(items), caller)
            started, held = time.monotonic(), list[str | None]()
            try:
                for key in {item.adapter for item in items}:
                    if not self.registry.is_ready(key):
                        await self.registry.again(key)
                    self.registry.hold(key)
                    held.append(key)
                    self._tell_accepted(kind, key)
                asked = [replace(item, scope=caller.key_id) for item in items]
                async with self._in_time("the request was not done"):
                    assert self._thread is not None
                    found = await self._thread.job(lambda engine: begin(engine, asked))
            finally:
                for key in held:
                    self.registry.release(key)
                self.places.give_back(len(items), caller)
        for key in held:
            for observer in self.observers:
                observer.finished(kind, self.registry.name_of(key), time.monotonic() - started, None)
        self.counts[kind] += len(items)
        return found

    @asynccontextmanager
    async def _in_time(self, what: str) -> AsyncIterator[None]:
        """Raise TimedOut if what is done here takes longer than a request may."""
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                yield
        except TimeoutError:
            raise TimedOut(f"{what} within {self.config.request_timeout_s:g} s", hint="ask for less at once, or later") from None

    # ---- the end ----

    def _crashed(self, error: BaseException) -> None:
        """The engine's thread died: nobody may wait for it, and the health check must say so."""
        _log.critical("the engine died; this server answers 503 until it is restarted", exc_info=error)
        self.failed = EngineError(f"the engine died of {type(error).__name__}", hint="restart the server; its log says what happened")
        self.ready = False
        self._end_all(self.failed.message)

    def _end_all(self, why: str) -> None:
        """End every request that still waits, with an error."""
        for ticket in list(self._tickets.values()):
            request = ticket.request
            completion = Completion(ticket.request_id, request.adapter, len(request.prompt_ids), (), "", "error", error=why)
            ticket.events.append(TokenEvent(ticket.request_id, None, "", completion=completion))
            self._finish(ticket, completion)
            ticket.wake()
