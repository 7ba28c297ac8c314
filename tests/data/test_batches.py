"""Batches: every row once, alike lengths together, the same order for the same seed and epoch."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from atoll.data.batches import epoch_batches, micro_batches
from atoll.errors import ConfigError


def lengths_of(count: int) -> list[int]:
    generator = random.Random(3)
    return [int(generator.lognormvariate(4, 0.7)) + 1 for _ in range(count)]


@pytest.mark.parametrize(("rows", "batch_size"), [(0, 4), (1, 4), (3, 4), (64, 16), (1003, 8), (5, 1)])
def test_every_row_is_in_exactly_one_batch(rows: int, batch_size: int) -> None:
    """A row left out is never learned, one taken twice counts double; only one batch may be short."""
    batches = epoch_batches(lengths_of(rows), batch_size, seed=0, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(rows))
    assert sorted((len(batch) for batch in batches), reverse=True)[: rows // batch_size] == [batch_size] * (rows // batch_size)


def test_rows_of_like_length_stand_together_in_a_random_order() -> None:
    """Padding each batch to its longest row must waste little, and batches must not come sorted, or late steps would see only long rows."""
    lengths = lengths_of(2000)
    batches = epoch_batches(lengths, 8, seed=0, epoch=0)
    assert sum(lengths) / sum(len(batch) * max(lengths[index] for index in batch) for batch in batches) > 0.9
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest != sorted(longest)
    assert abs(sum(longest[:125]) / sum(longest[125:]) - 1) < 0.25


def test_epochs_and_seeds_change_what_stands_together() -> None:
    """A small data set, too, gets new batches in every epoch, not only a new order of the same ones."""
    lengths = lengths_of(600)
    first, second, other = ({frozenset(batch) for batch in epoch_batches(lengths, 16, seed, epoch)} for seed, epoch in ((1, 11), (1, 12), (11, 1)))
    assert len(first & second) <= 2
    assert len(first & other) <= 2


def test_another_process_draws_the_same_order() -> None:
    """Resuming after a kill continues in the middle of an epoch: the order must follow from seed and epoch alone."""
    program = "from atoll.data.batches import epoch_batches; print(epoch_batches([n * 7 % 31 for n in range(60)], 4, 5, 2))"
    outputs = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{epoch_batches([n * 7 % 31 for n in range(60)], 4, 5, 2)}\n"}


def test_micro_batches_hold_every_row_once_within_the_limit() -> None:
    """The limit is memory: a group over it may be killed, unless it is one row that nothing can split."""
    lengths = [*lengths_of(40), 5000]
    groups = micro_batches(range(41), lengths, 400)
    assert sorted(index for group in groups for index in group) == list(range(41))
    assert all(sum(lengths[index] for index in group) <= 400 for group in groups if len(group) > 1)
    assert groups[0] == [40]


def test_micro_batches_are_few() -> None:
    """Each group costs a forward pass: rows that fit together are put together, longest first."""
    assert micro_batches([3, 1, 0, 2], [6, 4, 5, 5], 12) == [[0, 2], [3, 1]]
    assert micro_batches([], [], 10) == []


def test_a_long_row_among_short_ones_does_not_blow_up_the_padded_block() -> None:
    """Attention pads a group to rows times longest: bounded by their sum, one row of 500 and 127 of 20 made a block of 39,000."""
    lengths = [500] + [20] * 127
    groups = micro_batches(range(128), lengths, 2048)
    assert sorted(index for group in groups for index in group) == list(range(128))
    assert max(len(group) * max(lengths[index] for index in group) for group in groups) <= 2048


def test_sizes_below_one_are_refused() -> None:
    """Zero rows a step, or zero tokens a pass, would loop forever or train nothing."""
    with pytest.raises(ConfigError, match="batch_size is 0"):
        epoch_batches([1], 0, 0, 0)
    with pytest.raises(ConfigError, match="micro_batch_tokens is 0"):
        micro_batches([0], [1], 0)
