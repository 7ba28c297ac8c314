"""POST /v1/embeddings with OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.server.openai_server import OpenAILive, openai_serving

from atoll.model.base import Base


@pytest.fixture(scope="module")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAILive]:
    with openai_serving(served_base, tmp_path_factory.mktemp("server")) as server:
        yield server


def test_base64_holds_the_numbers_that_float_shows(live: OpenAILive):
    """The client asks for base64 unless told otherwise; half of all programs would get other vectors than the other half."""
    asked = live.client().embeddings
    packed = asked.create(model="plain", input=["a lagoon", "b"])
    plain = asked.create(model="plain", input=["a lagoon", "b"], encoding_format="float")
    assert [item.embedding for item in packed.data] == [pytest.approx(item.embedding, rel=1e-6) for item in plain.data]
    assert [item.index for item in packed.data] == [0, 1] and packed.object == "list" and packed.model == "plain"
    assert len(plain.data[0].embedding) == live.base.decoder.shape.hidden
    assert (packed.usage.prompt_tokens, packed.usage.total_tokens) == (9, 9)


def test_every_form_of_input_means_the_same(live: OpenAILive):
    """A text, its tokens, or a list of either."""
    ids = live.ids("lagoon")
    found = [live.client().embeddings.create(model="", input=given).data[0].embedding for given in ("lagoon", ["lagoon"], ids, [ids])]
    assert all(vector == pytest.approx(found[0], abs=1e-6) for vector in found)


def test_pooling_and_adapter_are_those_asked_for(live: OpenAILive):
    """A vector of another adapter, or of another pooling, looks just as good."""
    ids = live.ids("lagoon")
    live.client().embeddings.create(model="plain", input="x")  # loads it
    for model, adapter in (("plain", "plain"), (live.base.name, None)):
        for pooling in ("mean", "last"):
            found = live.client().embeddings.create(model=model, input=ids, extra_body={"pooling": pooling}).data[0].embedding
            assert found == pytest.approx(live.embed(ids, adapter, pooling), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [5, 100000]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"input": [{"a": 1}]}, None),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_a_wrong_request_is_refused_by_name(live: OpenAILive, fields: dict[str, object], param: str | None):
    """A client's mistake is a BadRequestError that says which field."""
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().embeddings.create(**{"model": "", **fields})
    if param is not None:
        assert caught.value.param == param


def test_dimensions_may_be_the_hidden_size(live: OpenAILive):
    """Some programs always send them."""
    width = live.base.decoder.shape.hidden
    assert len(live.client().embeddings.create(model="", input="x", dimensions=width).data[0].embedding) == width


async def ask_async(live: OpenAILive) -> list[float]:
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as asked:
        return (await asked.embeddings.create(model="talk", input="lagoon")).data[0].embedding


def test_the_async_client_works_too(live: OpenAILive):
    """It has another HTTP stack."""
    import asyncio

    assert len(asyncio.run(ask_async(live))) == live.base.decoder.shape.hidden
