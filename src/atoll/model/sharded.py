"""Frozen blocks shared out over processes: each holds a part of every block's linears, and a block is gathered when it is computed.

ZeRO's third stage (Rajbhandari et al. 2020, arXiv 1910.02054), FSDP's full shard (Zhao et al. 2023, arXiv 2304.11277), for frozen weights: parts are
gathered, nothing is scattered back, and the optimizer's state is the adapter's and small. Gathering is what all processes do at once, in the same
order. So a forward, with its backward, is a `walk` through the blocks: up, and down again. As its order is known, the next block is on its way while
one is computed; and whoever has nothing to compute, or failed, walks all the same, because the others need its parts.

Used by decoder.py, which keeps its linears here where it is asked to, and by train's loop, which walks.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's place, `index` from 0, among the `count` that hold a base together.

    gather(out, part) begins to fill out [count * n] with the part [n] of every process, both uint8, and returns a function that waits for the end.
    """

    index: int
    count: int
    gather: Callable[[Tensor, Tensor], Callable[[], None]]


class ShardedBlocks:
    """The blocks' linears. Two blocks are whole at a time: the one that is computed and the one that follows it."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._parts: list[Tensor] = []  # uint8, of each block
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._at, self._side = -1, 0  # the block that is whole, and in which buffer
        self._ahead: deque[int] = deque()  # the rest of the walk
        self._arrives: Callable[[], None] | None = None  # waits for the block that is under way, the first of those ahead

    @property
    def count(self) -> int:
        """Processes that hold the blocks together."""
        return self._share.count

    def add(self, weights: Sequence[Tensor]) -> tuple[ShardedWeight, ...]:
        """The next block's weights, all of one dtype and device: this process keeps its part of them."""
        whole = torch.cat([weight.reshape(-1) for weight in weights]).view(torch.uint8)
        size = math.ceil(whole.numel() / self.count)
        part = whole.new_zeros(size)
        mine = whole[self._share.index * size : (self._share.index + 1) * size]
        part[: mine.numel()] = mine
        self._parts.append(part)
        found, start = [], 0
        for weight in weights:
            found.append(ShardedWeight(self, len(self._parts) - 1, start, weight))
            start += weight.nbytes
        return tuple(found)

    @contextlib.contextmanager
    def walk(self, *, backward: bool) -> Iterator[None]:
        """What is computed inside uses every block once in order, or not at all, and with `backward` again in the other order.

        All processes walk alike. What was not used inside is gathered at the end, whatever the inside ended with.
        """
        up = range(len(self._parts))
        order = [*up, *reversed(up[:-1])] if backward else [*up]
        self._ahead = deque(order[1:] if order[0] == self._at else order)
        try:
            if self._ahead:
                self._begin()
            yield
        finally:
            while self._ahead:
                self._step()

    def fetch(self, block: int) -> Tensor:
        """All bytes of a block, uint8, good until the block after the next is fetched. Outside of a walk all processes must ask for it at once."""
        if block != self._at:
            if not self._ahead:
                self._ahead.append(block)
            assert self._ahead[0] == block, f"block {block} is asked for, but the walk comes to {self._ahead[0]}"
            self._step()
        return self._both()[self._side]

    def _step(self) -> None:
        """Arrive at the next block, and begin to gather the one behind it."""
        if self._arrives is None:
            self._begin()
        assert self._arrives is not None
        arrives, self._arrives = self._arrives, None
        block = self._ahead.popleft()
        arrives()
        self._at, self._side = block, 1 - self._side
        if self._ahead:
            self._begin()

    def _begin(self) -> None:
        part = self._parts[self._ahead[0]]
        self._arrives = self._share.gather(self._both()[1 - self._side][: part.numel() * self.count], part)

    def _both(self) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            largest = max(self._parts, key=Tensor.numel)
            self._buffers = (largest.new_empty(largest.numel() * self.count), largest.new_empty(largest.numel() * self.count))
        return self._buffers


class ShardedWeight:
    """One fused weight [d_out, d_in] of a block that is held in parts. Reading it (`dense`) gathers the block, if it is not there."""

    def __init__(self, blocks: ShardedBlocks, block: int, start: int, weight: Tensor) -> None:
        """start: its first byte in the block."""
        self._blocks, self._block, self._bytes = blocks, block, slice(start, start + weight.nbytes)
        self.shape, self.dtype, self.device = (int(weight.shape[0]), int(weight.shape[1])), weight.dtype, weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of it that one process holds."""
        return math.ceil((self._bytes.stop - self._bytes.start) / self._blocks.count)

    def dense(self) -> Tensor:
        """The weight [d_out, d_in], in a buffer that a later block's overwrites."""
        return self._blocks.fetch(self._block)[self._bytes].view(self.dtype).view(self.shape)
