"""What the OpenAPI document says of the compositions: their replies, and every status they answer with.

Used by compose's declarations; the replies are made from Job (compose_job.py).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from atoll.server.manage_docs import Answers, OwnError, OwnErrorDetail

EVENTS = "text/event-stream"
_READ = {
    401: "A key is needed, or is not known.",
    403: "The key may not do this.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The body or a parameter is not valid.",
}
_NO_JOB = {404: "No such composition, or none that this key may see; the oldest results are forgotten."}
_ASK = {
    404: "An adapter that is named is not there, or not for this key.",
    409: "The name is that of something else.",
    422: "The body, a row or a setting is not valid, or asks for more than is taken.",
    424: "This server does not compose, or has no hub.",
    429: "As many compositions wait as may wait; Retry-After says when to try again.",
    503: "The server is starting, stopping or broken.",
    507: "The disk refused to store the rows.",
}
_LOCATION = {"Location": {"description": "Where the job is.", "schema": {"type": "string"}, "required": True}}


class WeightReply(BaseModel):
    """One parent of the result. layer_weights: where each layer has a weight of its own, whose mean `weight` is then."""

    name: str
    digest: str | None
    weight: float
    layer_weights: list[float] | None = None


class ResultReply(BaseModel):
    """The adapter that was published, name@version, and what came of it.

    Weights of adapters that the key may not use (any more) are left out, and then the report, which speaks of them. It is null in lists too.
    """

    adapter: str
    digest: str
    weights: list[WeightReply]
    warnings: list[str]
    report: dict[str, Any] | None


class JobReply(BaseModel):
    """One composition. seconds: since its start. result: once it is finished; error: once it has failed, or why it was cancelled."""

    id: str
    name: str
    state: Literal["queued", "running", "finished", "failed", "cancelled"]
    stage: str
    done: int
    total: int
    created: float
    started: float | None
    seconds: float
    result: ResultReply | None
    error: OwnErrorDetail | None


class JobList(BaseModel):
    jobs: list[JobReply]


def asking() -> Answers:
    """Of POST /compose."""
    return _own(_READ | _ASK) | {202: {"description": "It is queued, or has begun.", "model": JobReply, "headers": _LOCATION}}


def listing() -> Answers:
    """Of GET /compose."""
    return _own(_READ) | {200: {"description": "The newest first.", "model": JobList}}


def one() -> Answers:
    """Of GET and DELETE /compose/JOB."""
    return _own(_READ | _NO_JOB) | {200: {"description": "As it is now.", "model": JobReply}}


def events() -> Answers:
    """Of GET /compose/JOB/events."""
    body = {"type": "object", "properties": {"data": {"type": "string", "description": "The job as JSON."}}, "required": ["data"]}
    return _own(_READ | _NO_JOB) | {
        200: {"description": "The job, and again after each change until it is over.", "content": {EVENTS: {"schema": body}}}
    }


def _own(statuses: dict[int, str]) -> Answers:
    return {status: {"description": text, "model": OwnError} for status, text in statuses.items()}
