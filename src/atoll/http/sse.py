"""Server-sent events: a reply that is sent while it is made, and work that ends when its client hangs up.

A stream is one task: it takes the next bytes and sends them. A second one listens for the client's hanging up, and then cancels the first; the
iterator is closed either way, and closing it is what cancels the request in the engine. While nothing happens, that second one sends a comment now
and then, so that proxies keep the connection.

Used by every route that streams (EventStream), and by those that answer at once (unless_gone).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atoll.errors import AtollError
from atoll.http.errors import ClientGone, Protocol, internal_error, protocol_of, refusal_of

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
OUTCOME = "atoll.outcome"  # of a request, in its scope: what its status does not tell, for whoever counts
_COMMENT = b": keep-alive\n\n"

_log = logging.getLogger(__name__)


def event(body: Mapping[str, Any]) -> bytes:
    """One event that carries a JSON object."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: Exception, protocol: Protocol) -> bytes:
    """The event that tells of an error after the reply has begun with status 200."""
    if isinstance(error, AtollError):
        return event(refusal_of(error, protocol).body)
    _log.error("a stream failed", exc_info=error)
    return event(internal_error(protocol).body)


class EventStream(Response):
    """A text/event-stream of ready-made bytes: each item of `events` is one or more whole events.

    An error that `events` raises becomes its last event, in the shape of the path's protocol.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._keep_alive_s = events, keep_alive_s
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.current_task()
        assert sender is not None
        gone = asyncio.Event()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            watcher = asyncio.create_task(self._watch(receive, send, sender, gone))
            try:
                await self._send_all(send, scope)
            except asyncio.CancelledError:
                if not gone.is_set():
                    raise
                sender.uncancel()
            finally:
                await _end(watcher)
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _send_all(self, send: Send, scope: Scope) -> None:
        try:
            async for part in self._events:
                self._num_sent += 1
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:
            scope.get(OUTCOME, {})["failed"] = True
            await send({"type": "http.response.body", "body": error_event(error, protocol_of(scope["path"])), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive, send: Send, sender: asyncio.Task[Any], gone: asyncio.Event) -> None:
        """Cancel the sender when the client hangs up; until then, break long silences."""
        waiting = asyncio.ensure_future(receive())
        seen = self._num_sent
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._keep_alive_s)
                if done:
                    if waiting.result()["type"] == "http.disconnect":
                        gone.set()
                        sender.cancel()
                        return
                    waiting = asyncio.ensure_future(receive())
                elif seen == self._num_sent:
                    await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                seen = self._num_sent
        finally:
            await _end(waiting)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(watcher)
        await _end(task)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it is over, whatever it raises meanwhile."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("ended with %r", error)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
