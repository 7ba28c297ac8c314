"""The keys and values of running sequences: a fixed set of rows, each as long as the longest sequence the engine accepts.

A row belongs to one sequence from `take` to `give_back`; decode reads it in place, without gathering. Rows are handed out lowest first, so running
sequences stand close together and the batched attention of decode covers few idle rows. Memory that was never written costs nothing (untouched
pages).

Used by the engine (who owns which row) and by attention.py (the tensors). `check` is the engine's integrity test of itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch
from torch import Tensor


class KvCache:
    """Keys and values [num_rows, num_kv_heads, row_tokens, K] for each layer, in one dtype."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        row_tokens: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_rows, num_kv_heads, row_tokens, head_size)
        self.keys, self.values = _lazy_zeros(shape, dtype, device), _lazy_zeros(shape, dtype, device)
        self.num_rows, self.row_tokens = num_rows, row_tokens
        self.token_bytes = 2 * num_layers * num_kv_heads * head_size * dtype.itemsize
        self._free = list(range(num_rows))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Hand out the lowest free row; the caller checks `num_free` first."""
        row = heapq.heappop(self._free)
        self._taken.add(row)
        return row

    def give_back(self, row: int) -> None:
        """Free a row; its old contents stay (they are finite, and every reader masks by length)."""
        if row not in self._taken:
            raise AssertionError(f"KV row {row} is given back but nobody holds it")
        self._taken.remove(row)
        heapq.heappush(self._free, row)

    def check(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless exactly the rows in `held` are taken, each once: a row can neither leak nor have two owners."""
        rows = list(held)
        if len(set(rows)) != len(rows):
            raise AssertionError(f"a KV row has two owners: {sorted(rows)}")
        if set(rows) != self._taken or sorted(self._free) != sorted(set(range(self.num_rows)) - self._taken):
            raise AssertionError(f"KV rows leak: sequences hold {sorted(rows)}, the cache has given out {sorted(self._taken)}")


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros whose pages the system hands out on first touch (calloc), so a large cache costs only what is used. Zeros, since 0 x NaN is NaN."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
