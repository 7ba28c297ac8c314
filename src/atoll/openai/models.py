"""GET /v1/models: what `model` may name, the base and every adapter that the caller may use, each with where it comes from.

Made by `router`; app includes it. What an operator does with adapters is in manage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.http.auth import caller_of
from atoll.openai.docs import ModelList, ModelReply, answers
from atoll.serving.entries import AdapterInfo, AdapterRef

if TYPE_CHECKING:
    from atoll.serving.service import Service

_OWNER = "atoll"


def router(service: Service) -> APIRouter:
    """The routes, asking `service`."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.get("/v1/models", summary="The base and the adapters", responses=answers(ModelList))
    async def models(http: HttpRequest) -> Response:
        found = await service.operator.listing.adapters(caller_of(http), with_engine=False)
        return JSONResponse({"object": "list", "data": [_base(service), *(_adapter(service, info) for info in found)]})

    @routes.get("/v1/models/{model:path}", summary="The base, or one adapter", responses=answers(ModelReply, not_found=True))
    async def one_model(http: HttpRequest, model: str) -> Response:
        if service.registry.is_base(model):
            return JSONResponse(_base(service))
        info = await service.operator.adapter(AdapterRef(model), caller_of(http))
        return JSONResponse(_adapter(service, info) | {"id": model})

    return routes


def _base(service: Service) -> dict[str, Any]:
    """The base. Its files do not say when they were made, so it is as old as the server."""
    base = service.base
    return {
        "id": base.name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": _OWNER,
        "root": base.name,
        "parent": None,
        "max_model_len": service.max_total_tokens,
        "lineage": {"kind": "base", **base.fingerprint.to_json()},
    }


def _adapter(service: Service, info: AdapterInfo) -> dict[str, Any]:
    owner, _, rest = info.name.partition("/")
    return {
        "id": info.name,
        "object": "model",
        "created": int(info.created or service.started_at),
        "owned_by": owner if rest else _OWNER,
        "root": service.base.name,
        "parent": service.base.name,
        "max_model_len": service.max_total_tokens,
        "lineage": {
            "kind": info.kind,
            "version": info.version,
            "digest": info.digest,
            "source": info.source,
            "state": info.state,
            "rank": info.rank,
            "num_parameters": info.num_parameters,
            "task": info.task,
            "description": info.description,
            "parents": [dict(parent) for parent in info.parents],
        },
    }
