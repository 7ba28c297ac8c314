"""POST /v1/completions: texts or tokens, continued as they are.

Programs that score models use this route: with `echo` and `logprobs` the reply tells how likely each token of the prompt is, and max_tokens 0 asks
for nothing else. The engine always computes one token; where none was asked for it is left out.

Made by `router`; app includes it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.engine.request import Completion, Request
from atoll.http.asking import check_finished, mean_logprob, stops_after_text, trims
from atoll.http.auth import caller_of
from atoll.http.sse import EventStream, unless_gone
from atoll.openai.docs import CompletionReply, answers
from atoll.openai.reply import (
    DONE,
    Chunks,
    CompletionLogprobs,
    Head,
    completion_logprobs_of,
    finish_reason,
    usage_of,
)
from atoll.openai.run import Asker, Input, begun, grouped, requests_for, streams
from atoll.openai.sampling import completion_logprobs, grammar_of, max_tokens, num_choices, sampling_params, stop_strings
from atoll.openai.types import CompletionBody, ParameterRefused, refuse_unsupported

if TYPE_CHECKING:
    from atoll.engine.request import TokenEvent
    from atoll.serving.entries import Served
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service

_KIND = "text_completion"
_DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Plan:
    """A request, understood: n answers of best_of for each prompt."""

    prompts: list[Input]
    requests: list[Request]
    n: int
    best_of: int
    echo: bool
    scores_only: bool  # max_tokens 0
    with_logprobs: bool


def router(service: Service) -> APIRouter:
    """The route, asking `service`."""
    asker, routes = Asker(service), APIRouter()

    @routes.post("/v1/completions", tags=["OpenAI"], summary="Continue texts, or score them", responses=answers(CompletionReply, streams=True))
    async def completions(http: HttpRequest, body: Annotated[CompletionBody, Body()]) -> Response:
        return await _answer(asker, http, body)

    return routes


async def _answer(asker: Asker, http: HttpRequest, body: CompletionBody) -> Response:
    refuse_unsupported(body)
    caller = caller_of(http)
    served = await unless_gone(http, asker.service.open(asker.ref(body), caller))
    plan = await _plan(asker, body, served)
    head = asker.head("cmpl", body, served)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(await begun(http, _stream(asker, caller, plan, head, with_usage=with_usage)))
    completions = await unless_gone(http, asker.service.generate(plan.requests, caller))
    return JSONResponse(_whole(asker, plan, head, completions))


async def _plan(asker: Asker, body: CompletionBody, served: Served) -> Plan:
    """Raises ParameterRefused and RequestRefused for whatever cannot be done."""
    n = num_choices(body, asker.choices)
    best_of = n if body.best_of is None else body.best_of
    if not n <= best_of <= asker.choices:
        limits = f"from n ({n}) to {asker.choices}"
        raise ParameterRefused(f"best_of is {best_of}, but must be {limits}", param="best_of", code="invalid_value")
    if best_of > n and body.stream:
        raise ParameterRefused("best_of above n cannot be streamed: the best is known at the end", param="best_of", code="invalid_value")
    asked = _DEFAULT_TOKENS if body.max_tokens is None else max_tokens("max_tokens", body.max_tokens, 0)
    top, echo = completion_logprobs(body.logprobs), bool(body.echo)
    if echo and top is not None and body.stream:
        raise ParameterRefused("echo with logprobs cannot be streamed", param="stream", code="invalid_value", hint="leave stream out")
    prompts = await asker.inputs(body.prompt, "prompt", asker.service.config.max_inputs)
    for prompt in prompts:
        asker.room("prompt", len(prompt.ids), asked or 1)
    form = served.prompt
    brings_stops, stops = not (body.ignore_eos or body.ignore_eos_token), stop_strings(body, asker.stops)
    sampling = sampling_params(
        body,
        max_new_tokens=asked or 1,
        stop=(*stops, *(form.stop if form is not None and brings_stops else ())),
        stop_token_ids=served.stop_token_ids if brings_stops else (),
        stop_after_text=stops_after_text(trims(form), stops),
        grammar=grammar_of(body.response_format),
        logprobs=top if top is not None or best_of == n else 0,
        prompt_logprobs=top if echo else None,
    )
    requests = requests_for(served, [prompt.ids for prompt in prompts], sampling, best_of)
    return Plan(prompts, requests, n, best_of, echo, scores_only=asked == 0, with_logprobs=top is not None)


def _echoed(asker: Asker, prompt: Input) -> str:
    """What `echo` shows of a prompt."""
    return asker.texts.decode(prompt.ids) if prompt.text is None else prompt.text


def _whole(asker: Asker, plan: Plan, head: Head, completions: Sequence[Completion]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    groups = grouped(completions, plan.best_of)
    for prompt, group in zip(plan.prompts, groups, strict=True):
        for completion in group:
            check_finished(completion)
        best = group if plan.best_of == plan.n else sorted(group, key=mean_logprob, reverse=True)[: plan.n]
        choices += [_choice(asker, plan, prompt, completion, len(choices) + place) for place, completion in enumerate(best)]
    dropped = len(completions) if plan.scores_only else 0
    return head.reply(_KIND, choices, usage_of(groups, dropped_tokens=dropped))


def _choice(asker: Asker, plan: Plan, prompt: Input, completion: Completion, index: int) -> dict[str, Any]:
    text = (_echoed(asker, prompt) if plan.echo else "") + ("" if plan.scores_only else completion.text)
    logprobs = None
    if plan.with_logprobs:
        logprobs = completion_logprobs_of(
            completion, asker.texts, prompt.ids, echo=plan.echo, num_added=prompt.num_added, keep_answer=not plan.scores_only
        )
    reason = "length" if plan.scores_only else finish_reason(completion.finish_reason)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _stream(asker: Asker, caller: Caller, plan: Plan, head: Head, *, with_usage: bool) -> AsyncGenerator[bytes]:
    """The reply's events; the last but one is the usage."""
    chunks = Chunks(head, _KIND, with_usage=with_usage)
    writers = [ChoiceWriter(asker, plan, chunks, index) for index in range(len(plan.requests))]
    completions: dict[int, Completion] = {}
    async with aclosing(streams(asker.service, plan.requests, caller)) as events:
        async for place, batch in events:
            if batch[-1].completion is not None:
                completions[place] = batch[-1].completion
            if part := b"".join(map(writers[place].push, batch)):
                yield part
    groups = grouped([completions[place] for place in range(len(plan.requests))], plan.n)
    usage = usage_of(groups, dropped_tokens=len(completions) if plan.scores_only else 0)
    yield (chunks.usage(usage) if with_usage else b"") + DONE


