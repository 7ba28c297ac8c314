"""A land: train every task of a file over one base, publish, measure, write the leaderboard.

Used by the command line and the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atoll.config import LandConfig
from atoll.data.task import load_task
from atoll.errors import AtollError, Busy, ConfigError, Interrupted, StorageError
from atoll.eval.arena import Arena, note_of
from atoll.eval.leaderboard import RowNote
from atoll.eval.score import Score
from atoll.hub.names import check_name
from atoll.workflows.bases import Bases
from atoll.workflows.many import Table, run_plans_in
from atoll.workflows.measuring import LandOutcome, write_board
from atoll.workflows.start import Progress, locked, open_hub, prefixed, require, silent
from atoll.workflows.training import make_plan, plan_name

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub

_ENDS_A_LAND = (Interrupted, StorageError, Busy)  # what no other task can be spared from


def land(
    config: LandConfig,
    out: Path,
    *,
    root: Path | None = None,
    hub: Hub | None = None,
    at_once: int | None = None,
    progress: Progress = silent,
    table: Table | None = None,
) -> LandOutcome:
    """Train every task of the file over one base, publish, evaluate base and adapters through the engine, write the leaderboard to `out`.

    All data is read before the first step, so a bad file stops the land at once. Tasks train together, at most `at_once` (see
    train.loop); table is told of each. A task that fails later is reported in `failures`; the others go on.
    Run again, it redoes only what is missing or whose inputs changed. Raises Busy if another land works in `out`, Interrupted on Ctrl-C.
    """
    require("scipy", "rouge_score")
    hub = hub or open_hub()
    with locked(out):
        jobs = config.jobs()
        data = {job.name: load_task(job.require_data(), name=job.name, root=root) for job in jobs}
        bases = Bases(progress)
        plans = [make_plan(job, base=bases.of(job), data=data[job.name]) for job in jobs]
        for plan in plans:
            check_name(plan_name(plan))
            if plan.masking is not None:
                raise ConfigError(
                    f"task {plan_name(plan)!r} has trainer.mlm_probability: it learns texts, and a land measures answers", hint="use atoll train"
                )
        folders = [out / "tasks" / plan_name(plan) / plan.digest[:12] for plan in plans]
        trained = run_plans_in(list(zip(folders, plans, strict=True)), hub, at_once=at_once, progress=progress, table=table)
        versions: dict[str, Version] = {}
        failures: dict[str, AtollError] = {}
        for plan, outcome in zip(plans, trained, strict=True):
            if isinstance(outcome, AtollError):
                failures[plan_name(plan)] = outcome
            else:
                assert outcome.version is not None
                versions[plan_name(plan)] = outcome.version
        arenas = {id(base): Arena(base, hub, config.eval, out / "scores") for base in bases.loaded.values()}
        scores: list[Score] = []
        notes: dict[str, RowNote] = {}
        for number, plan in enumerate(plans, 1):
            name, stage = plan_name(plan), prefixed(progress, f"[{number}/{len(plans)}]")
            if name in failures:
                continue
            try:
                measured = arenas[id(plan.base)].measure(plan.data, [versions[name]], plan.config.generation, stage)
                notes[plan.data.task.name] = note_of(plan.data, measured, config.eval, [versions[name]], hub)
                scores += measured
            except KeyboardInterrupt:
                raise Interrupted(f"stopped while task {name!r} was measured", hint="run the same command again to go on from there") from None
            except _ENDS_A_LAND:
                raise
            except AtollError as error:
                failures[name] = error
        warnings = [*(warning for plan in plans for warning in plan.warnings), *(warning for arena in arenas.values() for warning in arena.warnings)]
        return write_board(next(iter(bases.loaded.values())), scores, notes, out, failures, warnings)
