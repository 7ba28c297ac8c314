"""Who may use which adapter: what is forbidden does not exist, and merging is no way around."""

from __future__ import annotations

import pytest

from atoll.errors import AdapterNotFound
from atoll.hub import Hub
from atoll.serving.entries import AdapterRef
from atoll.serving.keys import Caller
from atoll.serving.merging import MergeSpec
from serving.scenes import ME, Loads, ask, key_of, play, running

PROMPT = [5, 6, 7, 8]


def test_a_forbidden_adapter_is_answered_like_a_missing_one(base, hub, write, monkeypatch):
    """Same class, same words, same work: a key must not learn what others have, nor by how long the answer takes."""
    hub.publish(write("secret", 21), "org_b/secret")

    async def scenario():
        async with running(base, hub) as service:
            await key_of(service, "org_b/secret")  # there, loaded and in use by somebody else
            ann = Caller("ann", adapters=("org_a/*", "red"))
            looked = []
            monkeypatch.setattr(hub, "resolve", lambda text: looked.append(text) or Hub.resolve(hub, text))
            digest = hub.resolve("org_b/secret").digest
            looked.clear()
            said = {}
            for name in ("org_b/secret", "org_b/nothing", "green", "grxxn", "org_b/secret@1", "org_b/nothing@1"):
                with pytest.raises(AdapterNotFound) as caught:
                    await service.open(AdapterRef(name), ann)
                said[name] = (type(caught.value), caught.value.message.replace(name, "X"), caught.value.hint)
            assert len(set(said.values())) == 1
            assert looked == []  # nothing is looked up, whether it exists or not
            for reference in (f"sha256:{digest}", "sha256:" + "0" * 64):
                with pytest.raises(AdapterNotFound) as caught:
                    await service.open(AdapterRef(reference), ann)
                assert caught.value.message.replace(reference, "X") == said["green"][1]
            with pytest.raises(AdapterNotFound) as caught:
                await service.open(AdapterRef("org_a/nothing"), ann)
            assert "org_b" not in caught.value.message + caught.value.hint
            assert (await service.open(AdapterRef("red"), ann)).name == "red"
            assert [info.name for info in await service.operator.adapters(ann)] == ["red"]

    play(scenario())


def test_every_parent_of_a_merge_is_checked(base, hub):
    """Merging must not be a way around an allow-list."""

    async def scenario():
        async with running(base, hub) as service:
            ann = Caller("ann", adapters=("red", "green"))
            ours = await service.open(AdapterRef(merged=MergeSpec(("red", "green"), (1.0, 0.5))), ann)
            assert ours.ids == ("red", "green")
            with pytest.raises(AdapterNotFound, match="blue"):
                await service.open(AdapterRef(merged=MergeSpec(("red", "blue"), (1.0, 0.5))), ann)

    play(scenario())


def test_a_merge_is_made_once_and_answers_differently(base, hub):
    """Cached by content: the same parents, weights and method are the same adapter whatever they were called."""

    async def scenario():
        async with running(base, hub) as service:
            loads = Loads(service)
            keys = [
                (await service.open(AdapterRef(merged=MergeSpec(ids, weights)), ME)).key
                for ids, weights in ((("red", "green"), (1.0, 0.5)), (("red@1", "green"), (1.0, 0.5)), (("red", "green"), (1.0, -0.5)))
            ]
            assert keys[0] == keys[1] != keys[2]
            assert len([name for name in loads.loads if name.startswith("merged:")]) == 2
            [one] = await service.generate([ask(PROMPT, keys[0])], ME)
            [two] = await service.generate([ask(PROMPT, keys[2])], ME)
            assert one.finish_reason == two.finish_reason == "length"
            with pytest.raises(AdapterNotFound):
                await service.open(AdapterRef(merged=MergeSpec(("red", "nope"), (1.0, 1.0))), ME)

    play(scenario())
