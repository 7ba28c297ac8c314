"""From an error to an HTTP reply: one table of statuses, three shapes of body.

    LoRAX's routes   {"error": "sentence", "error_type": "validation", "hint": "..."}
    OpenAI's, /v1/*  {"error": {"message": "sentence", "type": "invalid_request_error", "param": null, "code": "..."}}
    our own          {"error": {"code": "adapter_not_found", "message": "sentence", "hint": "..."}}

Clients decide by `error_type`, `type` and the status which exception they raise, so those follow each protocol; the sentence is the same everywhere.
What a client got wrong is never a 500: that is for mistakes of our own, whose details stay in the log.

Used by app (handlers), by sse (an error after the stream has begun is an event of the same body), and by middleware that answers by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll import errors
from atoll.errors import AtollError, EngineError, QueueFull, RequestRefused
from atoll.serving.entries import SourceRefused, TimedOut, Unavailable

Protocol = Literal["native", "openai", "own"]

OPENAI_PREFIX = "/v1/"
OWN_PREFIXES = ("/adapters", "/compose")


class Incomplete(EngineError):
    """A request was cut off before its answer was complete: the server is shutting down."""


class ClientGone(Exception):
    """The client hung up before its reply was ready."""


@dataclass(frozen=True)
class Kind:
    """What one class of errors is in each protocol: status and type for LoRAX, status, type and code for OpenAI, status for our own routes."""

    native: tuple[int, str]
    openai: tuple[int, str, str | None]
    own: int


@dataclass(frozen=True)
class Refusal:
    """A reply that tells of an error."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(self.body, separators=(",", ":")).encode()


_INVALID = "invalid_request_error"
_WRONG = Kind((422, "validation"), (400, _INVALID, None), 422)
_UNUSABLE = Kind((424, "generation"), (422, _INVALID, "adapter_unusable"), 422)
_AWAY = Kind((503, "unavailable"), (503, "server_error", "unavailable"), 503)

# The first class that fits counts.
_KINDS: tuple[tuple[type[AtollError], Kind], ...] = (
    (errors.KeyRefused, Kind((401, "authentication"), (401, "authentication_error", "invalid_api_key"), 401)),
    (errors.NotAllowed, Kind((403, "permission"), (403, "permission_error", "not_allowed"), 403)),
    (QueueFull, Kind((429, "overloaded"), (429, "rate_limit_error", "overloaded"), 429)),
    (errors.AdapterNotFound, Kind((424, "generation"), (404, _INVALID, "model_not_found"), 404)),
    (errors.NameRefused, Kind((424, "generation"), (404, _INVALID, "model_not_found"), 422)),
    (errors.IntegrityError, _UNUSABLE),
    (errors.BaseMismatch, _UNUSABLE),
    (errors.AdapterFormatError, _UNUSABLE),
    (errors.UnsupportedAdapter, _UNUSABLE),
    (Incomplete, Kind((503, "incomplete_generation"), (503, "server_error", "incomplete"), 503)),
    (Unavailable, _AWAY),
    (errors.Busy, _AWAY),
    (errors.Interrupted, _AWAY),
    (errors.PoolFull, Kind((424, "generation"), (503, "server_error", "no_adapter_slot"), 503)),
    (errors.HubError, Kind((424, "generation"), (422, _INVALID, None), 409)),
    (errors.StorageError, Kind((424, "generation"), (507, "server_error", None), 507)),
    (errors.DataError, Kind((422, "template_error"), (400, _INVALID, None), 422)),
    (errors.ConfigError, Kind((422, "template_error"), (400, _INVALID, None), 422)),
    (RequestRefused, _WRONG),
    (TimedOut, Kind((424, "generation"), (504, "server_error", "deadline"), 504)),
    (SourceRefused, Kind((424, "generation"), (422, _INVALID, "source_refused"), 424)),
    (EngineError, Kind((424, "generation"), (500, "server_error", None), 424)),  # OpenAI's clients ask again after a 5xx, and only then
    (AtollError, _UNUSABLE),
)

_NATIVE_TYPES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large", 415: "bad_request"}
_PREFIXES = {"validation": "Input validation error: ", "generation": "Request failed during generation: Server error: "}
_OVERLOADED = "Model is overloaded"


def protocol_of(path: str) -> Protocol:
    """Whose shape the errors of a path have."""
    if path.startswith(OPENAI_PREFIX):
        return "openai"
    return "own" if any(path == prefix or path.startswith(prefix + "/") for prefix in OWN_PREFIXES) else "native"


def kind_of(error: AtollError) -> Kind:
    return next(kind for known, kind in _KINDS if isinstance(error, known))


def refusal_of(error: AtollError, protocol: Protocol) -> Refusal:
    """The reply to one of our errors. `param` and `code` of an error, where it has them, go into OpenAI's body."""
    kind = kind_of(error)
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if isinstance(error, QueueFull) else {}
    if kind.native[0] == 401:
        headers["www-authenticate"] = "Bearer"
    if protocol == "native":
        status, error_type = kind.native
        return Refusal(status, _native_body(error, error_type), headers)
    if protocol == "openai":
        status, error_type, code = kind.openai
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        param, own_code = getattr(error, "param", None), getattr(error, "code", None)
        return Refusal(status, {"error": {"message": message, "type": error_type, "param": param, "code": own_code or code}}, headers)
    return Refusal(kind.own, own_body(_code_of(type(error).__name__), error.message, error.hint), headers)


def refusal(status: int, message: str, protocol: Protocol, *, hint: str = "", param: str | None = None) -> Refusal:
    """The reply to what has no class of its own: an unknown path, a method, a body that is too large."""
    if protocol == "native":
        error_type = "validation" if status == 422 else _NATIVE_TYPES.get(status, "internal" if status >= 500 else "bad_request")
        body: dict[str, Any] = {"error": _PREFIXES.get(error_type, "") + message, "error_type": error_type}
        return Refusal(status, body | ({"hint": hint} if hint else {}))
    if protocol == "openai":
        text = f"{message} ({hint})" if hint else message
        error_type = "server_error" if status >= 500 else _INVALID
        return Refusal(status, {"error": {"message": text, "type": error_type, "param": param, "code": None}})
    return Refusal(status, own_body(_NATIVE_TYPES.get(status, "internal" if status >= 500 else "validation"), message, hint))


def invalid_body(problems: Sequence[Mapping[str, Any]], protocol: Protocol) -> Refusal:
    """The reply to a body, path or query that does not have the types a route declares. The first problem is told, the others are counted."""
    first, *others = problems
    place = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        sentence = f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')} at character {first['loc'][-1]}"
        place = ""
    elif first["type"] == "missing":
        sentence = f"`{place}` is missing" if place else "the request has no body"
    elif not place:
        sentence = "the body must be a JSON object, sent with the header content-type: application/json"
    else:
        sentence = f"`{place}`: {_lower_first(first['msg'])}"
    if others and place:
        sentence += f" (and {len(others)} more)"
    return refusal(400 if protocol == "openai" else 422, sentence, protocol, param=place or None)


def own_body(code: str, message: str, hint: str = "") -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}


def internal_error(protocol: Protocol) -> Refusal:
    """The reply to a mistake of our own."""
    return refusal(500, "something went wrong in the server; its log has the details", protocol)


def _native_body(error: AtollError, error_type: str) -> dict[str, Any]:
    if error_type == "overloaded":
        return {"error": _OVERLOADED, "error_type": error_type, "hint": error.message}
    body = {"error": _PREFIXES.get(error_type, "") + error.message, "error_type": error_type}
    return body | ({"hint": error.hint} if error.hint else {})


def _code_of(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
