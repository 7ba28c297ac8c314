"""One request between the event loop and the engine: a Ticket; and TokenStream, the iterator of its events.

A ticket ends exactly once, with a completion or an error, whatever becomes of its client: what it holds is given back then, not when somebody reads.

Used by service.py; routes see TokenStream.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from atoll.engine.request import Completion, Request, TokenEvent
from atoll.errors import AtollError
from atoll.serving.entries import fresh
from atoll.serving.keys import Caller
from atoll.serving.observer import Kind


@dataclass(eq=False)
class Ticket:
    """A request that was admitted. events: those that nobody has read yet; waiter: who waits for the next."""

    request: Request
    caller: Caller
    kind: Kind
    started: float = field(default_factory=time.monotonic)
    events: deque[TokenEvent] = field(default_factory=deque)
    completion: Completion | None = None
    error: AtollError | None = None
    waiter: asyncio.Future[None] | None = None
    holds: bool = False

    @property
    def request_id(self) -> str:
        assert self.request.request_id is not None
        return self.request.request_id

    @property
    def is_done(self) -> bool:
        return self.completion is not None or self.error is not None

    def wake(self) -> None:
        """Tell whoever waits that something has come."""
        if self.waiter is not None:
            if not self.waiter.done():
                self.waiter.set_result(None)
            self.waiter = None

    async def wait(self) -> None:
        """Until the next `wake`."""
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    async def result(self) -> Completion:
        """The completion. Raises what the engine refused the request with."""
        while not self.is_done:
            await self.wait()
        if self.error is not None:
            raise fresh(self.error)
        assert self.completion is not None
        return self.completion


class TokenStream(AsyncIterator[TokenEvent]):
    """The events of one request; the last carries the completion. Closing it, or its being garbage, cancels the request within a step.

    `async for event in stream` gives them one at a time; `next_events` gives all that have come, which costs a slow reader less.
    """

    def __init__(self, ticket: Ticket, cancel: Callable[[Ticket], None]) -> None:
        self._ticket, self._cancel = ticket, cancel
        self._ended = False

    async def next_events(self) -> list[TokenEvent]:
        """All events that have come since, at least one; [] after the last. Raises what the engine refused the request with."""
        ticket = self._ticket
        while not ticket.events:
            if self._ended or ticket.completion is not None:
                return []
            if ticket.error is not None:
                self._ended = True
                raise fresh(ticket.error)
            await ticket.wait()
        events = list(ticket.events)
        ticket.events.clear()
        self._ended = events[-1].completion is not None
        return events

    async def accepted(self) -> None:
        """Until the first event has come. Raises what the engine refused the request with: to be asked before a reply's status is sent."""
        ticket = self._ticket
        while not ticket.events and not ticket.is_done:
            await ticket.wait()
        if ticket.error is not None:
            self._ended = True
            raise fresh(ticket.error)

    async def __anext__(self) -> TokenEvent:
        ticket = self._ticket
        while not ticket.events:
            if self._ended or ticket.completion is not None:
                raise StopAsyncIteration
            if ticket.error is not None:
                self._ended = True
                raise fresh(ticket.error)
            await ticket.wait()
        event = ticket.events.popleft()
        self._ended = event.completion is not None
        return event

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._cancel(self._ticket)

    def __del__(self) -> None:
        if not self._ticket.is_done:
            self._cancel(self._ticket)
