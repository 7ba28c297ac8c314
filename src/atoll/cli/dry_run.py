"""What `atoll train --dry-run` prints: the configuration as it was understood, prompts as the model will see them, counts, and what it would cost.

Nothing is trained and no folder or hub is touched; only a base that is not on this disk yet is fetched, since its tokenizer does the counting.

Used by train, and compose_dry_run.py for previews.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from atoll.cli.output import Column, clean, duration, size, to_terminal, warn, write, write_json, write_table
from atoll.cli.progress import progress_bar

if TYPE_CHECKING:
    from atoll.config import TrainConfig
    from atoll.config_file import LoadedConfig
    from atoll.data.encode import Encoded, EncodedRow
    from atoll.model.adapter import AdapterSpec
    from atoll.train.plan import CostEstimate, TrainingPlan

NUM_PROMPTS = 2
LONGEST_SHOWN = 1500  # characters of a prompt; of a longer one the beginning and the end
NUM_CUT_SHOWN = 5


def show_plans(every: Sequence[LoadedConfig[TrainConfig]], as_json: bool) -> None:
    """Plan each job, measure its cost, print both; as JSON one object, or a list where there are several files. Raises what loading raises."""
    from atoll.workflows.start import about

    plans = []
    for loaded in every:
        with about(loaded.path.name) if len(every) > 1 else nullcontext():
            plans.append(show_plan(loaded, as_json))
    if as_json:
        write_json(plans[0] if len(every) == 1 else plans)


def show_plan(loaded: LoadedConfig[TrainConfig], as_json: bool) -> dict[str, Any] | None:
    """Plan one job and print it as text, or return it as JSON."""
    from atoll.train.plan import estimate_cost
    from atoll.workflows import make_plan

    with progress_bar() as progress:
        plan = make_plan(loaded.config, root=loaded.root, progress=progress)
        progress("measuring one forward and backward pass", 0, 1)
        cost = estimate_cost(plan)
    warnings = [*loaded.warnings, *plan_warnings(plan)]
    if as_json:
        return _as_json(plan, cost, warnings)
    _show_config(loaded)
    _show_prompts(plan)
    _show_counts(plan)
    _show_cost(plan, cost)
    for warning in warnings:
        warn(warning)
    return None


def plan_warnings(plan: TrainingPlan) -> list[str]:
    """What is allowed but probably not meant, and what training will refuse."""
    from atoll.train.spec import nothing_taught

    warnings = []
    if (refused := nothing_taught(plan.train.rows, plan.spec, plan.base.decoder.shape.num_layers)) is not None:
        warnings.append(f"training will be refused: {refused.message}")
    if plan.train.num_cut:
        share = plan.train.num_cut / len(plan.train.rows)
        warnings.append(f"{plan.train.num_cut} training rows ({share:.0%}) lose the beginning of their prompt at {plan.train.max_length} tokens")
    if plan.num_unedited:
        positions = plan.spec.reft[0].positions
        warnings.append(
            f"{plan.num_unedited} of {len(plan.train.rows)} training rows have no token at positions {positions}: nothing is edited in them"
        )
    if not plan.validation.rows:
        warnings.append("there are no validation rows: training cannot stop early, and keeps its last step instead of its best one")
    if not plan.data.test:
        warnings.append("there are no test rows: the adapter cannot be scored on this data")
    reached, there = plan.total_steps * plan.config.trainer.batch_size, len(plan.train.rows)
    if reached < there:
        warnings.append(f"{plan.total_steps} steps of {plan.config.trainer.batch_size} rows reach {reached} of the {there} training rows")
    return warnings


def _show_config(loaded: LoadedConfig[TrainConfig]) -> None:
    from atoll.config_file import to_yaml

    form = "" if loaded.source == "atoll" else f", translated from {loaded.source.capitalize()}'s form"
    write(f"# {loaded.path}{form}, with every default\n{to_yaml(loaded.config).rstrip()}\n")


def _show_prompts(plan: TrainingPlan) -> None:
    rows = plan.train.rows[:NUM_PROMPTS]
    write(f"# {len(rows)} of {len(plan.train.rows)} training rows; what is learned stands in ⟦ ⟧, the rest is masked")
    for row in rows:
        if plan.masking is not None:
            shown = plan.masking.hide(row, "dry run")
            write(f"--- {row.where}: {shown.num_labels} of {len(row.token_ids)} tokens hidden and learned, others in each step; for example")
            row = shown
        else:
            write(f"--- {row.where}: {row.first_label} tokens masked, {row.num_labels} learned")
        if plan.spec.reft:
            write(f"edited: {_edited_text(row, plan)}")
        write_preview(preview_of(row, plan.base.tokenizer))
    write("")


def edited_runs(row: EncodedRow, spec: AdapterSpec, tokenizer: Any) -> list[tuple[int, int, str]]:
    """(first, last, text) of each run of neighbouring prompt tokens that ReFT edits."""
    from atoll.train.spec import edited_places

    runs: list[list[int]] = []
    for place in edited_places(row, spec):
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [(run[0], run[-1], tokenizer.decode(row.token_ids[run[0] : run[-1] + 1], skip_special_tokens=False)) for run in runs]


def _edited_text(row: EncodedRow, plan: TrainingPlan) -> str:
    runs = edited_runs(row, plan.spec, plan.base.tokenizer)
    shown = (f"{first} to {last} {_without_middle(clean(text))!r}" for first, last, text in runs)
    return f"tokens {', '.join(shown)}" if runs else "no token"


def preview_of(row: EncodedRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, learned) segments of a row, long texts without their middle."""
    from atoll.data.encode import preview

    return [(_without_middle(clean(text)), learned) for text, learned in preview(row, tokenizer)]


