"""Scores and runs: what was measured of an adapter, and how it came to be.

Rows are only added (a run is completed once), keyed by digest, so that a score says what it measured even after names have moved.

Hub is a Ledger; eval records scores, workflows records runs, the leaderboard and the card read both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from atoll.errors import HubError
from atoll.hub.database import Database
from atoll.hub.records import RunRow, ScoreRow

RUN_KINDS = ("train", "compose")
RUN_STATUSES = ("running", "finished", "failed", "interrupted")


@dataclass(frozen=True)
class Score:
    """One adapter (or base) on one task. failures are rows without a usable answer, already counted as wrong in value."""

    digest: str
    task: str
    task_version: str
    metric: str
    value: float
    stderr: float | None
    n: int
    failures: int
    options_value: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    created: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "details": dict(self.details), "created": self.created.isoformat() if self.created else None}


@dataclass(frozen=True)
class Run:
    """One training or composing. seconds is working time over all resumptions; digest is None until something was made.

    cost: train.cost.Cost as JSON; progress: steps and losses of a training; folder: where its files are on the machine that ran it.
    """

    id: int
    kind: str
    name: str | None
    digest: str | None
    status: str
    config: Mapping[str, Any]
    started: datetime
    finished: datetime | None
    seconds: float | None
    message: str
    cost: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    folder: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values. The folder is left out: it belongs to one machine."""
        finished = self.finished.isoformat() if self.finished else None
        values = {**asdict(self), "config": dict(self.config), "started": self.started.isoformat(), "finished": finished}
        del values["folder"]
        return values


class Ledger:
    """The score and run tables of one hub."""

    _database: Database

    def record_score(
        self,
        digest: str,
        task: str,
        task_version: str,
        metric: str,
        value: float,
        *,
        stderr: float | None = None,
        n: int,
        failures: int = 0,
        options_value: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Score:
        """Add a score. HubError if a figure is not finite or the counts contradict each other: a bad score is worse than none."""
        for name, figure in (("value", value), ("stderr", stderr), ("options_value", options_value)):
            if figure is not None and not math.isfinite(figure):
                raise HubError(f"score of {digest[:12]} on {task}: {name} is {figure}", hint="record a finite number, or None where there is none")
        if n < 1 or not 0 <= failures <= n:
            raise HubError(
                f"score of {digest[:12]} on {task}: {failures} failures of {n} rows", hint="n counts all rows, failures those without an answer"
            )
        facts = plain_json(details or {}, f"details of the score of {digest[:12]} on {task}")
        with self._database.write() as session:
            row = ScoreRow(
                digest=digest,
                task=task,
                task_version=task_version,
                metric=metric,
                value=float(value),
                stderr=stderr,
                n=n,
                failures=failures,
                options_value=options_value,
                details=facts,
                created_at=datetime.now(UTC),
            )
            session.add(row)
            session.flush()
            return _score(row)

    def scores(
        self, digest: str | None = None, *, task: str | None = None, task_version: str | None = None, history: bool = False
    ) -> tuple[Score, ...]:
        """Scores of a digest, of a task, or both, newest first: the newest of each (digest, task, task_version, metric), or all with `history`."""
        query = select(ScoreRow).order_by(ScoreRow.id.desc())
        for column, wanted in ((ScoreRow.digest, digest), (ScoreRow.task, task), (ScoreRow.task_version, task_version)):
            if wanted is not None:
                query = query.where(column == wanted)
        if not history:
            newest = select(func.max(ScoreRow.id)).group_by(ScoreRow.digest, ScoreRow.task, ScoreRow.task_version, ScoreRow.metric)
            query = query.where(ScoreRow.id.in_(newest))
        with self._database.read() as session:
            return tuple(_score(row) for row in session.scalars(query))

    def record_run(
        self,
        kind: str,
        config: Mapping[str, Any],
        *,
        status: str,
        started: datetime,
        finished: datetime | None = None,
        seconds: float | None = None,
        digest: str | None = None,
        name: str | None = None,
        message: str = "",
        cost: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
        folder: str | None = None,
        run_id: int | None = None,
    ) -> Run:
        """Add a run, or with `run_id` replace the record of one that was running."""
        if kind not in RUN_KINDS or status not in RUN_STATUSES:
            known = f"kinds {', '.join(RUN_KINDS)}; statuses {', '.join(RUN_STATUSES)}"
            raise HubError(f"a run of kind {kind!r} with status {status!r} cannot be recorded; known are {known}", hint="use one of those")
        facts = plain_json(config, f"config of the {kind} run")
        spent, reached = (None if each is None else plain_json(each, f"record of the {kind} run") for each in (cost, progress))
        with self._database.write() as session:
            row = RunRow() if run_id is None else session.get(RunRow, run_id)
            if row is None or (run_id is not None and row.status == "finished"):
                raise HubError(f"run {run_id} " + ("does not exist" if row is None else "is finished"), hint="record a new run by leaving run_id out")
            row.kind, row.name, row.digest, row.status, row.config = kind, name, digest, status, facts
            row.started_at, row.finished_at, row.seconds, row.message = started, finished, seconds, message
            row.cost, row.progress, row.folder = spent, reached, folder
            session.add(row)
            session.flush()
            return _run(row)

    def runs(
        self, *, digest: str | None = None, name: str | None = None, kind: str | None = None, status: str | None = None, run_id: int | None = None
    ) -> tuple[Run, ...]:
        """Runs, newest first, of a digest, a name, a kind, a status, or the one of an id."""
        query = select(RunRow).order_by(RunRow.id.desc())
        for column, wanted in ((RunRow.digest, digest), (RunRow.name, name), (RunRow.kind, kind), (RunRow.status, status), (RunRow.id, run_id)):
            if wanted is not None:
                query = query.where(column == wanted)
        with self._database.read() as session:
            return tuple(_run(row) for row in session.scalars(query))


def plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`value` as JSON objects only; HubError if it holds NaN or something JSON has no form for."""
    try:
        return dict(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise HubError(f"{what} cannot be stored as JSON: {error}", hint="use numbers, strings, lists and objects; None instead of NaN") from error


def _score(row: ScoreRow) -> Score:
    facts = (row.digest, row.task, row.task_version, row.metric, row.value, row.stderr, row.n, row.failures, row.options_value)
    return Score(*facts, details=row.details, created=row.created_at)


def _run(row: RunRow) -> Run:
    facts = (row.id, row.kind, row.name, row.digest, row.status, row.config, row.started_at, row.finished_at, row.seconds, row.message)
    return Run(*facts, cost=row.cost, progress=row.progress, folder=row.folder)
