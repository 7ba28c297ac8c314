"""LoRAX's generate routes: /, /invocations, /generate, /generate_stream, and Predibase's path to the same.

Every request goes one way: rules, tokens, adapter, engine, reply. What can be refused is refused before a reply begins, on streams too, so a client
sees a status and JSON; only what fails after the first token is an event of the stream.

Made by `router`; app includes it. Embedding, classes and tokens are in texts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.engine.request import Completion, Request
from atoll.errors import RequestRefused
from atoll.http.asking import check_finished, mean_logprob, stops_after_text, trims
from atoll.http.auth import PREDIBASE, caller_of, source_token
from atoll.http.errors import refusal
from atoll.http.sse import EventStream, unless_gone
from atoll.http.token_text import TokenTexts
from atoll.lorax.docs import EVENTS, answers
from atoll.lorax.prompt import encode_in_format, encode_texts
from atoll.lorax.reply import Clock, ReplyWriter, answer_headers, stream_headers
from atoll.lorax.rules import Limits, check, check_inputs, check_lengths, sampling_params
from atoll.lorax.types import AdapterChoice, CompatGenerateBody, GenerateBody, GenerateResponse, Parameters, StreamResponse
from atoll.serving.base_names import names_of
from atoll.serving.service import AdapterRef, Served

if TYPE_CHECKING:
    from atoll.http.metrics import Metrics
    from atoll.serving.service import Service, TokenStream

_DEFAULTS = Parameters()


def router(service: Service, metrics: Metrics) -> APIRouter:
    """The routes, asking `service`."""
    generator, routes = Generator(service, metrics), APIRouter(tags=["LoRAX"])
    whole = answers(GenerateResponse)
    events = answers(StreamResponse, media_type=EVENTS)
    either = answers(list[GenerateResponse], also=(EVENTS, StreamResponse))

    @routes.post("/generate", summary="Continue a text", responses=whole)
    async def generate(http: HttpRequest, body: Annotated[GenerateBody, Body()]) -> Response:
        return await generator.answer(http, body)

    @routes.post("/generate_stream", summary="Continue a text, token by token", responses=events)
    async def generate_stream(http: HttpRequest, body: Annotated[GenerateBody, Body()]) -> Response:
        return await generator.stream(http, body)

    @routes.post("/", summary="Continue a text, whole (a list of one) or token by token", responses=either)
    @routes.post("/invocations", summary="The same as POST /", responses=either)
    async def compat_generate(http: HttpRequest, body: Annotated[CompatGenerateBody, Body()]) -> Response:
        return await generator.stream(http, body) if body.stream else await generator.answer(http, body, as_list=True)

    @routes.post(PREDIBASE, summary="The same as POST /, at Predibase's path", responses=either | answers(status=404))
    async def deployed(http: HttpRequest, tenant: str, deployment: str, body: Annotated[CompatGenerateBody, Body()]) -> Response:
        return generator.unknown(deployment) or (
            await generator.stream(http, body) if body.stream else await generator.answer(http, body, as_list=True)
        )

    @routes.post(PREDIBASE + "/generate", summary="Continue a text, at Predibase's path", responses=whole | answers(status=404))
    async def deployed_generate(http: HttpRequest, tenant: str, deployment: str, body: Annotated[GenerateBody, Body()]) -> Response:
        return generator.unknown(deployment) or await generator.answer(http, body)

    @routes.post(PREDIBASE + "/generate_stream", summary="The same, token by token", responses=events | answers(status=404))
    async def deployed_stream(http: HttpRequest, tenant: str, deployment: str, body: Annotated[GenerateBody, Body()]) -> Response:
        return generator.unknown(deployment) or await generator.stream(http, body)

    return routes


@dataclass(frozen=True)
class Prepared:
    """A body, ready for the engine: one request for each of best_of's sequences, which differ in the seeds that the engine draws."""

    served: Served
    requests: list[Request]
    details: bool
    full_text: str
    num_chars: int
    clock: Clock