def write_preview(segments: Sequence[tuple[str, bool]]) -> None:
    """The marks ⟦ ⟧ are always there; on a terminal the masked part is dim as well."""
    if not to_terminal():
        write("".join(f"⟦{text}⟧" if learned else text for text, learned in segments))
        return
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(*((f"⟦{text}⟧", "bold green") if learned else (text, "dim") for text, learned in segments))
    Console(file=sys.stdout, highlight=False).print(line, soft_wrap=True)


def _without_middle(text: str) -> str:
    if len(text) <= LONGEST_SHOWN:
        return text
    half = LONGEST_SHOWN // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"


COUNTS = {
    "rows": "rows",
    "rows_cut": "rows whose prompt is cut",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "label_tokens": "tokens learned",
    "p50": "tokens a row: half have at most",
    "p95": "95 % have at most",
    "p99": "99 % have at most",
    "longest": "longest row",
    "max_length": "most tokens allowed",
}


def _show_counts(plan: TrainingPlan) -> None:
    write("# rows and tokens")
    reports = [plan.train.report(), plan.validation.report()]
    rows = [[text, *(f"{report[key]:,}" for report in reports)] for key, text in COUNTS.items()]
    write_table([Column(""), Column("train", right=True), Column("validation", right=True)], rows)
    for part, encoded in (("train", plan.train), ("validation", plan.validation)):
        if encoded.cut:
            write(f"cut in {part}: {_some(encoded)}")
    write(f"test rows, for evaluation only: {len(plan.data.test):,}\n")


def _some(encoded: Encoded) -> str:
    """The first few places of rows that were cut."""
    rest = encoded.num_cut - NUM_CUT_SHOWN
    return ", ".join(encoded.cut[:NUM_CUT_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _show_cost(plan: TrainingPlan, cost: CostEstimate) -> None:
    measured = f"measured just now on {cost.measured_tokens:,} tokens of this job: {cost.tokens_per_s:,.0f} tokens/s"
    write(
        "# what it takes\n"
        f"{_base_text(plan)}"
        f"adapter               {_adapter_text(plan)}\n"
        f"trainable parameters  {plan.num_parameters:,}\n"
        f"optimizer steps       {plan.total_steps:,} of {plan.config.trainer.batch_size} rows\n"
        f"time                  about {duration(cost.seconds)} ({measured})\n"
        f"memory                about {size(cost.memory_bytes)} at its peak (computed)"
    )


def _base_text(plan: TrainingPlan) -> str:
    """How the base is rounded, and what its linears take; nothing for a base as it is."""
    rounding, decoder = plan.base.fingerprint.quantization, plan.base.decoder
    held = "as blocks" if decoder.holds_blocks else f"whole, as {plan.config.trainer.dtype}"
    return f"base                  linears rounded to {rounding}, held {held}: {size(decoder.linear_bytes)}\n" if rounding else ""


def _adapter_text(plan: TrainingPlan) -> str:
    """What is trained, and where."""
    spec, shape = plan.spec, plan.base.decoder.shape
    num_layers = shape.num_layers
    kind = "DoRA" if spec.use_dora else "LoRA"
    texts = [f"{kind} of rank {spec.rank} on {len(spec.sites(num_layers, shape.linears))} linears"] if spec.target_modules else []
    for part in spec.reft:
        blocks = len({site.layer for site in part.sites(0, num_layers)})
        sides = ", each side with its own tensors" if part.sides == 2 else ""
        texts.append(f"{part.method} of rank {part.rank} at {part.component} of {blocks} of {num_layers} blocks, positions {part.positions}{sides}")
    return " and ".join(texts)


def _as_json(plan: TrainingPlan, cost: CostEstimate, warnings: Sequence[str]) -> dict[str, Any]:
    prompts = [
        {
            "where": row.where,
            "segments": [{"text": text, "learned": learned} for text, learned in preview_of(row, plan.base.tokenizer)],
            "edited": [{"first": run[0], "last": run[1], "text": run[2]} for run in edited_runs(row, plan.spec, plan.base.tokenizer)],
        }
        for row in plan.train.rows[:NUM_PROMPTS]
    ]
    return {
        "config": plan.config.model_dump(mode="json"),
        "job": plan.digest,
        "prompts": prompts,
        "rows": {
            "train": {**plan.train.report(), "cut": list(plan.train.cut)},
            "validation": {**plan.validation.report(), "cut": list(plan.validation.cut)},
            "test": {"rows": len(plan.data.test)},
        },
        "kind": plan.spec.kind,
        "quantization": plan.base.fingerprint.quantization or None,
        "linear_bytes": plan.base.decoder.linear_bytes,
        "trainable_parameters": plan.num_parameters,
        "steps": plan.total_steps,
        "estimate": {
            "seconds": round(cost.seconds, 1),
            "memory_bytes": cost.memory_bytes,
            "tokens_per_s": round(cost.tokens_per_s, 1),
            "measured_tokens": cost.measured_tokens,
        },
        "warnings": list(warnings),
    }
