"""The keys and values of running sequences, in pages of 32 tokens: memory only, without any accounting.

A sequence's tokens stand in the pages of its page table, in order; two sequences with the same beginning may name the same pages. So a cache holds as
many tokens as there are pages, however long each sequence is. Memory that was never written costs nothing (the system hands it out on first touch).

Used by attention.py (the tensors) and by the engine, whose pages.py says who owns which page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_TOKENS = 32  # large enough that a page is one long copy, small enough that little of the last one is wasted


class KvCache:
    """Keys and values [num_layers, num_pages, PAGE_TOKENS, num_kv_heads, K] in one dtype. Token-major: storing and gathering copy whole tokens."""

    def __init__(
        self, num_layers: int, num_pages: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_layers, num_pages, PAGE_TOKENS, num_kv_heads, head_size)
        self.keys, self.values = _lazy_zeros(shape, dtype, device), _lazy_zeros(shape, dtype, device)
        self.num_pages = num_pages
        self.token_bytes = 2 * num_layers * num_kv_heads * head_size * dtype.itemsize

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer: what a fork does with a page that it shares and is about to write into."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Clean pages that may hold NaN: another sequence's masked attention would still multiply it by zero, which is NaN."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        self.keys[:, index] = 0
        self.values[:, index] = 0


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros whose pages the system hands out on first touch (calloc), so a large cache costs only what is used. Zeros, since 0 x NaN is NaN."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
