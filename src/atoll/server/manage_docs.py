"""What the OpenAPI document says of the management routes: their replies, and every status they answer with, in which body.

Used by manage's declarations; the replies are made from AdapterInfo (serving/entries.py) and the hub's versions.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from atoll.openai.docs import OpenAIError

_READ = {
    401: "A key is needed, or is not known.",
    403: "The key may not do this.",
    404: "No such adapter, or none that this key may see.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The body, a parameter or the adapter is not valid.",
    424: "It could not be done: the source is off, or the adapter could not be read.",
    429: "Too much is being looked up or loaded at once; Retry-After says when to try again.",
    503: "The server is starting, stopping or broken, or has no room for the adapter now.",
    504: "It took longer than a request may.",
}
_PUBLISH = {409: "The hub refused it.", 507: "The disk refused to store it."}
_ACT = {409: "The adapter is in use or pinned, or the hub refused."}
_NAME = {400: "The body or the name is not valid, or the name is taken.", 409: "The adapter is in use or pinned.", 500: "It failed."}


class OwnErrorDetail(BaseModel):
    code: str
    message: str
    hint: str


class OwnError(BaseModel):
    """Every error of our own routes."""

    error: OwnErrorDetail


class AdapterReply(BaseModel):
    """One adapter. kind: lora, reft, lora+reft or composed; it, rank and num_parameters are null while only reading the adapter can tell them.

    engine: what the engine says of it (resident, pinned, in_use, bytes, loads) once it was loaded.
    """

    name: str
    version: str
    digest: str | None
    source: str
    state: Literal["known", "loading", "ready", "failed"]
    base: str | None
    kind: str | None
    rank: int | None
    num_parameters: int | None
    num_bytes: int
    pinned: bool
    holds: int
    created: float
    last_used: float | None
    task: str
    description: str
    parents: list[dict[str, Any]]
    labels: list[str] | None
    error: str
    counters: dict[str, float]
    engine: dict[str, int | bool]


class AdapterList(BaseModel):
    adapters: list[AdapterReply]


class PublishedReply(BaseModel):
    """The version that was made, or that had this content already; more fields say what the hub knows of it."""

    name: str
    version: str
    digest: str


Answers = dict[int | str, dict[str, Any]]


def listing() -> Answers:
    """Of GET /adapters."""
    return _own({status: text for status, text in _READ.items() if status != 404}) | {200: _success(AdapterList)}


def one() -> Answers:
    """Of GET /adapters/NAME."""
    return _own(_READ) | {200: _success(AdapterReply)}


def action() -> Answers:
    """Of POST /adapters/NAME/load and its like."""
    return _own(_READ | _ACT) | {200: _success(AdapterReply)}


def publishing() -> Answers:
    """Of POST /adapters."""
    return _own(_READ | _PUBLISH) | {201: _success(PublishedReply)}


def naming() -> Answers:
    """Of vLLM's two routes."""
    found: Answers = {status: {"description": text, "model": OpenAIError} for status, text in (_READ | _NAME | _PUBLISH).items()}
    return found | {200: {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _own(statuses: dict[int, str]) -> Answers:
    return {status: {"description": text, "model": OwnError} for status, text in statuses.items()}


def _success(model: type[BaseModel]) -> dict[str, Any]:
    return {"description": "The answer.", "model": model}
