"""Merging a stack of tensors entry by entry: keep part of each, agree on signs, sum.

TIES (Yadav et al. 2023, arXiv 2306.01708), DARE (Yu et al. 2023, arXiv 2311.03099) and magnitude pruning as functions from a stack [N, m, n] and N
weights to one [m, n]. What the entries are is the caller's choice: factors, whole updates, or coordinates in a shared basis. In all of them a tensor
is thinned first, then the signs are elected, and only then do the weights come in, so that a negative weight subtracts what its tensor holds instead
of taking part in the vote against it. Each tensor of a stack is thinned by itself. A density is the share of entries that is kept: above 0, at
most 1, or a ConfigError is raised.

Used by composed.py. These are PEFT's definitions, to the bit where the masks are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from atoll.errors import ConfigError

MajoritySign = Literal["total", "frequency"]
Merge = Callable[[Tensor, Tensor], Tensor]  # (stack [N, m, n], weights [N]) -> [m, n]


def weighted_sum(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ xᵢ."""
    total: Tensor = torch.tensordot(weights, stack, dims=1)
    return total


def magnitude_prune(density: float) -> Merge:
    """Σ wᵢ xᵢ over the largest entries of each xᵢ."""
    _check(density)
    return lambda stack, weights: weighted_sum(keep_largest(stack, density), weights)


def ties(density: float, majority_sign: MajoritySign = "total") -> Merge:
    """The mean of the wᵢ xᵢ that have the elected sign, over the largest entries of each xᵢ."""
    _check(density, majority_sign)
    return lambda stack, weights: _agreeing_mean(keep_largest(stack, density), weights, majority_sign)


def dare_linear(density: float, generator: torch.Generator) -> Merge:
    """Σ wᵢ xᵢ over random entries of each xᵢ, scaled up by 1 / density; the same in expectation as without dropping."""
    _check(density)
    return lambda stack, weights: weighted_sum(keep_random(stack, density, generator), weights)


def dare_ties(density: float, majority_sign: MajoritySign, generator: torch.Generator) -> Merge:
    """As `ties`, over random entries scaled up by 1 / density instead of the largest."""
    _check(density, majority_sign)
    return lambda stack, weights: _agreeing_mean(keep_random(stack, density, generator), weights, majority_sign)


def keep_largest(stack: Tensor, density: float) -> Tensor:
    """The int(density * entries) entries of largest magnitude of each tensor of the stack, zero elsewhere."""
    _check(density)
    if density == 1:
        return stack
    flat = stack.reshape(len(stack), -1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept)).reshape(stack.shape)


def keep_random(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, divided by it; zero elsewhere. The masks come from `generator` in the order of the entries."""
    _check(density)
    if density == 1:
        return stack
    return stack * torch.bernoulli(torch.full_like(stack, density), generator=generator) / density


def _check(density: float, majority_sign: str = "total") -> None:
    if not isinstance(density, Real) or not 0 < density <= 1:  # NaN too
        raise ConfigError(
            f"the density is {density!r:.60}, expected a number above 0 and at most 1", hint="it is the share of entries to keep, such as 0.5"
        )
    if majority_sign not in get_args(MajoritySign):
        raise ConfigError(f"the majority sign is {majority_sign!r:.60}, expected one of {', '.join(get_args(MajoritySign))}", hint="total is usual")


def _agreeing_mean(stack: Tensor, weights: Tensor, majority_sign: MajoritySign) -> Tensor:
    """At each entry, the sum of the weighted tensors that have its elected sign, divided by their number.

    The sign is that of the sum ("total") or of most tensors ("frequency"); a draw elects plus. Zeros have no sign and are not counted.
    """
    signs = stack.sign()
    elected = torch.where((stack if majority_sign == "total" else signs).sum(0) >= 0, 1.0, -1.0)
    agree = signs == elected
    return weighted_sum(stack * agree, weights) / agree.sum(0).clamp(min=1)
