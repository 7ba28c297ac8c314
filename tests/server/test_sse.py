"""Streams of events, driven as an ASGI server would drive them: order, the client's hanging up, errors, silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from atoll.errors import EngineError
from atoll.http.errors import ClientGone
from atoll.http.sse import EventStream, unless_gone

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/generate_stream", "headers": []}


class Client:
    """The other end: keeps what was sent; hangs up when told."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def test_events_come_out_in_order_and_the_reply_ends() -> None:
    """A reply that is never ended keeps a client waiting for ever; a lost or swapped event garbles the answer."""

    async def events() -> AsyncIterator[bytes]:
        for number in range(5):
            yield b"data:%d\n\n" % number

    async def run() -> Client:
        client = Client()
        await EventStream(events())(SCOPE, client.receive, client.send)
        return client

    client = asyncio.run(run())
    headers = dict(client.sent[0]["headers"])
    assert client.sent[0]["status"] == 200
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers
    assert client.body == b"".join(b"data:%d\n\n" % number for number in range(5))
    assert client.sent[-1]["more_body"] is False


def test_a_client_that_hangs_up_closes_the_events() -> None:
    """Closing is what cancels the request in the engine: without it an abandoned answer is computed to its end."""

    async def run() -> tuple[Client, bool]:
        client, closed = Client(), False

        async def events() -> AsyncIterator[bytes]:
            nonlocal closed
            try:
                yield b"data:1\n\n"
                client.gone.set()
                await asyncio.Event().wait()
            finally:
                closed = True

        await EventStream(events())(SCOPE, client.receive, client.send)
        return client, closed

    client, closed = asyncio.run(run())
    assert closed
    assert client.body == b"data:1\n\n"


def test_cancelling_from_outside_is_not_swallowed() -> None:
    """A server that stops cancels its tasks: one that took that for a client's hanging up would never end."""

    async def run() -> bool:
        closed = False

        async def events() -> AsyncIterator[bytes]:
            nonlocal closed
            try:
                yield b"data:1\n\n"
                await asyncio.Event().wait()
            finally:
                closed = True

        client = Client()
        task = asyncio.create_task(EventStream(events())(SCOPE, client.receive, client.send))
        while not client.body:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return closed

    assert asyncio.run(run())


@pytest.mark.parametrize(("path", "shape"), [("/generate_stream", "native"), ("/v1/chat/completions", "openai")])
@pytest.mark.parametrize("error", [EngineError("it broke"), RuntimeError("secret detail")])
def test_an_error_after_the_status_is_the_last_event(path: str, shape: str, error: Exception) -> None:
    """The status has gone out, so the event is all a client learns; what is a bug of ours stays in the log."""

    async def events() -> AsyncIterator[bytes]:
        yield b"data:1\n\n"
        raise error

    async def run() -> Client:
        client = Client()
        await EventStream(events())({**SCOPE, "path": path}, client.receive, client.send)
        return client

    client = asyncio.run(run())
    told = json.loads(client.body.split(b"\n\n")[1].removeprefix(b"data:"))
    assert "secret detail" not in json.dumps(told)
    if shape == "native":
        assert told["error_type"] == ("generation" if isinstance(error, EngineError) else "internal")
        assert isinstance(told["error"], str)
    else:
        assert told["error"]["type"] == "server_error"
    assert client.sent[-1]["more_body"] is False


def test_silence_is_broken_by_comments() -> None:
    """Proxies close connections that are silent for a while, and a long prompt is silent."""

    async def run() -> Client:
        client = Client()

        async def events() -> AsyncIterator[bytes]:
            while client.body.count(b": keep-alive") < 2:
                await asyncio.sleep(0)
            yield b"data:1\n\n"

        await EventStream(events(), keep_alive_s=0.001)(SCOPE, client.receive, client.send)
        return client

    body = asyncio.run(run()).body
    assert body.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert body.endswith(b"data:1\n\n")


def test_work_for_a_client_that_hung_up_is_cancelled() -> None:
    """A whole reply is waited for without sending anything, so only listening tells that nobody waits any more."""

    async def run() -> list[str]:
        client, seen = Client(), []
        request = Request(SCOPE, client.receive)

        async def work() -> None:
            try:
                client.gone.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        with pytest.raises(ClientGone):
            await unless_gone(request, work())
        return seen

    assert asyncio.run(run()) == ["cancelled"]


def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    """Listening must cost nothing to those who stay."""

    async def run() -> None:
        request = Request(SCOPE, Client().receive)

        async def answer() -> int:
            return 7

        async def fail() -> int:
            raise EngineError("no")

        assert await unless_gone(request, answer()) == 7
        with pytest.raises(EngineError):
            await unless_gone(request, fail())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
