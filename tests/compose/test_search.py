"""Searches find what is there to find, the same twice, within what they may spend, and keep the best whatever ends them."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from tests.adapters import random_adapter
from tests.compose.scenes import Bowl, Valley, examples, strong
from torch import Tensor

from atoll.compose.losses import LabelLosses
from atoll.compose.objective import FewShot, Objective, l1
from atoll.compose.pool import Pool, reach
from atoll.compose.population import _Nevergrad
from atoll.compose.quasi_newton import QuasiNewton
from atoll.compose.run import Settings
from atoll.compose.search import Found, search
from atoll.data.encode import EncodedRow
from atoll.errors import ConfigError, TrainingError
from atoll.model.bank import LoraBank
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.composed import cat
from atoll.model.decoder import Decoder

limits = QuasiNewton.limits
TARGET = [0.7, 0.0, -0.4]
SEARCHES = ["gradient", "gradient_per_layer", "cma", "nevergrad:NGOpt", "nevergrad:CMA", "nevergrad:DE"]


def bowl(**options: object) -> Objective:
    return Objective(Bowl(TARGET, **options), l1(0.0))  # type: ignore[arg-type]


def flat(found: Found) -> Tensor:
    return found.weights if found.weights.dim() == 1 else found.weights.mean(1)


# --- what is found ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_every_search_goes_down(method: str) -> None:
    """From the same start all of them must come close to the bottom of a bowl, or the books or the signs are wrong."""
    found = search(bowl(), 3, method, budget=200, settings=Settings(start="zero"))
    assert found.weights.shape == ((3, 3) if method == "gradient_per_layer" else (3,))
    torch.testing.assert_close(flat(found), torch.tensor(TARGET), rtol=0, atol=0.15)
    assert found.value == min(point.value for point in found.history)
    assert found.evaluations <= 200
    assert found.stopped_by in ("budget", "converged")


PLANTED = [0.8, 0.0, -0.6, 0.0, 0.5]


@pytest.fixture(scope="module")
def planted(decoder: Decoder) -> tuple[Pool, list[EncodedRow]]:
    """Five adapters and 10 rows drawn from a known composition of three of them."""
    adapters = [strong(random_adapter(decoder, 3 + index % 2, seed=20 + index), 4.0) for index in range(len(PLANTED))]
    slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(cat(adapters, PLANTED))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (6,), generator=generator).tolist() for _ in range(10)]
    with torch.no_grad():
        for _ in range(16):
            batch = PackedBatch.of(rows, outputs="last")
            logits = decoder.logits(decoder.forward(batch, AdapterBatch.single(slot, batch.num_tokens)))
            for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1, generator=generator).tolist(), strict=True):
                row += token
    return Pool.of(adapters, decoder), [EncodedRow(row, 6, f"few.jsonl:{index + 1}") for index, row in enumerate(rows)]


@pytest.mark.parametrize(("method", "budget"), [("gradient", 90), ("gradient_per_layer", 90), ("cma", 160), ("nevergrad:NGOpt", 60)])
def test_a_planted_mixture_is_found(decoder: Decoder, planted: tuple[Pool, list[EncodedRow]], method: str, budget: int) -> None:
    """The whole way through the model: the search must do as well as the composition that wrote the labels, and find its weights."""
    pool, rows = planted
    scores = LabelLosses(decoder, pool, rows)
    base, truth = scores.scores(torch.tensor([[0.0] * pool.num, PLANTED]), range(10)).mean(1).tolist()
    assert base - truth > 0.2, "there must be something to find"
    found = search(Objective(scores, l1(0.0)), pool.num, method, budget=budget, settings=Settings(start="zero"))
    assert found.value < truth + 0.02
    # 160 labels do not say more of a weight; a weight a layer has more freedom than they have information
    assert float((flat(found) - torch.tensor(PLANTED)).abs().max()) < (0.4 if method == "gradient_per_layer" else 0.25)


def test_a_search_from_the_best_never_ends_above_what_is_simple() -> None:
    """The base, 1/N each and every adapter alone are scored first: losing to one of them on the examples would be absurd."""
    for method in ("gradient", "cma"):
        for target in ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1 / 3] * 3):
            found = search(Objective(Bowl(target), l1(0.0)), 3, method, budget=9)
            assert found.value < 1e-9, (method, target)


@pytest.mark.parametrize("method", ["gradient", "gradient_per_layer"])
def test_an_adapter_far_larger_than_the_others_does_not_lead_the_search_astray(decoder: Decoder, method: str) -> None:
    """Its weight alone would decide how long each step is; the search over weights by reach finds what it finds with one of usual size."""
    rows, small = examples(6), [random_adapter(decoder, 4, seed=index) for index in range(6)]
    values = {}
    for factor in (1.0, 30.0, 1000.0):
        pool = Pool.of([*small, strong(random_adapter(decoder, 4, seed=40), factor)], decoder)
        assert (max(pool.reach) > 1) == (factor > 1) and pool.reach[:6] == (1.0,) * 6
        scores = LabelLosses(decoder, pool, rows)
        objective, settings = Objective(scores, l1(acts=pool.acts)), Settings(reach=pool.reach)
        values[factor] = search(objective, pool.num, method, settings=settings).value
        simple = torch.cat([torch.zeros(1, 7), torch.eye(7)])
        assert values[factor] <= float((scores.scores(simple, range(6)).mean(1) + objective.regulariser(simple)).min()) + 1e-5
    assert max(values.values()) < min(values.values()) + 0.05


def test_the_reach_of_adapters_that_are_broken_or_untrained_is_that_of_all(decoder: Decoder) -> None:
    usual = random_adapter(decoder, 2, seed=1)
    others = [strong(usual, factor) for factor in (0.0, math.nan, math.inf, 8.0)]
    assert reach([usual, *others]) == (1, 1, 1, 1, pytest.approx(2.0))
    assert reach([strong(usual, 0.0)] * 2) == (1, 1)


def test_best_single_and_uniform_are_what_they_say() -> None:
    """Two controls, by the same call."""
    found = search(bowl(), 3, "best_single")
    assert (found.weights.tolist(), found.evaluations, found.stopped_by) == ([1.0, 0.0, 0.0], 3.0, "done")
    found = search(bowl(), 3, "uniform")
    assert (found.weights.tolist(), found.evaluations) == ([pytest.approx(1 / 3)] * 3, 1.0)


def test_weights_stay_inside_their_bounds() -> None:
    """LoraHub's box is ±1.5; outside it adapters break the base."""
    for method in SEARCHES:
        found = search(Objective(Bowl([9.0, -9.0]), l1(0.0)), 2, method, budget=80, settings=Settings(bounds=(-0.5, 0.5)))
        assert float(found.weights.abs().max()) <= 0.5
        torch.testing.assert_close(flat(found), torch.tensor([0.5, -0.5]), rtol=0, atol=0.1)


