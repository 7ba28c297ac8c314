"""Measure a composition and its controls: held-out losses by cross-validation over the examples, and scores on test rows where there are any.

On test rows every seed is measured with all its contestants in one engine batch, by evaluation's own code: the same rows, metric, limits and prompt
format for all, the label options too where the label set is closed. A control that fails is left out with its sentence; the composition does not
depend on it.

Used by compose.py; compose_report.py makes tables and advice of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atoll.compose.controls import BASE, BEST_SINGLE, COMPOSED, IN_CONTEXT, RANDOM, TRAINED, UNIFORM
from atoll.compose.cross_validation import CrossValidation, Finished, cross_validated
from atoll.compose.few_shot_lora import train_on_examples
from atoll.compose.in_context import in_context
from atoll.compose.losses import LabelLosses
from atoll.compose.measuring import alone
from atoll.compose.random_adapters import random_pool
from atoll.compose.result import compose
from atoll.errors import AtollError, EngineError, Interrupted
from atoll.eval.arena import Arena, Entrant
from atoll.eval.baseline import Baseline, majority_baseline
from atoll.eval.evaluate import choose_examples
from atoll.eval.score import Score, better_base
from atoll.files import write_file
from atoll.workflows.compose_clock import Clock
from atoll.workflows.compose_plan import ComposePlan
from atoll.workflows.compose_search import Searched, adapter_of, controls_of, fold_groups, searcher
from atoll.workflows.start import Progress, prefixed

if TYPE_CHECKING:
    from atoll.compose.pool import Pool
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter


@dataclass
class Measured:
    """What was measured. scores: of each contestant, one a seed. majority: one a seed that has one. seconds: of making a contestant, one a seed.

    what: what a contestant is, in words. failures: why one is missing. stopped: ended before the end. warnings: sentences that the user should see.
    """

    cross: CrossValidation | None = None
    scores: dict[str, list[Score]] = field(default_factory=dict)
    majority: list[Baseline] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    what: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    warnings: list[str] = field(default_factory=list)


def held_out_losses(
    plan: ComposePlan, best: Searched, file: Path, measured: Measured, clock: Clock, progress: Progress, stop_asked: Callable[[], bool]
) -> None:
    """Cross-validate all contestants over the examples of the seed that is kept. file: where finished folds are kept for the same plan's next run."""
    folds = fold_groups(plan, best.draw)
    if not folds:
        why = "all examples have the same input" if len(best.draw.few) > 1 else "one example cannot be held out of one"
        measured.warnings.append(f"no held-out losses: {why}")
        return
    of = {"job": plan.digest, "seed": best.draw.seed}
    with clock.part("cross-validation"):
        found = cross_validated(
            controls_of(plan, best).contestants(),
            folds,
            earlier=_kept_folds(file, of),
            keep=lambda done: write_file(file, json.dumps({**of, "folds": [fold._asdict() for fold in done]})),
            report=lambda what, at, total: progress(f"controls, held out: {what}", at, total),
            stop_asked=stop_asked,
        )
    measured.cross, measured.stopped = found, measured.stopped or found.stopped
    measured.failures.update(found.failures)


