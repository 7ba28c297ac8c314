"""POST /v1/embeddings: texts as vectors, from the last hidden states of the base or of an adapter.

Made by `router`; app includes it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.engine.request import EmbedRequest
from atoll.http.auth import caller_of
from atoll.http.sse import unless_gone
from atoll.openai.docs import EmbeddingReply, answers
from atoll.openai.run import Asker
from atoll.openai.types import EmbeddingBody, ParameterRefused, refuse_unsupported

if TYPE_CHECKING:
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service


def router(service: Service) -> APIRouter:
    """The route, asking `service`."""
    asker, routes = Asker(service), APIRouter()

    @routes.post("/v1/embeddings", tags=["OpenAI"], summary="Texts as vectors", responses=answers(EmbeddingReply, not_found=True))
    async def embeddings(http: HttpRequest, body: Annotated[EmbeddingBody, Body()]) -> Response:
        return await _answer(asker, http, body)

    return routes


async def _answer(asker: Asker, http: HttpRequest, body: EmbeddingBody) -> Response:
    refuse_unsupported(body)
    caller, width = caller_of(http), asker.base.decoder.shape.hidden
    if body.dimensions not in (None, width):
        raise ParameterRefused(
            f"dimensions is {body.dimensions}, but this base's vectors have {width} and cannot be shortened", param="dimensions", code="invalid_value"
        )
    served = await unless_gone(http, asker.service.open(asker.ref(body), caller))
    prompts = [given.ids for given in await asker.inputs(body.input, "input", asker.service.config.max_embedding_inputs)]
    for ids in prompts:
        asker.room("input", len(ids), 0)
    items = [EmbedRequest(ids, adapter=served.key, pooling=body.pooling or "mean") for ids in prompts]
    vectors = await unless_gone(http, _embed(asker.service, items, caller))
    written = _base64 if body.encoding_format == "base64" else list
    num_tokens = sum(map(len, prompts))
    return JSONResponse(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": written(vector)} for index, vector in enumerate(vectors)],
            "model": body.model or served.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _embed(service: Service, items: Sequence[EmbedRequest], caller: Caller) -> list[list[float]]:
    """A batch at a time, so that a request of thousands takes no more places than others do."""
    config = service.config
    size = min(config.max_inputs, config.per_key_requests, config.max_concurrent_requests)
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    return [vector for batch in batches for vector in await service.embed(batch, caller)]


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
