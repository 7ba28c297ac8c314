"""POST /v1/chat/completions: a conversation, answered by the base, an adapter, or a merge of adapters.

The prompt is the adapter's own (chat_prompt), the answer a text or a call of a function (tools), whole or in chunks. Every choice of a stream has a
writer that turns the engine's events into bytes; for plain text that is one json.dumps a token.

Made by `router`; app includes it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.engine.request import Completion, Request, TokenEvent
from atoll.errors import RequestRefused
from atoll.http.asking import check_finished, stops_after_text
from atoll.http.auth import caller_of
from atoll.http.sse import EventStream, unless_gone
from atoll.http.token_text import TokenTexts
from atoll.lorax.prompt import beside
from atoll.openai.chat_prompt import chat_prompt, num_chars
from atoll.openai.docs import ChatReply, answers
from atoll.openai.reply import DONE, Chunks, ContentLogprobs, Head, chat_logprobs_of, finish_reason, usage_of
from atoll.openai.run import Asker, begun, requests_for, streams
from atoll.openai.sampling import chat_logprobs, grammar_of, max_tokens, num_choices, sampling_params, schema_of, stop_strings
from atoll.openai.tools import CallReader, ToolUse, tool_use
from atoll.openai.types import ChatBody, refuse_unsupported

if TYPE_CHECKING:
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service

_KIND, _CHUNK = "chat.completion", "chat.completion.chunk"


def router(service: Service) -> APIRouter:
    """The route, asking `service`."""
    asker, routes = Asker(service), APIRouter()

    @routes.post("/v1/chat/completions", tags=["OpenAI"], summary="Answer a conversation", responses=answers(ChatReply, streams=True))
    async def chat_completions(http: HttpRequest, body: Annotated[ChatBody, Body()]) -> Response:
        return await _answer(asker, http, body)

    return routes


async def _answer(asker: Asker, http: HttpRequest, body: ChatBody) -> Response:
    refuse_unsupported(body)
    caller, count = caller_of(http), num_choices(body, asker.choices)
    use = tool_use(body.tools, body.tool_choice)
    served = await unless_gone(http, asker.service.open(asker.ref(body), caller))
    prompt = await beside(lambda: chat_prompt(asker.base, served.prompt, body, use), num_chars(body))
    brings_stops = not (body.ignore_eos or body.ignore_eos_token)  # what ends an adapter's answers is its end-of-text
    stops = stop_strings(body, asker.stops)
    if body.max_completion_tokens is not None:
        wanted = max_tokens("max_completion_tokens", body.max_completion_tokens)
    else:
        wanted = max_tokens("max_tokens", body.max_tokens)
    schema = schema_of(body.response_format)
    grammar = grammar_of(body.response_format) if use is None else await beside(lambda: use.grammar(schema), num_chars(body))
    sampling = sampling_params(
        body,
        max_new_tokens=asker.room("messages", len(prompt.token_ids), wanted),
        stop=(*stops, *(prompt.stop if brings_stops else ())),
        stop_token_ids=served.stop_token_ids if brings_stops else (),
        stop_after_text=stops_after_text(prompt.trims, stops),
        grammar=grammar,
        logprobs=chat_logprobs(body.logprobs, body.top_logprobs),
    )
    requests, head = requests_for(served, [prompt.token_ids], sampling, count), asker.head("chatcmpl", body, served)
    try:
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks, texts = Chunks(head, _CHUNK, with_usage=with_usage), asker.texts if sampling.logprobs is not None else None
            writers = [ChoiceWriter(chunks, index, use, texts, trims=prompt.trims) for index in range(count)]
            return EventStream(await begun(http, _stream(asker, caller, requests, chunks, writers, with_usage=with_usage)))
        completions = await unless_gone(http, asker.service.generate(requests, caller))
    except RequestRefused as error:  # by the engine, which looks at the grammar
        raise error if use is None or sampling.grammar is None else use.blamed(error, sampling.grammar) from error
    return JSONResponse(_whole(head, completions, use, asker.texts, trims=prompt.trims))


def _whole(head: Head, completions: Sequence[Completion], use: ToolUse | None, texts: TokenTexts, *, trims: bool) -> dict[str, Any]:
    choices = []
    for index, completion in enumerate(completions):
        check_finished(completion)
        reader = CallReader(use)
        content, name, arguments = reader.push(completion.text.lstrip() if trims else completion.text)
        content += reader.finish()
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if name is not None:
            call = {"id": _call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
            message |= {"content": None, "tool_calls": [call]}
        reason = _reason(completion, reader)
        choices.append({"index": index, "message": message, "logprobs": chat_logprobs_of(completion, texts), "finish_reason": reason})
    return head.reply(_KIND, choices, usage_of([completions]))


async def _stream(
    asker: Asker, caller: Caller, requests: Sequence[Request], chunks: Chunks, writers: Sequence[ChoiceWriter], *, with_usage: bool
) -> AsyncGenerator[bytes]:
    """The reply's events. The first holds every choice's role and the first token, the last but one the usage."""
    completions: list[Completion] = []
    waiting = b"".join(writer.begin() for writer in writers)
    async with aclosing(streams(asker.service, requests, caller)) as events:
        async for place, batch in events:
            part = waiting + b"".join(map(writers[place].push, batch))
            waiting = b""
            if batch[-1].completion is not None:
                completions.append(batch[-1].completion)
            if part:
                yield part
    yield (chunks.usage(usage_of([completions])) if with_usage else b"") + DONE


class ChoiceWriter:
    """One choice of a stream: events in, chunks as bytes out."""

    def __init__(self, chunks: Chunks, index: int, use: ToolUse | None, texts: TokenTexts | None, *, trims: bool) -> None:
        """texts: log-probabilities are wanted. trims: leave out the white space that the answer begins with."""
        self._chunks, self._index, self._trims = chunks, index, trims
        self._reader = CallReader(use)
        self._logprobs = None if texts is None else ContentLogprobs(texts)
        self._is_plain = use is None and texts is None
        self._write = chunks.text_writer(index, '"delta":{"content":', '},"logprobs":null,"finish_reason":null')

    def begin(self) -> bytes:
        """The first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def push(self, event: TokenEvent) -> bytes:
        """The chunks that an event makes, or none. Raises EngineError when the request failed."""
        text = event.text
        if self._trims and text:
            text = text.lstrip()
            self._trims = not text
        part = self._told(event, text) if not self._is_plain else self._write(text) if text else b""
        return part if event.completion is None else part + self._end(event.completion)

    def _told(self, event: TokenEvent, text: str) -> bytes:
        """With log-probabilities or tools."""
        entries = self._logprobs.push(event.logprob, event.text) if self._logprobs is not None else []
        content, name, arguments = self._reader.push(text)
        delta: dict[str, Any] = {"content": content} if content else {}
        if name is not None:
            delta["tool_calls"] = [{"index": 0, "id": _call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}]
        elif arguments:
            delta["tool_calls"] = [{"index": 0, "function": {"arguments": arguments}}]
        return self._chunk(delta, entries) if delta or entries else b""

    def _end(self, completion: Completion) -> bytes:
        check_finished(completion)
        rest = self._reader.finish()
        entries = self._logprobs.finish(completion) if self._logprobs is not None else []
        last = self._chunk({"content": rest} if rest else {}, entries) if rest or entries else b""
        return last + self._chunk({}, reason=_reason(completion, self._reader))

    def _chunk(self, delta: dict[str, Any], entries: Sequence[dict[str, Any]] = (), reason: str | None = None) -> bytes:
        logprobs = {"content": list(entries), "refusal": None} if entries else None
        return self._chunks.chunk({"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})


def _reason(completion: Completion, reader: CallReader) -> str:
    reason = finish_reason(completion.finish_reason)
    return "tool_calls" if reason == "stop" and reader.name is not None else reason


def _call_id() -> str:
    return "call_" + secrets.token_hex(12)
