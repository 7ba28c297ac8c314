"""Held-out losses of several contestants on the same few examples, by cross-validation.

In every fold each contestant learns from (searches on, trains on, shows) the other folds' examples only, and is measured on the fold's own. So every
example is held out once, and nothing that is compared has seen what it is measured on.

Used by workflows. The contestants are in controls.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.compose.run import Report
from atoll.errors import AtollError, Interrupted
from atoll.model.memory import keep_freed_memory, release_memory
from atoll.train.interrupt import interruptible


class Fold(NamedTuple):
    """One fold: the examples a contestant may learn from, those it is measured on, and whether it should give up (it raises Interrupted then)."""

    number: int
    learn: tuple[int, ...]
    held_out: tuple[int, ...]
    stop_asked: Callable[[], bool]


class Finished(NamedTuple):
    """What one fold gave, by contestant: the losses of its held-out examples, the seconds it took, and the sentence of one that failed."""

    losses: Mapping[str, Sequence[float]]
    seconds: Mapping[str, float]
    failures: Mapping[str, str]


Contestant = Callable[[Fold], Tensor]  # the losses [len(fold.held_out)] of the held-out examples, in nats a label token


@dataclass(frozen=True)
class HeldOut:
    """A contestant's losses [k] of every example that was held out (NaN where its fold was not finished), and their mean in each finished fold."""

    losses: Tensor
    folds: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Of all examples that were held out."""
        return float(self.losses.nanmean())

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over folds, in which what was learned differs; None for one fold."""
        return _stderr(self.folds)


@dataclass(frozen=True)
class CrossValidation:
    """What each contestant got. folds: those that were finished. failures: why a contestant is missing. stopped: ended before the last fold."""

    folds: tuple[tuple[int, ...], ...]
    results: Mapping[str, HeldOut]
    failures: Mapping[str, str] = field(default_factory=dict)
    stopped: bool = False

    def gain(self, name: str, over: str) -> tuple[float, float | None]:
        """(mean, standard error) of how much smaller a contestant's loss is than another's, paired: over examples, and over folds."""
        mine, other = self.results[name], self.results[over]
        return float((other.losses - mine.losses).nanmean()), _stderr([b - a for a, b in zip(mine.folds, other.folds, strict=True)])

    def to_json(self) -> dict[str, Any]:
        """For reports and manifests; no times in it, so the same cross-validation is the same JSON."""
        results = {
            name: {"loss": found.mean, "stderr": found.stderr, "folds": list(found.folds)} for name, found in self.results.items() if self.folds
        }
        return {"folds": [list(fold) for fold in self.folds], "stopped": self.stopped, "results": results, "failures": dict(self.failures)}


def cross_validated(
    contestants: Mapping[str, Contestant],
    folds: Sequence[Sequence[int]],
    *,
    earlier: Sequence[Finished] = (),
    keep: Callable[[Sequence[Finished]], None] | None = None,
    report: Report | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> CrossValidation:
    """Every contestant in every fold. folds: groups of examples that together are all of them, each once.

    Fold by fold, with all contestants in each, so that whatever ends it early, what is returned compares them on the same examples: Ctrl-C, or
    stop_asked() once true, ends it at the next chance. A contestant that raises an AtollError is out, with the sentence, and the others go on.

    keep is called with all finished folds after each; earlier: what it was called with last in an earlier run of the same, which is gone on with.
    """
    work = _Work(contestants, [tuple(fold) for fold in folds], report, list(earlier))
    keep_freed_memory()
    try:
        with interruptible() as interrupted:

            def asked() -> bool:
                return interrupted() or (stop_asked is not None and stop_asked())

            for number in range(len(earlier), len(folds)):
                if asked():
                    break
                try:
                    work.fold(number, asked)
                except Interrupted:
                    break
                if keep is not None:
                    keep(work.finished)
    finally:
        release_memory()
    return work.outcome()


class _Work:
    """One cross-validation while it runs."""

    def __init__(
        self, contestants: Mapping[str, Contestant], folds: Sequence[tuple[int, ...]], report: Report | None, finished: list[Finished]
    ) -> None:
        self._contestants, self._folds, self._report, self.finished = contestants, folds, report, finished
        self._everyone = sorted(example for fold in folds for example in fold)
        assert self._everyone == list(range(len(self._everyone))), "the folds are not a partition of the examples"

    @property
    def failures(self) -> dict[str, str]:
        return {name: said for finished in self.finished for name, said in finished.failures.items()}

    def fold(self, number: int, stop_asked: Callable[[], bool]) -> None:
        """All contestants on one fold, or none: raises Interrupted before anything of it is kept."""
        held_out = self._folds[number]
        fold = Fold(number, tuple(example for example in self._everyone if example not in set(held_out)), held_out, stop_asked)
        losses: dict[str, Sequence[float]] = {}
        seconds: dict[str, float] = {}
        failures: dict[str, str] = {}
        for place, (name, contestant) in enumerate(self._contestants.items()):
            if name in self.failures:
                continue
            if stop_asked():
                raise Interrupted("the cross-validation was stopped")
            if self._report is not None:
                self._report(f"fold {number + 1}: {name}", number * len(self._contestants) + place, len(self._folds) * len(self._contestants))
            started = time.perf_counter()
            try:
                losses[name] = contestant(fold).detach().float().cpu().tolist()
            except Interrupted:
                raise
            except AtollError as error:
                failures[name] = error.message
            seconds[name] = time.perf_counter() - started
        self.finished.append(Finished(losses, seconds, failures))

    def outcome(self) -> CrossValidation:
        folds, failures = tuple(self._folds[: len(self.finished)]), self.failures
        if self._report is not None:
            total = len(self._folds) * len(self._contestants)
            self._report("cross-validation", len(self.finished) * len(self._contestants), total)
        results = {name: self._held_out(name) for name in self._contestants if name not in failures and folds}
        return CrossValidation(folds, results, failures, len(folds) < len(self._folds))

    def _held_out(self, name: str) -> HeldOut:
        losses = torch.full((len(self._everyone),), math.nan)
        for fold, finished in zip(self._folds, self.finished, strict=False):
            losses[list(fold)] = torch.tensor(finished.losses[name])
        means = tuple(float(losses[list(fold)].mean()) for fold in self._folds[: len(self.finished)])
        return HeldOut(losses, means, sum(finished.seconds[name] for finished in self.finished))


def _stderr(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).std() / math.sqrt(len(values))) if len(values) > 1 else None
