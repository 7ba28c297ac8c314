"""The soak's HTTP client: whole replies, streams, clients that hang up, and the count of everything that came.

Used by users.py, operators.py and ending.py.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from soaking.reading import is_done
from soaking.reference import Seen

TIMEOUT_S = 300.0
MAX_SURPRISES = 200


@dataclass
class Tally:
    """What came: replies by kind and status, answers to be compared (equal ones once, with their number), and whatever nobody expected."""

    replies: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[Seen] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    num_surprises: int = 0

    def surprise(self, what: str) -> None:
        """Something that should not be: the soak has failed."""
        self.num_surprises += 1
        if len(self.surprises) < MAX_SURPRISES:
            self.surprises.append(what[:600])


@dataclass(frozen=True)
class Reply:
    """A reply: its body decoded from JSON, or the text of a stream. whole: False where this client hung up."""

    status: int
    headers: Mapping[str, str]
    body: Any = None
    text: str = ""
    whole: bool = True


class Client:
    """Asks one server. Every reply is tallied under the kind of request that it answers."""

    def __init__(self, url: str, keys: Mapping[str, str], tally: Tally) -> None:
        self.url, self._keys, self.tally = url, keys, tally
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, auto_decompress=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    async def ask(self, kind: str, method: str, path: str, body: Any = None, *, key: str = "full", raw: bytes | None = None, **more: Any) -> Reply:
        """A whole reply. raw: a body that need not be JSON; more: aiohttp's. Transport errors raise aiohttp.ClientError or TimeoutError."""
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        headers = {**self._headers(key, data), **more.pop("headers", {})}
        async with self._session.request(method, self.url + path, data=more.pop("form", data), headers=headers, **more) as reply:
            content = await reply.read()
            found = Reply(reply.status, _lower(reply.headers), _decoded(reply.content_type, content), content.decode("utf-8", "replace"))
        self._count(kind, method + " " + path, found)
        return found

    async def stream(self, kind: str, path: str, body: Any, *, key: str = "full", cut_after: int | None = None) -> Reply:
        """A streamed reply. cut_after: hang up once that many events have come."""
        data = json.dumps(body).encode()
        async with self._session.post(self.url + path, data=data, headers=self._headers(key, data)) as reply:
            if reply.status != 200:
                content = await reply.read()
                found = Reply(reply.status, _lower(reply.headers), _decoded(reply.content_type, content), content.decode("utf-8", "replace"))
            else:
                found = await self._read_events(reply, cut_after)
        self._count(kind, "POST " + path, found)
        return found

    async def hang_up(self, kind: str, path: str, body: Any, seconds: float, *, key: str = "full") -> None:
        """Ask, and leave before the whole reply is there."""
        task = asyncio.ensure_future(self.ask(kind, "POST", path, body, key=key))
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            task.cancel()
            self.tally.replies[kind, "left"] += 1
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _read_events(self, reply: aiohttp.ClientResponse, cut_after: int | None) -> Reply:
        text = ""
        async for chunk in reply.content.iter_any():
            text += chunk.decode()  # JSON of ours is ASCII
            if cut_after is not None and text.count("\n\n") >= cut_after and not is_done(text):
                reply.close()
                return Reply(200, _lower(reply.headers), text=text, whole=False)
        return Reply(200, _lower(reply.headers), text=text)

    def _headers(self, key: str, data: bytes | None) -> dict[str, str]:
        found = {"content-type": "application/json"} if data is not None else {}
        return {**found, "authorization": f"Bearer {self._keys[key]}"} if key else found

    def _count(self, kind: str, what: str, reply: Reply) -> None:
        self.tally.replies[kind, str(reply.status) if reply.whole else "cut"] += 1
        if reply.status >= 400 and (problem := wrong_error(reply)):
            self.tally.surprise(f"{kind}: {what} answered {reply.status} with {problem}: {reply.text[:200]!r}")
        if reply.status == 429 and not reply.headers.get("retry-after", "0").isdecimal():
            self.tally.surprise(f"{kind}: {what} answered 429 with retry-after {reply.headers.get('retry-after')!r}")


def wrong_error(reply: Reply) -> str:
    """What is wrong with the form of an error, or nothing."""
    if reply.status >= 500 and reply.status not in (501, 503):
        return "an error of our own"
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    sentence = error.get("message") if isinstance(error, dict) else error
    if not isinstance(sentence, str) or not sentence:
        return "no sentence"
    if reply.status == 429 and int(reply.headers.get("retry-after", "0") or 0) < 1:
        return "no Retry-After"
    return "a path of this machine" if "/tmp/" in sentence or "/home/" in sentence else ""


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _decoded(content_type: str, content: bytes) -> Any:
    if content_type != "application/json":
        return None
    try:
        return json.loads(content)
    except ValueError:
        return None
