"""One composition from its asking on: what was asked, how far it is, and what may be told of it to whom.

Used by compose_jobs.py, which moves jobs from state to state, and by the routes, which show them.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from atoll.http.errors import own_body

if TYPE_CHECKING:
    from atoll.server.processes import Child
    from atoll.serving.keys import Caller

State = Literal["queued", "running", "finished", "failed", "cancelled"]
MAX_STAGE_CHARS = 200


@dataclass(frozen=True)
class Order:
    """What is asked of a composition. request: for the process, as JSON. tags, message: of the version that is published."""

    name: str
    request: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    message: str = ""


@dataclass(eq=False)
class Job:
    """One composition from its asking on. seconds counts from its start; result and error are JSON, at most one of them is there."""

    id: str
    order: Order
    caller: Caller
    folder: tempfile.TemporaryDirectory[str]
    state: State = "queued"
    stage: str = ""
    done: int = 0
    total: int = 0
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    child: Child | None = None
    cancel_asked: bool = False
    recorded: bool = False  # in the hub's ledger, or about to be
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set at the next change, which brings a new one
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def told(self, stage: str, done: int, total: int) -> None:
        """The process says how far it is."""
        self.stage, self.done, self.total = stage[:MAX_STAGE_CHARS], done, total
        self._change()

    def begin(self) -> None:
        self.state, self.started, self.stage = "running", time.time(), "starting"
        self._change()

    def end(self, state: State, *, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> None:
        """The last change; its rows and files go. A job that is over stays as it is."""
        if self.is_over:
            return
        self.state, self.result, self.error, self.ended, self.child = state, result, error, time.time(), None
        self.folder.cleanup()
        self.over.set()
        self._change()

    def to_json(self, caller: Caller, *, with_report: bool = True) -> dict[str, Any]:
        """What the caller may know. Weights, and a report that speaks of adapters which the caller may not use (any more), are left out."""
        result = self.result
        if result is not None:
            allowed = [weight for weight in result["weights"] if caller.allows(str(weight["name"]).partition("@")[0])]
            report = result["report"] if with_report and len(allowed) == len(result["weights"]) else None
            result = {**result, "weights": allowed, "report": report}
        end = self.ended or time.time()
        return {
            "id": self.id,
            "name": self.order.name,
            "state": self.state,
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "created": self.created,
            "started": self.started,
            "seconds": 0.0 if self.started is None else round(end - self.started, 3),
            "result": result,
            "error": self.error,
        }

    def _change(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def failure(code: str, message: str, hint: str = "") -> dict[str, Any]:
    """The error of a job, in the shape of our routes' errors."""
    found: dict[str, Any] = own_body(code, message, hint)["error"]
    return found