class ChoiceWriter:
    """One choice of a stream: events in, chunks as bytes out."""

    def __init__(self, asker: Asker, plan: Plan, chunks: Chunks, index: int) -> None:
        self._chunks, self._index, self._scores_only = chunks, index, plan.scores_only
        self._echo = _echoed(asker, plan.prompts[index // plan.n]) if plan.echo else ""
        self._logprobs = CompletionLogprobs(asker.texts, len(self._echo)) if plan.with_logprobs else None
        self._write = chunks.text_writer(index, '"text":', ',"logprobs":null,"finish_reason":null')

    def push(self, event: TokenEvent) -> bytes:
        """The chunks that an event makes, or none. Raises EngineError when the request failed."""
        if event.completion is not None:
            check_finished(event.completion)
        part = self._write(self._echo) if self._echo else b""
        self._echo = ""
        if not self._scores_only:
            part += self._token(event)
        if event.completion is None:
            return part
        reason = "length" if self._scores_only else finish_reason(event.completion.finish_reason)
        return part + self._chunks.chunk({"index": self._index, "text": "", "logprobs": None, "finish_reason": reason})

    def _token(self, event: TokenEvent) -> bytes:
        if self._logprobs is None or event.logprob is None:
            return self._write(event.text) if event.text else b""
        logprobs = self._logprobs.answer([(event.logprob, event.text)])
        return self._chunks.chunk({"index": self._index, "text": event.text, "logprobs": logprobs, "finish_reason": None})
