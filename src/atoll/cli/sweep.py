"""What `atoll train` does with a file that has a sweep: train all of it and show the table, or with --dry-run show the grid.

Used by train.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atoll.cli.classify import trial_of
from atoll.cli.job_table import job_table
from atoll.cli.leaderboard import cost_text
from atoll.cli.options import stopped
from atoll.cli.output import Column, duration, messages, say, size, warn, write, write_json, write_table
from atoll.cli.progress import progress_bar

if TYPE_CHECKING:
    from atoll.config_sweep import LoadedSweep
    from atoll.train.plan import TrainingPlan
    from atoll.workflows.sweeping import SweepOutcome


def run_sweep(loaded: LoadedSweep, out: Path | None, publish: bool, at_once: int | None, as_json: bool) -> None:
    """Train every point; exit code 1 if one of them failed."""
    from atoll.workflows import sweep

    try:
        console = messages()
        with progress_bar(console) as progress, job_table(console) as table:
            outcome = sweep(loaded, out=out, publish=publish, at_once=at_once, progress=progress, table=table)
    except KeyboardInterrupt:
        raise stopped() from None
    for warning in outcome.warnings:
        warn(warning)
    write_json(outcome.to_json()) if as_json else _show(outcome)
    for line in outcome.lines:
        if line.error is not None:
            warn(f"{line.name} {'was cancelled' if line.cancelled else 'failed'}: {line.error}")
    if any(line.error is not None for line in outcome.lines):
        raise typer.Exit(1)


def _show(outcome: SweepOutcome) -> None:
    from atoll.train.cost import Cost

    columns = [Column("training", spare=2), *(Column(key, right=True) for key in outcome.keys)]
    columns += [Column("steps", right=True, spare=3), Column("loss", right=True), Column("validation", right=True)]
    columns += [Column("score", right=True), Column("cost", right=True, spare=1), Column("", spare=4)]
    rows = []
    for line in outcome.lines:
        mark = (
            "cancelled" if line.cancelled else "failed" if line.error else "best" if line.name == outcome.best else "found" if line.reused else None
        )
        cost = cost_text(Cost.from_json(line.cost)) if line.cost else None
        figures = (line.steps, *map(_figure, (line.train_loss, line.best_loss, line.score)), cost, mark)
        rows.append([line.name, *(value_text(line.values.get(key)) for key in outcome.keys), *figures])
    used = [place for place in range(len(columns)) if columns[place].name != "score" or outcome.best_by == "metric"]
    write_table([columns[place] for place in used], [[row[place] for place in used] for row in rows])
    if outcome.best is not None:
        say(f"best by {outcome.best_by.replace('_', ' ')}: {outcome.best}")
    if outcome.version is not None:
        say("; ".join(part for part in (f"published as {outcome.version.ref}", trial_of(outcome.version)) if part))
    say(f"written: {outcome.path}")


def show_grid(loaded: LoadedSweep, at_once: int | None, as_json: bool) -> None:
    """Plan every point, measure the first, and print what would be trained. Raises what loading raises."""
    from atoll.train.loop import JOBS_AT_ONCE
    from atoll.train.plan import estimate_cost
    from atoll.workflows.sweeping import plan_sweep, why_incomparable

    with progress_bar() as progress:
        plans = plan_sweep(loaded, progress=progress)
        progress("measuring one forward and backward pass", 0, 1)
        first = estimate_cost(plans[0])
    tokens = [_tokens(plan) for plan in plans]
    seconds = sum(first.seconds * each / tokens[0] for each in tokens)
    doubt = why_incomparable(plans, loaded.best_by)
    warnings = [*loaded.warnings, *([doubt] if doubt else [])]
    if as_json:
        facts = [
            {"name": point.name, "values": dict(point.values), "job": plan.digest, "steps": plan.total_steps, "parameters": plan.num_parameters}
            for point, plan in zip(loaded.points, plans, strict=True)
        ]
        estimate = {"seconds": round(seconds, 1), "memory_bytes": first.memory_bytes, "tokens_per_s": round(first.tokens_per_s, 1)}
        about = {"name": loaded.name, "keys": list(loaded.keys), "best_by": loaded.best_by, "trainings": facts}
        write_json({**about, "estimate": estimate, "warnings": warnings})
        return
    columns = [Column("training"), *(Column(key, right=True) for key in loaded.keys), Column("steps", right=True), Column("parameters", right=True)]
    rows = [
        [point.name, *(value_text(point.values.get(key)) for key in loaded.keys), plan.total_steps, f"{plan.num_parameters:,}"]
        for point, plan in zip(loaded.points, plans, strict=True)
    ]
    write_table(columns, rows)
    together = min(at_once or JOBS_AT_ONCE, len(plans))
    chosen = "" if doubt else f"; best by {loaded.best_by.replace('_', ' ')}, which is published as {loaded.name}"
    write(f"\n{len(plans)} trainings, {together} at once{chosen}")
    write(f"time    about {duration(seconds)} in all, one after another (measured on the first: {first.tokens_per_s:,.0f} tokens/s)")
    write(f"memory  about {size(first.memory_bytes)} for one of them alone")
    for warning in warnings:
        warn(warning)


def _tokens(plan: TrainingPlan) -> float:
    """About how many tokens a training goes through."""
    lengths = [len(row.token_ids) for row in plan.train.rows]
    return plan.total_steps * plan.config.trainer.batch_size * sum(lengths) / len(lengths)


def value_text(value: Any) -> str:
    """A swept value in a cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return "null" if value is None else " ".join(map(value_text, value)) if isinstance(value, list | tuple) else str(value)


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
