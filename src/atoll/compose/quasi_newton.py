"""Minimise several smooth functions inside a box, side by side: limited-memory BFGS, asked and told like an optimiser without gradients.

A search for composition weights pays a forward and a backward for each look at its function, and has few weights; so what a look says about curvature
is worth more than anything that could be saved on it. BFGS finds in five looks what gradient descent with a fixed schedule finds in thirty.

The searches share nothing but the batch: each has its own step length, curvature pairs and bounds that are active.

Used by gradient.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MEMORY = 10  # curvature pairs that are kept
_DECREASE = 1e-4  # of what the slope promises, that a step must bring (Armijo's condition)
_SHORTER = (0.1, 0.5)  # how much of a step that did not is tried next, at least and at most
_CURVED = 1e-8  # curvature of a pair, by its lengths, below which it says nothing
_STILL = 1e-3  # largest change of a weight, below which a search counts as ended


class _Pair(NamedTuple):
    """A step s and the change y of the gradient along it, [S, n]; rho [S] is 1/(s·y), 0 where a search has no pair here."""

    s: Tensor
    y: Tensor
    rho: Tensor


class QuasiNewton:
    """S searches [S, n] in the box `bounds` (the lowest and highest weights, [n] each), none of which changes a weight by more than `step` at a time.

    L-BFGS (Liu and Nocedal 1989), the direction being projected onto the free weights as in Bertsekas 1982: a weight at its bound whose gradient
    points outwards takes no part. Loop: values and gradients at `ask()` go to `tell`. `weights` are the best of each search so far.
    """

    def __init__(self, start: Tensor, bounds: tuple[Tensor, Tensor], step: float) -> None:
        self.weights = start.clone()
        self._bounds, self._step = bounds, step
        self._values = start.new_full((len(start),), torch.inf)
        self._gradients = torch.zeros_like(start)
        self._length = start.new_ones(len(start))  # of the next step, as a share of the direction
        self._direction: Tensor | None = None
        self._pairs: list[_Pair] = []

    @property
    def ended(self) -> bool:
        """Whether no search would change a weight by as much as a thousandth."""
        return self._direction is not None and bool((self._length.unsqueeze(1) * self._direction).abs().amax() < _STILL)

    def ask(self) -> Tensor:
        """[S, n]: where each function is to be looked at next."""
        if self._direction is None:
            return self.weights
        return (self.weights + self._length.unsqueeze(1) * self._direction).clamp(*self._bounds)

    @property
    def limits(self) -> Tensor:
        """[S]: the value that the point asked for must not exceed to be taken (Armijo's condition); beyond, nobody reads its gradient."""
        if self._direction is None:
            return torch.full_like(self._values, torch.inf)
        return self._values + _DECREASE * (self._gradients * (self.ask() - self.weights)).sum(1)

    def tell(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Take the values [S] and gradients [S, n] at the points asked for. Returns [S]: which of them became the search's weights.

        A point that is not finite is one that went too far.
        """
        point, limits = self.ask(), self.limits
        finite = torch.isfinite(values) & torch.isfinite(gradients).all(1)
        if self._direction is None:
            taken = finite
        else:
            move = point - self.weights
            slope = (self._gradients * move).sum(1)
            taken = finite & (values <= limits)
            self._remember(move, torch.where(taken.unsqueeze(1), gradients - self._gradients, 0.0), taken)
            self._length = torch.where(taken, 1.0, self._length * _shorter(values - self._values, slope))
        self.weights = torch.where(taken.unsqueeze(1), point, self.weights)
        self._gradients = torch.where(taken.unsqueeze(1), gradients, self._gradients)
        self._values = torch.where(taken, values, self._values)
        direction = self._towards()
        self._direction = direction if self._direction is None else torch.where(taken.unsqueeze(1), direction, self._direction)
        return taken

    def _remember(self, move: Tensor, change: Tensor, taken: Tensor) -> None:
        curvature = (move * change).sum(1)
        says = taken & (curvature > _CURVED * move.norm(dim=1) * change.norm(dim=1))
        self._pairs = [*self._pairs, _Pair(move, change, torch.where(says, 1 / curvature, 0.0))][-_MEMORY:]

    def _towards(self) -> Tensor:
        """-H g over the free weights, by the two loops; down the gradient where that is no way down. No weight changes by more than the step."""
        low, high = self._bounds
        outwards = ((self.weights <= low) & (self._gradients > 0)) | ((self.weights >= high) & (self._gradients < 0))
        free = self._gradients.masked_fill(outwards, 0.0)
        steepest = -self._capped(free, torch.inf)
        direction, shares = free, []
        for pair in reversed(self._pairs):
            shares.append(pair.rho * (pair.s * direction).sum(1))
            direction = direction - shares[-1].unsqueeze(1) * pair.y
        known = torch.stack([pair.rho > 0 for pair in self._pairs]).any(0) if self._pairs else torch.zeros_like(self._values, dtype=torch.bool)
        direction = direction * self._scale().unsqueeze(1)
        for pair, share in zip(self._pairs, reversed(shares), strict=True):
            direction = direction + (share - pair.rho * (pair.y * direction).sum(1)).unsqueeze(1) * pair.s
        direction = -direction.masked_fill(outwards, 0.0)
        down = known & ((direction * free).sum(1) < 0) & torch.isfinite(direction).all(1)
        return torch.where(down.unsqueeze(1), self._capped(direction, 1.0), steepest)

    def _scale(self) -> Tensor:
        """[S]: s·y / y·y of the latest pair of each search, the first guess at the inverse of its curvature."""
        scale = torch.ones_like(self._values)
        for pair in self._pairs:
            scale = torch.where(pair.rho > 0, (pair.s * pair.y).sum(1) / pair.y.square().sum(1), scale)
        return scale

    def _capped(self, direction: Tensor, longest: float) -> Tensor:
        """Each row shortened to a largest change of `step`; lengthened too, by as much as `longest` times."""
        largest = direction.abs().amax(1, keepdim=True)
        return direction * (self._step / largest.clamp(min=torch.finfo(direction.dtype).tiny)).clamp(max=longest)


def _shorter(rise: Tensor, slope: Tensor) -> Tensor:
    """[S]: the share of a step at whose end the parabola through value, slope and value at its end is lowest."""
    share = -slope / (2 * (rise - slope))
    return torch.where(torch.isfinite(rise), share, _SHORTER[0]).nan_to_num(_SHORTER[0]).clamp(*_SHORTER)
