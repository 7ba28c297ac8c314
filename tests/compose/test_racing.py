"""Racing: the worse half of a generation is dropped after some examples, and what is clearly best never is."""

from __future__ import annotations

import pytest
import torch
from tests.compose.scenes import Bowl
from torch import Tensor

from atoll.compose.objective import Objective, l1
from atoll.compose.run import Run, Settings


def run_of(scores: Bowl, **settings: object) -> Run:
    return Run(
        Objective(scores, l1(0.0)),
        Settings(**settings),  # type: ignore[arg-type]
        layered=False,
        budget=1000,
        time_s=None,
        seed=0,
        report=None,
        stop_asked=lambda: False,
    )


def generation(num: int, width: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_winner_of_a_clear_case_is_never_dropped(at_once: int) -> None:
    """Where the examples agree on who is best, every race finds that candidate, with its true value, whichever examples it began with."""
    scores = Bowl([0.3, -0.2, 0.5], num_examples=5, spread=0.05, at_once=at_once)
    run = run_of(scores)
    for seed in range(8):
        candidates = generation(12, seed=seed)
        truth = scores.scores(candidates, range(5)).mean(1)
        values = run.values(candidates, racing=True)
        assert int(values.argmin()) == int(truth.argmin())
        torch.testing.assert_close(values.min(), truth.min())
    assert run.best is not None
    assert run.best.value == pytest.approx(min(point.value for point in run.history))


def test_half_is_dropped_and_ranks_behind_the_rest_in_its_own_order() -> None:
    """Optimisers by rank see all who were raced; the dropped must never look better than one who was scored to the end."""
    scores = Bowl([0.0, 0.0, 0.0], num_examples=5, spread=0.0)
    candidates = generation(9)
    truth = scores.scores(candidates, range(5)).mean(1)
    values = run_of(scores).values(candidates, racing=True)
    kept = truth.argsort()[:5]
    torch.testing.assert_close(values[kept], truth[kept])
    assert values.argsort().tolist()[:5] == kept.tolist()
    assert sorted(values.tolist(), key=float) == values[truth.argsort()].tolist()


def test_racing_saves_what_it_says() -> None:
    """Two of five examples for all, three for half: 3.5 rows a candidate instead of 5, counted so."""
    scores = Bowl([0.0] * 3, num_examples=5)
    run = run_of(scores)
    run.values(generation(10), racing=True)
    assert scores.rows == 35
    assert run.evaluations == pytest.approx(7.0)


@pytest.mark.parametrize(("num", "examples", "racing"), [(3, 5, True), (10, 2, True), (10, 5, False)])
def test_few_candidates_or_examples_do_not_race(num: int, examples: int, racing: bool) -> None:
    scores = Bowl([0.0] * 3, num_examples=examples)
    run = run_of(scores, racing=racing)
    candidates = generation(num)
    torch.testing.assert_close(run.values(candidates, racing=True), candidates.square().sum(1))
    assert run.evaluations == num


def test_races_begin_with_other_examples_each() -> None:
    """Or the first two examples would choose all survivors of a search."""
    scores = Bowl([0.0] * 3, num_examples=5)
    original, firsts = scores.scores, []
    scores.scores = lambda weights, rows: firsts.append(tuple(rows)) or original(weights, rows)  # type: ignore[method-assign]
    run = run_of(scores)
    for _ in range(5):
        run.values(generation(4), racing=True)
    assert firsts[::2] == [(0, 1), (2, 3), (4, 0), (1, 2), (3, 4)]
    assert all(sorted(early + late) == [0, 1, 2, 3, 4] for early, late in zip(firsts[::2], firsts[1::2], strict=True))
