"""Compositions as jobs: a bounded queue, one process at a time beside the server, and what is known of each until its key has asked for many more.

    queued ──its turn──► running ──► finished   the adapter is published, by the rules of publishing
       │                    ├──────► failed     a sentence for whoever asked; of a crash the details stand in the log alone
       └──────cancel────────┴──────► cancelled  nothing is published

The one idea: the process only composes. It reads the hub, writes into a folder of its own and dies with its group; it is this file that publishes
what it made, so a cancelled, crashed or late composition leaves nothing behind but its record: every job that has begun is a run of the hub's
ledger, however it ended. Jobs are not kept over a restart: a server that stops cancels them.

Used by compose.py. Everything runs on the event loop. The process is workflows/compose_worker.py; processes.py starts, hears and ends it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterNotFound, AtollError, EngineError, QueueFull, StorageError
from atoll.http.errors import refusal_of
from atoll.server.compose_job import Job, Order, State, failure
from atoll.server.processes import Child, Crashed
from atoll.serving.entries import Unavailable
from atoll.serving.workers import Workers

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service

PREPARE_S = 60.0  # to read and count the rows of a request
CANCEL_S = 5.0  # that a process which was asked to end may take for it
_LESS = "give fewer or shorter rows, fewer seeds, or a smaller top_k"

_log = logging.getLogger(__name__)


class NotOffered(EngineError):
    """This server does not compose: asking again changes nothing."""


class ComposeJobs:
    """The compositions of one server."""

    def __init__(self, service: Service) -> None:
        self._service, self._limits = service, service.config.compose
        self._jobs: dict[str, Job] = {}  # by id, the oldest first
        self._waiting: deque[Job] = deque()
        self._entering = Counter[str]()  # requests whose rows are being read, by key
        self._readers = Workers(1, "atoll-compose")
        self._works = False
        self._runner: asyncio.Task[Any] | None = None  # once it has begun to work

    # ---- for the routes ----

    def check(self, caller: Caller) -> None:
        """Raise NotOffered, Unavailable or QueueFull where `add` would, before anything is read for it."""
        self._check_up()
        self._check_room(caller)

    async def add(self, caller: Caller, prepare: Callable[[Path], Order]) -> Job:
        """Queue what `prepare` makes of a request, in a thread and in the job's new folder. Raises StorageError, and what they both raise."""
        self.check(caller)
        self._entering[caller.key_id] += 1
        try:
            folder = tempfile.TemporaryDirectory(prefix="atoll-compose-", ignore_cleanup_errors=True)
            try:
                order = await self._readers.run(lambda: prepare(Path(folder.name)), PREPARE_S, "reading the examples")
                self._check_up()  # it may have begun to stop meanwhile
            except BaseException:
                folder.cleanup()
                raise
        except OSError as error:
            raise StorageError(f"the rows could not be stored: {error.strerror}", hint="the operator must free some space") from error
        finally:
            self._entering -= Counter((caller.key_id,))
        job = Job(secrets.token_hex(8), order, caller, folder)
        self._jobs[job.id] = job
        self._waiting.append(job)
        if not self._works:
            self._works = True
            self._service.spawn(self._work())
        return job

    def of(self, caller: Caller) -> list[Job]:
        """The jobs that the caller may see, the newest first: those of its key; an administrator of all adapters sees everybody's."""
        return [job for job in reversed(self._jobs.values()) if _sees(caller, job)]

    def get(self, job_id: str, caller: Caller) -> Job | None:
        """The job of that id, if there is one that the caller may see."""
        job = self._jobs.get(job_id)
        return job if job is not None and _sees(caller, job) else None

    async def cancel(self, job: Job) -> None:
        """End a job and wait until it is over. What is being published already is published all the same."""
        job.cancel_asked = True
        if job in self._waiting:
            self._waiting.remove(job)
            self._end(job, "cancelled")
            return
        if job.child is not None:
            job.child.interrupt()
        try:
            await asyncio.wait_for(job.over.wait(), CANCEL_S)
        except TimeoutError:
            if job.child is not None:
                job.child.kill()
            await job.over.wait()

    async def changes(self, job: Job, caller: Caller) -> AsyncIterator[dict[str, Any]]:
        """The job as it is, and again after every change until it is over. Changes that nobody took in time are one."""
        while True:
            changed = job.changed
            yield job.to_json(caller)
            if job.is_over:
                return
            await changed.wait()

    async def stop(self) -> None:
        """Cancel everything, at once, and wait until no process is left."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait({self._runner})
        self._drop_waiting()

    # ---- the queue ----

    def _check_up(self) -> None:
        if not self._limits.enabled:
            raise NotOffered("this server does not compose adapters", hint="the operator turned it off: compose.enabled")
        service = self._service
        if service.failed is not None:
            raise Unavailable(service.failed.message, hint=service.failed.hint)
        if service.draining or not service.ready:
            raise Unavailable("the server is stopping or has not started yet", hint="ask another one, or later")

    def _check_room(self, caller: Caller) -> None:
        alive = [job for job in self._jobs.values() if not job.is_over]
        own = sum(job.caller.key_id == caller.key_id for job in alive) + self._entering[caller.key_id]
        if own >= self._limits.per_key:
            raise QueueFull(
                f"this key has {own} compositions running or waiting, and more are not taken", hint="wait for one, or cancel one", retry_after_s=10
            )
        if len(alive) + self._entering.total() > self._limits.max_waiting:
            raise QueueFull("as many compositions wait as may wait", hint="try again later", retry_after_s=10)

    async def _work(self) -> None:
        """One job after the other, until none waits. Cancelled when the service stops."""
        self._runner = asyncio.current_task()
        job: Job | None = None
        try:
            while self._waiting:
                job = self._waiting.popleft()
                job.begin()
                await self._compose(job)
        except asyncio.CancelledError:
            if job is not None:
                self._waiting.appendleft(job)
            self._drop_waiting()
            raise
        finally:
            self._works, self._runner = False, None

    def _drop_waiting(self) -> None:
        """The server stops: what it has not finished is cancelled."""
        stopped = Unavailable("the server stopped", hint="ask again when it is back")
        while self._waiting:
            job = self._waiting.popleft()
            if job.started is not None:
                self._record(job, "interrupted", stopped.message)  # nothing else waits for this thread any more
            self._end(job, "cancelled", error=dict(refusal_of(stopped, "own").body["error"]))

    async def _compose(self, job: Job) -> None:
        """From a job's turn to its end, whatever happens."""
        try:
            self._service.keys.again(job.caller).require("publish")  # hours may have passed since it was asked
            async with asyncio.timeout(self._limits.job_s):
                made = await self._made(job)
            if made is None:
                await asyncio.to_thread(self._record, job, "interrupted", "cancelled")
                self._end(job, "cancelled")
                return
            job.told("publishing", 0, 1)
            self._end(job, "finished", result=await self._published(job, made))
        except Exception as error:
            told = self._told(job, error)
            await asyncio.to_thread(self._record, job, "failed", told["message"])
            self._end(job, "failed", error=told)

    def _told(self, job: Job, error: Exception) -> dict[str, Any]:
        """What whoever asked may know of a failure; the log has the rest."""
        if isinstance(error, AdapterNotFound):  # deleted since it was chosen; the hub's own words would name what is there instead
            return failure("adapter_not_found", "an adapter that was to be composed is no longer there", "ask again")
        if isinstance(error, AtollError):
            return dict(refusal_of(error, "own").body["error"])
        if isinstance(error, TimeoutError):
            return failure("timed_out", f"the composition took longer than {self._limits.job_s:g} s", _LESS)
        if isinstance(error, Crashed):
            _log.error("composition %s ended with status %s; its last words:\n%s", job.id, error.status, error.last_words)
            why = "was killed, perhaps for want of memory" if error.was_killed else "broke off; the server's log has the details"
            return failure("crashed", f"the composition {why}", _LESS if error.was_killed else "")
        _log.error("composition %s", job.id, exc_info=error)
        return failure("internal", "something went wrong in the server; its log has the details")

    async def _made(self, job: Job) -> Mapping[str, Any] | None:
        """What the process made, or None if it was cancelled. Raises what the process says, or Crashed."""
        limits = self._limits
        async with Child.started(job.order.request, threads=limits.threads, with_clouds=self._clouds()) as child:
            job.child = child
            if job.cancel_asked:
                return None
            try:
                made = await child.outcome(job.told)
                return None if job.cancel_asked else made
            except (AtollError, Crashed):
                if job.cancel_asked:
                    return None
                raise
            finally:
                job.child = None

    async def _published(self, job: Job, made: Mapping[str, Any]) -> dict[str, Any]:
        order, caller = job.order, self._service.keys.again(job.caller)
        caller.require("publish")
        folder = Path(made["folder"])
        message = order.message or f"composed of {len(made['weights'])} adapters for {made['report']['task']}"
        version = await self._service.operator.publish(folder, order.name, caller, tags=order.tags, message=message)
        await asyncio.to_thread(self._record, job, "finished", version=version, made=made)
        return {
            "adapter": version.ref,
            "digest": version.digest,
            "weights": made["weights"],
            "warnings": made["warnings"],
            "report": made["report"],
        }

    def _record(self, job: Job, status: str, message: str = "", *, version: Version | None = None, made: Mapping[str, Any] | None = None) -> None:
        """In a thread: the run into the hub's ledger, once, and its score. What was published is so whether or not that succeeds."""
        from atoll.workflows.compose import record_score

        if job.recorded:
            return
        job.recorded, hub = True, self._service.hub
        assert hub is not None and job.started is not None
        started, now = datetime.fromtimestamp(job.started, UTC), datetime.now(UTC)
        try:
            hub.record_run(
                "compose",
                job.order.request["config"],
                status=status,
                started=started,
                finished=now,
                seconds=(now - started).total_seconds(),
                digest=None if version is None else version.digest,
                name=job.order.name if version is None else version.name,
                message=message,
                cost=None if made is None else made["cost"],
            )
            if version is not None and made is not None and made["score"] is not None:
                record_score(hub, version, made["score"])
        except Exception as error:  # the queue must go on
            published = "" if version is None else f"published as {version.ref}, but "
            _log.error("composition %s is %snot in the ledger", job.id, published, exc_info=error)

    def _end(self, job: Job, state: State, **facts: Any) -> None:
        """The job is over; of its key's, the oldest that are beyond the bound are forgotten."""
        job.end(state, **facts)
        own = [each.id for each in self._jobs.values() if each.is_over and each.caller.key_id == job.caller.key_id]
        for old in own[: -self._limits.kept_per_key]:
            del self._jobs[old]

    def _clouds(self) -> bool:
        """Whether the hub's blobs are elsewhere, so that the process needs the names and keys by which this one reaches them."""
        hub = self._service.hub
        return hub is not None and hub.urls[1] is not None


def _sees(caller: Caller, job: Job) -> bool:
    return caller.key_id == job.caller.key_id or (caller.may("admin") and caller.adapters is None)
