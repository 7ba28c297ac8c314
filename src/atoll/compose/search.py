"""Find the weights of a composition: `search` by the name of a method.

    gradient            L-BFGS on one weight an adapter
    gradient_per_layer  L-BFGS on one weight an adapter and layer: the default of `atoll compose`
    cma                 CMA-ES, without gradients: for scores that have none
    nevergrad:<name>    any optimiser of nevergrad; nevergrad:NGOpt is LoraHub's
    uniform             1/N each, and no search
    best_single         the best adapter alone, with weight 1

The same objective, seed, budget and settings give the same weights, bit for bit on a CPU, unless the clock or Ctrl-C ended the search.

Used by workflows, lorahub and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from atoll.compose.gradient import search_gradient
from atoll.compose.objective import NOT_FINITE, Objective
from atoll.compose.population import search_cma, search_nevergrad
from atoll.compose.run import Ended, Point, Report, Run, Settings
from atoll.errors import ConfigError, TrainingError
from atoll.model.memory import keep_freed_memory, release_memory
from atoll.train.interrupt import interruptible

METHODS = ("gradient", "gradient_per_layer", "cma", "nevergrad:<name>", "uniform", "best_single")
BUDGETS = {"gradient": 48, "gradient_per_layer": 48, "cma": 240, "nevergrad": 40}  # evaluations, three a gradient; 40 is LoraHub's
_NEEDS_GRADIENTS = ("gradient", "gradient_per_layer")


@dataclass(frozen=True)
class Found:
    """What a search found: weights [N] or [N, L] float32 on the CPU, the best by held_out where examples are held out, else by value.

    evaluations counts candidates scored on all examples, each as three where gradients were taken. stopped_by: "budget", "time", "interrupted",
    "held out", "converged", or "done" where there was nothing to search. recommendation: what a nevergrad optimiser itself recommends, which LoraHub
    takes.
    """

    method: str
    weights: Tensor
    value: float
    held_out: float | None
    history: tuple[Point, ...]
    evaluations: float
    seconds: float
    stopped_by: str
    seed: int
    recommendation: Tensor | None = None


def search(
    objective: Objective,
    num: int,
    method: str = "gradient",
    *,
    budget: int | None = None,
    time_s: float | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    report: Report | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> Found:
    """The best weights of `num` adapters that `method` finds within `budget` evaluations (None: see BUDGETS) and `time_s` seconds.

    Ctrl-C, or stop_asked() once true, ends the search after the forward at hand, and the best so far is returned; a second Ctrl-C interrupts at once.
    Raises ConfigError for a method that is not known, not installed or not possible with this objective, TrainingError where nothing finite is found.
    """
    kind = method.partition(":")[0]
    _check(objective, num, method, budget, time_s)
    keep_freed_memory()
    try:
        with interruptible() as interrupted:
            run = Run(
                objective,
                settings or Settings(),
                layered=method == "gradient_per_layer",
                budget=budget or BUDGETS.get(kind, num),
                time_s=time_s,
                seed=seed,
                report=report,
                stop_asked=lambda: interrupted() or (stop_asked is not None and stop_asked()),
            )
            stopped_by = _ended_by(run, kind, method.partition(":")[2])
    finally:
        release_memory()
    best = run.best
    assert best is not None
    if best.value >= NOT_FINITE:
        raise TrainingError("no candidate has a finite score", hint="look at the adapters' norms, or search within narrower bounds of the weights")
    return Found(
        method=method,
        weights=best.weights.cpu(),
        value=best.value,
        held_out=best.held_out,
        history=tuple(run.history),
        evaluations=round(run.evaluations, 3),
        seconds=run.seconds,
        stopped_by=stopped_by,
        seed=seed,
        recommendation=run.recommendation,
    )


def _check(objective: Objective, num: int, method: str, budget: int | None, time_s: float | None) -> None:
    kind, _, name = method.partition(":")
    known = [listed.partition(":")[0] for listed in METHODS]
    if kind not in known or (kind == "nevergrad") != bool(name):
        near = get_close_matches(method, known, n=1)
        raise ConfigError(f"there is no method {method!r}", hint=f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}")
    if kind in _NEEDS_GRADIENTS and not objective.scores.differentiable:
        raise ConfigError(f"the method {method} needs scores with gradients, and these have none", hint="use cma, or search by the label loss")
    if objective.folds and kind not in _NEEDS_GRADIENTS:
        raise ConfigError(f"the method {method} knows no folds", hint="hold out a part of the examples, or use the method gradient")
    if budget is not None and budget < 1:
        raise ConfigError(f"the budget is {budget} evaluations, expected at least 1")
    if time_s is not None and not time_s > 0:
        raise ConfigError(f"the time budget is {time_s} s, expected more than 0")
    assert num == objective.num_adapters, f"{num} weights asked for {objective.num_adapters} adapters"


def _ended_by(run: Run, kind: str, name: str) -> str:
    """Run the method to its end, and say what ended it."""
    num = run.shape[0]
    try:
        match kind:
            case "uniform":
                run.values(torch.full((1, num), 1 / num))
            case "best_single":
                run.values(torch.eye(num))
            case "cma":
                search_cma(run)
            case "nevergrad":
                search_nevergrad(run, name)
            case _:
                search_gradient(run)
    except Ended as ended:
        return ended.reason
    return "done"
