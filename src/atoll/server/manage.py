"""Routes for operators: list adapters, load, unload, pin, reload, publish; and the two that vLLM's tools know.

    GET  /adapters              every adapter that the caller may see            scope infer
    GET  /adapters/NAME         one of them
    POST /adapters/NAME/load    also unload, pin, unpin, reload                  scope admin
    POST /adapters              publish a folder or an upload to the hub         scope publish
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter                          scope admin

NAME is any reference: dates, dates@2, acme/dates:stable, sha256:…. A web page cannot use these through a visitor's browser: a request that comes from
a page of elsewhere is refused, since a POST without a body needs no permission from the browser.

Made by `router`; app includes it. What they do is serving/operator.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from atoll.errors import NotAllowed
from atoll.http.auth import Rule, caller_of
from atoll.http.errors import own_body, protocol_of, refusal
from atoll.server import manage_docs
from atoll.server.uploads import Publication, publication
from atoll.serving.entries import AdapterRef, InUse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from atoll.serving.service import Service

UPLOAD_SPARE_BYTES = 4 << 20  # beside the weights: the small files and the form around them
RULES: Mapping[str, Rule] = {
    "/adapters": {"GET": "infer", "POST": "publish"},
    **{f"/adapters/{{name:path}}/{action}": {"GET": "infer", "POST": "admin"} for action in ("load", "unload", "pin", "unpin", "reload")},
    "/adapters/{name:path}": {"GET": "infer"},
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
}  # fmt: skip


class Where(BaseModel):
    """Where an adapter comes from, when it is not our hub."""

    source: str | None = Field(default=None, description="hub, local, hf or s3; default hub.")
    revision: str | None = Field(default=None, max_length=256, description="Version number, tag or commit.")
    api_token: str | None = Field(default=None, max_length=512, description="Token for the source, used for this download only.")
    wait_s: float = Field(default=0.0, ge=0, le=600, description="To unload: seconds to wait for requests that use the adapter.")


class LoadLora(BaseModel):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="What requests will call the adapter.")
    lora_path: str = Field(min_length=1, max_length=512, description="A folder below the server's local root, or an adapter of the hub.")
    load_inplace: bool = Field(default=False, description="Let the name mean this adapter even if it meant another.")


class UnloadLora(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="The name given when it was loaded.")
    wait_s: float = Field(default=0.0, ge=0, le=600, description="Seconds to wait for requests that use it.")


def upload_limit(service: Service, path: str) -> int | None:
    """The bytes that a path's route takes if it reads the body itself; for the body limit in front of all routes."""
    return service.config.max_adapter_bytes + UPLOAD_SPARE_BYTES if path == "/adapters" else None


def router(service: Service) -> APIRouter:
    """The routes, asking `service`."""

    async def only_ours(http: HttpRequest) -> None:
        refuse_foreign_pages(http, service.config.cors_origins)

    routes = APIRouter(tags=["Adapters"], dependencies=[Depends(only_ours)])
    operator = service.operator

    @routes.get("/adapters", summary="Every adapter that you may see", responses=manage_docs.listing())
    async def listing(http: HttpRequest) -> Response:
        caller = caller_of(http)
        caller.require("infer")
        return JSONResponse({"adapters": [info.to_json() for info in await operator.adapters(caller)]})

    document = {"requestBody": Publication.document()}

    @routes.post(
        "/adapters", summary="Publish an adapter, servable at once", status_code=201, responses=manage_docs.publishing(), openapi_extra=document
    )
    async def publish(http: HttpRequest) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        with tempfile.TemporaryDirectory(prefix="atoll-upload-", ignore_cleanup_errors=True) as scratch:
            asked = await publication(http, Path(scratch), service)
            version = await operator.publish(asked.folder, asked.name, caller, tags=asked.tags, message=asked.message, bind_base=asked.bind_base)
        return JSONResponse(version.to_json() | {"version": version.ref}, 201)

    def add(action: Literal["load", "unload", "pin", "unpin", "reload"], summary: str) -> None:
        @routes.post(f"/adapters/{{name:path}}/{action}", summary=summary, operation_id=f"adapter_{action}", responses=manage_docs.action())
        async def act(http: HttpRequest, name: str, where: Annotated[Where | None, Body()] = None) -> Response:
            caller, where = caller_of(http), where or Where()
            caller.require("admin")
            ref = AdapterRef(name, where.source, revision=where.revision, token=where.api_token)
            try:
                info = await (operator.unload(ref, caller, where.wait_s) if action == "unload" else getattr(operator, action)(ref, caller))
            except InUse as error:
                return _conflict(http, error)
            return JSONResponse(info.to_json())

    add("load", "Load an adapter now, also one that failed a moment ago")
    add("unload", "Take an adapter out of memory; the next request loads it again")
    add("pin", "Load an adapter and keep it resident, also after a restart")
    add("unpin", "Let a pinned adapter leave when room is needed")
    add("reload", "Look the name up again and load what it means now")

    @routes.get("/adapters/{name:path}", summary="One adapter", responses=manage_docs.one())
    async def one(http: HttpRequest, name: str, source: str | None = None, revision: str | None = None) -> Response:
        caller = caller_of(http)
        caller.require("infer")
        return JSONResponse((await operator.adapter(AdapterRef(name, source, revision=revision), caller)).to_json())

    @routes.post(
        "/v1/load_lora_adapter",
        summary="Give an adapter a name and load it (vLLM's route)",
        responses=manage_docs.naming(),
    )
    async def load_lora(http: HttpRequest, body: LoadLora) -> Response:
        caller = caller_of(http)
        caller.require("admin")
        await operator.name(body.lora_name, body.lora_path, caller, replace_old=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post(
        "/v1/unload_lora_adapter",
        summary="Take a name away and unload its adapter (vLLM's route)",
        responses=manage_docs.naming(),
    )
    async def unload_lora(http: HttpRequest, body: UnloadLora) -> Response:
        caller = caller_of(http)
        caller.require("admin")
        try:
            await operator.unname(body.lora_name, caller, body.wait_s)
        except InUse as error:
            return _conflict(http, error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _conflict(http: HttpRequest, error: InUse) -> Response:
    """409: what was asked is right, but not now."""
    protocol = protocol_of(http.scope["path"])  # http.url needs a Host that can be parsed
    body = own_body("in_use", error.message, error.hint) if protocol == "own" else refusal(409, error.message, protocol, hint=error.hint).body
    return JSONResponse(dict(body), 409)


def refuse_foreign_pages(http: HttpRequest, allowed: tuple[str, ...]) -> None:
    """Raise NotAllowed for a POST that a browser sends for a page of another origin."""
    origin = http.headers.get("origin")
    if http.method == "GET" or origin is None or origin in allowed or "*" in allowed:
        return
    try:
        is_ours = urlsplit(origin).netloc == http.headers.get("host")
    except ValueError:  # such as "http://["
        is_ours = False
    if not is_ours:
        raise NotAllowed(f"pages of {origin[:80]!r} may not manage this server", hint="the operator can allow the origin: --cors-origin")