def _kept_folds(file: Path, of: Mapping[str, Any]) -> list[Finished]:
    """The folds that an earlier run of the same plan finished; none where there are none, or they are damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return [Finished(**fold) for fold in kept["folds"]] if {key: kept[key] for key in of} == of else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def test_scores(
    plan: ComposePlan,
    searched: Sequence[Searched],
    hub: Hub,
    folder: Path,
    measured: Measured,
    clock: Clock,
    progress: Progress,
    stop_asked: Callable[[], bool],
    *,
    record: bool = True,
) -> None:
    """Score every seed's contestants on the test rows; without controls, the base and the composition alone. record: the base's, in the hub."""
    arena = Arena(plan.base, hub, plan.config.eval, folder, record=record)
    rows = choose_examples(plan.data, plan.config.eval.test_rows)
    for number, one in enumerate(searched, 1):
        watched = _watched(prefixed(progress, f"seed {number}/{len(searched)},") if len(searched) > 1 else progress, stop_asked)
        try:
            with clock.part("making the controls"):
                entrants = _entrants(plan, one, measured, watched, stop_asked)
            with clock.part("test rows"):
                scores = arena.measure(plan.data, [], plan.config.generation, watched, entrants=entrants)
        except Interrupted:
            measured.stopped = True
            break
        except EngineError as error:  # of the machine: the composition is none the worse, and the same command measures it again
            measured.stopped = True
            measured.warnings.append(f"the test rows could not be scored: {error.message}")
            break
        _enter(scores, plan.base.title, measured)
        majority = majority_baseline(replace(plan.data, train=one.draw.examples), rows)
        if majority is not None:
            measured.majority.append(majority)
    measured.warnings += dict.fromkeys(arena.warnings)


def _enter(scores: Sequence[Score], base_title: str, measured: Measured) -> None:
    """One score a contestant: of several prompt styles the better one."""
    by_name: dict[str, list[Score]] = {}
    for score in scores:
        by_name.setdefault(BASE if score.model == base_title else score.model, []).append(score)
    for name, found in by_name.items():
        best = better_base(found)
        options = [score.options_value for score in found if score.options_value is not None]
        measured.scores.setdefault(name, []).append(replace(best, options_value=max(options, default=None)))


def _entrants(plan: ComposePlan, one: Searched, measured: Measured, progress: Progress, stop_asked: Callable[[], bool]) -> list[Entrant]:
    pool, rows = controls_of(plan, one).pool(), one.draw.few.rows
    entrants = [_in_memory(COMPOSED, adapter_of(plan, pool, one.found, one.draw.few))]
    measured.seconds.setdefault(COMPOSED, []).append(one.seconds)
    if not plan.config.controls:
        return entrants
    makers: Mapping[str, Callable[[], Entrant]] = {
        BEST_SINGLE: lambda: _best_single(plan, pool, one, measured),
        UNIFORM: lambda: _in_memory(UNIFORM, compose(pool, torch.full((pool.num,), 1 / pool.num)).adapter),
        RANDOM: lambda: _random(plan, pool, one, progress, stop_asked),
        TRAINED: lambda: _in_memory(
            TRAINED,
            train_on_examples(
                plan.base.decoder,
                rows,
                base=plan.base.name,
                seed=one.draw.seed,
                report=lambda what, at, total: progress(f"training on the examples: {what}", at, total),
                stop_asked=stop_asked,
            ),
        ),
        IN_CONTEXT: lambda: _in_context(plan, one),
    }
    for name, make in makers.items():
        if name in measured.failures:
            continue
        if stop_asked():
            raise Interrupted("the controls were stopped")
        started = time.perf_counter()
        try:
            entrants.append(make())
        except Interrupted:
            raise
        except AtollError as error:
            measured.failures[name] = error.message
        measured.seconds.setdefault(name, []).append(time.perf_counter() - started)
    return entrants


def _best_single(plan: ComposePlan, pool: Pool, one: Searched, measured: Measured) -> Entrant:
    """Of the shortlist, the adapter whose loss on the examples is least."""
    losses = alone(LabelLosses(plan.base.decoder, pool, one.draw.few.rows)).mean(1)
    index = int(losses.argmin())
    names = measured.what.get(BEST_SINGLE, "").split(", ") if BEST_SINGLE in measured.what else []
    measured.what[BEST_SINGLE] = ", ".join(dict.fromkeys([*names, pool.names[index]]))
    return Entrant(BEST_SINGLE, "lora", pool.digests[index] or content_digest(pool.adapters[index]), pool.adapters[index])


def _random(plan: ComposePlan, pool: Pool, one: Searched, progress: Progress, stop_asked: Callable[[], bool]) -> Entrant:
    drawn = random_pool(pool, plan.base.decoder, one.draw.seed)
    search = searcher(plan, lambda what, at, total: progress(f"searching random adapters: {what}", at, total))
    found = search(drawn, one.draw.few.rows, one.draw.seed, stop_asked)
    if found.stopped_by == "interrupted":
        raise Interrupted("the search over random adapters was stopped")
    return _in_memory(RANDOM, adapter_of(plan, drawn, found, one.draw.few))


def _in_context(plan: ComposePlan, one: Searched) -> Entrant:
    rows = choose_examples(plan.data, plan.config.eval.test_rows)
    found = in_context(rows, one.draw.examples, plan.data.task, plan.base, room=plan.max_new_tokens)
    return Entrant(IN_CONTEXT, "base", plan.base.fingerprint.digest, data=replace(plan.data, test=found.examples))


def _in_memory(name: str, adapter: Adapter) -> Entrant:
    return Entrant(name, "lora" if name == TRAINED else "composed", content_digest(adapter), adapter)


def content_digest(adapter: Adapter) -> str:
    """sha256 in hex over the factors: the identity of an adapter that is not stored."""
    state = hashlib.sha256()
    for site, module in adapter.modules.items():
        state.update(f"{site.layer} {site.target} {module.scaling} {tuple(module.a.shape)} {tuple(module.b.shape)}\n".encode())
        for tensor in (module.a, module.b):
            state.update(tensor.detach().float().contiguous().numpy().tobytes())
    return state.hexdigest()


def _watched(progress: Progress, stop_asked: Callable[[], bool]) -> Progress:
    """Progress that ends the work at hand, by Interrupted, once it is asked to."""

    def report(stage: str, done: int, total: int) -> None:
        progress(stage, done, total)
        if stop_asked():
            raise Interrupted("the controls were stopped")

    return report
