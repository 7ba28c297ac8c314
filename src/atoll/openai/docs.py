"""What the OpenAPI document says of OpenAI's routes: their replies, and every status they answer with.

The replies themselves are written by hand (openai_reply); these models describe them.

Used by the routes' declarations.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

EVENTS = "text/event-stream"
_EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}}, "required": ["data"]}  # each

_ERRORS = {
    400: "The body or a parameter is not valid, or asks for what is not supported.",
    401: "A key is needed, or is not known.",
    403: "The key may not do this.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The adapter or its source could not be used.",
    429: "Too many requests at once; Retry-After says when to try again.",
    500: "Generating failed.",
    503: "The server is starting, stopping or broken.",
    504: "It took longer than a request may.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """Every error of OpenAI's routes."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class ReplyUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledFunctionReply(BaseModel):
    name: str
    arguments: str


class ToolCallReply(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunctionReply


class MessageReply(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    index: int
    message: MessageReply
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ReplyUsage


class CompletionLogprobsReply(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobsReply | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: ReplyUsage


class EmbeddingItem(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ModelReply(BaseModel):
    """A model. parent: the base of an adapter; lineage: where its content comes from."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    lineage: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelReply]


def answers(model: type[BaseModel], *, streams: bool = False, not_found: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: what success looks like, and every error."""
    found: dict[int | str, dict[str, Any]] = {code: {"description": text, "model": OpenAIError} for code, text in _ERRORS.items()}
    found[200] = {"description": "The answer.", "model": model}
    if not_found or streams:
        found[404] = {"description": "No such model, or none that this key may use.", "model": OpenAIError}
    if streams:
        found[200]["description"] = "The answer; with `stream`, events of its chunks, then `data: [DONE]`. A later error is an event with `error`."
        found[200]["content"] = {EVENTS: {"schema": _EVENT}}
    return found
