"""LoRAX's other routes: a text's vector, its class, its tokens; and what this server is.

Classes are those of an adapter that was trained on a closed set of labels: each label's likelihood as the answer to the adapter's own prompt, over
the sum of all, is its score. That has the form of LoRAX's entities, one for each label with the whole text as its word. Over an encoder (BERT,
RoBERTa) they are the classes of the adapter's classifier; one that came without a prompt format is asked with the text as it is. Entities inside a
text need a classifier of tokens, which is not served, so the base and other adapters answer 501 and say so.

Made by `router`; app includes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.data.prompt import encode_prompts
from atoll.engine.request import EmbedRequest, ScoreRequest
from atoll.errors import RequestRefused
from atoll.http import health
from atoll.http.asking import row_of
from atoll.http.auth import caller_of
from atoll.http.errors import refusal
from atoll.http.sse import unless_gone
from atoll.lorax.docs import answers
from atoll.lorax.generate import open_adapter
from atoll.lorax.prompt import beside, encode_texts, label_tokens
from atoll.lorax.rules import Limits, check_adapters, check_inputs, check_lengths
from atoll.lorax.types import (
    ClassifyBatchBody,
    ClassifyBody,
    EmbedBody,
    EmbedResponse,
    Entity,
    FieldsChoice,
    Info,
    PooledChoice,
    SimpleToken,
    TokenizeBody,
)

if TYPE_CHECKING:
    from atoll.http.metrics import Metrics
    from atoll.serving.service import Served, Service

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification"}


def router(service: Service, metrics: Metrics) -> APIRouter:
    """The routes, asking `service`."""
    texts, routes = Texts(service, metrics), APIRouter(tags=["LoRAX"])
    no_labels = answers(status=501)

    @routes.post("/embed", summary="The vector of a text", responses=answers(EmbedResponse))
    async def embed(http: HttpRequest, body: Annotated[EmbedBody, Body()]) -> Response:
        return await texts.embed(http, body)

    @routes.post("/classify", summary="How likely each label is for a text", responses=answers(list[Entity]) | no_labels)
    async def classify(http: HttpRequest, body: Annotated[ClassifyBody, Body()]) -> Response:
        found = await texts.classify(http, [body.inputs], body.parameters)
        return found if isinstance(found, Response) else JSONResponse(found[0])

    @routes.post("/classify_batch", summary="The same for several texts", responses=answers(list[list[Entity]]) | no_labels)
    async def classify_batch(http: HttpRequest, body: Annotated[ClassifyBatchBody, Body()]) -> Response:
        found = await texts.classify(http, body.inputs, body.parameters)
        return found if isinstance(found, Response) else JSONResponse(found)

    @routes.post("/tokenize", summary="The tokens of a text, with their places in it", responses=answers(list[SimpleToken]) | answers(status=404))
    async def tokenize(http: HttpRequest, body: Annotated[TokenizeBody, Body()]) -> Response:
        return await texts.tokenize(body)

    @routes.get("/info", summary="What this server is", responses=answers(Info))
    async def info(http: HttpRequest) -> Response:
        return JSONResponse(await texts.info(http))

    @routes.get("/", summary="May this server be sent requests?", response_class=Response, responses=health.RESPONSES)
    async def alive() -> Response:
        return health.answer(service)

    return routes


class Texts:
    """What the routes of one server do."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._base, self._metrics = service, service.base, metrics
        self._limits = Limits.of(service)

    async def embed(self, http: HttpRequest, body: EmbedBody) -> Response:
        """The text's vector with the adapter that was asked for."""
        choice = body.parameters or PooledChoice()
        check_adapters(choice)
        check_inputs(body.inputs)
        [token_ids] = await encode_texts(self._base, [body.inputs])
        check_lengths(len(token_ids), None, self._limits)
        served = await open_adapter(self._service, http, choice, self._limits)
        request = EmbedRequest(token_ids, adapter=served.key, pooling=choice.pooling or "mean")
        [vector] = await unless_gone(http, self._service.embed([request], caller_of(http)))
        return JSONResponse({"embeddings": vector})

    async def classify(self, http: HttpRequest, inputs: Sequence[str], parameters: FieldsChoice | None) -> list[list[dict[str, Any]]] | Response:
        """The entities of each text, or the reply that says why there are none."""
        choice = parameters or FieldsChoice()
        check_adapters(choice)
        if not inputs:
            raise RequestRefused("`inputs` cannot be empty")
        if len(inputs) > self._limits.inputs:
            raise RequestRefused(f"`inputs` may hold up to {self._limits.inputs} texts. Given: {len(inputs)}")
        for text in inputs:
            check_inputs(text)
        served = await open_adapter(self._service, http, choice, self._limits)
        if not served.labels or (served.prompt is None and not self._base.decoder.classifies):
            return _without_labels(served)
        items = await self._score_requests(served, inputs, choice)
        sums = await unless_gone(http, self._service.score(items, caller_of(http)))
        self._metrics.classified(len(inputs), len(inputs) * len(served.labels))
        return [_entities(text, served.labels, found) for text, found in zip(inputs, sums, strict=True)]

    async def _score_requests(self, served: Served, inputs: Sequence[str], choice: FieldsChoice) -> list[ScoreRequest]:
        form, labels = served.prompt, served.labels
        assert labels is not None
        prompts = list(inputs) if form is None else [form.render(row_of(form, text, choice.fields, "`inputs`")) for text in inputs]
        chat = form is not None and form.chat
        prompt_ids = await beside(lambda: encode_prompts(prompts, self._base.tokenizer, chat), sum(map(len, prompts)))
        options = label_tokens(form, prompts, labels, self._base)
        for token_ids, continuations in zip(prompt_ids, options, strict=True):
            check_lengths(len(token_ids), max(map(len, continuations)), self._limits)
        return [ScoreRequest(ids, tuple(ways), adapter=served.key) for ids, ways in zip(prompt_ids, options, strict=True)]

    async def tokenize(self, body: TokenizeBody) -> Response:
        """The tokens of a text; start and stop count characters."""
        check_inputs(body.inputs)
        tokenizer = self._base.tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            refused = refusal(404, "the base's tokenizer does not tell where tokens begin and end", "native")
            return JSONResponse({**refused.body, "error_type": "no fast tokenizer"}, 404)
        special = body.add_special_tokens is not False

        def split() -> list[dict[str, Any]]:
            found = tokenizer(body.inputs, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            return [
                {"id": token, "text": body.inputs[start:stop] or tokenizer.convert_ids_to_tokens(token), "start": start, "stop": stop}
                for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True)
            ]

        return JSONResponse(await beside(split, len(body.inputs)))

    async def info(self, http: HttpRequest) -> dict[str, Any]:
        """LoRAX's fields, and ours."""
        from atoll import __version__

        service, config, base = self._service, self._service.config, self._base
        return {
            "model_id": base.name,
            "model_sha": base.fingerprint.weights,
            "model_dtype": str(base.dtype),
            "model_device_type": base.decoder.device.type,
            "model_pipeline_tag": _PIPELINES[base.decoder.task_type],
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_length": self._limits.max_input,
            "max_total_tokens": self._limits.max_total,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": config.engine.max_rows * self._limits.max_total,
            "max_waiting_tokens": 0,
            "validation_workers": 1,
            "eager_prefill": True,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "request_logger_url": None,
            "base": base.describe(),
            "adapters": await service.operator.listing.count(caller_of(http)),
            "adapter_kinds": dict(await service.operator.listing.kinds(caller_of(http))),
            "kernel": service.kernel,
        }


def _without_labels(served: Served) -> Response:
    what = "the base" if served.key is None else f"adapter {served.name!r}"
    why = "has no closed set of labels" if not served.labels else "has labels, but no prompt format to ask for them in"
    refused = refusal(
        501,
        f"{what} {why}, so it cannot classify",
        "native",
        hint='name an adapter that was trained on a closed set of labels: "parameters": {"adapter_id": ...}; '
        "finding entities inside a text needs a classifier of tokens, which this server does not run",
    )
    return JSONResponse({**refused.body, "error_type": "classification_failure"}, 501)


def _entities(text: str, labels: Sequence[str], log_likelihoods: Sequence[float]) -> list[dict[str, Any]]:
    """One entity a label, the likeliest first; scores add up to 1."""
    highest = max(log_likelihoods)
    weights = [math.exp(value - highest) for value in log_likelihoods]
    total = sum(weights)
    ranked = sorted(zip(labels, weights, strict=True), key=lambda pair: -pair[1])
    return [{"entity_group": label, "score": weight / total, "word": text, "start": 0, "end": len(text)} for label, weight in ranked]
