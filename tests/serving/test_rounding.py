"""A server of the plain base and adapters that were trained on a rounded one: refused by name, with the flag that helps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters import decoder_of, publish, random_adapter
from atoll.errors import BaseMismatch
from conftest import tiny_model
from serving.scenes import answer, play, running


@pytest.fixture
def rounded(base, hub, tmp_path):
    """An adapter of the hub whose manifest says that its base was rounded."""
    record = replace(base.fingerprint, quantization="nf4").to_json()
    return publish(hub, random_adapter(decoder_of(tiny_model("llama"))), "rounded", tmp_path, base={"name": base.name, **record})


def test_an_adapter_of_a_rounded_base_is_refused_with_the_flag_that_helps(base, hub, rounded):
    """A silent mismatch would only show as somewhat worse answers."""

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises(BaseMismatch, match="rounded to nf4, but this is the base as it is") as refused:
                await answer(service, "rounded", [5, 6, 7])
            assert "atoll serve --quantization nf4" in refused.value.hint

    play(scenario())


def test_a_server_may_be_told_to_take_it_all_the_same(base, hub, rounded):
    """The override is the operator's, and explicit."""

    async def scenario():
        async with running(base, hub, ignore_quantization=True) as service:
            assert (await answer(service, "rounded", [5, 6, 7])).finish_reason == "length"

    play(scenario())
