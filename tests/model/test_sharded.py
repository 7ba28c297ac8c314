"""model/sharded.py: parts of blocks, gathered in the order of a walk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atoll.model.sharded import ShardedBlocks, ShardedWeight, Share

SHAPES = ((6, 5), (3, 7))  # 51 numbers a block, which 2 and 4 do not divide
NUM_BLOCKS = 3


class Together:
    """`count` processes' shares of the same blocks; what one of them gathers, and when, is noted: ("begin", block) and ("arrive", block)."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.blocks = [[torch.randn(shape, generator=drawn).to(dtype) for shape in SHAPES] for _ in range(NUM_BLOCKS)]
        self.log: list[tuple[str, int]] = []
        self.members = [ShardedBlocks(Share(index, count, self._gather)) for index in range(count)]
        self.weights: list[list[tuple[ShardedWeight, ...]]] = [[member.add(block) for block in self.blocks] for member in self.members]

    def _gather(self, out: Tensor, part: Tensor) -> Callable[[], None]:
        block = next(index for index, own in enumerate(self.members[0]._parts) if own is part)
        out.fill_(255)  # nobody may read it before it has arrived
        self.log.append(("begin", block))

        def arrive() -> None:
            torch.cat([member._parts[block] for member in self.members], out=out)
            self.log.append(("arrive", block))

        return arrive

    def check(self, block: int) -> None:
        """The first process sees what was shared out."""
        for weight, truth in zip(self.weights[0][block], self.blocks[block], strict=True):
            assert torch.equal(weight.dense(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_walk_gives_every_block_whole_and_up_and_down_again(count: int, dtype: torch.dtype) -> None:
    """The last block is there for the way back, the first for the next walk."""
    together = Together(count, dtype)
    for _ in range(2):
        with together.members[0].walk(backward=True):
            for block in (0, 1, 2, 2, 1, 0):
                together.check(block)
    assert [block for what, block in together.log if what == "arrive"] == [0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_a_process_holds_its_part() -> None:
    """Padding is less than one byte a process and block."""
    together = Together(4)
    held = sum(part.numel() for part in together.members[0]._parts)
    assert held == NUM_BLOCKS * 51 * 4 / 4
    assert sum(weight.nbytes for block in together.weights[0] for weight in block) == pytest.approx(held, rel=0.02)


def test_the_next_block_is_on_its_way() -> None:
    """While one is computed; and nothing beyond the walk."""
    together = Together(2)
    with together.members[0].walk(backward=False):
        together.check(0)
        assert together.log == [("begin", 0), ("arrive", 0), ("begin", 1)]
    assert together.log[3:] == [("arrive", 1), ("begin", 2), ("arrive", 2)]


def test_what_fails_inside_a_walk_leaves_it_walked() -> None:
    """The others wait for this process's part of every block."""
    together = Together(2)
    with pytest.raises(RuntimeError, match="no memory left"), together.members[0].walk(backward=True):
        together.check(0)
        raise RuntimeError("no memory left")
    assert [block for what, block in together.log if what == "arrive"] == [0, 1, 2, 1, 0]


def test_outside_of_a_walk_a_block_is_gathered_alone() -> None:
    """What a start out of the base's weights asks for, in any order."""
    together = Together(2)
    for block in (2, 0, 0, 1):
        together.check(block)
    assert together.log == [("begin", 2), ("arrive", 2), ("begin", 0), ("arrive", 0), ("begin", 1), ("arrive", 1)]
