"""How adapters leave memory: the idle longest first, on request, and never under somebody's answer."""

from __future__ import annotations

import asyncio

import pytest

from atoll.serving import registry as registry_module
from atoll.serving.entries import AdapterRef, InUse
from serving.scenes import ME, Loads, answer, ask, key_of, play, running, settled

PROMPT = [5, 6, 7, 8]
LONG = 400


def test_the_idle_longest_leaves_when_there_are_too_many(base, hub, monkeypatch):
    """Memory is bounded; what is in use or pinned stays, and what left comes back when it is asked for."""
    monkeypatch.setattr(registry_module, "JUST_OPENED_S", -1.0)

    async def scenario():
        async with running(base, hub, max_registered=2) as service:
            loads = Loads(service)
            await service.operator.pin(AdapterRef("red"), ME)
            stream = service.stream(ask(PROMPT, await key_of(service, "green"), LONG), ME)
            await anext(stream)
            await answer(service, "blue", PROMPT)
            assert loads.evictions == []  # red is pinned and green in use: one too many for a while
            await stream.aclose()
            await settled(service)
            await answer(service, "blue", PROMPT)
            await service.operator.unpin(AdapterRef("red"), ME)
            await service.operator.unload(AdapterRef("blue"), ME)
            await answer(service, "blue", PROMPT)
            assert loads.evictions == ["red"]
            registered = (await service.run(lambda engine: engine.stats()))["adapters_registered"]
            assert registered == 2
            assert len((await answer(service, "red", PROMPT)).token_ids) == 8

    play(scenario())


def test_unloading_waits_for_those_who_use_it(base, hub):
    """An unload in the middle of an answer must not break it; nor may it hang for ever."""

    async def scenario():
        async with running(base, hub) as service:
            key = await key_of(service, "red")
            stream = service.stream(ask(PROMPT, key, LONG), ME)
            await anext(stream)
            with pytest.raises(InUse, match="1 request"):
                await service.operator.unload(AdapterRef("red"), ME)
            unloading = asyncio.create_task(service.operator.unload(AdapterRef("red"), ME, wait_s=60))
            await asyncio.sleep(0.03)
            assert not unloading.done()
            await stream.aclose()
            assert (await unloading).state == "known"
            assert not await service.run(lambda engine: engine.is_registered(key))
            assert (await answer(service, "red", PROMPT)).finish_reason == "length"  # loaded again

    play(scenario())


def test_a_request_that_opened_an_adapter_before_it_was_unloaded_still_answers(base, hub):
    """Between opening and queueing, an operator may unload: the request loads it again and nobody notices."""

    async def scenario():
        async with running(base, hub) as service:
            key = await key_of(service, "red")
            await service.operator.unload(AdapterRef("red"), ME)
            [found] = await service.generate([ask(PROMPT, key)], ME)
            assert found.finish_reason == "length"
            await service.operator.unload(AdapterRef("red"), ME)
            assert len([event async for event in service.stream(ask(PROMPT, key), ME)]) == 8

    play(scenario())


def test_nothing_is_lost_while_versions_come_and_go_under_load(base, hub, write):
    """The daily life of a server: requests, publishing, loading and unloading at once; every answer is some version's own."""
    folders = [write(f"red-{number}", 50 + number) for number in range(4)]

    async def scenario():
        async with running(base, hub, max_registered=3) as service:
            finished = []

            async def client(number):
                for turn in range(6):
                    found = await answer(service, ("red", "green", "blue", None)[(number + turn) % 4], PROMPT, num_tokens=6)
                    assert found.finish_reason == "length", found.error
                    finished.append((found.adapter, found.token_ids))

            async def operator():
                for folder in folders:
                    await asyncio.to_thread(hub.publish, folder, "red")
                    for name in ("green", "blue"):
                        try:
                            await service.operator.unload(AdapterRef(name), ME)
                        except InUse:
                            continue

            await asyncio.gather(operator(), *(client(number) for number in range(8)))
            assert len(finished) == 48
            by_key = {}
            for adapter, tokens in finished:
                assert by_key.setdefault(adapter, tokens) == tokens
            assert hub.resolve("red@5").digest == await key_of(service, "red")

    play(scenario())