class Generator:
    """One server's generate routes."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._base, self._metrics = service, service.base, metrics
        self._limits = Limits.of(service)
        self._deployments = names_of(service.base) | {name.casefold() for name in service.config.deployment_names}
        self._writer = ReplyWriter(TokenTexts(service.base.tokenizer))

    async def answer(self, http: HttpRequest, body: GenerateBody, *, as_list: bool = False) -> Response:
        """A whole reply."""
        prepared = await self._prepare(http, body, streams=False)
        completions = await unless_gone(http, self._service.generate(prepared.requests, caller_of(http)))
        for completion in completions:
            check_finished(completion)
        if len(completions) > 1:
            completions = best_first(completions)
        reply = self._writer.body(prepared.requests[0], completions, details=prepared.details, full_text=prepared.full_text)
        headers = answer_headers(prepared.served, self._base.name, prepared.num_chars, completions, prepared.clock, time.perf_counter())
        return JSONResponse([reply] if as_list else reply, headers=dict(headers))

    async def stream(self, http: HttpRequest, body: GenerateBody) -> Response:
        """A reply in events, begun when the first token is there."""
        prepared = await self._prepare(http, body, streams=True)
        tokens = self._service.stream(prepared.requests[0], caller_of(http))
        try:
            await unless_gone(http, tokens.accepted())
        except BaseException:
            await tokens.aclose()
            raise
        return EventStream(self._events(tokens, prepared), stream_headers(prepared.served, self._base.name, prepared.num_chars))

    def unknown(self, deployment: str) -> Response | None:
        """404 for a deployment that is not the base of this server."""
        if deployment.casefold() in self._deployments:
            return None
        refused = refusal(404, f"there is no deployment {deployment[:120]!r} here", "native", hint=f"this server has {self._base.name!r}")
        return JSONResponse(refused.body, refused.status)

    async def _events(self, tokens: TokenStream, prepared: Prepared) -> AsyncIterator[bytes]:
        """All that came since the last time, in one piece."""
        writer = self._writer
        try:
            while found := await tokens.next_events():
                parts = [writer.event(event) for event in found if event.completion is None]
                if parts:
                    yield "".join(parts).encode()
                if found[-1].completion is not None:
                    yield writer.last_event(found[-1], details=prepared.details, full_text=prepared.full_text).encode()
        finally:
            await tokens.aclose()

    async def _prepare(self, http: HttpRequest, body: GenerateBody, *, streams: bool) -> Prepared:
        """Raises RequestRefused for what a rule forbids, and what opening the adapter raises."""
        came = time.perf_counter()
        parameters = body.parameters or _DEFAULTS
        check(parameters, self._limits, streams=streams)
        check_inputs(body.inputs)
        templated = bool(parameters.apply_chat_template)
        if parameters.fields is not None and not templated:
            raise RequestRefused("`fields` fill a prompt format, which only `apply_chat_template` uses")
        prompt_ids = [] if templated else self._cut((await encode_texts(self._base, [body.inputs]))[0], parameters)
        served = await open_adapter(self._service, http, parameters, self._limits)
        if templated:
            prompt_ids = self._cut(await encode_in_format(self._base, served.prompt, body.inputs, parameters.fields), parameters)
        return Prepared(
            served=served,
            requests=self._requests(parameters, prompt_ids, served, streams=streams),
            details=bool(parameters.details or parameters.decoder_input_details),
            full_text=body.inputs if parameters.return_full_text else "",
            num_chars=len(body.inputs),
            clock=Clock(came, time.perf_counter()),
        )

    def _cut(self, prompt_ids: list[int], parameters: Parameters) -> list[int]:
        """The prompt as `truncate` leaves it. Raises RequestRefused if it is too long even so."""
        kept = prompt_ids if parameters.truncate is None else prompt_ids[-parameters.truncate :]
        check_lengths(len(kept), parameters.max_new_tokens, self._limits)
        return kept

    def _requests(self, parameters: Parameters, prompt_ids: list[int], served: Served, *, streams: bool) -> list[Request]:
        form = None if parameters.ignore_eos_token else served.prompt
        stops = tuple(parameters.stop or ())
        own_stops = () if form is None else form.stop
        best_of = parameters.best_of or 1
        max_new_tokens = parameters.max_new_tokens or self._limits.max_total - len(prompt_ids)
        self._metrics.asked(max_new_tokens)
        sampling = sampling_params(
            parameters,
            max_new_tokens=max_new_tokens,
            stop=tuple(dict.fromkeys((*stops, *own_stops))),
            stop_token_ids=() if parameters.ignore_eos_token else served.stop_token_ids,
            stop_after_text=stops_after_text(trims(form), stops),
            logprobs=streams or best_of > 1 or bool(parameters.details or parameters.decoder_input_details),
        )
        return [Request(prompt_ids, adapter=served.key, sampling=sampling) for _ in range(best_of)]


async def open_adapter(service: Service, http: HttpRequest, choice: AdapterChoice, limits: Limits) -> Served:
    """What a body's adapter fields mean for this caller. Raises what Service.open raises, and RequestRefused for a merge that cannot be."""
    merged = None if choice.merged_adapters is None else choice.merged_adapters.spec(limits.merged)
    token = choice.api_token or source_token(http, service.config.keys_file is not None)
    ref = AdapterRef(adapter_id=choice.adapter_id or None, source=choice.adapter_source, merged=merged, token=token)
    return await unless_gone(http, service.open(ref, caller_of(http)))


def best_first(completions: Sequence[Completion]) -> list[Completion]:
    """The sequence of the highest mean log-probability in front, the others as they were."""
    best = max(range(len(completions)), key=lambda index: mean_logprob(completions[index]))
    return [completions[best], *completions[:best], *completions[best + 1 :]]
