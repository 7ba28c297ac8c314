"""One search while it runs: what has been tried, the best so far, what it has cost, and whether it must end.

All methods ask for values here and nowhere else, so the budget, the clock, Ctrl-C, the held-out part, racing and the history are the same for all of
them. Whatever ends a search, the best so far is kept.

Used by search.py, gradient.py and population.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atoll.compose.objective import NOT_FINITE, Objective

Report = Callable[[str, int, int], None]  # (what is going on, evaluations done, evaluations in all)

GRADIENT_COST = 3  # evaluations that a forward with its backward takes as long as, by measurement: the backward, and no merged weights
_RACED_SHARE = 0.4  # of the examples, that all candidates of a race are scored on
_BEYOND = 1e-5  # by how much, and this share of it, a value must be beyond its limit: sums in another order differ in their last digits
_RACE_FROM = 4  # candidates; and one example fewer


@dataclass(frozen=True)
class Settings:
    """What methods may be told; the defaults are for 3 to 30 adapters and 5 to 100 examples.

    bounds: of every weight. start: where the search begins, "best" (of 1/N each and every adapter alone, all of which are scored for it), "uniform"
    (1/N each), "zero" (the base) or weights of one's own; None is uniform for gradients, zero for nevergrad, as in LoraHub, and best for CMA-ES.
    patience: successive improvements of the search value (for a gradient: steps) without a better held-out value, after which a search stops. racing:
    whether a generation's candidates race. step: the largest change of a weight in one step of a gradient search. reach: how many times further each
    adapter's weight reaches than it should (`Pool.reach`; None: none does), by which its start and its steps are smaller. sigma: CMA-ES's first step
    size. population: candidates of a generation, None for the optimiser's own number. workers: how many candidates a nevergrad optimiser may have out
    at once, None for as many as suit it.
    """

    bounds: tuple[float, float] = (-1.5, 1.5)
    start: Literal["best", "uniform", "zero"] | Sequence[float] | None = None
    patience: int = 10
    racing: bool = True
    step: float = 1.0
    reach: Sequence[float] | None = None
    sigma: float = 0.3
    population: int | None = None
    workers: int | None = None


class Point(NamedTuple):
    """The search after some evaluations: the value that was offered, and its held-out value if there is one."""

    evaluations: float
    seconds: float
    value: float
    held_out: float | None


class Best(NamedTuple):
    """A candidate, [N] or [N, L], and its values."""

    weights: Tensor
    value: float
    held_out: float | None


class Ended(Exception):
    """Ends a search from within. reason: "budget", "time", "interrupted", "held out" (got no better for long) or "converged"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Run:
    """One search. An evaluation, which budget and evaluations count, is one candidate on all examples searched on; gradients make it count for 3."""

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        *,
        layered: bool,
        budget: int,
        time_s: float | None,
        seed: int,
        report: Report | None,
        stop_asked: Callable[[], bool],
    ) -> None:
        self.objective, self.settings, self.budget, self.seed = objective, settings, budget, seed
        self.shape = (objective.num_adapters, objective.num_layers) if layered else (objective.num_adapters,)
        self.best: Best | None = None
        self.recommendation: Tensor | None = None
        self.history: list[Point] = []
        self.evaluations = 0.0
        self._time_s, self._report, self._stop_asked = time_s, report, stop_asked
        self._started = time.perf_counter()
        self._lowest, self._stale, self._races = math.inf, 0, 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def reach(self) -> Tensor:
        """[N]: by how much each adapter's start and steps are smaller, at least 1."""
        return torch.ones(self.shape[0]) if self.settings.reach is None else torch.tensor(self.settings.reach, dtype=torch.float32)

    def starts(self, coefficients: Tensor, default: str = "best") -> Tensor:
        """[S, …] weights to begin with, inside the bounds, for S searches whose examples count coefficients [S, k].

        "best" scores the base, 1/N each and every adapter alone, so no search ends above them. It does not begin with the base, where LoraHub's
        product form has no gradient.
        """
        asked, num = self.settings.start or default, self.shape[0]
        if asked == "best":
            simple = self.simple()
            scores = self._scores_of_simple(simple)
            values = scores.nan_to_num(NOT_FINITE, NOT_FINITE) @ coefficients.T + self.objective.regulariser(simple).unsqueeze(1)
            return simple[1 + values[1:].argmin(0)]
        if asked == "uniform":
            weights = 1 / num / self.reach
        elif asked == "zero":
            weights = torch.zeros(num)
        else:
            weights = torch.as_tensor(asked, dtype=torch.float32).clone()
        one = (weights.unsqueeze(0) if weights.shape == self.shape else self._shaped(weights.unsqueeze(0))).clamp(*self.settings.bounds)
        return one.expand(len(coefficients), *self.shape).clone()

    def simple(self) -> Tensor:
        """[N + 2, …] candidates that need no search, inside the bounds: the base, 1/N each, and every adapter alone."""
        num = self.shape[0]
        return self._shaped(torch.cat([torch.zeros(1, num), (1 / num / self.reach).unsqueeze(0), torch.eye(num)]).clamp(*self.settings.bounds))

    def start(self, default: str = "best") -> Tensor:
        """The weights to begin with, for a single search."""
        return self.starts(self.objective.coefficients(self.objective.searched).unsqueeze(0), default)[0]

    def room(self, num: int) -> bool:
        """Whether the budget has room for `num` more candidates (if they race, for a race of them). The first ones always have."""
        return self.best is None or self.evaluations + num * (self._race_share() if self._races_with(num) else 1) <= self.budget + 1e-6

    def values(self, candidates: Tensor, *, racing: bool = False) -> Tensor:
        """[P] of candidates [P, …], the best of which is offered. Raises Ended between forwards, when it is time to.

        racing: all are scored on some examples, the better half on the rest. Those that were dropped get values above all others', in their order.
        """
        if racing and self._races_with(len(candidates)):
            return self._raced(candidates)
        return torch.cat(
            [self._offered(part, self._scores(part, self.objective.searched)) for part in self._parts(candidates, self.objective.searched)]
        )

    def gradient(self, weights: Tensor, coefficients: Tensor, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores [P, k] of all examples, and the gradient [P, …] of Σₑ coefficients[p, e] scoreₑ(w_p) + regulariser(w_p). coefficients [P, k].

        limits [P]: where all of these values are beyond theirs, for certain, nobody wants the gradient, and zeros stand for it. What can be
        differentiated are losses, none of them below zero, so a part of the examples may already be too much.
        """
        leaf = weights.detach().clone().requires_grad_()
        scores = torch.zeros_like(coefficients)
        used = (coefficients != 0).any(0)
        graded, others = used.nonzero().flatten().tolist(), (~used).nonzero().flatten().tolist()
        with torch.enable_grad():
            cost = self.objective.regulariser(leaf)
            values, wanted, with_backward = cost.detach().clone(), True, 0
            for portion in self.objective.scores.portions(graded, len(leaf)):
                with torch.set_grad_enabled(wanted):
                    found = self.objective.scores.scores(leaf, portion)
                scores[:, portion] = found.detach()
                values += (scores * coefficients)[:, portion].sum(1)
                wanted = wanted and (limits is None or not bool((values - limits > _BEYOND * (1 + limits.abs())).all()))
                if wanted:
                    (found * coefficients[:, portion]).sum().backward()
                    with_backward += len(portion)
            if wanted and cost.requires_grad:
                cost.sum().backward()
        if others:
            scores[:, others] = self.objective.scores.scores(weights, others)
        self._count(len(leaf) * (len(graded) + len(others) + (GRADIENT_COST - 1) * with_backward))
        return scores, leaf.grad if wanted and leaf.grad is not None else torch.zeros_like(leaf)

    def offer(self, weights: Tensor, value: float, held_out: float | None = None) -> None:
        """Keep a candidate if it is the best: by its held-out value where examples are held out, else by its value. Raises Ended out of patience."""
        if held_out is None and self.objective.held_out:
            if self.best is not None and value >= self._lowest:
                return
            held_out = self.held_out_value(weights)
        self._lowest = min(self._lowest, value)
        best = self.best
        if best is None or _key(value, held_out) < _key(best.value, best.held_out):
            self.best, self._stale = Best(weights.detach().clone(), value, held_out), 0
        elif held_out is not None:
            self._stale += 1
        self.history.append(Point(round(self.evaluations, 3), self.seconds, value, held_out))
        if self._stale >= self.settings.patience:
            raise Ended("held out")

    def held_out_value(self, weights: Tensor) -> float:
        """The weighted mean score of the held-out examples, without the regulariser."""
        examples = self.objective.held_out
        self._count(len(examples))
        return float((self.objective.scores.scores(weights.unsqueeze(0), examples) @ self.objective.coefficients(examples)[list(examples)])[0])

    def check(self) -> None:
        """Raise Ended if the time is over or the user asked for the end; not before there is a best."""
        if self.best is None:
            return
        if self._report is not None:
            held_out = "" if self.best.held_out is None else f", held out {self.best.held_out:.4f}"
            self._report(f"best {self.best.value:.4f}{held_out}", min(round(self.evaluations), self.budget), self.budget)
        if self._stop_asked():
            raise Ended("interrupted")
        if self._time_s is not None and self.seconds >= self._time_s:
            raise Ended("time")

    def _scores_of_simple(self, candidates: Tensor) -> Tensor:
        """[P, k]: of the examples that are searched on; the best is offered, except beside folds, which have their own way to compare."""
        searched = list(self.objective.searched)
        found = []
        for part in self._parts(candidates, searched):
            found.append(self._scores(part, searched))
            if not self.objective.folds:
                self._offered(part, found[-1])
        scores = torch.zeros(len(candidates), self.objective.scores.num_examples)
        scores[:, searched] = torch.cat(found)
        return scores

    def _shaped(self, weights: Tensor) -> Tensor:
        """[P, N], or [P, N, L] with the same in every layer."""
        return weights if len(self.shape) == 1 else weights.unsqueeze(2).expand(len(weights), *self.shape).clone()

    def _parts(self, candidates: Tensor, examples: Sequence[int]) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = candidates.split(self.objective.scores.at_once(examples))
        return parts

    def _scores(self, candidates: Tensor, examples: Sequence[int]) -> Tensor:
        found = self.objective.scores.scores(candidates, examples)
        self._count(found.numel())
        return found

    def _offered(self, candidates: Tensor, scores: Tensor) -> Tensor:
        """The values of candidates with all their scores; the best is offered."""
        values = self.objective.value(scores, self.objective.searched, candidates)
        place = int(values.argmin())
        self.offer(candidates[place], float(values[place]))
        self.check()
        return values

    def _count(self, rows: int) -> None:
        self.evaluations += rows / len(self.objective.searched)

    def _races_with(self, num: int) -> bool:
        return self.settings.racing and num >= _RACE_FROM and len(self.objective.searched) >= _RACE_FROM - 1

    def _num_raced(self) -> int:
        return max(1, round(_RACED_SHARE * len(self.objective.searched)))

    def _race_share(self) -> float:
        return (1 + self._num_raced() / len(self.objective.searched)) / 2

    def _raced(self, candidates: Tensor) -> Tensor:
        """Every race starts with other examples, so that no candidate is favoured by the same few all along."""
        searched, num = self.objective.searched, self._num_raced()
        turn = self._races * num % len(searched)
        order = searched[turn:] + searched[:turn]
        first, rest = order[:num], order[num:]
        self._races += 1
        early = []
        for part in self._parts(candidates, first):
            early.append(self._scores(part, first))
            self.check()
        scores = candidates.new_empty(len(candidates), len(searched))
        scores[:, [searched.index(example) for example in first]] = torch.cat(early)
        values = self.objective.value(torch.cat(early), first, candidates)
        ranking = values.argsort(stable=True)
        kept, dropped = ranking[: -(-len(candidates) // 2)], ranking[-(-len(candidates) // 2) :]
        finished = []
        later = [searched.index(example) for example in rest]
        for places in kept.split(self.objective.scores.at_once(rest)):
            found = scores[places]
            found[:, later] = self._scores(candidates[places], rest)
            finished.append(self._offered(candidates[places], found))
        whole = torch.cat(finished)
        estimates = values[dropped]
        values[kept] = whole
        values[dropped] = whole.max() + (estimates - estimates[0])
        return values


def _key(value: float, held_out: float | None) -> float:
    return value if held_out is None else held_out
