"""The HTTP app: every route, and what stands around all of them.

    HEAD as GET ─► CORS (if configured) ─► who asks, and may they (auth) ─► counting (metrics) ─► the body (body) ─► routes ─► errors as JSON

All of it is plain ASGI, so a stream's bytes pass through no task and no queue on their way out. Nothing here logs what a request says.

Used by `atoll serve` and by tests; `create_app(service)` is all there is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.errors import AtollError
from atoll.http import health, metrics
from atoll.http.auth import RULES, Authentication, Rules
from atoll.http.body import BodyLimit
from atoll.http.docs_page import docs_page
from atoll.http.errors import ClientGone, Protocol, Refusal, internal_error, invalid_body, protocol_of, refusal, refusal_of
from atoll.http.metrics import CountRequests, Metrics
from atoll.lorax import generate, texts
from atoll.openai import chat, completions, embeddings, models
from atoll.server import compose, manage
from atoll.server.compose_jobs import ComposeJobs

if TYPE_CHECKING:
    from atoll.serving.service import Service

COUNTED = ("/", "/invocations", "/generate", "/generate_stream", "/embed", "/classify", "/classify_batch", "/completions", "/embeddings")
_ABOUT = "One base language model and any number of adapters, in one continuous batch. LoRAX's API, OpenAI's, and management."


def create_app(service: Service) -> FastAPI:
    """The app that serves `service`, which starts and stops with it."""
    from atoll import __version__

    jobs = ComposeJobs(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            try:
                await service.stop()
            finally:
                await jobs.stop()

    app = FastAPI(
        title="Atoll",
        version=__version__,
        description=_ABOUT,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    counted = Metrics(service)
    app.state.service, app.state.metrics = service, counted
    for routes in (
        health.router(service),
        generate.router(service, counted),
        texts.router(service, counted),
        chat.router(service),
        completions.router(service),
        embeddings.router(service),
        models.router(service),
        manage.router(service),
        compose.router(service, jobs),
        metrics.router(counted),
    ):
        app.include_router(routes)
    _add_documents(app)
    _add_handlers(app)
    _add_middleware(app, service, counted)
    return app


def _add_documents(app: FastAPI) -> None:
    """What describes the routes, for programs and for people."""

    @app.get("/openapi.json", include_in_schema=False)
    @app.get("/api-doc/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(_document(app))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page(_document(app)), media_type="text/html")


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; a key comes in either header, and not at all where the server has no keys."""
    found = app.openapi()
    bearer, header = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "header", "name": "x-api-key"}
    components = {**found.get("components", {}), "securitySchemes": {"bearer": bearer, "x-api-key": header}}
    return {**found, "components": components, "security": [{"bearer": []}, {"x-api-key": []}, {}]}


def _add_middleware(app: FastAPI, service: Service, counted: Metrics) -> None:
    """The last one added is the outermost."""
    config = service.config
    rules = Rules({**RULES, **manage.RULES})
    for path, method in declared(app.routes):
        assert rules.has(path, method), f"auth.RULES does not say who may {method} {path}"
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, own_limit=lambda path: manage.upload_limit(service, path))
    app.add_middleware(CountRequests, metrics=counted, paths=COUNTED)
    app.add_middleware(Authentication, keys=service.keys, rules=rules, guard_host=not service.keys.required)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "x-api-key"],
            expose_headers=["*"],
        )
    app.add_middleware(HeadAsGet)


def declared(routes: Sequence[BaseRoute]) -> list[tuple[str, str]]:
    """(path, method) of every route, those of included routers too; of a mounted app its path."""
    return [(getattr(route, "path", ""), method) for route in _single(routes) for method in getattr(route, "methods", None) or ("GET",)]


def _single(routes: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    for route in routes:
        inner = getattr(route, "original_router", None)  # FastAPI keeps an included router as one route
        if inner is None:
            yield route
        else:
            yield from _single(inner.routes)


def _add_handlers(app: FastAPI) -> None:
    """Every error as JSON, in the shape of the path's protocol."""
    app.add_exception_handler(AtollError, _handler(lambda request, error: refusal_of(cast(AtollError, error), _protocol(request))))
    app.add_exception_handler(
        RequestValidationError, _handler(lambda request, error: invalid_body(cast(RequestValidationError, error).errors(), _protocol(request)))
    )
    app.add_exception_handler(RecursionError, _handler(lambda request, error: refusal(422, "the body is nested too deeply", _protocol(request))))
    app.add_exception_handler(Exception, _handler(lambda request, error: internal_error(_protocol(request))))
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _http_error)


def _handler(told: Callable[[Request, Exception], Refusal]) -> Callable[[Request, Exception], Any]:
    async def handle(request: Request, error: Exception) -> Response:
        return _response(told(request, error))

    return handle


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the access log."""
    return Response(status_code=499)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths and methods, bodies it cannot read."""
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"], request.method
    if error.status_code in (404, 405):
        allowed = _methods_of(request)
        if method == "OPTIONS" and allowed:
            return Response(status_code=204, headers={"allow": ", ".join(allowed)})
        if allowed:
            refused = refusal(405, f"{path[:200]} does not take {method}", _protocol(request), hint=f"it takes {', '.join(allowed)}")
            return _response(refused, {"allow": ", ".join(allowed)})
        return _response(refusal(404, f"there is no route {path[:200]!r}", _protocol(request), hint="GET /docs lists them"))
    if error.status_code == 400:  # a body that Python cannot read, in the status of one that is no JSON at all
        return _response(refusal(400 if _protocol(request) == "openai" else 422, "the body cannot be read as JSON", _protocol(request)))
    return _response(refusal(error.status_code, str(error.detail), _protocol(request)), error.headers)


def _methods_of(request: Request) -> list[str]:
    """The methods that the routes of the request's path take."""
    found: set[str] = set()
    for route in _single(request.app.routes):
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    if "GET" in found:
        found.add("HEAD")
    return sorted(found | {"OPTIONS"}) if found else []


def _protocol(request: Request) -> Protocol:
    return protocol_of(request.scope["path"])


def _response(refused: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(refused.body, refused.status, headers={**refused.headers, **(headers or {})})


class HeadAsGet:
    """ASGI middleware: HEAD is GET without its body, on every route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)
