"""Search by gradient: quasi-Newton steps on the composition weights, one an adapter or one an adapter and layer.

A forward and its backward give the exact derivative of the loss by all weights at once, for the price of three evaluations, whatever the number of
adapters; a search without gradients must try each of them. A look that turns out too far costs its forward alone.

When to stop is read from held-out examples, or from folds: beside the real search runs one search for each fold without its examples, as further
candidates of the same batch. The mean loss of the folds' own examples says how far the real search should go.

One adapter of a norm far above the others' would decide every step's length alone: the search runs over weights times their adapters' `reach`, where
all are of one size.

Used by search.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atoll.compose.quasi_newton import QuasiNewton
from atoll.compose.run import GRADIENT_COST, Ended, Run
from atoll.errors import TrainingError


def search_gradient(run: Run) -> None:
    """As many steps as the budget has room for if all go well: one that goes too far costs less, and is not made up for.

    Raises TrainingError where the gradient at the start is not finite.
    """
    objective, settings = run.objective, run.settings
    coefficients = torch.stack([objective.coefficients(examples) for examples in _searched(run)])
    far = run.reach.view(-1, *[1] * (len(run.shape) - 1)).expand(run.shape)
    if bool((far > 1).any()) and not objective.folds:
        run.values(run.simple())  # what a search over unlike adapters must not end above
    starts = run.starts(coefficients, "uniform")
    low, high = (bound * far.flatten() for bound in settings.bounds)
    searches = QuasiNewton((starts * far).flatten(1), (low, high), settings.step)
    accepted = torch.zeros_like(coefficients)  # each search's scores at its weights
    steps = max(1, int((run.budget - run.evaluations + 1e-6) // (GRADIENT_COST * len(starts))))
    for step in range(steps):
        weights = (searches.ask().view_as(starts) / far).clamp(*settings.bounds)
        scores, gradient = run.gradient(weights, coefficients, searches.limits)
        if step == 0 and not bool(torch.isfinite(gradient).all()):
            raise TrainingError("the gradient of the composition weights is not finite", hint="look at the adapters' norms, or use narrower bounds")
        values = (scores * coefficients).sum(1) + objective.regulariser(weights)
        taken = searches.tell(values, (gradient / far).flatten(1))
        accepted = torch.where(taken.unsqueeze(1), scores, accepted)
        _offer(run, (searches.weights.view_as(starts) / far).clamp(*settings.bounds), accepted)
        run.check()
        if searches.ended:
            raise Ended("converged")
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
