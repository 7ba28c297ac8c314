"""What happens to adapters while users ask: republished, loaded, unloaded, pinned, reloaded, named and unnamed; and crowds that come all at once.

Used by soak.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from soaking.cases import MOVING
from soaking.client import Client
from soaking.world import PINNED, World

NICK = "nick"  # a name that is given to local/fine and taken away again
EVERY_S = {"publish": 0.8, "load": 0.25, "pin": 0.5, "name": 1.0, "reload": 0.7}


@dataclass
class Published:
    """One version of `moving`. sent: when it was asked for; done: when the server said so (None: not yet), both of time.monotonic."""

    version: int
    content: int
    sent: float
    done: float | None


class History:
    """What `moving` has been."""

    def __init__(self) -> None:
        self._all = [Published(1, 0, 0.0, 0.0)]

    def begin(self, content: int) -> Published:
        self._all.append(Published(len(self._all) + 1, content, time.monotonic(), None))
        return self._all[-1]

    def possible(self, began: float, ended: float) -> tuple[int, ...]:
        """The contents that the bare name may have meant to a request which began and ended then."""
        found = set()
        for one, following in zip(self._all, [*self._all[1:], None], strict=True):
            was_replaced = following is not None and following.done is not None and following.done < began
            if one.sent <= ended and not was_replaced:
                found.add(one.content)
        return tuple(sorted(found))

    def draw(self, draw: random.Random) -> tuple[int, int]:
        """(version, content) of one that is there."""
        one = draw.choice([each for each in self._all[-8:] if each.done is not None] or self._all[:1])
        return one.version, one.content

    @property
    def last_content(self) -> int:
        return self._all[-1].content


class Operators:
    """One coroutine for each kind of work."""

    def __init__(self, client: Client, world: World, history: History, seed: int) -> None:
        self._client, self._world, self._history = client, world, history
        self._draw = random.Random(seed)

    async def run(self, until: float) -> None:
        await asyncio.gather(*(self._repeat(name, until) for name in EVERY_S))

    async def _repeat(self, name: str, until: float) -> None:
        work: Callable[[], Awaitable[None]] = getattr(self, f"_{name}")
        while time.monotonic() < until:
            try:
                await work()
            except (aiohttp.ClientError, TimeoutError) as error:
                self._client.tally.surprise(f"{name}: {type(error).__name__}: {error}")
            await asyncio.sleep(EVERY_S[name] * self._draw.uniform(0.5, 1.5))

    async def _publish(self) -> None:
        """Another content under the same name; a README that is never the same makes each a version of its own."""
        choices = [number for number in range(len(self._world.contents)) if number != self._history.last_content]
        content = self._draw.choice(choices)
        folder = self._world.contents[content]
        form = aiohttp.FormData({"name": MOVING, "message": "again"})
        for path in sorted(folder.iterdir()):
            form.add_field("files", path.read_bytes(), filename=path.name, content_type="application/octet-stream")
        form.add_field("files", f"version {time.monotonic_ns()}\n".encode(), filename="README.md", content_type="text/markdown")
        published = self._history.begin(content)
        reply = await self._client.ask("publish", "POST", "/adapters", key="admin", form=form)
        published.done = time.monotonic()
        if reply.status != 201 or reply.body["version"] != f"{MOVING}@{published.version}":
            self._client.tally.surprise(f"publish: {reply.status} {reply.text[:300]}, expected {MOVING}@{published.version}")

    async def _load(self) -> None:
        name = self._draw.choice((*self._world.good, "labels", MOVING))
        if self._draw.random() < 0.5:
            await self._act(name, "load", (200,))
        else:
            await self._act(name, "unload", (200, 409), {"wait_s": self._draw.choice((0, 0, 0.2, 2.0))})

    async def _pin(self) -> None:
        name = self._draw.choice(PINNED)
        await self._act(name, self._draw.choice(("pin", "unpin")), (200, 503))  # 503: all room is in use
        await self._act(MOVING, self._draw.choice(("pin", "unpin")), (200, 503))

    async def _reload(self) -> None:
        await self._act(self._draw.choice((MOVING, "a07", "torn", "faded")), "reload", (200, 422))

    async def _name(self) -> None:
        reply = await self._client.ask("name", "POST", "/v1/load_lora_adapter", {"lora_name": NICK, "lora_path": "fine"}, key="admin")
        if reply.status != 200:
            self._client.tally.surprise(f"name: {reply.status} {reply.text[:300]}")
            return
        asked = await self._client.ask("name", "POST", "/v1/completions", {"model": NICK, "prompt": "a", "max_tokens": 2})
        if asked.status not in (200, 429):
            self._client.tally.surprise(f"name: a given name answered {asked.status}: {asked.text[:300]}")
        reply = await self._client.ask("name", "POST", "/v1/unload_lora_adapter", {"lora_name": NICK, "wait_s": 5}, key="admin")
        if reply.status not in (200, 409):
            self._client.tally.surprise(f"name: taking it away answered {reply.status}: {reply.text[:300]}")

    async def _act(self, name: str, action: str, statuses: tuple[int, ...], body: object = None) -> None:
        reply = await self._client.ask(action, "POST", f"/adapters/{name}/{action}", body, key="admin")
        if reply.status not in statuses:
            self._client.tally.surprise(f"{action}: {name} answered {reply.status}: {reply.text[:300]}")
