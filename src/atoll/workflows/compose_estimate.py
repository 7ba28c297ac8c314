"""How long a composition would take, from one forward and one gradient measured on its own examples.

Used by the command line's dry run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from atoll.compose.few_shot_lora import few_shot_trainer
from atoll.compose.losses import LabelLosses
from atoll.compose.pool import Pool, why_not
from atoll.compose.retrieval import MEASURED, SAMPLED
from atoll.compose.run import GRADIENT_COST
from atoll.compose.search import BUDGETS
from atoll.eval.evaluate import choose_examples
from atoll.workflows.compose_plan import ComposePlan
from atoll.workflows.compose_search import fold_groups

_CONTESTANTS = 6  # of each seed whose answers are written where controls are on; the base, which is one more, is asked once


@dataclass(frozen=True)
class Estimate:
    """seconds by part of the work, without the answers to test rows, of which `answers` would be written; evaluation_s: of one candidate."""

    seconds: Mapping[str, float]
    answers: int
    evaluation_s: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def estimate(plan: ComposePlan) -> Estimate:
    """Measure a forward and a gradient over the first adapters, and multiply. Raises what loading and stacking adapters raises."""
    settings, draw, decoder = plan.config.compose, plan.draws[0], plan.base.decoder
    usable = (adapter for candidate in plan.candidates if not why_not(adapter := candidate.load())[0])
    pool = Pool.of(list(islice(usable, settings.top_k)), decoder)
    scores, num_seeds, k = LabelLosses(decoder, pool, draw.few.rows, form=settings.form), len(plan.draws), len(draw.few)
    kind = settings.method.partition(":")[0]
    shape = (1, pool.num, pool.num_layers) if kind == "gradient_per_layer" else (1, pool.num)

    def forward() -> None:
        scores.scores(torch.full(shape, 1 / pool.num), range(k))

    def gradient() -> None:
        for portion in scores.portions(list(range(k)), 1):
            weights = torch.full(shape, 1 / pool.num, requires_grad=True)
            scores.scores(weights, portion).sum().backward()

    evaluation = _timed(forward)
    by_gradient = _timed(gradient)
    budget = settings.budget or BUDGETS.get(kind, 1 if kind == "uniform" else pool.num)
    one_search = budget / GRADIENT_COST * by_gradient if kind.startswith("gradient") else budget * evaluation
    one_search = min(one_search * (1 + (settings.folds or 0)), settings.time_s or float("inf"))
    seconds = {
        "ranking": num_seeds * min(len(plan.candidates), MEASURED) * evaluation * min(k, SAMPLED) / k,
        "search": num_seeds * one_search,
    }
    if plan.config.controls:
        trainer = few_shot_trainer(k)
        training = (trainer.max_steps or 0) * min(trainer.batch_size, k) / k * by_gradient
        folds = fold_groups(plan, draw)
        seconds["cross-validation"] = sum(1 - len(fold) / k for fold in folds) * (2 * one_search + training)
        if plan.data.test:
            seconds["making the controls"] = num_seeds * (one_search + training)
    rows = len(choose_examples(plan.data, plan.config.eval.test_rows)) if plan.data.test else 0
    return Estimate(seconds, rows * (1 + num_seeds * (_CONTESTANTS if plan.config.controls else 1)), evaluation)


def _timed(work: Callable[[], None]) -> float:
    """Seconds of the second run: the first packs batches and warms memory up."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
