"""Search by gradient: Adam on the composition weights, one an adapter or one an adapter and layer.

A forward and its backward give the exact derivative of the loss by all weights at once, for the price of three evaluations, whatever the number of
adapters; a search without gradients must try each of them.

When to stop is read from held-out examples, or, where there are too few to hold any out, from folds: beside the real search runs one search for each
fold without its examples, as further candidates of the same batch. The mean loss of the folds' own examples says how far the real search should go.

Used by search.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atoll.compose.run import GRADIENT_COST, Ended, Run
from atoll.errors import TrainingError

_BETAS = (0.9, 0.99)
_EPS = 1e-8


def search_gradient(run: Run) -> None:
    """As many Adam steps as the budget has room for, the learning rate decayed by a cosine. Raises TrainingError where a gradient is not finite."""
    objective, settings = run.objective, run.settings
    coefficients = torch.stack([objective.coefficients(examples) for examples in _searched(run)])
    weights = run.starts(coefficients)
    steps = max(1, int((run.budget - run.evaluations - len(weights)) // (GRADIENT_COST * len(weights))))
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(steps):
        scores, gradient = run.gradient(weights, coefficients)
        if not bool(torch.isfinite(gradient).all()):
            raise TrainingError("the gradient of the composition weights is not finite", hint="look at the adapters' norms, or use narrower bounds")
        _offer(run, weights, scores)
        run.check()
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        corrected = first / (1 - _BETAS[0] ** (step + 1)), second / (1 - _BETAS[1] ** (step + 1))
        weights = (weights - rate * corrected[0] / (corrected[1].sqrt() + _EPS)).clamp(*settings.bounds)
    _offer(run, weights, run.all_scores(weights))
    raise Ended("budget")


def _searched(run: Run) -> list[tuple[int, ...]]:
    """The examples of each search that runs side by side: all that are searched on, then without each fold."""
    objective = run.objective
    return [objective.searched, *(tuple(e for e in objective.searched if e not in set(fold)) for fold in objective.folds)]


def _offer(run: Run, weights: Tensor, scores: Tensor) -> None:
    """Offer the real search's weights, with the held-out value of the same step. scores [P, k] of all examples."""
    objective = run.objective
    searched = list(objective.searched)
    value = float(objective.value(scores[:1, searched], searched, weights[:1])[0])
    held_out: float | None = None
    if objective.held_out:
        held_out = float(scores[0] @ objective.coefficients(objective.held_out))
    elif objective.folds:
        unseen = [float(scores[row] @ objective.coefficients(fold)) * len(fold) for row, fold in enumerate(objective.folds, 1)]
        held_out = sum(unseen) / len(searched)
    run.offer(weights[0], value, held_out)
