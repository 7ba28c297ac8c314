"""Routes that compose: from a few examples and the hub's adapters to one new adapter, as a job beside the server.

    POST   /compose               examples in the body; 202 and the job, whose adapter is servable once it is finished
    GET    /compose               the key's jobs, the newest first
    GET    /compose/JOB           one: how far it is, its result or its error
    GET    /compose/JOB/events    the same as server-sent events, one a change
    DELETE /compose/JOB           end it; nothing is published

All need the scope publish. A key sees its own jobs, and composes only adapters that it may use; a job of another key is one that does not exist.

Made by `router`; app includes it. The body is compose_body.py, its adapters are compose_adapters.py, the jobs are compose_jobs.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from atoll.http.auth import caller_of
from atoll.http.errors import own_body
from atoll.http.sse import EventStream, event
from atoll.server import compose_docs
from atoll.server.compose_adapters import candidates
from atoll.server.compose_body import ComposeBody, prepared
from atoll.server.compose_job import Job, Order
from atoll.server.manage import refuse_foreign_pages

if TYPE_CHECKING:
    from atoll.server.compose_jobs import ComposeJobs
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service


def router(service: Service, jobs: ComposeJobs) -> APIRouter:
    """The routes over `jobs`."""

    async def only_ours(http: HttpRequest) -> None:
        refuse_foreign_pages(http, service.config.cors_origins)

    routes = APIRouter(tags=["Compose"], dependencies=[Depends(only_ours)])

    @routes.post("/compose", summary="Compose an adapter from a few examples and those of the hub", status_code=202, responses=compose_docs.asking())
    async def ask(http: HttpRequest, body: ComposeBody) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        jobs.check(caller)
        service.operator.may_publish(body.name, caller)
        chosen = await candidates(body, service, caller)

        def prepare(folder: Path) -> Order:
            return Order(body.name, prepared(body, chosen, folder, service), body.tags, body.message)

        job = await jobs.add(caller, prepare)
        return JSONResponse(job.to_json(caller), 202, headers={"location": f"/compose/{job.id}"})

    @routes.get("/compose", summary="Your compositions", responses=compose_docs.listing())
    async def listing(http: HttpRequest) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        return JSONResponse({"jobs": [job.to_json(caller, with_report=False) for job in jobs.of(caller)]})

    @routes.get("/compose/{job}", summary="How far a composition is, and what came of it", responses=compose_docs.one())
    async def one(http: HttpRequest, job: str) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        found = jobs.get(job, caller)
        return _missing(job) if found is None else JSONResponse(found.to_json(caller))

    @routes.get("/compose/{job}/events", summary="The same, as it changes", responses=compose_docs.events(), response_class=Response)
    async def events(http: HttpRequest, job: str) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        found = jobs.get(job, caller)
        return _missing(job) if found is None else EventStream(_changes(jobs, found, caller))

    @routes.delete("/compose/{job}", summary="Cancel a composition; nothing is published", responses=compose_docs.one())
    async def cancel(http: HttpRequest, job: str) -> Response:
        caller = caller_of(http)
        caller.require("publish")
        found = jobs.get(job, caller)
        if found is None:
            return _missing(job)
        await jobs.cancel(found)
        return JSONResponse(found.to_json(caller))

    return routes


async def _changes(jobs: ComposeJobs, job: Job, caller: Caller) -> AsyncIterator[bytes]:
    async for state in jobs.changes(job, caller):
        yield event(state)


def _missing(job: str) -> Response:
    """The one answer for what is not there and for what is another key's."""
    return JSONResponse(own_body("job_not_found", f"no composition {job[:80]!r} here", "GET /compose lists yours"), 404)
