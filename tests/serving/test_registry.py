"""From names to adapters that answer: versions, one load each, failures that stay alone, allow-lists, bounds, unloading."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from adapters import decoder_of, random_adapter
from atoll.errors import AdapterFormatError, AdapterNotFound, BaseMismatch, EngineError, IntegrityError, QueueFull
from atoll.hub import Hub
from atoll.model.adapter_files import write_adapter
from atoll.serving import registry as registry_module
from atoll.serving.entries import AdapterRef
from atoll.serving.keys import Caller
from conftest import tiny_model
from serving.scenes import ME, Loads, answer, ask, key_of, play, running

PROMPT = [5, 6, 7, 8]
LONG = 400


def hold_back(service, name, event):
    """Let reading the adapter `name` wait for an event, in its worker thread."""
    source = service.registry.lookups.source("hub")
    fetch = source.fetch

    def slow(located, scratch, token):
        if located.name == name:
            assert event.wait(30)
        return fetch(located, scratch, token)

    source.fetch = slow


def damage(hub, name):
    """Flip bytes of what the hub has stored, as a dying disk does."""
    path = hub.resolve(name).path / "adapter_model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.unlink()
    path.write_bytes(data)


# ---- names ----


def test_every_way_to_name_a_version_finds_the_same_content(base, hub):
    """Names, numbers, tags and digests are aliases of one content, and the engine must not keep it twice."""
    version = hub.tag("red", "stable")

    async def scenario():
        async with running(base, hub) as service:
            for text in ("red", "RED", "red@1", "red:stable", f"sha256:{version.digest}", f"red@sha256:{version.digest[:12]}"):
                served = await service.open(AdapterRef(text), ME)
                assert (served.key, served.name, served.version, served.ids) == (version.digest, "red", "red@1", (text,))
            assert await key_of(service, "red", revision="1") == await key_of(service, "red", revision="stable") == version.digest
            assert len(service.registry.entries) == 1

    play(scenario())


@pytest.mark.parametrize("name", [None, "", "base", "__base_model__"])
def test_the_base_has_names_of_its_own(base, hub, name):
    """LoRAX's clients send null, "" or __base_model__."""

    async def scenario():
        async with running(base, hub) as service:
            for text in (name, base.name):
                served = await service.open(AdapterRef(text), Caller("k", adapters=()))
                assert (served.key, served.name, served.ids) == (None, base.name, ())

    play(scenario())


def test_a_default_adapter_answers_who_names_none(base, hub):
    """And the base can still be asked for by its name."""

    async def scenario():
        async with running(base, hub, default_adapter="green") as service:
            assert (await service.open(AdapterRef(), ME)).name == "green"
            assert (await service.open(AdapterRef("__base_model__"), ME)).key is None

    play(scenario())


@pytest.mark.parametrize("name", ["nope", "red@9", "red:nope", "../red", "a/b/c", "red\n", "sha256:" + "0" * 64, "x" * 5000, "hf:acme/sql"])
def test_what_is_not_there_is_not_found(base, hub, name):
    """Whatever a client writes, the answer is one sentence and never the base."""

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises((AdapterNotFound, EngineError)) as caught:
                await service.open(AdapterRef(name), ME)
            assert len(caught.value.message) < 300

    play(scenario())


def test_a_version_published_elsewhere_is_served_at_once(base, hub, write, tmp_path):
    """Publishing is how a new version goes live; requests in flight keep what they began with."""

    async def scenario():
        async with running(base, hub) as service:
            old = await key_of(service, "red")
            stream = service.stream(ask(PROMPT, old, 100), ME)
            first = await anext(stream)
            other = Hub(tmp_path / "hub")  # as another process has it
            version = await asyncio.to_thread(other.publish, write("red-2", 40), "red")
            new = await key_of(service, "red")
            assert (old, new) == (hub.resolve("red@1").digest, version.digest)
            events = [first] + [event async for event in stream]
            assert len(events) == 100
            assert {events[-1].completion.adapter} == {old}
            assert (await answer(service, "red@1", PROMPT)).adapter == old
            await asyncio.to_thread(other.yank, "red@2")
            assert await key_of(service, "red") == old

    play(scenario())


# ---- loading ----


def test_many_who_ask_at_once_wait_for_one_load(base, hub):
    """A popular new version must be read once, not once a request."""

    async def scenario():
        async with running(base, hub) as service:
            loads = Loads(service)
            keys = await asyncio.gather(*(key_of(service, "red") for _ in range(50)))
            assert len(set(keys)) == 1
            assert loads.loads == ["red"]

    play(scenario())


def test_a_slow_load_holds_up_nobody_else(base, hub):
    """Not other adapters, not the base, not streams that run."""

    async def scenario():
        async with running(base, hub) as service:
            event = threading.Event()
            hold_back(service, "red", event)
            waiting = asyncio.create_task(answer(service, "red", PROMPT))
            while not service.registry.num_loading:
                await asyncio.sleep(0)
            assert len((await answer(service, "green", PROMPT)).token_ids) == 8
            assert len((await answer(service, None, PROMPT)).token_ids) == 8
            assert [info.state for info in await service.operator.adapters(ME)] == ["known", "ready", "loading"]
            assert not waiting.done()
            event.set()
            assert len((await waiting).token_ids) == 8

    play(scenario())