def test_one_adapter_alone_can_be_weighted() -> None:
    """CMA-ES does not search in one dimension by itself."""
    for method in SEARCHES:
        found = search(Objective(Bowl([0.4]), l1(0.0)), 1, method, budget=60)
        torch.testing.assert_close(flat(found), torch.tensor([0.4]), rtol=0, atol=0.1)


def test_the_regulariser_is_in_the_value_and_the_gradient() -> None:
    """An adapter that does not help gets no weight when weights cost something."""
    free, paid = (search(Objective(Bowl([0.05, 1.0]), regulariser), 2, budget=150).weights for regulariser in (l1(0.0), None))
    assert paid[0].abs() < free[0].abs()
    assert paid[1] < free[1]


# --- the same again ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_a_seed_gives_the_same_bits(decoder: Decoder, planted: tuple[Pool, list[EncodedRow]], method: str) -> None:
    """In one process and with other random numbers drawn in between: nothing may come from a global generator."""
    import numpy as np

    pool, rows = planted
    results = []
    for _ in range(2):
        torch.rand(3)
        np.random.seed(None)
        found = search(Objective(LabelLosses(decoder, pool, rows[:4])), pool.num, method, budget=24, seed=5)
        results.append(found)
    one, other = results
    assert torch.equal(one.weights, other.weights)
    assert [point[0::2] for point in one.history] == [point[0::2] for point in other.history]  # evaluations and values; not the seconds
    assert (one.value, one.evaluations) == (other.value, other.evaluations)


