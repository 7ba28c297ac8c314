"""What the OpenAPI document says of LoRAX's routes: every status they answer with, and in which body.

Used by the routes' declarations.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from atoll.lorax.types import ErrorBody

EVENTS = "text/event-stream"
JSON = "application/json"

_EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "A JSON object."}}, "required": ["data"]}  # each event

_ERRORS = {
    401: "A key is needed, or is not known.",
    403: "The key may not do this.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The body or a parameter is not valid.",
    424: "The adapter could not be used, or generating failed.",
    429: "Too many requests at once; Retry-After says when to try again.",
    503: "The server is starting, stopping or broken.",
}

Responses = dict[int | str, dict[str, Any]]


def answers(model: Any = None, *, media_type: str = JSON, also: tuple[str, Any] | None = None, status: int = 200) -> Responses:
    """`responses` of a route: what success looks like, and every error. With a status of an error: that one alone."""
    if status != 200:
        return {status: {"description": "Not found.", "model": ErrorBody}}
    found: Responses = {code: {"description": text, "model": ErrorBody} for code, text in _ERRORS.items()}
    if media_type == JSON:
        found[200] = {"description": "The answer.", "model": model}
    else:
        found[200] = {"description": _told(model), "content": {media_type: {"schema": _EVENT}}}
    if also is not None:
        found[200]["content"] = {also[0]: {"schema": _EVENT}}
        found[200]["description"] = f"The answer; with `stream`, events: {_told(also[1])}"
    return found


def _told(model: Any) -> str:
    fields = ", ".join(TypeAdapter(model).json_schema().get("properties", {}))
    return f"One event a token, `data:` and an object of {fields}; an error after the first event is an event with error and error_type."
