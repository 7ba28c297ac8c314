"""GET /health, /ping and /startup: may this server be sent requests? Asks nobody for a key, says nothing but yes or no.

200 with an empty body when it may; 503 with LoRAX's body while it starts, drains, has lost its engine, or has one that makes no step or fails at
everything. The engine is not asked: a server that is busy is healthy, and an engine that hangs would not answer.

Made by `router`; app includes it. GET / with a browser or a health checker is in lorax/texts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from atoll.serving.service import Service

UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Ready; the body is empty."},
    503: {"description": "Starting, stopping or broken."},
}


def answer(service: Service) -> Response:
    """Yes or no."""
    return Response(status_code=200) if service.healthy else JSONResponse(UNHEALTHY, 503)


def router(service: Service) -> APIRouter:
    """The routes, asking `service`."""
    routes = APIRouter(tags=["Health"])

    @routes.get("/health", summary="May this server be sent requests?", response_class=Response, responses=RESPONSES)
    @routes.get("/ping", summary="The same, as SageMaker asks it", response_class=Response, responses=RESPONSES)
    @routes.get("/startup", summary="The same, as Kubernetes asks while it starts", response_class=Response, responses=RESPONSES)
    async def health() -> Response:
        return answer(service)

    return routes