def test_seeds_differ_where_a_search_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave numpy's global generator as it was."""
    import numpy as np

    np.random.seed(3)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    for method in ("cma", "nevergrad:CMA"):
        found = [search(bowl(), 3, method, budget=30, seed=seed).weights for seed in (0, 1, 1 << 40)]
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


# --- what it may cost -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("budget", [13, 40])
def test_a_budget_is_kept(method: str, budget: int) -> None:
    """Counted in rows that were really run: an evaluation is one candidate on all examples, and a gradient step is three."""
    objective = Objective(Valley(TARGET), l1(0.0))
    found = search(objective, 3, method, budget=budget)
    rows = objective.scores.rows  # type: ignore[attr-defined]
    steps = sum(1 for _ in found.history) if method.startswith("gradient") else 0
    assert found.evaluations <= budget
    assert found.evaluations >= 0.6 * budget, "the budget is there to be used"
    assert rows / 5 <= found.evaluations
    assert (rows / 5 == found.evaluations) == (steps == 0)


@pytest.mark.parametrize("method", ["gradient", "gradient_per_layer"])
def test_a_look_that_goes_too_far_costs_no_backward_and_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a narrow valley's looks some are refused: their gradients are never read, in whichever portion the value is beyond its limit."""
    objective = Objective(Valley(TARGET), l1(0.0))
    found = search(objective, 3, method, budget=60)
    monkeypatch.setattr(QuasiNewton, "limits", property(lambda self: torch.full_like(self._values, torch.inf)))
    tell = QuasiNewton.tell

    def with_limits(self: QuasiNewton, values: Tensor, gradients: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuasiNewton, "limits", limits)
            return tell(self, values, gradients)

    monkeypatch.setattr(QuasiNewton, "tell", with_limits)
    every = search(objective, 3, method, budget=60)
    assert torch.equal(found.weights, every.weights)
    assert [point.value for point in found.history] == [point.value for point in every.history]
    assert every.evaluations == 60
    assert found.evaluations < every.evaluations


def test_lorahubs_search_takes_forty_evaluations_one_by_one() -> None:
    """NGOpt with one worker, from zero, in LoraHub's box: what was told in between decides what is asked next. Its own last word is kept too."""
    objective = bowl()
    asked = []
    original = objective.scores.scores
    objective.scores.scores = lambda weights, rows: asked.append(weights.clone()) or original(weights, rows)  # type: ignore[method-assign]
    found = search(objective, 3, "nevergrad:NGOpt")
    assert len(asked) == found.evaluations == 40
    assert all(len(weights) == 1 for weights in asked)
    assert torch.equal(asked[0], torch.zeros(1, 3))
    assert found.recommendation is not None
    torch.testing.assert_close(found.recommendation, found.weights, rtol=0, atol=0.1)
    assert search(bowl(), 3, "gradient").recommendation is None


