"""Request bodies, before anything reads them: not too large, not too slow, and text that can be encoded.

A body is taken in whole here and handed on as one message, so every route behind it has the same three refusals as JSON, and a slow client holds
nothing but its own connection. JSON can spell half of a surrogate pair ("\\ud800"), which is no character: tokenizers and databases fail on it far
from here, so it is refused by name.

Used by app, around every route; routes that take files read their bodies themselves, with a limit of their own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.http.errors import Refusal, protocol_of, refusal

READ_TIMEOUT_S = 30.0
LARGE_BYTES = 1 << 16  # from here on a thread looks through a body
_HEX = rb"[0-9a-fA-F]{2}"
_HIGH, _LOW = rb"\\u[dD][89abAB]" + _HEX, rb"\\u[dD][c-fC-F]" + _HEX
# Whole pairs in a row, or a half; behind backslashes of which two and two are escaped ones.
_SURROGATES = re.compile(rb"(?<!\\)(?:\\\\)*+(?:((?:" + _HIGH + _LOW + rb")++)|" + _HIGH + rb"|" + _LOW + rb")")


class BodyLimit:
    """ASGI middleware. own_limit: the bytes that a path's route takes if it reads the body itself, else None."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, own_limit: Callable[[str], int | None] = lambda path: None, timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self._app, self._max_bytes, self._own_limit, self._timeout_s = app, max_bytes, own_limit, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = self._own_limit(scope["path"])
        limit = own if own is not None else self._max_bytes
        length = _declared_length(scope)
        if length is not None and length > limit:
            await reply(_too_large(scope, limit), send, close=True)
        elif own is not None:
            await self._app(scope, _counted(receive, limit), send)
        else:
            await self._take_in(scope, receive, send, limit)

    async def _take_in(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        protocol = protocol_of(scope["path"])
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await _read(receive, limit)
        except TimeoutError:
            await reply(refusal(408, f"the body did not arrive within {self._timeout_s:g} seconds", protocol), send, close=True)
            return
        except _TooLarge:
            await reply(_too_large(scope, limit), send, close=True)
            return
        if body is None:
            return
        problem = text_problem(body) if len(body) < LARGE_BYTES else await asyncio.to_thread(text_problem, body)
        if problem is not None:
            await reply(refusal(400 if protocol == "openai" else 422, problem, protocol), send)
            return
        await self._app(scope, _replayed(body, receive), send)


class _TooLarge(Exception):
    """More bytes came than are taken."""


async def reply(refused: Refusal, send: Send, *, close: bool = False) -> None:
    """Send a refusal as JSON. close: end the connection, since the rest of the request will not be read."""
    body = refused.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in refused.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def text_problem(body: bytes) -> str | None:
    """Why a body cannot be JSON text, or None. Python's reader would also take UTF-16 and bytes that stand for half a pair."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8 text: byte {error.start} cannot be decoded"
    if b"\0" in body[:4]:
        return "the body is not UTF-8 text: it begins with a zero byte"
    if has_half_surrogate(body):
        return "the body holds half of a surrogate pair (such as \\ud800), which is no character"
    return None


def has_half_surrogate(body: bytes) -> bool:
    """Whether JSON text escapes a high surrogate without its low one, or the other way round."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return False
    return any(match[1] is None for match in _SURROGATES.finditer(body))


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client hung up first."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLarge
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what comes after it: the client's hanging up."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _counted(receive: Receive, limit: int) -> Receive:
    """A receive that refuses to give more than `limit` bytes."""
    from starlette.exceptions import HTTPException

    size = 0

    async def count() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        return message

    return count


def _declared_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _too_large(scope: Scope, limit: int) -> Refusal:
    return refusal(413, f"the body is larger than {limit} bytes", protocol_of(scope["path"]), hint="send less at a time")
