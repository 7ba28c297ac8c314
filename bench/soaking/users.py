"""The soak's users: each asks one thing after the other, of every route and in every way, and some of them behave badly.

A user draws what to do by WEIGHTS. What comes is compared later (reference.py); here it is only noted, with the contents that `moving` may have had
meanwhile. A status that the situation does not allow is a surprise, and a surprise is a failure of the soak.

Used by soak.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import aiohttp

from soaking.bad_requests import BAD_REQUESTS, BadRequest
from soaking.cases import MOVING, STREAMED, Case, Route
from soaking.client import Client, Reply
from soaking.operators import History
from soaking.reading import Answer, Malformed, events_of, is_done, read_reply, read_stream
from soaking.reference import Seen
from soaking.world import BROKEN_LOCAL, World

WEIGHTS = {"ask": 60, "cut": 10, "leave": 5, "bad": 8, "broken": 4, "huge": 3, "forbidden": 3, "unseeded": 2, "look": 5}
OVERLOADED = 429
MAX_DRAWN = 40  # answers with a seed of the server's own: each needs a reference of its own
LOOKS = (
    "/adapters",
    "/adapters/a03",
    "/v1/models",
    "/v1/models/labels",
    "/info",
    "/metrics",
    "/metrics?format=json",
    "/health",
    "/",
    "/openapi.json",
)


class User:
    """One user. keys: drawn for each request, so that beginnings of prompts meet under several."""

    def __init__(self, client: Client, world: World, cases: Sequence[Case], history: History, seed: int) -> None:
        self._client, self._world, self._cases, self._history = client, world, cases, history
        self._draw = random.Random(seed)
        self._tally = client.tally
        self._deployment = world.base.name.rstrip("/").rpartition("/")[2]
        self._actions: dict[str, Callable[[], Awaitable[None]]] = {name: getattr(self, f"_{name}") for name in WEIGHTS}

    async def run(self, until: float) -> None:
        """Until that moment of time.monotonic."""
        while time.monotonic() < until:
            [action] = self._draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
            await self.act(action)

    async def act(self, action: str) -> None:
        """One action. What the transport or a reply's form has wrong is a surprise."""
        try:
            await self._actions[action]()
        except (aiohttp.ClientError, TimeoutError, Malformed) as error:
            self._tally.surprise(f"{action}: {type(error).__name__}: {error}")

    # ---- good requests ----

    async def _ask(self) -> None:
        await self.question(self._draw.choice(self._cases))

    async def _cut(self) -> None:
        case = self._draw.choice([case for case in self._cases if case.kind == "text"])
        await self.question(case, cut_after=self._draw.choice((1, 1, 2, 4, 8)))

    async def question(self, case: Case, route: Route | None = None, *, cut_after: int | None = None, kind: str = "") -> bool:
        """Ask a question by one of its routes, whole or streamed, and note the answer; whether one came."""
        streamed: Sequence[Route] = [each for each in case.routes if each in (*STREAMED, "root")]
        route = route or self._draw.choice(case.routes if cut_after is None else streamed)
        stream = route == "generate_stream" or cut_after is not None or (route in streamed and self._draw.random() < 0.5)
        path, body, contents = self._body(case, route, stream)
        kind = kind or (f"merged {route}" if case.merge else route) + (" stream" if stream else "")
        began = time.monotonic()
        if stream:
            reply = await self._client.stream(kind, path, body, key=self._key(), cut_after=cut_after)
        else:
            reply = await self._client.ask(kind, "POST", path, body, key=self._key())
        if reply.status != 200:
            self._check_refused(case, kind, reply)
            return False
        answer = self._read(route, reply) if stream else read_reply(route, reply.body)
        if contents is None and case.adapter == MOVING:
            contents = self._history.possible(began, time.monotonic())
        self._note(case, answer, contents)
        return True

    def _body(self, case: Case, route: Route, stream: bool) -> tuple[str, Any, tuple[int, ...] | None]:
        """(path, body, the content of `moving` where the body pins it)."""
        name, contents = case.adapter, None
        if name == MOVING and self._draw.random() < 0.3:
            version, content = self._history.draw(self._draw)
            name, contents = f"{MOVING}@{version}", (content,)
        elif name is not None and name != MOVING and self._draw.random() < 0.3:
            name = f"{name}@1"
        path, body = case.body(route, stream=stream, adapter=name)
        if case.adapter == "a05" and self._draw.random() < 0.5 and "parameters" in body:
            body["parameters"] |= {"adapter_id": "fine", "adapter_source": "local"}  # the same content in a folder
        return path.replace("DEPLOYMENT", self._deployment), body, contents

    def _read(self, route: Route, reply: Reply) -> Answer:
        events = events_of(reply.text)
        if error := next((event["error"] for event in events if "error" in event), None):
            raise Malformed(f"a stream of {route} ended with {str(error)[:200]}")
        if reply.whole and route in ("completions", "chat") and not is_done(reply.text):
            raise Malformed(f"a stream of {route} ended without [DONE]")
        return read_stream(route, events, whole=reply.whole)

    def _note(self, case: Case, answer: Answer, contents: tuple[int, ...] | None, seed: int | None = None) -> None:
        self._tally.seen[Seen(case.number, answer, contents, seed)] += 1

    def _check_refused(self, case: Case, kind: str, reply: Reply) -> None:
        """Overload may refuse anybody; an unloaded parent, a merge."""
        if reply.status != OVERLOADED and not (case.merge is not None and reply.status in (424, 422) and "was unloaded" in reply.text):
            self._tally.surprise(f"{kind}: question {case.number} ({case.adapter}) answered {reply.status}: {reply.text[:300]}")

    async def _unseeded(self) -> None:
        """Sampling without a seed: the reply says which one was drawn, and that one must give the same answer again."""
        case = self._draw.choice([case for case in self._cases if case.kind == "text" and case.sampling.get("temperature") and not case.chat])
        if case.adapter == MOVING or sum(seen.seed is not None for seen in self._tally.seen) >= MAX_DRAWN:
            return
        path, body = case.body("generate")
        del body["parameters"]["seed"]
        reply = await self._client.ask("unseeded", "POST", path, body)
        if reply.status == 200:
            self._note(case, read_reply("generate", reply.body), None, reply.body["details"]["seed"])
        else:
            self._check_refused(case, "unseeded", reply)

    async def _leave(self) -> None:
        """Hang up before a whole reply is there, perhaps while its adapter is being loaded."""
        case = self._draw.choice(self._cases)
        path, body, _ = self._body(case, case.routes[0], False)
        await self._client.hang_up("leave", path, body, self._draw.choice((0.0, 0.002, 0.02, 0.1)), key=self._key())

    def _key(self) -> str:
        return self._draw.choice(("full", "full", "other"))

    # ---- others ----

    async def _bad(self) -> None:
        bad: BadRequest = self._draw.choice(BAD_REQUESTS)
        headers = {"content-type": bad.content_type} if bad.content_type else {}
        reply = await self._client.ask("bad", bad.method, bad.path, raw=bad.content(), headers=headers)
        self._expect("bad", reply, (400, 404, 405, 408, 413, 415, 422, 424), f"{bad.path} {bad.content()[:120]!r}")

    async def _broken(self) -> None:
        """An adapter that cannot be loaded: refused every time, whatever was tried a moment ago."""
        names: list[tuple[str, str | None]] = [(name, None) for name in self._world.broken] + [(name, "local") for name in BROKEN_LOCAL]
        name, source = self._draw.choice([*names, ("never-was", None)])
        if source is None and self._draw.random() < 0.3:
            reply = await self._client.ask("broken", "POST", "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 4})
            self._expect("broken", reply, (404, 422), name)
        else:
            parameters = {"adapter_id": name, "adapter_source": source, "max_new_tokens": 4}
            reply = await self._client.ask("broken", "POST", "/generate", {"inputs": "a", "parameters": parameters})
            self._expect("broken", reply, (424,), name)

    async def _huge(self) -> None:
        """An adapter whose outputs are not finite fails its own requests, in the middle of batches of others."""
        reply = await self._client.ask("huge", "POST", "/generate", {"inputs": "a b c", "parameters": {"adapter_id": "huge", "max_new_tokens": 4}})
        self._expect("huge", reply, (424,), "huge")

    async def _forbidden(self) -> None:
        """A key's allow-list: what is on it is answered, all else is answered like what does not exist."""
        allowed = self._draw.random() < 0.4
        name = self._draw.choice(("a00", "a12") if allowed else ("a05", "labels", "moving", "never-was"))
        parameters = {"adapter_id": name, "max_new_tokens": 2}
        reply = await self._client.ask("narrow", "POST", "/generate", {"inputs": "a", "parameters": parameters}, key="narrow")
        self._expect("narrow", reply, (200,) if allowed else (424,), name)
        if reply.status == 424 and reply.body["error"] != f"Request failed during generation: Server error: no adapter {name!r} here":
            self._tally.surprise(f"narrow: {name} is told apart: {reply.text[:300]}")

    async def _look(self) -> None:
        path = self._draw.choice(LOOKS)
        reply = await self._client.ask("look", "GET", path)
        if reply.status != 200:
            self._tally.surprise(f"look: {path} answered {reply.status}: {reply.text[:200]}")

    def _expect(self, kind: str, reply: Reply, statuses: Sequence[int], what: str) -> None:
        if reply.status not in (*statuses, OVERLOADED):
            self._tally.surprise(f"{kind}: {what} answered {reply.status}: {reply.text[:200]}")


async def burst(user: User, cases: Sequence[Case], count: int, draw: random.Random) -> None:
    """Many requests in the same moment, more than the server has places for."""
    short = [case for case in cases if case.kind == "text" and case.sampling["max_new_tokens"] <= 24 and not case.chat]
    asked = [replace(draw.choice(short), routes=("generate", "completions")) for _ in range(count)]
    await asyncio.gather(*(_quiet(user, case) for case in asked))


async def _quiet(user: User, case: Case) -> None:
    try:
        await user.question(case, kind="burst")
    except (aiohttp.ClientError, TimeoutError, Malformed) as error:
        user._tally.surprise(f"burst: {type(error).__name__}: {error}")
