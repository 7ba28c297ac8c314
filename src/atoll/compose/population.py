"""Search without gradients: an optimiser is asked for candidates and told their values, a generation at a time.

CMA-ES comes from the package cma, everything else from nevergrad, by the name that it has there. A generation is one batch of rows. Some of
nevergrad's optimisers (COBYLA, which its NGOpt chooses for LoraHub's 40 evaluations) go step by step; for those a generation is one candidate.

Used by search.py; workflows asks `check_method` before any work. Both packages come with the extra `compose`.
"""

from __future__ import annotations

import builtins
import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from atoll.compose.run import Ended, Run
from atoll.errors import ConfigError

# What nevergrad chooses by budget, dimension and workers; with one worker it chooses what LoraHub got.
_CHOOSING = ("NGO", "Shiwa", "NgIoh", "NgDS", "NGDS", "NgLn", "NgLglr", "NgRS")


def search_cma(run: Run) -> None:
    """CMA-ES (Hansen, arXiv 1604.00772) from the start weights, with the whole population as one batch."""
    import numpy as np

    cma, apart = _required("cma"), _Apart(run.seed)
    num = int(torch.Size(run.shape).numel())
    wide = max(2, num)  # it searches no single dimension: the second one has no effect then
    start = torch.zeros(wide)
    start[:num] = run.start().flatten()
    options = {
        "bounds": list(run.settings.bounds),
        "popsize": run.settings.population or 4 + int(3 * math.log(wide)),
        "randn": np.random.RandomState(run.seed % (1 << 32)).randn,
        "seed": math.nan,  # it would seed numpy's generator for the whole process
        "verbose": -9,
        "verb_log": 0,
    }
    with apart.kept():
        optimiser = cma.CMAEvolutionStrategy(start.tolist(), run.settings.sigma, options)
    while run.room(optimiser.popsize):
        with apart.kept():
            asked = optimiser.ask()
        values = run.values(_candidates([point[:num] for point in asked], run), racing=run.settings.racing)
        with apart.kept():
            optimiser.tell(asked, values.tolist())
            if optimiser.stop():
                raise Ended("converged")
    raise Ended("budget")


def search_nevergrad(run: Run, name: str) -> None:
    """Any optimiser of nevergrad's registry, with as many candidates out at once as it can use. run.recommendation is its own last word.

    Raises ConfigError for a name that nevergrad does not have, or whose optimiser fails (some need packages of their own).
    """
    optimiser = _Nevergrad(run, name)
    try:
        with _quiet():  # also between two questions, when an optimiser's own thread may be busy
            while run.room(1):
                batch = min(optimiser.workers, max(1, int(run.budget - run.evaluations + 1e-6)))
                values = run.values(optimiser.ask(batch), racing=run.settings.racing)
                optimiser.tell(values)
    finally:
        try:
            if run.best is not None:
                run.recommendation = optimiser.recommendation()
        finally:  # whatever it says: its threads would keep the process alive
            optimiser.close()
    raise Ended("budget")


def check_method(method: str) -> None:
    """Raise ConfigError where a search without gradients could not begin: its package is not installed, or nevergrad has no such optimiser."""
    kind, _, name = method.partition(":")
    if kind == "cma":
        _required("cma")
    elif kind == "nevergrad":
        _nevergrad_with(name)


class _Nevergrad:
    """One of nevergrad's optimisers, kept apart from the process: its random numbers, its errors and its threads."""

    def __init__(self, run: Run, name: str) -> None:
        import numpy as np

        self._run, self._name, self._apart = run, name, _Apart(run.seed)
        ng = _nevergrad_with(name)
        kind, (low, high) = ng.optimizers.registry[name], run.settings.bounds
        num = int(torch.Size(run.shape).numel())
        stepwise = kind.no_parallelization or name.startswith(_CHOOSING)
        self.workers = min(run.budget, run.settings.workers or (1 if stepwise else 4 + int(3 * math.log(max(2, num)))))
        if self.workers > 1 and kind.no_parallelization:
            raise ConfigError(f"nevergrad's {name} goes step by step and cannot have {self.workers} workers", hint="leave workers out")
        start = run.start("zero").flatten().double().numpy()
        self._ng, self._asked = ng, list[Any]()
        with self._guarded():
            space = ng.p.Array(init=start, lower=low, upper=high)
            space.random_state = np.random.RandomState(run.seed % (1 << 32))
            self._optimiser = kind(parametrization=space, budget=run.budget, num_workers=self.workers)

    def ask(self, num: int) -> Tensor:
        with self._guarded():
            self._asked = [self._optimiser.ask() for _ in range(num)]
        return _candidates([point.value for point in self._asked], self._run)

    def tell(self, values: Tensor) -> None:
        with self._guarded():
            for point, value in zip(self._asked, values.tolist(), strict=True):
                self._optimiser.tell(point, value)

    def recommendation(self) -> Tensor:
        with self._guarded():
            return _candidates([self._optimiser.provide_recommendation().value], self._run)[0]

    def close(self) -> None:
        """End the threads of optimisers that are functions in disguise: they wait for a value as long as the process lives, and keep it alive."""
        left, seen = [self._optimiser], set[int]()
        while left:
            thing = left.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, self._ng.optimizers.base.Optimizer):
                thread = getattr(thing, "_messaging_thread", None)
                if thread is not None:
                    thread.stop()
                left += vars(thing).values()
            elif isinstance(thing, list | tuple):
                left += thing

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with self._apart.kept():
                yield
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ConfigError(f"nevergrad's optimiser {self._name} failed: {reason}", hint="use another one, or the method gradient") from error


class _Apart:
    """A state of numpy's global generator for an optimiser that may use it; the process gets its own back."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._state = np.random.RandomState(seed % (1 << 32)).get_state()

    @contextmanager
    def kept(self) -> Iterator[None]:
        import numpy as np

        outside = np.random.get_state()
        np.random.set_state(self._state)
        try:
            with _quiet():
                yield
        finally:
            self._state = np.random.get_state()
            np.random.set_state(outside)


def _candidates(points: list[Any], run: Run) -> Tensor:
    return torch.stack([torch.as_tensor(point, dtype=torch.float32) for point in points]).view(len(points), *run.shape)


def nevergrad_package() -> Any:
    """nevergrad, fit for numpy 2.4: its surrogate models turn arrays of one element into numbers with float(), which numpy no longer allows."""
    ng = _required("nevergrad")
    metamodel = importlib.import_module("nevergrad.optimization.metamodel")
    metamodel.float = lambda value: value.item() if getattr(value, "size", None) == 1 else builtins.float(value)  # type: ignore[attr-defined]
    return ng


def _nevergrad_with(name: str) -> Any:
    """nevergrad, which has an optimiser of that name. Raises ConfigError."""
    ng = nevergrad_package()
    if name not in ng.optimizers.registry:
        near = get_close_matches(name, sorted(ng.optimizers.registry), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "NGOpt is what LoraHub uses; CMA and DE are others"
        raise ConfigError(f"nevergrad has no optimiser {name!r}", hint=hint)
    return ng


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of these packages, which concern nobody here: plots, end tolerances of zero, searches that have converged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(nevergrad|cma|scipy|sklearn|bayes_opt|directsearch|numpy|importlib)\b")
        yield


def _required(package: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this search needs the package {error.name}, which is not installed", hint='pip install "atoll[compose]", or use the method gradient'
        ) from error
