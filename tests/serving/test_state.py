"""What survives a restart, and what an operator does: pins, names, reloads, publishing."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest

from atoll.errors import AdapterFormatError, AdapterNotFound, BaseMismatch, ConfigError, NotAllowed, PoolFull, RequestRefused
from atoll.serving.entries import AdapterRef, InUse
from atoll.serving.keys import Caller
from atoll.serving.state import StateFile
from serving.scenes import ME, answer, key_of, play, running

PROMPT = [5, 6, 7, 8]


async def until_pinned(service, *names):
    """Until the background has loaded and pinned these."""
    while {entry.name for entry in service.registry.entries.values() if entry.pinned} != set(names):
        await asyncio.sleep(0.002)


def test_pins_survive_a_restart(base, hub):
    """The complaint of every server with an API for loading: a restart forgets it all."""

    async def scenario():
        async with running(base, hub) as service:
            for name in ("red", "green@1"):
                assert (await service.operator.pin(AdapterRef(name), ME)).pinned
            await service.operator.pin(AdapterRef("blue"), ME)
            await service.operator.unpin(AdapterRef("blue"), ME)
        async with running(base, hub) as service:
            await until_pinned(service, "red", "green")
            assert (await service.run(lambda engine: engine.stats()))["adapters_pinned"] == 2
            with pytest.raises(InUse, match="pinned"):
                await service.operator.unload(AdapterRef("red"), ME)
            await service.operator.unpin(AdapterRef("red@1"), ME)  # another word for the same content
            assert not (await service.operator.unload(AdapterRef("red"), ME)).pinned
        async with running(base, hub) as service:
            await until_pinned(service, "green")

    play(scenario())


def test_a_pin_that_cannot_be_restored_does_not_stop_the_server(base, hub, caplog):
    """It is logged, stays remembered, and everything else is served."""

    async def scenario():
        async with running(base, hub) as service:
            for name in ("red", "green"):
                await service.operator.pin(AdapterRef(name), ME)
        hub.delete("red")
        with caplog.at_level(logging.ERROR):
            async with running(base, hub) as service:
                await until_pinned(service, "green")
                assert service.ready
        assert "red, which was pinned, could not be loaded" in caplog.text

    play(scenario())


def test_two_servers_of_a_base_share_the_file(base, hub):
    """What one pins must not undo what the other has."""
    first, second = StateFile(base), StateFile(base)
    first.pin(AdapterRef("red"))
    second.pin(AdapterRef("green"))
    first.name("mine", AdapterRef("blue", "hub", token="secret"))
    assert [one.adapter_id for one in second.read().pinned] == ["red", "green"]
    assert second.read().names["mine"].adapter_id == "blue"
    assert "secret" not in first.path.read_text()
    second.unpin(AdapterRef("red"))
    assert [one.adapter_id for one in first.read().pinned] == ["green"]


def test_a_damaged_file_is_reported_and_kept(base, hub, caplog):
    """Writing over it would lose what a person could still read."""
    file = StateFile(base)
    file.path.parent.mkdir(parents=True)
    file.path.write_text("{")
    with pytest.raises(ConfigError, match=r"\.json"):
        file.pin(AdapterRef("red"))

    async def scenario():
        async with running(base, hub) as service:
            assert (await answer(service, "red", PROMPT)).finish_reason == "length"

    with caplog.at_level(logging.ERROR):
        play(scenario())
    assert "nothing was restored" in caplog.text
    assert file.path.read_text() == "{"


def test_a_pinned_name_follows_its_newest_version(base, hub, write):
    """Pinned is the name: the old version must not stay in memory for ever, nor the new one be loaded at every request."""

    async def scenario():
        async with running(base, hub) as service:
            await service.operator.pin(AdapterRef("red"), ME)
            await asyncio.to_thread(hub.publish, write("red-2", 41), "red")
            await answer(service, "red", PROMPT)
            while True:
                pinned = [entry.version for entry in service.registry.entries.values() if entry.pinned]
                if pinned == ["red@2"]:
                    break
                await asyncio.sleep(0.002)
            assert (await service.run(lambda engine: engine.stats()))["adapters_pinned"] == 1

    play(scenario())


def test_what_is_preloaded_is_there_before_the_first_request(base, hub):
    """And what cannot be is an error at the start, not at the first request."""

    async def scenario():
        async with running(base, hub, preload=["red", "green"]) as service:
            assert {entry.name for entry in service.registry.entries.values() if entry.pinned} == {"red", "green"}
            assert StateFile(base).read().pinned == ()
        with pytest.raises(AdapterNotFound, match="nope"):
            async with running(base, hub, preload=["nope"]):
                pass
        with pytest.raises(PoolFull):
            async with running(base, hub, preload=["red"], engine={"adapter_bytes": 100}):
                pass

    play(scenario())


def test_a_given_name_means_a_folder(base, hub, write, tmp_path):
    """vLLM's way: a name for a path; it survives a restart, and a name that is taken is not taken over silently."""
    root = tmp_path / "root"
    write("one", 42, where=root)
    write("two", 43, where=root)

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            operator = service.operator
            info = await operator.name("mine", "one", ME)
            assert (info.name, info.source, info.state) == ("mine", "local", "ready")
            served = await service.open(AdapterRef("mine"), Caller("k", adapters=("mine",)))
            assert served.name == "mine"
            assert served.key == await key_of(service, "one", source="local")
            for name, path in (("red", "one"), ("mine", "two")):
                with pytest.raises(RequestRefused, match=name):
                    await operator.name(name, path, ME)
            with pytest.raises(RequestRefused):
                await operator.name("../x", "one", ME)
            with pytest.raises(NotAllowed):
                await operator.name("other", "one", Caller("k", adapters=("mine", "local:one")))
            await operator.name("mine", "two", ME, replace_old=True)
            assert await key_of(service, "mine") == await key_of(service, "two", source="local")
            assert (await operator.name("red", "red", ME)).source == "hub"  # loads it: it has that name already
            found = {info.name: info for info in await operator.adapters(ME)}
            assert (found["mine"].state, found["mine"].digest) == ("ready", await key_of(service, "mine"))
        async with running(base, hub, local_root=root) as service:
            while "mine" not in service.registry.lookups.aliases:
                await asyncio.sleep(0.002)
            assert await key_of(service, "mine") == await key_of(service, "two", source="local")
            await service.operator.unname("mine", ME)
            with pytest.raises(AdapterNotFound):
                await key_of(service, "mine")
        assert StateFile(base).read().names == {}

    play(scenario())


