"""What lorahub 0.1.0 computes, to the last bit where the same libraries run: for comparing with numbers that were made with it.

Its search minimises the sum of the batches' mean losses, divided by the number of examples, plus get_regular(w), over [-1.5, 1.5]ᴺ from 0, by
nevergrad's NGOpt with one worker, and takes what that recommends. Three things are not what its article says, and are reproduced here:

- The last module is lost. Loading the modules leaves the last one's cached tensors and the model's own the same memory, so what one candidate writes
  into the model is the "last module" of the next: after the first candidate, w = 0, it is zero.
- All modules get the scaling of the last one, whatever their own.
- A module that is listed twice counts once in the search, where the weights too many change nothing but the regulariser, and twice in what is merged.

With current versions of PEFT that is so for modules of the same targets and ranks. Others are refused here.

Used by algorithm.py.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from atoll.compose.population import nevergrad_package
from atoll.errors import ConfigError
from atoll.lorahub.arguments import number
from atoll.lorahub.examples import ExampleDataset
from atoll.lorahub.objective import GetLoss, GetRegular
from atoll.model.adapter import LoraModule
from atoll.model.generic import Change, GenericModel
from atoll.model.generic_adapter import GenericAdapter

BOUND = 1.5


class Learnt(NamedTuple):
    """The weights [N] as nevergrad gives them (numpy, float64), and the adapter that lorahub would merge."""

    weights: Any
    adapter: GenericAdapter


def learn_as_lorahub(
    model: GenericModel,
    adapters: Mapping[str, GenericAdapter],
    listed: Sequence[str],
    dataset: ExampleDataset,
    max_inference_step: int,
    batch_size: int | None,
    get_loss: GetLoss,
    get_regular: GetRegular,
    seed: int,
) -> Learnt:
    """Search as lorahub_learning of lorahub 0.1.0 does. adapters: by name, in the order in which `listed` names them first.

    Raises ConfigError for modules that differ in targets or rank, and where nevergrad is not installed.
    """
    state = _State(adapters, listed)

    def score(weights: Any) -> float:
        changes = state.set(weights)
        with model.changed(changes):
            loss = number("get_loss", get_loss(dataset, model.model, batch_size))
        return loss + number("get_regular", get_regular(weights))

    with _seeded(seed), _threads_ended():
        found = _minimum(score, len(listed), max_inference_step)
    return Learnt(found, state.adapter(found))


def _minimum(score: Callable[[Any], float], num_weights: int, steps: int) -> Any:
    """What NGOpt recommends after so many steps."""
    import numpy as np

    ng = nevergrad_package()
    space = ng.p.Array(init=[0] * num_weights, upper=[BOUND] * num_weights, lower=[-BOUND] * num_weights)
    optimiser = ng.optimizers.NGOpt(parametrization=space, budget=steps)

    def asked(call: Callable[[], Any]) -> Any:
        try:
            with _quiet():
                return call()
        except (TypeError, ValueError, RuntimeError, np.linalg.LinAlgError) as error:
            raise ConfigError(
                f"nevergrad's NGOpt failed after {optimiser.num_tell} of {steps} steps with {num_weights} modules: {error}",
                hint="with fewer than 200 steps for each module it chooses another optimiser",
            ) from error

    for _ in range(steps):
        candidate = asked(optimiser.ask)
        value = score(candidate.value)
        asked(partial(optimiser.tell, candidate, value))
    return asked(optimiser.provide_recommendation).value


class _State:
    """The modules' tensors as lorahub keeps them: the last one's are the model's."""

    def __init__(self, adapters: Mapping[str, GenericAdapter], listed: Sequence[str]) -> None:
        first, last, order = listed[0], listed[-1], list(adapters)
        for name, adapter in adapters.items():
            if _ranks(adapter) != _ranks(adapters[first]):
                raise ConfigError(
                    f"modules {first!r} and {name!r} differ in their targets or ranks, which lorahub cannot merge",
                    hint="leave compatible out and use form='cat', which takes any modules",
                )
        self._last, self._live = adapters[last], order.index(last)
        self._listed = [order.index(name) for name in listed]
        self._scalings = {place: module.scaling for place, module in self._last.modules.items()}
        self._factors: list[dict[str, tuple[Tensor, Tensor]]] = [
            {place: (module.a.float(), module.b.float()) for place, module in adapter.modules.items()} for adapter in adapters.values()
        ]

    def set(self, weights: Any) -> dict[str, Change]:
        """Put a candidate into the model, and so into the last module; returns what it changes."""
        self._factors[self._live] = self._summed(weights, range(len(self._factors)))
        return {place: _change(a, b, self._scalings[place]) for place, (a, b) in self._factors[self._live].items()}

    def adapter(self, weights: Any) -> GenericAdapter:
        """What is merged in the end: the sum over the list, in which a module may stand twice."""
        summed = self._summed(weights, self._listed)
        modules = {place: LoraModule(a, b, self._scalings[place]) for place, (a, b) in summed.items()}
        return GenericAdapter(self._last.spec, modules, task_type=self._last.task_type)

    def _summed(self, weights: Any, which: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Each factor's weighted sum over the modules numbered by `which`, in lorahub's order of operations."""
        first, *rest = which
        summed = {}
        for place in self._scalings:
            a, b = (weights[0] * tensor for tensor in self._factors[first][place])
            for weight, index in zip(weights[1:], rest, strict=False):
                a, b = a + weight * self._factors[index][place][0], b + weight * self._factors[index][place][1]
            summed[place] = a, b
        return summed


def _ranks(adapter: GenericAdapter) -> dict[str, int]:
    return {place: module.rank for place, module in adapter.modules.items()}


def _change(a: Tensor, b: Tensor, scaling: float) -> Change:
    """In PEFT's order of operations."""
    return lambda x, y: y + F.linear(F.linear(x, a.to(x)), b.to(x)) * scaling


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within, Python's and numpy's generators are seeded as lorahub seeds them; outside they are as if nothing had been drawn."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _threads_ended() -> Iterator[None]:
    """At the end, end the threads that step-by-step optimisers run in; else an error on the way would keep the process from ever exiting."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - before:
            if type(thread).__name__ == "_MessagingThread":
                cast(Any, thread).stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """nevergrad and scipy warn of the end tolerance that nevergrad itself sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
