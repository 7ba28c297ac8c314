"""The order of training: which rows make an optimizer step, and how a step is split to fit memory.

Rows of like length stand together, because a batch costs what its longest row costs in attention and a step is as even as its rows; yet the order
must stay random for the gradient. So rows are shuffled, sorted inside windows of some batches, and the batches shuffled again. All of it follows
from (seed, epoch) alone: a resumed run draws the same order.

Used by train.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from atoll.errors import ConfigError

WINDOW_BATCHES = 50  # a window this wide already makes lengths within a batch nearly equal (95 % of a padded batch is content)
MIN_WINDOWS = 4  # a small data set in a single window would get nearly the same batches in every epoch


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of each optimizer step of an epoch; every row is in exactly one, and only one batch may be smaller than batch_size.

    The same for equal arguments in every process and on every machine. Raises ConfigError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1 row", hint="16 is a good start")
    # Seeded with a text: random.Random hashes it with SHA-512, so that (1, 11) and (11, 1) differ and PYTHONHASHSEED has no part in it.
    generator = random.Random(f"atoll epoch_batches {seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    num_batches = math.ceil(len(order) / batch_size)
    window = batch_size * max(1, min(WINDOW_BATCHES, num_batches // MIN_WINDOWS))
    batches = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda index: lengths[index])  # stable: ties stay shuffled
        batches += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    generator.shuffle(batches)
    return batches


def micro_batches(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The rows of one step in groups whose rows times longest row is at most `max_tokens`, longest first; a longer row is a group of its own.

    Rows times longest, not the sum: attention lays a group's rows into one padded block. Groups only decide memory and speed, not the loss, which is
    summed over the step's labels (dropout's masks alone are drawn a group). Raises ConfigError for max_tokens below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"micro_batch_tokens is {max_tokens}, expected at least 1 token", hint="2048 is a good start")
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
