"""What `atoll compose --dry-run` prints: adapters that would be composed, examples as the model will see them, and how long it would take.

Nothing is searched and no folder or hub is touched.

Used by compose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.cli.dry_run import NUM_PROMPTS, preview_of, write_preview
from atoll.cli.output import duration, warn, write, write_json
from atoll.cli.progress import progress_bar

if TYPE_CHECKING:
    from atoll.config_compose import ComposeConfig
    from atoll.config_file import LoadedConfig
    from atoll.workflows.compose_estimate import Estimate
    from atoll.workflows.compose_plan import ComposePlan


def show_plan(loaded: LoadedConfig[ComposeConfig], as_json: bool) -> None:
    """Plan the composition, measure an evaluation, print both; as JSON one object. Raises what planning raises."""
    from atoll.workflows.compose_estimate import estimate
    from atoll.workflows.compose_plan import plan_composition
    from atoll.workflows.start import open_hub

    with progress_bar() as progress:
        plan = plan_composition(loaded.config, open_hub(), root=loaded.root, progress=progress)
        progress("measuring one evaluation", 0, 1)
        found = estimate(plan)
    if as_json:
        write_json(_as_json(plan, found))
        return
    settings, rows = plan.config.compose, plan.draws[0].few.rows
    names = [version.ref for version in plan.versions]
    write(f"# {plan.name}, over {plan.base.title}")
    write(f"adapters   {len(names)}, of which the best {min(settings.top_k, len(names))} are searched over by {settings.method}: {', '.join(names)}")
    write(f"examples   {len(rows)} of {len(plan.data.train)}{_drawn(plan)}")
    write(f"test rows  {len(plan.data.test):,}" + (f" ({plan.data.task.metric})" if plan.data.test else ": compared by held-out loss alone"))
    write(f"\n# {len(rows[:NUM_PROMPTS])} of {len(rows)} examples; what the loss is of stands in ⟦ ⟧")
    for row in rows[:NUM_PROMPTS]:
        write(f"--- {row.where}: {row.num_labels} of {len(row.token_ids)} tokens")
        write_preview(preview_of(row, plan.base.tokenizer))
    write(f"\n# what it takes (an evaluation of {len(rows)} examples was measured just now: {found.evaluation_s:.3g} s)")
    width = max(map(len, found.seconds))
    for part, seconds in found.seconds.items():
        write(f"{part:{width}}  about {duration(seconds)}")
    if found.answers:
        write(f"{'test rows':{width}}  {found.answers:,} answers of at most {plan.max_new_tokens} tokens beside it")
    for warning in (*loaded.warnings, *plan.warnings):
        warn(warning)


def _drawn(plan: ComposePlan) -> str:
    """How the seeds came about."""
    if len(plan.draws) == 1:
        return f" ({plan.seeds_note})" if plan.seeds_note else ""
    chosen = f"{len(plan.dev)} rows that none has" if plan.dev else "rows that each leaves out" if plan.draws[0].left_out else "its search"
    return f", {len(plan.draws)} seeds, of which one is kept by {chosen}"


def _as_json(plan: ComposePlan, found: Estimate) -> dict[str, Any]:
    rows = plan.draws[0].few.rows
    return {
        "config": plan.config.model_dump(mode="json"),
        "job": plan.digest,
        "base": plan.base.title,
        "adapters": [version.ref for version in plan.versions],
        "examples": len(rows),
        "seeds": [draw.seed for draw in plan.draws],
        "test_rows": len(plan.data.test),
        "prompts": [
            {"where": row.where, "segments": [{"text": text, "learned": learned} for text, learned in preview_of(row, plan.base.tokenizer)]}
            for row in rows[:NUM_PROMPTS]
        ],
        "estimate": {"seconds": {part: round(seconds, 2) for part, seconds in found.seconds.items()}, "answers": found.answers},
        "warnings": list(plan.warnings),
    }