def test_publishing_makes_servable_at_once_or_changes_nothing(base, hub, write, tmp_path):
    """What could not be served must not take the next version's number."""
    broken = write("broken", 44)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)

    async def scenario():
        async with running(base, hub) as service:
            old = await key_of(service, "red")
            with pytest.raises(AdapterFormatError):
                await service.operator.publish(broken, "red", ME)
            assert await key_of(service, "red") == old
            version = await service.operator.publish(write("better", 45), "red", ME, tags=["stable"], message="better")
            assert version.ref == "red@2"
            assert await key_of(service, "red:stable") == version.digest
            with pytest.raises(NotAllowed):
                await service.operator.publish(write("better", 46), "red", Caller("k", adapters=("green",)))
            assert [version.number for version in hub.list("red", all_versions=True)] == [2, 1]
            other = {**base.describe(), "weights_fingerprint": "0" * 64}
            with pytest.raises(BaseMismatch):
                await service.operator.publish(write("bound", 47, base=other), "bound", ME, bind_base=True)

    play(scenario())


def test_the_list_tells_state_and_counts(base, hub, write):
    """What an operator looks at first when something is wrong."""
    hub.publish(write("both", 48, kind="composed", parents=[{"digest": hub.resolve("red").digest, "name": "red", "weight": 0.5}]), "both")

    async def scenario():
        async with running(base, hub) as service:
            await answer(service, "red", PROMPT)
            await key_of(service, "green")
            await service.operator.pin(AdapterRef("green"), ME)
            found = {info.name: info.to_json() for info in await service.operator.adapters(ME)}
            json.dumps(found)
            assert list(found) == ["blue", "both", "green", "red"]
            assert [found[name]["state"] for name in found] == ["known", "known", "ready", "ready"]
            assert found["both"]["parents"][0]["weight"] == 0.5
            assert found["red"]["counters"]["requests"] == 1
            assert found["red"]["counters"]["generated_tokens"] == 8
            assert found["red"]["engine"]["resident"]
            assert found["green"]["pinned"]
            assert found["green"]["engine"]["pinned"]
            assert found["blue"]["created"] > 0
            assert found["red"]["digest"] == hub.resolve("red").digest

    play(scenario())


def test_one_content_under_two_names_is_listed_under_both(base, hub, write):
    """Each team looks for its own name; the engine keeps one copy."""
    hub.publish(write("red", 1), "team/red")

    async def scenario():
        async with running(base, hub) as service:
            assert await key_of(service, "red") == await key_of(service, "team/red")
            assert [info.name for info in await service.operator.adapters(ME)] == ["blue", "green", "red", "team/red"]
            assert [info.name for info in await service.operator.adapters(Caller("k", adapters=("team/*",)))] == ["team/red"]
            assert (await service.run(lambda engine: engine.stats()))["adapters_registered"] == 1

    play(scenario())


def test_background_work_ends_with_the_service(base, hub):
    """A restore that hangs must not keep the process from ending."""

    async def scenario():
        async with running(base, hub) as service:
            await service.operator.pin(AdapterRef("red"), ME)
        event = threading.Event()
        async with running(base, hub) as service:
            source = service.registry.lookups.source("hub")
            source.fetch = lambda located, scratch, token: event.wait(30)
        event.set()
        assert service.draining

    play(scenario())
