"""The quasi-Newton search for itself: it finds minima in a box in few looks, each search of a batch as if it were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atoll.compose.quasi_newton import QuasiNewton

Function = Callable[[Tensor], Tensor]  # [S, n] -> [S]
BOX = (torch.tensor(-1.5), torch.tensor(1.5))


def looks(search: QuasiNewton, function: Function, most: int) -> int:
    """Run a search to its end; how many looks it took."""
    for number in range(1, most + 1):
        point = search.ask().clone().requires_grad_()
        values = function(point)
        values.sum().backward()
        assert point.grad is not None
        search.tell(values.detach(), point.grad)
        if search.ended:
            return number
    return most


def uneven(w: Tensor) -> Tensor:
    """A bowl a hundred times steeper one way than the other, its bottom at (0.6, -0.3, 0.1)."""
    return (torch.tensor([100.0, 10.0, 1.0]) * (w - torch.tensor([0.6, -0.3, 0.1])).square()).sum(1)


def valley(w: Tensor) -> Tensor:
    """Rosenbrock's, its bottom at (1, 1)."""
    return (1 - w[:, 0]).square() + 100 * (w[:, 1] - w[:, 0].square()).square()


@pytest.mark.parametrize(("function", "bottom", "most"), [(uneven, [0.6, -0.3, 0.1], 15), (valley, [1.0, 1.0], 60)])
def test_a_minimum_is_found_in_few_looks(function: Function, bottom: list[float], most: int) -> None:
    """Going down the gradient takes hundreds on either."""
    search = QuasiNewton(torch.zeros(1, len(bottom)), BOX, 0.5)
    assert looks(search, function, most) < most
    torch.testing.assert_close(search.weights[0], torch.tensor(bottom), rtol=0, atol=0.02)


def test_each_search_of_a_batch_goes_as_if_it_were_alone() -> None:
    """Folds run beside the real search; they must not change it."""
    starts = torch.tensor([[0.0, 0.0], [-1.2, 1.0], [1.5, -1.5], [1.0, 1.0]])
    together = QuasiNewton(starts, BOX, 0.5)
    alone = [QuasiNewton(start.unsqueeze(0), BOX, 0.5) for start in starts]
    for _ in range(25):
        for search in (together, *alone):
            point = search.ask().clone().requires_grad_()
            values = valley(point)
            values.sum().backward()
            assert point.grad is not None
            search.tell(values.detach(), point.grad)
        torch.testing.assert_close(together.weights, torch.cat([search.weights for search in alone]), rtol=0, atol=1e-5)


def test_a_minimum_outside_the_box_is_taken_where_the_box_ends() -> None:
    """And the weights that are free are still found: a bound that is active must not spoil the curvature of the others."""
    search = QuasiNewton(torch.zeros(1, 3), (torch.tensor(-0.5), torch.tensor(0.5)), 0.5)
    looks(search, uneven, 30)
    torch.testing.assert_close(search.weights[0], torch.tensor([0.5, -0.3, 0.1]), rtol=0, atol=1e-3)
    assert float(search.ask().abs().max()) <= 0.5


def test_no_step_is_longer_than_allowed_and_no_value_rises() -> None:
    search, before, lowest = QuasiNewton(torch.full((1, 2), -1.2), BOX, 0.1), torch.full((1, 2), -1.2), torch.inf
    for _ in range(30):
        point = search.ask().clone().requires_grad_()
        assert float((point.detach() - before).abs().max()) <= 0.1 + 1e-6
        values = valley(point)
        values.sum().backward()
        assert point.grad is not None
        search.tell(values.detach(), point.grad)
        before = search.weights
        assert float(valley(before)) <= lowest
        lowest = float(valley(before))


def test_a_point_that_is_not_finite_is_one_that_went_too_far() -> None:
    """Weights that make the forward overflow are stepped back from, and the search goes on."""

    def cliff(w: Tensor) -> Tensor:
        return torch.where(w[:, 0] > 0.4, torch.nan, (w[:, 0] - 0.35).square() + w[:, 1].square())

    search = QuasiNewton(torch.tensor([[-0.5, 0.7]]), BOX, 1.0)
    looks(search, cliff, 40)
    torch.testing.assert_close(search.weights[0], torch.tensor([0.35, 0.0]), rtol=0, atol=0.01)


def test_a_start_at_the_bottom_ends_at_once() -> None:
    search = QuasiNewton(torch.tensor([[0.6, -0.3, 0.1]]), BOX, 0.5)
    assert looks(search, uneven, 10) == 1
