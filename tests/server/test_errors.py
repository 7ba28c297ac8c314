"""Every error of ours in every protocol: the status and type by which clients choose their exception, and one sentence."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from atoll import errors
from atoll.errors import AtollError, QueueFull
from atoll.http.errors import Incomplete, invalid_body, kind_of, protocol_of, refusal, refusal_of
from atoll.serving.entries import SourceRefused, TimedOut, Unavailable

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AtollError)] + [Incomplete, Unavailable]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_has_a_body_in_each_protocol(kind: type[AtollError]) -> None:
    """A client's mistake is never a 500, and no protocol's client meets another's body."""
    error = kind("it is so", hint="do this")
    for protocol in ("native", "openai", "own"):
        refused = refusal_of(error, protocol)
        assert 400 <= refused.status < 600 and (refused.status != 500 or (kind, protocol) == (errors.EngineError, "openai"))
        body = json.loads(refused.encode())
        if protocol == "native":
            assert isinstance(body["error"], str) and isinstance(body["error_type"], str)
            assert "it is so" in body["error"] or body["hint"] == "it is so"
        elif protocol == "openai":
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["message"] == "it is so (do this)"
        else:
            assert body["error"]["message"] == "it is so"
            assert body["error"]["hint"] == "do this"
            assert body["error"]["code"].islower()


@pytest.mark.parametrize(
    ("error", "native", "openai", "own"),
    [
        (errors.KeyRefused("x"), (401, "authentication"), (401, "authentication_error"), (401, "key_refused")),
        (errors.NotAllowed("x"), (403, "permission"), (403, "permission_error"), (403, "not_allowed")),
        (errors.RequestRefused("x"), (422, "validation"), (400, "invalid_request_error"), (422, "request_refused")),
        (errors.AdapterNotFound("x"), (424, "generation"), (404, "invalid_request_error"), (404, "adapter_not_found")),
        (errors.BaseMismatch("x"), (424, "generation"), (422, "invalid_request_error"), (422, "base_mismatch")),
        (errors.EngineError("x"), (424, "generation"), (500, "server_error"), (424, "engine_error")),
        (TimedOut("x"), (424, "generation"), (504, "server_error"), (504, "timed_out")),
        (SourceRefused("x"), (424, "generation"), (422, "invalid_request_error"), (424, "source_refused")),
        (errors.QueueFull("x"), (429, "overloaded"), (429, "rate_limit_error"), (429, "queue_full")),
        (Unavailable("x"), (503, "unavailable"), (503, "server_error"), (503, "unavailable")),
        (Incomplete("x"), (503, "incomplete_generation"), (503, "server_error"), (503, "incomplete")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_statuses_and_types(error: AtollError, native: tuple[int, str], openai: tuple[int, str], own: tuple[int, str]) -> None:
    """The table that clients rely on."""
    found = refusal_of(error, "native")
    assert (found.status, found.body["error_type"]) == native
    found = refusal_of(error, "openai")
    assert (found.status, found.body["error"]["type"]) == openai
    found = refusal_of(error, "own")
    assert (found.status, found.body["error"]["code"]) == own


def test_an_overloaded_server_says_when_to_come_back() -> None:
    """Retry-After counts whole seconds, at least one: clients wait that long and no longer."""
    for seconds, told in [(0.2, "1"), (1.0, "1"), (3.2, "4")]:
        assert refusal_of(QueueFull("x", retry_after_s=seconds), "openai").headers["retry-after"] == told
    assert refusal_of(QueueFull("three wait"), "native").body == {"error": "Model is overloaded", "error_type": "overloaded", "hint": "three wait"}


def test_a_missing_key_names_the_scheme() -> None:
    """HTTP demands it of a 401, and tools show it."""
    assert refusal_of(errors.KeyRefused("x"), "native").headers == {"www-authenticate": "Bearer"}


def test_openai_errors_carry_the_field_and_the_code() -> None:
    """The official client shows `param` and `code`."""
    error = errors.RequestRefused("x")
    error.param, error.code = "messages[0].role", "invalid_value"  # type: ignore[attr-defined]
    assert refusal_of(error, "openai").body["error"] == {
        "message": "x",
        "type": "invalid_request_error",
        "param": "messages[0].role",
        "code": "invalid_value",
    }


@pytest.mark.parametrize(
    ("path", "protocol"),
    [
        ("/generate", "native"),
        ("/v1/models", "openai"),
        ("/v1", "native"),
        ("/adapters", "own"),
        ("/adapters/x/load", "own"),
        ("/adaptersx", "native"),
    ],
)
def test_the_path_decides_the_shape(path: str, protocol: str) -> None:
    """One shape for all routes of a protocol, also for those that do not exist."""
    assert protocol_of(path) == protocol


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ({"type": "json_invalid", "loc": ("body", 7), "msg": "JSON decode error", "ctx": {"error": "Expecting value"}}, "not JSON: Expecting value"),
        ({"type": "missing", "loc": ("body", "inputs"), "msg": "Field required"}, "`inputs` is missing"),
        ({"type": "missing", "loc": ("body",), "msg": "Field required"}, "the request has no body"),
        ({"type": "model_attributes_type", "loc": ("body",), "msg": "x"}, "content-type: application/json"),
        ({"type": "int_type", "loc": ("body", "parameters", "seed"), "msg": "Input should be an integer"}, "`parameters.seed`: input should be"),
    ],
)
def test_an_invalid_body_is_told_in_one_sentence(problem: dict[str, Any], sentence: str) -> None:
    """The place and what is wrong with it, not a list of machine words."""
    assert sentence in invalid_body([problem], "native").body["error"]
    assert invalid_body([problem], "native").status == 422
    assert invalid_body([problem], "openai").status == 400


def test_unclassed_refusals_have_the_same_shapes() -> None:
    """404 and 413 come from middleware, and clients parse them alike."""
    assert refusal(413, "too much", "native").body == {"error": "too much", "error_type": "too_large"}
    assert refusal(404, "no", "own").body == {"error": {"code": "not_found", "message": "no", "hint": ""}}
    assert refusal(500, "no", "openai").body["error"]["type"] == "server_error"


def test_the_root_of_the_tree_has_a_kind_too() -> None:
    """A class that somebody adds tomorrow is answered as what it descends from."""

    class New(errors.HubError):
        """Of tomorrow."""

    assert kind_of(New("x")) is kind_of(errors.HubError("x"))
    assert kind_of(AtollError("x")).native == (424, "generation")
