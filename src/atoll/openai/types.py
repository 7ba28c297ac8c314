"""Bodies of OpenAI's routes, as its clients send them, and what Atoll adds to them.

Three kinds of fields: those we carry out; those that would change the answer and that we cannot carry out, which are refused by name (an answer
that quietly is another than the one asked for would be worse); and all others, which are ignored, since clients send many. Every optional field
may be null.

Used by chat, completions and embeddings. Values' limits are checked where the engine's parameters are made (sampling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from atoll.errors import RequestRefused
from atoll.lorax.types import MergedAdapters


class ParameterRefused(RequestRefused):
    """A request that OpenAI's routes refuse; `param` names the field and `code` the reason, as OpenAI's error bodies do."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param, self.code = param, code


class Part(BaseModel):
    """A piece of a body. Numbers are not read from texts, nor texts from numbers; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class StreamOptions(Part):
    include_usage: bool | None = Field(default=None, description="Send the usage as a last chunk, whose choices are empty.")


class JsonSchema(Part):
    name: str | None = Field(default=None, description="What the schema is called; not used.")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="A JSON Schema.")
    strict: bool | None = Field(default=None, description="Ignored: an answer always fits its schema.")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, description="For type json_schema.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="LoRAX's place for a schema, with either JSON type.")


class AskedModel(Part):
    """What answers: the base, an adapter, or a merge of adapters."""

    refused: ClassVar[Mapping[str, str]] = {}

    model: str | None = Field(default=None, description='An adapter ("name", "name@version"), or the base ("" or its name).')
    adapter_source: str | None = Field(default=None, description="Where the adapter is: hub, local, s3 or hf. Atoll's addition.")
    merged_adapters: MergedAdapters | None = Field(default=None, description="Adapters to merge for this request, instead of one. Atoll's addition.")
    api_token: str | None = Field(default=None, description="A token for the adapter's source, if it needs one. Atoll's addition.")
    user: str | None = Field(default=None, description="Ignored.")


class Sampling(AskedModel):
    """What chat and completions share."""

    n: int | None = Field(default=None, description="Choices for each prompt.")
    temperature: float | None = Field(default=None, description="0: always the likeliest token. Default 1, as OpenAI has it.")
    top_p: float | None = Field(default=None, description="Sample from the likeliest tokens that together reach this probability.")
    seed: int | None = Field(default=None, description="The same seed gives the same answer; choice i draws from seed + i.")
    stop: str | list[str] | None = Field(default=None, description="Texts at which the answer ends; they are not part of it.")
    stream: bool | None = Field(default=None, description="Send the answer as it is made.")
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, description="-2 to 2: subtracted from tokens that the answer has.")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2: subtracted once for each time the answer has a token.")
    logit_bias: dict[str, float] | None = Field(default=None, description="Token id to -100 ... 100, added to the token's logit.")
    response_format: ResponseFormat | None = Field(default=None, description="Constrain the answer to JSON, or to a JSON Schema.")
    top_k: int | None = Field(default=None, description="Sample from that many likeliest tokens; 0 or -1: all. Atoll's addition.")
    min_p: float | None = Field(default=None, description="Leave out tokens below this share of the likeliest one's probability. Atoll's addition.")
    typical_p: float | None = Field(default=None, description="Locally typical sampling. Atoll's addition.")
    repetition_penalty: float | None = Field(default=None, description="Above 1: tokens of prompt and answer become less likely. Atoll's addition.")
    min_tokens: int | None = Field(default=None, description="Nothing but the length ends the answer before that. Atoll's addition.")
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-text token. Atoll's addition.")
    ignore_eos_token: bool | None = Field(default=None, description="LoRAX's name of ignore_eos.")
    stop_token_ids: list[int] | None = Field(default=None, description="Tokens that end the answer. Atoll's addition.")


class TextPart(Part):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Part):
    name: str
    arguments: str = ""


class ToolCall(Part):
    id: str | None = None
    type: str = "function"
    function: CalledFunction | None = None


class Message(Part):
    """One turn. `name` and what other clients add to a turn is ignored."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    audio: Any = None
    function_call: Any = None


class Function(Part):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON Schema of the arguments, which always fit it. Default: none.")
    strict: bool | None = Field(default=None, description="Ignored: arguments always fit their schema.")


class Tool(Part):
    type: str
    function: Function | None = None


class ChosenFunction(Part):
    name: str


class ToolChoice(Part):
    type: str
    function: ChosenFunction | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        "audio": "answers are text",
        "functions": "use tools, which replaced it",
        "function_call": "use tool_choice, which replaced it",
        "web_search_options": "there is no web search here",
        "moderation": "there is no moderation model here",
        "reasoning_effort": "there is no hidden reasoning to set",
        "verbosity": "say in the prompt how long the answer should be",
    }
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "function_call": ("none",),
        "functions": ([],),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    messages: list[Message] = Field(description="The conversation: system, developer, user, assistant and tool turns of text.")
    max_tokens: int | None = Field(default=None, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(default=None, description="Tokens of the answer at most. Default: what the context has room for.")
    logprobs: bool | None = Field(default=None, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(default=None, description="0 to 20: and that many likeliest tokens in its place.")
    tools: list[Tool] | None = Field(default=None, description="Functions that the model may call, one call an answer.")
    tool_choice: str | ToolChoice | None = Field(default=None, description="none, auto, required, or one function.")
    parallel_tool_calls: bool | None = Field(default=None, description="Ignored: an answer has one call at most.")
    modalities: list[str] | None = Field(default=None, description='["text"].')
    fields: dict[str, Any] | None = Field(
        default=None, description="Columns of the adapter's prompt template; the message fills the one that is not given. Atoll's addition."
    )
    prompt_format: Literal["adapter", "base"] | None = Field(
        default=None,
        description="adapter (default): the adapter's own prompt format, if it has one. base: always the base's chat template. Atoll's addition.",
    )
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    moderation: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, str]] = {"suffix": "text can only be continued, not filled in"}

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="A text, its tokens, or a list of either; taken as it is.")
    max_tokens: int | None = Field(default=None, description="Tokens of the answer at most, default 16; 0 only scores the prompt.")
    echo: bool | None = Field(default=None, description="Put the prompt before the answer, in logprobs too.")
    logprobs: int | None = Field(default=None, description="0 to 5: each token's log-probability and that many likeliest tokens in its place.")
    best_of: int | None = Field(default=None, description="Make that many answers and return the n likeliest per token.")
    suffix: str | None = None


class EmbeddingBody(AskedModel):
    """POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]] = Field(description="A text, its tokens, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="base64: little-endian float32. Default float.")
    dimensions: int | None = Field(default=None, description="The hidden size, if given: vectors cannot be shortened.")
    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="The mean of all tokens' hidden states (default), or the last one. Atoll's addition."
    )


def refuse_unsupported(body: AskedModel) -> None:
    """Raise ParameterRefused for a field that would change the answer and that Atoll cannot carry out."""
    harmless = getattr(body, "harmless", {})
    for name, reason in body.refused.items():
        value = getattr(body, name)
        if value is not None and value not in harmless.get(name, ()):
            raise ParameterRefused(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter", hint=f"leave {name} out")
    modalities = getattr(body, "modalities", None)
    if modalities is not None and any(kind != "text" for kind in modalities):
        raise ParameterRefused(f"modalities is {modalities!r}, but answers are text", param="modalities", code="unsupported_value")