def test_who_gives_up_waiting_does_not_stop_the_load(base, hub):
    """The next request finds the adapter there."""

    async def scenario():
        async with running(base, hub) as service:
            event = threading.Event()
            hold_back(service, "red", event)
            first, second = asyncio.create_task(key_of(service, "red")), asyncio.create_task(key_of(service, "red"))
            while not service.registry.num_loading:
                await asyncio.sleep(0)
            first.cancel()
            event.set()
            assert await second == hub.resolve("red").digest

    play(scenario())


def test_a_load_that_takes_too_long_is_given_up(base, hub):
    """One worker, one source that hangs: the place must be free for others at once."""

    async def scenario():
        async with running(base, hub, load_timeout_s=0.2, load_workers=1) as service:
            event = threading.Event()
            hold_back(service, "red", event)
            with pytest.raises(EngineError, match="longer than"):
                await key_of(service, "red")
            assert await key_of(service, "green") == hub.resolve("green").digest
            event.set()

    play(scenario())


def test_loads_that_wait_are_bounded(base, hub):
    """Naming a thousand adapters at once must not queue a thousand downloads."""

    async def scenario():
        async with running(base, hub, max_loading=1) as service:
            event = threading.Event()
            hold_back(service, "red", event)
            waiting = asyncio.create_task(key_of(service, "red"))
            while not service.registry.num_loading:
                await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await key_of(service, "green")
            event.set()
            await waiting
            assert await key_of(service, "green")

    play(scenario())


def test_a_corrupt_adapter_fails_its_own_requests_only(base, hub):
    """And is not read again at each of them: the second failure comes from memory, until an operator or time says try again."""
    damage(hub, "red")

    async def scenario():
        async with running(base, hub) as service:
            loads = Loads(service)
            for _ in range(3):
                with pytest.raises(IntegrityError) as caught:
                    await answer(service, "red", PROMPT)
                assert "red@1" in caught.value.message
                assert str(hub.root) not in caught.value.message
            assert loads.failures == ["red"]
            assert len((await answer(service, "green", PROMPT)).token_ids) == 8
            info = await service.operator.adapter(AdapterRef("red"), ME)
            assert info.state == "failed"
            assert "red@1" in info.error
            shutil.rmtree(hub.resolve("red").path)  # the hub builds it again from its blobs
            assert (await service.operator.load(AdapterRef("red"), ME)).state == "ready"
            assert len((await answer(service, "red", PROMPT)).token_ids) == 8

    play(scenario())


def test_each_failure_doubles_the_wait(base, hub, monkeypatch):
    """A source that is down must not be asked for every request."""
    damage(hub, "red")

    async def scenario():
        async with running(base, hub, negative_cache_s=10) as service:
            clock = [1000.0]
            # The registry's own clock: Python's is also that of every event loop, and the shared test server's would sleep for hours.
            monkeypatch.setattr(registry_module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
            loads = Loads(service)
            for wait in (10, 20, 40):
                with pytest.raises(IntegrityError):
                    await key_of(service, "red")
                count = len(loads.failures)
                clock[0] += wait - 1
                with pytest.raises(IntegrityError):
                    await key_of(service, "red")
                assert len(loads.failures) == count
                clock[0] += 2
            assert len(loads.failures) == 3
            monkeypatch.undo()

    play(scenario())


def test_an_adapter_of_another_base_is_refused(base, hub, tmp_path):
    """Applied all the same, it would answer nonsense with a 200."""
    write_adapter(tmp_path / "wide", random_adapter(decoder_of(tiny_model("llama", hidden_size=128)), rank=4))
    hub.publish(tmp_path / "wide", "wide")

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises(BaseMismatch, match="wide"):
                await key_of(service, "wide")
            assert await key_of(service, "red")
            assert "wide" not in {info.name for info in await service.operator.adapters(ME)}

    play(scenario())


def test_an_adapter_that_is_too_large_is_refused_before_it_is_read(base, hub):
    """A limit that is checked after reading is no limit."""

    async def scenario():
        async with running(base, hub, max_adapter_bytes=1000) as service:
            hold_back(service, "red", threading.Event())  # reading would never end
            with pytest.raises(AdapterFormatError, match="1,000"):
                await key_of(service, "red")

    play(scenario())


def test_what_came_with_an_adapter_is_served_with_it(base, hub, write):
    """Prompt, stop tokens and labels are part of the version."""
    prompt = {"template": "T: {text}\nL:", "instruction": "", "target": "label", "chat": False, "stop": ["\n"], "completion_prefix": " "}
    hub.publish(write("a", 11, prompt=prompt, labels=["good", "bad"], stop_token_ids=[4, 7, 10_000, "x"]), "a")
    hub.publish(write("b", 12, training={"config": {"data": {"label_set": ["yes", "no"]}}}), "b")
    hub.publish(write("c", 13, training={"config": {"data": {"path": "builtin:support_intents"}}}), "c")
    hub.publish(write("d", 14, training={"config": {"data": {"path": "builtin:of the future"}}}), "d")

    async def scenario():
        async with running(base, hub) as service:
            a, b, c, d, red = [await service.open(AdapterRef(name), ME) for name in ("a", "b", "c", "d", "red")]
            assert a.prompt.template == "T: {text}\nL:"
            assert a.prompt.stop == ("\n",)
            assert a.stop_token_ids == (4, 7)
            assert (a.labels, b.labels, d.labels, red.labels) == (("good", "bad"), ("yes", "no"), None, None)
            assert len(c.labels) > 3
            assert red.prompt is None

    play(scenario())
