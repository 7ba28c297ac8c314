"""Services that end with their test, and short ways to ask them: what the tests of serving are written with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from atoll.engine.config import EngineConfig
from atoll.engine.request import Completion, Request, SamplingParams
from atoll.hub import Hub
from atoll.model.base import Base
from atoll.serving.config import ServeConfig
from atoll.serving.entries import AdapterRef
from atoll.serving.keys import Caller
from atoll.serving.observer import Observer
from atoll.serving.service import Service

ME = Caller("me")
ENGINE = {"max_rows": 8, "max_row_tokens": 512, "max_step_tokens": 128, "kernel": "plain"}


@asynccontextmanager
async def running(base: Base, hub: Hub | None, *, drain_s: float = 0.0, **settings: Any) -> AsyncIterator[Service]:
    """A started service; stopped at the end, having leaked nothing."""
    engine = EngineConfig(**{**ENGINE, **settings.pop("engine", {})})
    service = Service(base, ServeConfig(base=str(base.path), engine=engine, **settings), hub)
    await service.start()
    try:
        yield service
        if service.failed is None and not service.draining:
            await settled(service)
            await service.run(lambda engine: engine.check())
            assert [entry.key for entry in service.registry.entries.values() if entry.holds] == []
    finally:
        await service.stop(drain_s)


async def settled(service: Service) -> None:
    """Until no request is left."""
    while service.stats()["active_requests"]:
        await asyncio.sleep(0.002)


def play(scenario: Coroutine[Any, Any, Any]) -> Any:
    """Run an async test to its end, but not for ever."""

    async def limited() -> Any:
        async with asyncio.timeout(60):
            return await scenario

    return asyncio.run(limited())


def ask(prompt: list[int], key: str | None = None, num_tokens: int = 8, **sampling: Any) -> Request:
    """A greedy request that says exactly num_tokens tokens, unless told otherwise."""
    return Request(prompt, key, SamplingParams(**{"max_new_tokens": num_tokens, "ignore_eos": True, **sampling}))


async def key_of(service: Service, name: str, caller: Caller = ME, **ref: Any) -> str | None:
    """What the engine calls an adapter, which is loaded."""
    return (await service.open(AdapterRef(name, **ref), caller)).key


async def answer(service: Service, name: str | None, prompt: list[int], caller: Caller = ME, num_tokens: int = 8) -> Completion:
    """One greedy answer of an adapter."""
    key = await key_of(service, name, caller) if name else None
    [found] = await service.generate([ask(prompt, key, num_tokens)], caller)
    return found


class Loads(Observer):
    """Counts what was loaded and what could not be."""

    def __init__(self, service: Service) -> None:
        self.loads: list[str] = []
        self.failures: list[str] = []
        self.evictions: list[str] = []
        service.observers.append(self)

    def loaded(self, adapter: str, source: str, seconds: float) -> None:
        self.loads.append(adapter)

    def load_failed(self, adapter: str, source: str, error: Exception) -> None:
        self.failures.append(adapter)

    def evicted(self, adapter: str) -> None:
        self.evictions.append(adapter)
