"""What is minimised: a true mean by default, LoraHub's own scaling where asked, and no held-out example in it."""

from __future__ import annotations

import pytest
import torch
from tests.compose.scenes import Bowl, examples

from atoll.compose.objective import NOT_FINITE, FewShot, Objective, l1
from atoll.errors import ConfigError, DataError


def test_the_value_is_the_mean_loss_and_a_mean_of_weights() -> None:
    """Twice the examples or twice the adapters must not change what a loss or a weight counts, as they do in LoraHub."""
    objective = Objective(Bowl([0.0, 0.0], num_examples=4))
    weights, scores = torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert float(objective.value(scores, range(4), weights)) == pytest.approx(3.0 + 0.05 * 2.0)
    twice = Objective(Bowl([0.0] * 4, num_examples=8))
    assert float(twice.value(scores.repeat(1, 2), range(8), weights.repeat(1, 2))) == pytest.approx(3.1)
    layered = weights.unsqueeze(2).expand(-1, -1, 3)
    assert float(objective.value(scores, range(4), layered)) == pytest.approx(3.1)


def test_regularisers_are_means() -> None:
    weights = torch.tensor([[1.0, -3.0], [0.0, 0.5]])
    torch.testing.assert_close(l1(0.1)(weights), torch.tensor([0.2, 0.025]))
    assert torch.equal(l1(0.0)(weights), torch.zeros(2)), "none"


def test_layers_that_an_adapter_lacks_do_not_thin_out_the_regulariser() -> None:
    """Weights of layers without an update mean nothing, whatever they are."""
    acts = torch.tensor([[True, True, False], [True, False, False]])
    weights = torch.tensor([[[1.0, -2.0, 9.0], [3.0, 9.0, 9.0]]])
    torch.testing.assert_close(l1(0.1, acts)(weights), torch.tensor([0.2]))
    torch.testing.assert_close(l1(0.1, acts)(weights[:, :, 0]), torch.tensor([0.2]))
    torch.testing.assert_close(l1(0.1, torch.ones(2, 3, dtype=torch.bool))(weights), l1(0.1)(weights))


def test_a_part_of_the_examples_stands_for_all() -> None:
    """A race scores some examples first; its values must be on the scale of whole ones, whatever each example counts."""
    objective = Objective(Bowl([0.0], num_examples=4), l1(0.0), importance=[0.1, 0.2, 0.3, 0.6])
    same = torch.full((1, 4), 2.0)
    whole = float(objective.value(same, range(4), torch.zeros(1, 1)))
    assert whole == pytest.approx(2.4)
    for part in ([0], [1, 3], [2, 0, 1]):
        assert float(objective.value(same[:, part], part, torch.zeros(1, 1))) == pytest.approx(whole)
    mixed = torch.tensor([[1.0, 5.0]])
    assert float(objective.value(mixed, [3, 0], torch.zeros(1, 1))) == pytest.approx((0.6 * 1 + 0.1 * 5) / 0.7 * 1.2), "in the order given"


def test_held_out_examples_are_in_no_value() -> None:
    few = FewShot(examples(8))
    held_out = few.hold_out(0.25, seed=0)
    objective = Objective(Bowl([0.0], num_examples=8), held_out=held_out)
    assert len(held_out) == 2
    assert sorted(objective.searched + held_out) == list(range(8))
    assert not set(held_out) & set(objective.coefficients(objective.searched).nonzero().flatten().tolist())
    assert float(objective.coefficients(objective.searched).sum()) == pytest.approx(1.0)


def test_what_is_held_out_comes_from_the_seed() -> None:
    """And leaves at least one example on each side."""
    few = FewShot(examples(10))
    assert few.hold_out(0.3, 1) == few.hold_out(0.3, 1) != few.hold_out(0.3, 2)
    assert [len(FewShot(examples(num)).hold_out(share, 0)) for num, share in ((2, 0.01), (2, 0.99), (5, 0.2), (10, 0.25))] == [1, 1, 1, 2]
    folds = few.folds(4, seed=3)
    assert folds == few.folds(4, seed=3) != few.folds(4, seed=4)
    assert sorted(example for fold in folds for example in fold) == list(range(10))
    assert sorted(map(len, folds)) == [2, 2, 3, 3]


def test_splits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be held out of one"):
        FewShot(examples(1)).hold_out(0.5, 0)
    with pytest.raises(ConfigError, match=r"share of examples to hold out is 1\.5"):
        FewShot(examples(4)).hold_out(1.5, 0)
    for num in (1, 5):
        with pytest.raises(ConfigError, match=f"4 examples cannot be cut into {num} folds"):
            FewShot(examples(4)).folds(num, 0)
    with pytest.raises(ConfigError, match="all examples are held out"):
        Objective(Bowl([0.0], num_examples=2), held_out=(0, 1))
    with pytest.raises(DataError, match="no examples"):
        FewShot([])


def test_the_digest_is_of_the_tokens_and_labels() -> None:
    """It says in the manifest which examples an adapter was composed for: where they stood does not matter, what they say does."""
    rows = examples(3)
    moved = [type(row)(row.token_ids, row.num_prompt, "elsewhere:1") for row in rows]
    assert FewShot(rows).digest == FewShot(moved).digest
    assert len({FewShot(rows).digest, FewShot(rows[:2]).digest, FewShot([*rows[:2], type(rows[2])(rows[2].token_ids, 1, "x:1")]).digest}) == 3


def test_scores_that_are_no_numbers_rank_last() -> None:
    """An adapter that overflows at some weights must not win, nor end the search."""
    objective = Objective(Bowl([0.0], num_examples=2))
    values = objective.value(torch.tensor([[1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]]), range(2), torch.zeros(3, 1))
    assert values.tolist() == [1.0, NOT_FINITE, NOT_FINITE]
