"""Look at runs: find one by number or name, read how far it is, and set several side by side.

The hub's record says what was asked for, what came of it and what it cost; a run that is still going says its losses in its folder's log.

Used by runs.py and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atoll.config_section import by_dotted_key
from atoll.errors import HubError
from atoll.train.cost import Cost
from atoll.train.log import read_log
from atoll.workflows.start import is_held
from atoll.yaml_file import nearest

if TYPE_CHECKING:
    from pathlib import Path

    from atoll.hub.ledger import Run
    from atoll.hub.store import Hub

LOSSES = ("step", "total_steps", "train_loss", "best_loss", "best_step", "stopped_early")
COSTS = ("tokens", "seconds", "cpu_seconds", "peak_memory_bytes", "energy_joules", "price", "currency")


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side: by key, a value for each run in their order, None where a run has none.

    settings: those of their configs that differ. scores: by "task metric", of the adapters that they made.
    """

    runs: tuple[Run, ...]
    settings: Mapping[str, tuple[Any, ...]]
    losses: Mapping[str, tuple[Any, ...]]
    scores: Mapping[str, tuple[float | None, ...]]
    cost: Mapping[str, tuple[Any, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        about = [{"id": run.id, "name": run.name, "kind": run.kind, "status": run.status, "digest": run.digest} for run in self.runs]
        parts = {name: {key: list(values) for key, values in getattr(self, name).items()} for name in ("settings", "losses", "scores", "cost")}
        return {"runs": about, **parts}


def as_it_is(hub: Hub, run: Run) -> Run:
    """The run, interrupted where it counts as running but no process holds its folder: it was killed, or its machine went down.

    Of a folder that is not here nothing can be told.
    """
    if not _seems_dead(run):
        return run
    again = next(iter(hub.runs(run_id=run.id)), run)  # a process closes its record before it lets go of its folder
    return ended_unseen(again) if again.status == "running" else again


def _seems_dead(run: Run) -> bool:
    from pathlib import Path

    return run.status == "running" and run.folder is not None and Path(run.folder).is_dir() and not is_held(Path(run.folder))


def ended_unseen(run: Run) -> Run:
    """A run that counts as running, as one whose process died: interrupted, with the steps and losses of its log."""
    return replace(run, status="interrupted", message="ended without a word", progress=losses_of(run) or None)


def find_run(hub: Hub, text: str) -> Run:
    """The run of a number, or the newest of a name. Raises HubError with the nearest name."""
    by_number = hub.runs(run_id=int(text)) if text.isdecimal() else ()
    found = by_number or hub.runs(name=text)
    if not found:
        names = {run.name for run in hub.runs() if run.name}
        guess = nearest(text, names)
        raise HubError(f"there is no run {text!r} in the hub", hint=f"did you mean {guess}?" if guess else "`atoll runs list` shows what is there")
    return as_it_is(hub, found[0])


def folder_of(run: Run) -> Path:
    """Where a run's log and checkpoints are. Raises HubError where that is not recorded, or not on this machine."""
    from pathlib import Path

    if run.folder is None:
        raise HubError(f"run {run.id} has no folder on record: it was made before folders were recorded, or elsewhere", hint="look below runs/")
    if not Path(run.folder).is_dir():
        raise HubError(f"the folder of run {run.id} is not there: {run.folder}", hint="it was on another machine, or has been moved or deleted")
    return Path(run.folder)


def losses_of(run: Run) -> dict[str, Any]:
    """Steps and losses: of the record, or for one that is not over, of its log. Keys of LOSSES; {} where nothing is known."""
    if run.progress is not None:
        return {key: run.progress.get(key) for key in LOSSES}
    if run.folder is None or run.status != "running":  # a later run may stand in the same folder
        return {}
    from pathlib import Path

    lines = read_log(Path(run.folder))
    losses, measured = [line for line in lines if "loss" in line], [line for line in lines if "validation_loss" in line]
    if not losses:
        return {}
    best = min(measured, key=lambda line: float(line["validation_loss"]), default={})
    known = {"step": losses[-1]["step"], "train_loss": losses[-1]["loss"], "best_loss": best.get("validation_loss"), "best_step": best.get("step")}
    return {key: known.get(key) for key in LOSSES}


def cost_of(run: Run) -> Cost | None:
    """What a run has cost, or None where that is not recorded."""
    return Cost.from_json(run.cost) if run.cost is not None else None


def compare_runs(hub: Hub, runs: Sequence[Run]) -> Comparison:
    """Settings that differ, losses, scores and costs of some runs, side by side."""
    configs = [dict(by_dotted_key(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    settings = {key: tuple(config.get(key) for config in configs) for key in keys}
    # the newest score of a task is the last to be put in
    scores = [{f"{s.task} {s.metric}": s.value for s in reversed(hub.scores(run.digest))} if run.digest else {} for run in runs]
    losses, costs = [losses_of(run) for run in runs], [run.cost or {} for run in runs]
    return Comparison(
        tuple(runs),
        {key: values for key, values in settings.items() if any(value != values[0] for value in values)},
        _side_by_side(LOSSES, losses),
        _side_by_side(sorted({key for each in scores for key in each}), scores),
        _side_by_side(COSTS, costs),
    )


def _side_by_side(keys: Sequence[str], values: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Those of the keys for which anybody has a value."""
    table = {key: tuple(each.get(key) for each in values) for key in keys}
    return {key: row for key, row in table.items() if any(value is not None for value in row)}
