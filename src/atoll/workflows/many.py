"""Train many plans over shared bases at once: each is written, published and recorded the moment it ends, and fails alone.

Used by landing.py and, for several files, by the command line.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import TrainConfig
from atoll.errors import AtollError, ConfigError, Interrupted, StorageError
from atoll.hub.names import check_name
from atoll.workflows.bases import Bases
from atoll.workflows.cancelling import announce, is_cancelled, withdraw
from atoll.workflows.runs import recorded_run
from atoll.workflows.start import Progress, about, locked, open_hub, silent
from atoll.workflows.training import TrainOutcome, finished, keep, make_plan, plan_name, reached

if TYPE_CHECKING:
    from atoll.hub.store import Hub
    from atoll.train.job import TrainingJob, TrainResult
    from atoll.train.loop import JobStatus
    from atoll.train.plan import TrainingPlan

_ENDS_ALL = (StorageError,)  # what no other job can be spared from


@dataclass(frozen=True)
class JobLine:
    """One job as a table shows it. state: "waiting", "training", "done", "found" (it had been trained before), "cancelled" or "failed".

    headline: its losses, or why it failed. seconds_left is None where that is not known.
    """

    name: str
    state: str
    headline: str = ""
    step: int = 0
    total_steps: int = 0
    tokens_per_s: float = 0.0
    seconds_left: float | None = None


Table = Callable[[Sequence[JobLine]], None]


def train_many(
    configs: Sequence[tuple[TrainConfig, Path | None]],
    *,
    out: Path | None = None,
    hub: Hub | None = None,
    publish: bool = True,
    at_once: int | None = None,
    named: Sequence[str] | None = None,
    progress: Progress = silent,
    table: Table | None = None,
) -> list[TrainOutcome | AtollError]:
    """Train the adapters of several configs over one base, at once, each into its folder below `out` (default: runs), named after it.

    configs: (config, the folder that its relative paths start at); named: what each is called in errors (its file). A job that fails is an error in
    the list; the others go on. Raises ConfigError where two configs have one name, and what loading raises: all is checked before the first step.
    """
    bases = Bases(progress)
    plans = []
    for place, (config, root) in enumerate(configs):
        called = named[place] if named is not None else f"training {place + 1} of {len(configs)}"
        with about(called, also="nothing was trained: all files are checked before the first step"):
            plans.append(make_plan(config, root=root, base=bases.of(config), progress=progress))
        name = check_name(plan_name(plans[-1]))
        if name.casefold() in (plan_name(other).casefold() for other in plans[:-1]):
            raise ConfigError(f"two of the files train an adapter named {name!r}", hint="give one of them another name")
    folders = [(out or Path("runs")) / plan_name(plan) for plan in plans]
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(locked(folder))
        work = list(zip(folders, plans, strict=True))
        return run_plans_in(work, hub or open_hub() if publish else None, at_once=at_once, progress=progress, table=table)


def run_plans_in(
    work: Sequence[tuple[Path, TrainingPlan]],
    hub: Hub | None,
    *,
    at_once: int | None = None,
    progress: Progress = silent,
    table: Table | None = None,
) -> list[TrainOutcome | AtollError]:
    """Carry out plans, each in its folder, those of one base together; in the order of `work`, each one's outcome or the error that ended it.

    Finished runs of the same jobs are found and kept. table is told of each job; without one, progress hears of all as one stage. Raises
    Interrupted and StorageError.
    """
    from atoll.train.loop import JOBS_AT_ONCE, train_jobs

    jobs = _Jobs(work, hub, progress, table)
    for group in jobs.groups():
        try:
            train_jobs(
                [jobs.maker(index) for index in group],
                functools.partial(jobs.ended, group),
                at_once=at_once or JOBS_AT_ONCE,
                report=functools.partial(jobs.stepped, group),
                cancelled=functools.partial(jobs.cancelled, group),
            )
        except BaseException as error:
            jobs.abandon(error)
            raise
    return jobs.outcomes()


class _Jobs:
    """The jobs of one call: what has become of each, and the hub's open records of those that run."""

    def __init__(self, work: Sequence[tuple[Path, TrainingPlan]], hub: Hub | None, progress: Progress, table: Table | None) -> None:
        from atoll.train.entering import Room

        self._work, self._hub, self._progress, self._table = work, hub, progress, table
        self._room = Room()
        self._found: dict[int, TrainOutcome | AtollError] = {}
        self._records: dict[int, tuple[ExitStack, dict[str, Any]]] = {}
        self._running: dict[int, TrainingJob] = {}
        self._lines = [JobLine(plan_name(plan), "waiting", total_steps=plan.total_steps) for _, plan in work]
        for index, (folder, plan) in enumerate(work):
            try:
                done = finished(folder, plan, hub)
            except _ENDS_ALL:
                raise
            except AtollError as error:
                self._end(index, error)
                continue
            if done is not None:
                self._end(index, done)
                continue
            announce(folder, plan_name(plan))

    def groups(self) -> list[list[int]]:
        """What is left to train, by base."""
        groups: dict[int, list[int]] = {}
        for index, (_, plan) in enumerate(self._work):
            if index not in self._found:
                groups.setdefault(id(plan.base), []).append(index)
        return list(groups.values())

    def maker(self, index: int) -> Callable[[], TrainingJob]:
        """What makes the job when its turn comes; from then on the hub says that it runs."""
        from atoll.train.plan import training_job

        folder, plan = self._work[index]

        def make() -> TrainingJob:
            if is_cancelled(folder):
                raise Interrupted("cancelled before its first step", hint="run the same command again to train it")
            stack = ExitStack()
            run = recorded_run(self._hub, "train", plan_name(plan), plan.config.model_dump(mode="json"), folder)
            self._records[index] = stack, stack.enter_context(run)
            self._running[index] = training_job(plan, folder, room=self._room)
            return self._running[index]

        return make

    def cancelled(self, group: Sequence[int], place: int) -> bool:
        """Whether somebody has asked for the end of a job."""
        return is_cancelled(self._work[group[place]][0])

    def ended(self, group: Sequence[int], place: int, outcome: TrainResult | Exception) -> None:
        """Keep and publish a result, or keep the error; either way the hub's record of the run is closed."""
        from atoll.train.plan import with_manifest

        index = group[place]
        folder, plan = self._work[index]
        stack, record = self._close(index)
        try:
            with stack:
                if isinstance(outcome, Exception):
                    raise outcome
                self._end(index, keep(folder, plan, with_manifest(plan, outcome), self._hub, record))
        except _ENDS_ALL:
            raise
        except AtollError as error:
            self._end(index, error)

    def stepped(self, group: Sequence[int], statuses: Sequence[JobStatus]) -> None:
        """Tell how far all are, after a round."""
        for status in statuses:
            index = group[status.index]
            name = self._lines[index].name
            self._lines[index] = JobLine(name, "training", status.headline, status.step, status.total_steps, status.tokens_per_s, status.seconds_left)
        self._show()

    def abandon(self, error: BaseException) -> None:
        """Close the hub's records of the jobs that were running when everything ended: they were interrupted, whatever became of another."""
        for index, (folder, _) in enumerate(self._work):
            if index not in self._found:
                withdraw(folder)
        for stack, _ in [self._close(index) for index in list(self._records)]:
            with contextlib.suppress(AtollError), stack:
                raise Interrupted(str(error) if isinstance(error, Interrupted) else f"stopped because everything did: {error}")

    def _close(self, index: int) -> tuple[ExitStack, dict[str, Any]]:
        """A job's open record, with how far it got; an empty one where the hub could not even write that it runs."""
        stack, record = self._records.pop(index, (ExitStack(), {}))
        job = self._running.pop(index, None)
        if job is not None:
            record.update(reached(self._work[index][1], job))
        return stack, record

    def outcomes(self) -> list[TrainOutcome | AtollError]:
        return [self._found[index] for index in range(len(self._work))]

    def _end(self, index: int, outcome: TrainOutcome | AtollError) -> None:
        self._found[index] = outcome
        withdraw(self._work[index][0])
        line = self._lines[index]
        if isinstance(outcome, AtollError):
            state = "cancelled" if isinstance(outcome, Interrupted) else "failed"
            self._lines[index] = JobLine(line.name, state, outcome.message, line.step, line.total_steps)
        else:
            headline = line.headline or f"loss {outcome.training['train_loss']:.3f}"
            self._lines[index] = JobLine(line.name, "found" if outcome.reused else "done", headline, line.total_steps, line.total_steps)
        self._show()

    def _show(self) -> None:
        if self._table is not None:
            self._table(tuple(self._lines))
            return
        training = [line for line in self._lines if line.state == "training"]
        ended = len(self._lines) - len(training) - sum(line.state == "waiting" for line in self._lines)
        losses = ", ".join(f"{line.name} {line.headline.partition(',')[0].removeprefix('loss ')}" for line in training[:4])
        more = f" and {len(training) - 4} more" if len(training) > 4 else ""
        self._progress(
            f"train {len(self._lines)} adapters: {ended} ended" + (f", loss of {losses}{more}" if training else ""),
            sum(line.step for line in self._lines),
            sum(line.total_steps for line in self._lines),
        )