def test_an_optimiser_without_a_last_word_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would keep the process alive."""
    closed = []

    def refuse(optimiser: object) -> Tensor:
        raise ConfigError("it has none")

    monkeypatch.setattr("atoll.compose.population._Nevergrad.recommendation", refuse)
    original = _Nevergrad.close
    monkeypatch.setattr("atoll.compose.population._Nevergrad.close", lambda optimiser: (closed.append(optimiser), original(optimiser)))
    with pytest.raises(ConfigError, match="it has none"):
        search(bowl(), 3, "nevergrad:OnePlusOne")
    assert len(closed) == 1


def test_optimisers_that_can_get_whole_generations() -> None:
    """Workers are rows of a batch; those that go step by step are refused more than one."""
    sizes = []
    objective = bowl()
    original = objective.scores.scores
    objective.scores.scores = lambda weights, rows: sizes.append(len(weights)) or original(weights, rows)  # type: ignore[method-assign]
    search(objective, 3, "nevergrad:DE", budget=20, settings=Settings(workers=10, racing=False))
    assert sizes == [10, 10]
    with pytest.raises(ConfigError, match="Cobyla goes step by step"):
        search(bowl(), 3, "nevergrad:Cobyla", settings=Settings(workers=2))


@pytest.mark.parametrize("name", ["NGOpt", "MetaModel", "NelderMead", "SQP"])
def test_nevergrads_own_threads_end_with_the_search(name: str) -> None:
    """A thread that waits for a value would keep the process alive; with a search that was cut short, an error in it, or one that went to its end."""
    scores = Bowl(TARGET)
    original = scores.scores

    def failing(weights: Tensor, rows: Sequence[int]) -> Tensor:
        if scores.rows > 60:
            raise RuntimeError("no memory")
        return original(weights, rows)

    before, kept = threading.active_count(), []
    search(Objective(Bowl(TARGET), l1(0.0)), 3, f"nevergrad:{name}", budget=30)
    search(Objective(Bowl(TARGET), l1(0.0)), 3, f"nevergrad:{name}", budget=300, time_s=0.01)
    scores.scores = failing  # type: ignore[method-assign]
    try:
        search(Objective(scores, l1(0.0)), 3, f"nevergrad:{name}", budget=30)
    except RuntimeError as error:
        kept.append(error)  # with its frames, and all that they hold
    assert kept
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_optimiser_that_fails_is_named() -> None:
    """Some of nevergrad's five hundred need packages that nobody has."""
    with pytest.raises(ConfigError, match="nevergrad's optimiser BOBYQA failed: No module named 'pybobyqa'"):
        search(bowl(), 3, "nevergrad:BOBYQA")


class Slow(Bowl):
    """A bowl whose scores take a while."""

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        time.sleep(0.02)
        return super().scores(weights, examples)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_time_budget_ends_the_search_between_forwards(method: str) -> None:
    """With the best so far, which is always something: even a budget that is over at once has seen one candidate."""
    time_s = 0.05 if method.startswith("gradient") else 0.3  # a gradient is soon at the bottom of a bowl
    found = search(Objective(Slow(TARGET, at_once=2), l1(0.0)), 3, method, budget=100_000, time_s=time_s)
    assert found.stopped_by == "time"
    assert found.value < 1.0
    found = search(Objective(Slow(TARGET, at_once=2), l1(0.0)), 3, method, time_s=1e-9)
    assert found.stopped_by == "time"
    assert found.evaluations <= 5


