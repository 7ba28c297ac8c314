"""GET /v1/models with OpenAI's client: what may be asked, and by whom."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.server.openai_server import OpenAILive, openai_serving

from atoll.model.base import Base

KEYS = {
    "all": {"scopes": ["infer"]},
    "some": {"scopes": ["infer"], "adapters": ["talk", "org/*"]},
    "publisher": {"scopes": ["publish"]},
}


@pytest.fixture(scope="module")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAILive]:
    with openai_serving(served_base, tmp_path_factory.mktemp("server"), KEYS) as server:
        yield server


def names(live: OpenAILive, key: str) -> list[str]:
    return [model.id for model in live.client(key).models.list()]


def test_the_list_has_the_base_and_every_adapter_of_the_hub(live: OpenAILive):
    """Clients choose `model` from this list."""
    assert names(live, "all") == [live.base.name, "org/mix", "pair", "plain", "sentiment", "talk"]


def test_an_adapter_tells_where_it_comes_from(live: OpenAILive):
    """Lineage is why one can trust an adapter: content, version, parents and their weights."""
    models = {model.id: model for model in live.client("all").models.list()}
    hub = live.service.hub
    assert hub is not None
    mix, base = models["org/mix"], models[live.base.name]
    assert (mix.object, mix.owned_by, base.owned_by) == ("model", "org", "atoll")
    assert mix.created == int(hub.resolve("org/mix").created.timestamp())
    extra, lineage = mix.model_extra or {}, (mix.model_extra or {})["lineage"]
    assert extra["root"] == extra["parent"] == live.base.name and "permission" not in extra
    assert (lineage["version"], lineage["digest"], lineage["kind"]) == ("org/mix@1", hub.resolve("org/mix").digest, "composed")
    assert [(parent["name"], parent["weight"]) for parent in lineage["parents"]] == [("plain@1", 0.5), ("sentiment@1", 0.5)]
    assert (base.model_extra or {})["parent"] is None
    assert (base.model_extra or {})["lineage"]["weights_fingerprint"] == live.base.fingerprint.weights


def test_one_model_is_found_by_every_name_that_a_request_may_use(live: OpenAILive):
    """Names with an owner have a slash, and versions an at sign; the id is the one that was asked for."""
    for name in ("plain", "org/mix", "org/mix@1", live.base.name):
        assert live.client("all").models.retrieve(name).id == name


def test_what_is_not_there_is_not_found_in_openais_shape(live: OpenAILive):
    """The client raises by status, and programs look at `code`."""
    with pytest.raises(openai.NotFoundError) as caught:
        live.client("all").models.retrieve("nobody/nothing")
    assert caught.value.code == "model_not_found" and caught.value.type == "invalid_request_error"


def test_a_key_sees_only_the_adapters_that_it_may_use(live: OpenAILive):
    """An allow-list that shows names it forbids would tell a customer what other customers have."""
    assert names(live, "some") == [live.base.name, "org/mix", "talk"]
    with pytest.raises(openai.NotFoundError) as hidden:
        live.client("some").models.retrieve("sentiment")
    with pytest.raises(openai.NotFoundError) as missing:
        live.client("some").models.retrieve("nothing")
    assert str(hidden.value).replace("sentiment", "nothing") == str(missing.value)
    with pytest.raises(openai.NotFoundError):
        live.client("some").completions.create(model="sentiment", prompt="a", max_tokens=1)
    assert live.client("some").completions.create(model="talk", prompt="a", max_tokens=1).model == "talk"


def test_a_key_is_needed_and_must_be_one_for_asking(live: OpenAILive):
    """The classes that a program catches."""
    with pytest.raises(openai.AuthenticationError) as caught:
        live.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        live.client("publisher").models.list()
