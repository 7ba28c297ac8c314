"""What one request, or one key, may cost all others: grammars, merges, loads, places; and when a server is ill."""

from __future__ import annotations

import asyncio
import threading

import pytest

from atoll.engine.grammar import GrammarCompiler
from atoll.engine.request import Grammar
from atoll.errors import EngineError, QueueFull, RequestRefused
from atoll.serving import registry as registry_module
from atoll.serving.entries import AdapterRef
from atoll.serving.keys import Caller
from atoll.serving.merging import MergeSpec
from atoll.serving.vitals import Vitals
from serving.scenes import ME, answer, ask, key_of, play, running

PROMPT = [5, 6, 7, 8]


def test_a_grammar_that_compiles_for_long_holds_up_nobody(base, hub, monkeypatch):
    """It used to compile on the engine's thread, so one schema stopped every stream for seconds."""
    go, check, seen = threading.Event(), GrammarCompiler.check, []

    def slow(compiler, grammar):
        if grammar.kind == "regex":
            seen.append(grammar.text)
            assert go.wait(30)
        if grammar.text == "bad":
            raise RequestRefused("bad")
        return check(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "check", slow)

    async def scenario():
        async with running(base, hub) as service:
            asked = [asyncio.create_task(service.generate([ask(PROMPT, grammar=Grammar("regex", "[ab]+"))], ME)) for _ in range(3)]
            while not seen:
                await asyncio.sleep(0.002)
            assert len((await answer(service, None, PROMPT)).token_ids) == 8
            go.set()
            assert [done.finish_reason for [done] in await asyncio.gather(*asked)] == ["length"] * 3
            for _ in range(2):
                with pytest.raises(RequestRefused):
                    await service.generate([ask(PROMPT, grammar=Grammar("regex", "bad"))], ME)
            assert seen.count("bad") == 1

    play(scenario())


def test_merges_have_a_thread_of_their_own_and_a_key_has_few_of_them(base, hub, monkeypatch):
    """A merge takes seconds; adapters must load meanwhile, and other keys' merges get their turn."""
    go = threading.Event()

    async def scenario():
        async with running(base, hub, loads_per_key=2, load_workers=1) as service:
            await asyncio.gather(*(key_of(service, name) for name in ("red", "green")))
            made = service.registry.loader.made
            service.registry.loader.made = lambda *arguments: (go.wait(30), made(*arguments))[1]
            specs = [MergeSpec(("red", "green"), (weight, 1.0)) for weight in (0.1, 0.2, 0.3)]
            first = [asyncio.create_task(service.open(AdapterRef(merged=spec), ME)) for spec in specs[:2]]
            while service.registry.num_loading < 2:
                await asyncio.sleep(0.002)
            with pytest.raises(QueueFull, match="merges"):
                await service.open(AdapterRef(merged=specs[2]), ME)
            other = asyncio.create_task(service.open(AdapterRef(merged=specs[2]), Caller("other")))
            assert await key_of(service, "blue") is not None
            go.set()
            assert len({served.key for served in await asyncio.gather(*first, other)}) == 3

    play(scenario())


def test_merged_adapters_have_a_budget_of_their_own(base, hub, monkeypatch):
    """Every weight is another adapter: a client that tries many must not put all published ones out of memory."""
    monkeypatch.setattr(registry_module, "JUST_OPENED_S", -1.0)

    async def scenario():
        async with running(base, hub, merged_bytes=1) as service:
            for weight in (0.1, 0.2, 0.3):
                await service.open(AdapterRef(merged=MergeSpec(("red", "green"), (weight, 1.0))), ME)
            loaded = [entry.source for entry in service.registry.entries.values() if entry.loaded is not None]
            assert sorted(loaded) == ["hub", "hub", "merged"]

    play(scenario())


def test_a_load_that_succeeded_is_not_failed_by_another_that_cannot_leave(base, hub, monkeypatch):
    """Making room is for later; the adapter that was asked for is there."""
    monkeypatch.setattr(registry_module, "JUST_OPENED_S", -1.0)

    async def scenario():
        async with running(base, hub, max_registered=1) as service:
            await key_of(service, "red")

            async def refuse(entry):
                raise EngineError("busy")

            service.registry.unload = refuse
            assert await key_of(service, "green") is not None

    play(scenario())


def test_more_places_than_there_are_is_a_refusal_not_a_later(base, hub):
    """429 says come again, which would never help."""

    async def scenario():
        async with running(base, hub, per_key_requests=2) as service:
            with pytest.raises(RequestRefused, match="2 are allowed"):
                await service.generate([ask(PROMPT)] * 3, ME)

    play(scenario())


def test_an_engine_that_hangs_or_only_fails_is_ill(base, hub):
    """A load balancer goes on sending requests to a server that says it is well."""
    vitals = Vitals(60, 3)
    for reason in ("error", "error", "cancelled"):
        vitals.ended(reason)
    assert vitals.trouble(59) == ""
    vitals.ended("error")
    assert "all failed" in vitals.trouble(0)
    vitals.ended("stop")
    assert vitals.trouble(0) == ""
    go = threading.Event()

    async def scenario():
        async with running(base, hub, stuck_s=0.01) as service:
            assert service.healthy
            hanging = asyncio.create_task(service.run(lambda engine: go.wait(30)))
            while service.healthy:
                await asyncio.sleep(0.002)
            go.set()
            await hanging
            while not service.healthy:
                await asyncio.sleep(0.002)

    play(scenario())