@pytest.mark.parametrize("method", ["gradient", "cma", "nevergrad:NGOpt"])
def test_ctrl_c_keeps_the_best_so_far(method: str) -> None:
    """The first one ends the search after the forward at hand; the handler of before is back afterwards."""
    scores = Bowl(TARGET, at_once=2)
    original, calls = scores.scores, []

    def interrupting(weights: Tensor, rows: Sequence[int]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(weights, rows)

    scores.scores = interrupting  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    found = search(Objective(scores, l1(0.0)), 3, method, budget=1000)
    assert found.stopped_by == "interrupted"
    assert len(calls) <= 5
    assert found.value == pytest.approx(float(original(found.weights[None], range(5)).mean()))
    assert signal.getsignal(signal.SIGINT) is before


def test_whoever_started_it_may_end_it_and_watch() -> None:
    """What an asynchronous job needs: progress, and a way to cancel without a signal."""
    reports: list[tuple[str, int, int]] = []

    def report(headline: str, done: int, total: int) -> None:
        reports.append((headline, done, total))

    found = search(bowl(), 3, "cma", budget=300, report=report, stop_asked=lambda: len(reports) > 5)
    assert found.stopped_by == "interrupted"
    assert len(reports) == 6
    assert reports[-1][0] == f"best {found.value:.4f}"
    assert reports[-1][2] == 300


# --- held-out examples ------------------------------------------------------------------------------------------------------------------------


class Overfit(Bowl):
    """Four examples at the target, and two, to be held out, at half of it: going all the way is going too far."""

    def __init__(self) -> None:
        super().__init__([1.0, 0.0], num_examples=6)
        self.targets[4:] *= 0.5


@pytest.mark.parametrize("method", ["gradient", "gradient_per_layer", "cma", "nevergrad:CMA"])
def test_a_search_stops_where_the_held_out_examples_are_best(method: str) -> None:
    """The weights returned are those of the best held-out value, not of the last or the lowest search value."""
    settings = Settings(start="zero", patience=5, step=0.05)
    objective = Objective(Overfit(), l1(0.0), held_out=(4, 5))
    found = search(objective, 2, method, budget=400, settings=settings)
    assert found.stopped_by == "held out"
    assert found.held_out == pytest.approx(min(point.held_out for point in found.history if point.held_out is not None))
    assert abs(float(flat(found)[0]) - 0.5) < 0.2
    assert found.value > min(point.value for point in found.history)
    endless = Settings(start="zero", patience=10_000, step=0.05)
    far = search(Objective(Overfit(), l1(0.0), held_out=(4, 5)), 2, method, budget=400, settings=endless)
    assert far.held_out is not None
    assert far.evaluations > found.evaluations, "stopping early is what the patience is for"


def test_folds_hold_every_example_out_without_losing_one() -> None:
    """The real search uses all examples; the searches beside it only say how long it should go."""
    scores = Bowl([1.0, 0.0], num_examples=4, spread=0.4)
    folds = FewShot(examples(4)).folds(4, seed=0)
    found = search(Objective(scores, l1(0.0), folds=folds), 2, budget=900, settings=Settings(start="zero", patience=1000))
    assert found.held_out is not None
    assert found.held_out == min(point.held_out for point in found.history if point.held_out is not None)
    mean = scores.targets.mean(0)
    assert float((found.weights - mean).norm()) < 0.3
    # The mean of the others is further from an example than the mean of all: (n/(n-1))² times the variance.
    variance = float((scores.targets - mean).square().sum(1).mean())
    at_end = [point.held_out for point in found.history][-1]
    assert at_end == pytest.approx(variance * (4 / 3) ** 2, rel=0.1)


# --- what is refused --------------------------------------------------------------------------------------------------------------------------


def test_searches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="no method 'gradent'") as error:
        search(bowl(), 3, "gradent")
    assert error.value.hint == "did you mean 'gradient'?"
    with pytest.raises(ConfigError, match="nevergrad has no optimiser 'NGOptt'") as error:
        search(bowl(), 3, "nevergrad:NGOptt")
    assert "'NGOpt" in error.value.hint
    for method in ("nevergrad", "nevergrad:", "cma:x"):
        with pytest.raises(ConfigError, match="no method"):
            search(bowl(), 3, method)
    with pytest.raises(ConfigError, match="needs scores with gradients"):
        search(bowl(differentiable=False), 3)
    with pytest.raises(ConfigError, match="cma knows no folds"):
        search(Objective(Bowl(TARGET), folds=((0, 1), (2, 3, 4))), 3, "cma")
    for wrong in ({"budget": 0}, {"time_s": 0.0}, {"time_s": float("nan")}):
        with pytest.raises(ConfigError, match="budget is"):
            search(bowl(), 3, **wrong)  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is optional; the gradient needs none of it."""
    import sys

    for package, method in (("cma", "cma"), ("nevergrad", "nevergrad:NGOpt")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=package) as error:
            search(bowl(), 3, method)
        assert "atoll[compose]" in error.value.hint


def test_an_adapter_that_overflows_is_no_start() -> None:
    """A search begins with the best of those whose scores are numbers."""
    scores = Bowl([0.0, 1.0, 0.0])
    original = scores.scores

    def broken(weights: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.where(weights[:, :1] > 0.5, float("nan"), original(weights, rows))

    scores.scores = broken  # type: ignore[method-assign]
    for method in ("gradient", "cma"):
        found = search(Objective(scores, l1(0.0)), 3, method, budget=9)
        assert found.weights.tolist() == [0.0, 1.0, 0.0]


def test_scores_that_are_never_finite_are_an_error() -> None:
    """Rather than a composition of nothing."""
    objective = Objective(Bowl([float("nan"), 0.0]))
    for method in ("cma", "best_single", "uniform"):
        with pytest.raises(TrainingError, match="no candidate has a finite score"):
            search(objective, 2, method, budget=8)
    with pytest.raises(TrainingError, match="gradient of the composition weights is not finite"):
        search(objective, 2)
