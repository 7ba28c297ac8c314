"""What chat and completions share between body and reply: open the model, ask the engine, put the streams of several choices side by side.

A stream is waited for until its first token before the reply begins, so that whatever the engine refuses still gets a status of its own; nothing is
lost by that, since there is nothing to send earlier.

Used by chat, completions and embeddings.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest

from atoll.data.prompt import added_tokens, encode_prompts
from atoll.engine.request import Completion, Request, SamplingParams, TokenEvent
from atoll.errors import AtollError, DataError
from atoll.http.asking import StopCaps
from atoll.http.sse import unless_gone
from atoll.http.token_text import TokenTexts
from atoll.lorax.prompt import beside
from atoll.openai.reply import Head, fingerprint_of
from atoll.openai.sampling import seed_of_choice
from atoll.openai.types import AskedModel, ParameterRefused
from atoll.serving.entries import AdapterRef, Served

if TYPE_CHECKING:
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service
    from atoll.serving.tickets import TokenStream


@dataclass(frozen=True)
class Input:
    """One text of a request: its tokens, the text itself (None where tokens were given), and how many tokens in front the tokenizer added to it."""

    ids: list[int]
    text: str | None
    num_added: int


class Asker:
    """One server's OpenAI routes: its service, what its tokens look like, and its caps."""

    def __init__(self, service: Service) -> None:
        config = service.config
        self.service, self.base = service, service.base
        self.texts = TokenTexts(service.base.tokenizer)
        self.choices, self.stops = config.max_best_of, StopCaps(config.max_stop_sequences, config.max_stop_length)

    def head(self, prefix: str, body: AskedModel, served: Served) -> Head:
        """The head of a reply: the model by the name that the client used, else by its own."""
        return Head.new(prefix, body.model or served.name, self._fingerprint)

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Known when the engine is there: the routes are made before it."""
        return fingerprint_of(self.base, self.service.kernel)

    def ref(self, body: AskedModel) -> AdapterRef:
        """What a body asks for. A client's key is never passed on to an adapter's source."""
        name = body.model or None
        merged = None if body.merged_adapters is None else body.merged_adapters.spec(self.service.config.max_merged)
        if merged is not None and name is not None and not self.service.registry.is_base(name):
            raise ParameterRefused(
                f"model names {name[:80]!r}, but merged_adapters already says what answers",
                param="merged_adapters",
                code="invalid_value",
                hint='leave model empty ("") or give the base\'s name',
            )
        return AdapterRef(adapter_id=name, source=body.adapter_source, merged=merged, token=body.api_token)

    def room(self, param: str, num_prompt: int, wanted: int | None) -> int:
        """How long an answer may get. Raises ParameterRefused where prompt and answer do not fit a row."""
        total, longest = self.service.max_total_tokens, self.service.max_input_tokens
        if num_prompt > longest:
            raise ParameterRefused(
                f"the prompt has {num_prompt} tokens, but this server takes {longest}", param=param, code="context_length_exceeded", hint="shorten it"
            )
        if wanted is not None and num_prompt + wanted > total:
            raise ParameterRefused(
                f"the prompt has {num_prompt} tokens and {wanted} more are asked for, but this server's context holds {total}",
                param=param,
                code="context_length_exceeded",
                hint="shorten the prompt or ask for fewer tokens",
            )
        return total - num_prompt if wanted is None else wanted

    async def inputs(self, given: str | list[str] | list[int] | list[list[int]], param: str, most: int) -> list[Input]:
        """One text, one list of tokens, or up to `most` of either, as tokens; all within limits. Long texts are read beside the event loop."""
        items: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not 1 <= len(items) <= most:
            raise ParameterRefused(f"{param} has {len(items)} entries, but must have 1 to {most}", param=param, code="invalid_value")
        if all(isinstance(item, str) for item in items):
            before, _ = added_tokens(self.base.tokenizer)
            try:
                encoded = await beside(lambda: encode_prompts(items, self.base.tokenizer), sum(map(len, items)))
            except DataError as error:
                raise ParameterRefused(f"{param} has an empty text: {error.message}", param=param, code="invalid_value") from error
            return [Input(ids, text, len(before)) for ids, text in zip(encoded, items, strict=True)]
        for ids in items:
            self._check_ids(ids, param)
        return [Input(ids, None, 0) for ids in items]

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        vocabulary = self.service.limits.vocabulary
        if not ids:
            raise ParameterRefused(f"{param} has a list without tokens", param=param, code="invalid_value")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise ParameterRefused(f"{param} has the token {wrong}, but tokens are 0 to {vocabulary - 1}", param=param, code="invalid_value")


def requests_for(served: Served, prompts: Sequence[Sequence[int]], sampling: SamplingParams, count: int) -> list[Request]:
    """`count` requests for each prompt, prompt by prompt; they differ in their seeds."""
    seeds = [seed_of_choice(sampling.seed, index) for index in range(count)]
    variants = [sampling if seed == sampling.seed else replace(sampling, seed=seed) for seed in seeds]
    return [Request(prompt, adapter=served.key, sampling=variant) for prompt in prompts for variant in variants]


def grouped(completions: Sequence[Completion], count: int) -> list[Sequence[Completion]]:
    """The completions of requests_for, one group a prompt."""
    return [completions[start : start + count] for start in range(0, len(completions), count)]


async def streams(service: Service, requests: Sequence[Request], caller: Caller) -> AsyncGenerator[tuple[int, list[TokenEvent]]]:
    """What comes of requests that run side by side, each time with the request's place. Closing it cancels all of them."""
    service.places.check(len(requests))  # together, for they are taken one by one
    opened: list[TokenStream] = []
    try:
        for request in requests:
            opened.append(service.stream(request, caller))
        if len(opened) == 1:
            while events := await opened[0].next_events():
                yield 0, events
        else:
            async with aclosing(_side_by_side(opened)) as found:
                async for item in found:
                    yield item
    finally:
        for stream in opened:
            await stream.aclose()


async def _side_by_side(opened: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, list[TokenEvent]]]:
    """The events of several streams as they come. The first error ends all."""
    items: asyncio.Queue[tuple[int, list[TokenEvent]] | AtollError] = asyncio.Queue()

    async def drain(place: int, stream: TokenStream) -> None:
        try:
            while events := await stream.next_events():
                items.put_nowait((place, events))
        except AtollError as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(drain(place, stream)) for place, stream in enumerate(opened)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, AtollError):
                raise item
            left -= item[1][-1].completion is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def begun(http: HttpRequest, parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The same parts, once the first is there. Raises what making it raised, and ClientGone if the client hung up meanwhile."""
    try:
        first = await unless_gone(http, _next(parts))
    except BaseException:
        await parts.aclose()
        raise
    return _joined(first, parts)


async def _joined(first: bytes, parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for part in parts:
            yield part
    finally:
        await parts.aclose()


async def _next(parts: AsyncGenerator[bytes]) -> bytes:
    return await anext(parts)
