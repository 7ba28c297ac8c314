"""Many streams of /v1/completions at once from one thread that does almost nothing: the server under test has the cores.

Each stream is one connection whose bytes are kept as they come, with the moment they came; chunks, events and JSON are taken apart only after the
last stream has ended.

Used by http_worker.py. Standard library only.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream(asyncio.Protocol):
    """One request on its own connection, closed by the server at its end."""

    request: bytes
    done: asyncio.Future[None]
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True)
class Answer:
    """What came of one stream: the text, how many tokens the server says it has, and when each event with text or a token came."""

    text: str
    num_tokens: int
    moments: list[float]


def complete(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """Send all bodies at once; returns (the moment before the first was sent, the answers). Raises RuntimeError for any answer but a whole stream."""
    requests = [_post(port, "/v1/completions", body) for body in bodies]
    started, streams = asyncio.run(_run(port, requests))
    return started, [_read_answer(stream) for stream in streams]


async def _run(port: int, requests: list[bytes]) -> tuple[float, list[Stream]]:
    loop = asyncio.get_running_loop()
    streams = [Stream(request, loop.create_future()) for request in requests]
    started = time.perf_counter()
    await asyncio.gather(*(loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port) for stream in streams))  # type: ignore[misc]
    await asyncio.gather(*(stream.done for stream in streams))
    return started, streams


def _post(port: int, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = ("Content-Type: application/json", f"Content-Length: {len(content)}", "Connection: close", "", "")
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode() + "\r\n".join(head).encode() + content


def _read_answer(stream: Stream) -> Answer:
    """Take a kept stream apart: each event has the moment at which its last byte came."""
    whole = b"".join(data for _, data in stream.pieces)
    head, _, body = whole.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {whole[:500].decode(errors='replace')!r}")
    chunks = _chunks(body) if b"transfer-encoding: chunked" in head.lower() else [(0, body)]
    arrivals = list(itertools.accumulate(len(data) for _, data in stream.pieces))
    ends = list(itertools.accumulate(len(content) for _, content in chunks))  # in the content, where each chunk ends
    texts, moments, num_tokens = [], [], None
    for end, data in _events(b"".join(content for _, content in chunks)):
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"a stream ended with {event['error']}")
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
        if event.get("choices"):
            start, content = chunks[number := bisect.bisect_left(ends, end)]
            place = len(head) + 4 + start + len(content) - (ends[number] - end)  # of the event's last byte in what was received
            texts.append(event["choices"][0].get("text") or "")
            moments.append(stream.pieces[bisect.bisect_left(arrivals, place)][0])
    if num_tokens is None or not moments:
        raise RuntimeError(f"a stream ended early, after {len(moments)} events")
    return Answer("".join(texts), num_tokens, moments)


def _events(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(place of its end, data) of every event but the last one, [DONE]; comments are no events."""
    start = 0
    while (end := content.find(b"\n\n", start)) >= 0:
        for line in content[start:end].split(b"\n"):
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield end + 2, line[5:]
        start = end + 2


def _chunks(body: bytes) -> list[tuple[int, bytes]]:
    """(place in the body, content) of every chunk."""
    found, at = [], 0
    while True:
        line = body.find(b"\r\n", at)
        if line < 0:
            raise RuntimeError("the server hung up in the middle of a stream")
        size = int(body[at:line].split(b";")[0], 16)
        if size == 0:
            return found
        found.append((line + 2, body[line + 2 : line + 2 + size]))
        at = line + 2 + size + 2
