"""Names: of the base, given by the operator, shown in lists; and what a name means while it changes."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from atoll.errors import AdapterNotFound, HubError, RequestRefused
from atoll.serving.entries import AdapterRef
from atoll.serving.keys import Caller
from atoll.serving.state import StateFile
from serving.scenes import ME, answer, key_of, play, running

PROMPT = [5, 6, 7, 8]


def test_the_base_keeps_its_names(base, hub, write):
    """An adapter named like the base would be published, and the base would answer in its place."""

    async def scenario():
        async with running(base, hub) as service:
            assert await key_of(service, base.name.upper()) is None
            last = base.name.rpartition("/")[2]
            for name in {last, last.upper()}:
                with pytest.raises(RequestRefused, match="name of the base"):
                    await service.operator.publish(write("x", 60), name, ME)
                with pytest.raises(RequestRefused, match="name of the base"):
                    await service.operator.name(name, "red", ME)

    play(scenario())


def test_a_given_name_is_one_in_any_case_and_nothing_is_published_under_it(base, hub, write, tmp_path, caplog):
    """A version under a given name could not be asked for: the given name comes first."""
    write("one", 61, where=tmp_path / "root")

    async def scenario():
        async with running(base, hub, local_root=tmp_path / "root") as service:
            await service.operator.name("Mine", "one", ME)
            assert await key_of(service, "mINE") == await key_of(service, "local:one")
            with pytest.raises(HubError, match="given"):
                await service.operator.publish(write("x", 62), "mine", ME)
            with pytest.raises(RequestRefused, match="revision"):
                await key_of(service, "mine", revision="2")
        await asyncio.to_thread(hub.publish, write("x", 62), "mine")
        with caplog.at_level(logging.ERROR):
            async with running(base, hub, local_root=tmp_path / "root") as service:
                while "is dropped" not in caplog.text:
                    await asyncio.sleep(0.002)
                assert await key_of(service, "mine") == hub.resolve("mine").digest

    play(scenario())


def test_what_is_gone_can_still_be_unpinned_and_unnamed(base, hub, write, tmp_path):
    """Else a deleted adapter is asked for at every start, for ever."""
    folder = write("one", 63, where=tmp_path / "root")

    async def scenario():
        async with running(base, hub, local_root=tmp_path / "root") as service:
            operator = service.operator
            await operator.pin(AdapterRef("red"), ME)
            await operator.name("mine", "one", ME)
            await asyncio.to_thread(hub.delete, "red")
            folder.rename(folder.with_name("elsewhere"))
            operator._registry.forget()
            await operator.unpin(AdapterRef("red"), ME)
            await operator.unname("MINE", ME)
            with pytest.raises(AdapterNotFound):
                await operator.unpin(AdapterRef("red"), ME)
            assert not any(entry.pinned for entry in service.registry.entries.values())
        state = StateFile(base).read()
        assert (state.pinned, state.names) == ((), {})

    play(scenario())


def test_every_listed_name_can_be_asked_for(base, hub, write, tmp_path):
    """A list whose names are refused is worse than none; of a name that has a newer version, the loaded older one is name@version."""
    write("one", 64, where=tmp_path / "root")

    async def scenario():
        async with running(base, hub, local_root=tmp_path / "root") as service:
            await answer(service, "red", PROMPT)
            await service.open(AdapterRef("one", "local"), ME)
            await asyncio.to_thread(hub.publish, write("red-2", 65), "red")
            found = {info.name: info for info in await service.operator.adapters(ME)}
            assert sorted(found) == ["blue", "green", "local:one", "red", "red@1"]
            for name, info in found.items():
                assert await key_of(service, name) == info.digest or info.digest is None

    play(scenario())


def test_parents_are_told_alike_before_and_after_loading(base, hub, write):
    """A client that reads lineage need not know what is in memory; weights of layers come with it."""
    parent = {"digest": hub.resolve("red").digest, "name": "red@1", "weight": 0.5, "layer_weights": [0.25, 0.75]}
    hub.publish(write("both", 67, kind="composed", parents=[parent]), "both")

    async def scenario():
        async with running(base, hub) as service:
            known = (await service.operator.adapter(AdapterRef("both"), ME)).parents
            await key_of(service, "both")
            loaded = (await service.operator.adapter(AdapterRef("both"), ME)).parents
            listed = {info.name: info.parents for info in await service.operator.adapters(ME)}["both"]
            assert known == loaded == listed and [dict(one) for one in known] == [parent]

    play(scenario())


def test_parents_that_a_key_may_not_see_are_not_told(base, hub, write):
    """What an adapter was made of is a list of other people's adapters."""
    parents = [{"digest": hub.resolve(name).digest, "name": f"{name}@1", "weight": 0.5} for name in ("red", "green")]
    hub.publish(write("both", 66, kind="composed", parents=parents), "both")

    async def scenario():
        async with running(base, hub) as service:
            caller = Caller("k", adapters=("both", "red"))
            for _ in range(2):  # known, then loaded
                [both, _red] = await service.operator.adapters(caller)
                assert [parent["name"] for parent in both.parents] == ["red@1"]
                assert (await service.operator.adapter(AdapterRef("both"), caller)).parents == both.parents
                await key_of(service, "both")
            assert len((await service.operator.adapter(AdapterRef("both"), ME)).parents) == 2

    play(scenario())


def test_a_lookup_that_began_before_a_publish_is_not_joined_after_it(base, hub):
    """Whoever publishes and then asks must get what was published."""

    async def scenario():
        async with running(base, hub) as service:
            lookups, started, go = service.registry.lookups, threading.Event(), threading.Event()
            source = lookups.source("hub")
            locate, calls = source.locate, []

            def slow(reference):
                found = locate(reference)
                calls.append(reference)
                if len(calls) == 1:
                    started.set()
                    assert go.wait(30)
                return found

            source.locate = slow
            source.stamp = lambda reference: "the same"
            first = asyncio.create_task(key_of(service, "red"))
            await asyncio.to_thread(started.wait, 30)
            service.registry.forget()
            second = await key_of(service, "red")
            go.set()
            assert await first == second
            assert len(calls) == 2

    play(scenario())


def test_an_adapter_that_was_pinned_while_its_unload_waited_stays(base, hub):
    """The check before waiting says nothing of the time after it."""

    async def scenario():
        from atoll.serving.entries import InUse

        async with running(base, hub) as service:
            key = await key_of(service, "red")
            entry = service.registry.entries[key]
            service.registry.hold(key)
            unloading = asyncio.create_task(service.operator.unload(AdapterRef("red"), ME, wait_s=30))
            await asyncio.sleep(0.03)
            await service.operator.pin(AdapterRef("red"), ME)
            service.registry.release(key)
            with pytest.raises(InUse, match="pinned"):
                await unloading
            assert entry.loaded is not None

    play(scenario())
