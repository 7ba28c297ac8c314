"""From what was measured to the report's lines, gains and advice.

Used by compose.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from atoll.compose.controls import BASE, BEST_SINGLE, COMPOSED, IN_CONTEXT, RANDOM, TRAINED, UNIFORM
from atoll.compose.pool import Pool
from atoll.compose.result import in_force, mean_weight, own_layers
from atoll.eval.baseline import constant_answer
from atoll.model.adapter import Adapter
from atoll.workflows.compose_advice import MAJORITY, advice
from atoll.workflows.compose_clock import Clock
from atoll.workflows.compose_controls import Measured
from atoll.workflows.compose_draws import ONLY_SEED
from atoll.workflows.compose_plan import ComposePlan
from atoll.workflows.compose_report import Gain, Line, Listed, Report, counted, options_gain, score_gain, scores_stderr
from atoll.workflows.compose_search import Searched

ORDER = (BASE, MAJORITY, BEST_SINGLE, UNIFORM, RANDOM, TRAINED, IN_CONTEXT, COMPOSED)


def report_of(
    plan: ComposePlan, searched: Sequence[Searched], best: Searched, pool: Pool, adapter: Adapter, measured: Measured, clock: Clock, stopped: str
) -> Report:
    """The whole report."""
    settings, found = plan.config.compose, best.found
    report = Report(
        task=plan.data.task.name,
        base=plan.base.title,
        metric=plan.data.task.metric,
        examples=len(best.draw.examples),
        test_rows=max((score.n for scores in measured.scores.values() for score in scores), default=0),
        candidates=len(plan.candidates),
        method=settings.method,
        form=settings.form,
        rank=adapter.max_rank,
        seeds=tuple(one.draw.seed for one in searched),
        seed=best.draw.seed,
        chosen_by=_chosen_by(plan, searched),
        search={
            "value": found.value,
            "held_out": found.held_out,
            "evaluations": found.evaluations,
            "seconds": round(found.seconds, 2),
            "stopped_by": found.stopped_by,
        },
        shortlist=tuple(_listed(pool, best, place) for place in range(pool.num)),
        took={name: round(seconds, 2) for name, seconds in clock.parts.items()},
        stopped=stopped,
        energy_kept=adapter.manifest["composition"]["energy_kept"],
    )
    measure, versus = _versus(measured)
    report = replace(report, lines=_lines(plan, best, pool, measured), measure=measure, versus=versus)
    if measure == "score" and BASE in measured.scores and COMPOSED in measured.scores:
        report = replace(report, options_gain=options_gain(measured.scores[COMPOSED], measured.scores[BASE]))
    return replace(report, advice=advice(report))


def _chosen_by(plan: ComposePlan, searched: Sequence[Searched]) -> str:
    if len(plan.draws) == 1:
        return plan.seeds_note or ONLY_SEED
    if plan.dev:
        return f"loss on {counted(len(plan.dev), 'row')} that no seed drew"
    if searched[0].draw.left_out:
        return "loss, less the base's, on the examples that each leaves out"
    return "held-out loss of its search" if searched[0].found.held_out is not None else "the search's own value"


def _listed(pool: Pool, best: Searched, place: int) -> Listed:
    ranked, weights = best.shortlist[place], in_force(pool, best.found.weights)[place]
    layers: dict[str, Any] = {"layer_weights": tuple(weights.tolist()), "layers": own_layers(pool, place)} if weights.dim() else {}
    mean = mean_weight(pool, place, weights)
    return Listed(pool.names[place], pool.digests[place], mean, ranked.loss, ranked.slope, ranked.similarity, **layers)


def _versus(measured: Measured) -> tuple[str, dict[str, Gain]]:
    """What the composition gains over each contestant: by score where test rows were scored, else by held-out loss."""
    mine = measured.scores.get(COMPOSED)
    if mine:
        versus = {name: score_gain(mine, scores) for name, scores in measured.scores.items() if name != COMPOSED and scores}
        if measured.majority:
            versus[MAJORITY] = _over_majority(measured)
        return "score", versus
    cross = measured.cross
    if cross is not None and COMPOSED in cross.results:
        return "loss", {name: Gain.over_folds(*cross.gain(COMPOSED, name), len(cross.folds)) for name in cross.results if name != COMPOSED}
    return "", {}


def _over_majority(measured: Measured, name: str = COMPOSED) -> Gain:
    """The constant answer is measured without a model, so its rows stand nowhere: errors as if the rows were others."""
    pairs = list(zip(measured.scores[name], measured.majority, strict=False))
    errors = [math.hypot(score.stderr, constant.stderr) for score, constant in pairs if score.stderr is not None and constant.stderr is not None]
    gain = sum(score.value - constant.value for score, constant in pairs) / len(pairs)
    return Gain(gain, sum(errors) / len(errors) if errors else None)


def _lines(plan: ComposePlan, best: Searched, pool: Pool, measured: Measured) -> tuple[Line, ...]:
    lines = [_line(plan, best, pool, measured, name) for name in ORDER]
    return tuple(line for line in lines if line.loss is not None or line.scores or line.note)


def _line(plan: ComposePlan, best: Searched, pool: Pool, measured: Measured, name: str) -> Line:
    scores = measured.scores.get(name, [])
    facts: dict[str, Any] = {"name": name, "what": _what(plan, best, pool, measured, name), "note": measured.failures.get(name, "")}
    if name == MAJORITY and measured.cross is not None and not measured.majority:
        common = constant_answer(replace(plan.data, train=best.draw.examples))
        facts |= {} if common is None else {"what": repr(common[0]), "note": f"{common[1]:.0%} of the examples; has no loss, is scored on test rows"}
    if measured.cross is not None and name in measured.cross.results:
        held_out = measured.cross.results[name]
        facts |= {"loss": held_out.mean, "loss_stderr": held_out.stderr, "seconds": held_out.seconds / max(1, len(held_out.folds))}
    if name == MAJORITY and measured.majority:
        facts |= {"scores": tuple(found.value for found in measured.majority), "score_stderr": measured.majority[0].stderr}
    if scores:
        facts |= {"scores": tuple(score.value for score in scores), "score_stderr": scores_stderr(scores)}
        facts["options"] = tuple(score.options_value for score in scores if score.options_value is not None)
    if measured.seconds.get(name):
        facts["seconds"] = sum(measured.seconds[name]) / len(measured.seconds[name])
    if name in (BASE, MAJORITY):
        facts["seconds"] = None
    return Line(**facts, gain=None if name == BASE else _over_base(measured, name))


def _over_base(measured: Measured, name: str) -> Gain | None:
    scores, base = measured.scores.get(name), measured.scores.get(BASE)
    if base and name == MAJORITY and measured.majority:
        found = _over_majority(measured, BASE)
        return replace(found, value=-found.value)
    if base:
        return score_gain(scores, base) if scores else None
    cross = measured.cross
    if cross is None or name not in cross.results or BASE not in cross.results:
        return None
    return Gain.over_folds(*cross.gain(name, BASE), len(cross.folds))


def _what(plan: ComposePlan, best: Searched, pool: Pool, measured: Measured, name: str) -> str:
    k = len(best.draw.examples)
    if name == BASE:
        styles = {score.prompt_style for score in measured.scores.get(BASE, [])}
        return f"asked in its {styles.pop()} style" if len(styles) == 1 else ""
    if name == MAJORITY:
        return ", ".join(dict.fromkeys(repr(found.answer) for found in measured.majority))
    if name == BEST_SINGLE:
        return measured.what.get(name) or ", ".join(_best_names(best, pool))
    used = max(1, int((in_force(pool, best.found.weights) != 0).reshape(pool.num, -1).any(1).sum()))
    words = {
        UNIFORM: f"{counted(pool.num, 'adapter')}, 1/{pool.num} each",
        RANDOM: f"{pool.num} of the same shapes, searched",
        TRAINED: f"on the {counted(k, 'example')}",
        IN_CONTEXT: f"the base, {counted(k, 'example')} in its prompt",
        COMPOSED: f"{counted(used, 'adapter')}, {plan.config.compose.method}",
    }
    return words[name]


def _best_names(best: Searched, pool: Pool) -> list[str]:
    """The adapter of the least loss, where losses were measured in ranking."""
    losses = [ranked.loss for ranked in best.shortlist]
    return [pool.names[min(range(len(losses)), key=lambda place: losses[place] or math.inf)]] if losses and losses[0] is not None else []
