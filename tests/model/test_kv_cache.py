"""model/kv_cache.py: pages of keys and values that cost memory only when used, and start and end clean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from atoll.model.kv_cache import PAGE_TOKENS, KvCache


def small(num_pages: int = 4, dtype: torch.dtype = torch.float32) -> KvCache:
    return KvCache(num_layers=3, num_pages=num_pages, num_kv_heads=2, head_size=8, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_bytes_and_zeros(dtype: torch.dtype) -> None:
    """Admission counts token_bytes; and every place must start finite, since a masked NaN still poisons a sum."""
    cache = small(dtype=dtype)
    assert cache.keys.shape == cache.values.shape == (3, 4, PAGE_TOKENS, 2, 8)
    assert cache.num_pages == 4
    assert cache.keys.dtype == dtype
    assert cache.token_bytes * 4 * PAGE_TOKENS == 2 * cache.keys.numel() * dtype.itemsize
    assert not cache.keys.any()
    assert not cache.values.any()


def test_a_copied_page_is_the_same_in_every_layer_and_a_page_of_its_own() -> None:
    """A fork writes into its copy; a layer that was missed, or memory that is shared, would change another continuation's score."""
    cache = small()
    cache.keys[:, 1], cache.values[:, 1] = torch.randn(2, 3, PAGE_TOKENS, 2, 8)
    cache.copy_page(1, 3)
    assert torch.equal(cache.keys[:, 3], cache.keys[:, 1])
    assert torch.equal(cache.values[:, 3], cache.values[:, 1])
    cache.keys[:, 3] = 0
    assert cache.keys[:, 1].any()


def test_zeroed_pages_hold_no_nan_and_others_keep_what_they_have() -> None:
    """A NaN that stayed would reach the page's next owner; a page zeroed too many would be an answer without its prompt."""
    cache = small()
    cache.keys[:], cache.values[:] = torch.nan, torch.nan
    cache.keys[:, 2], cache.values[:, 2] = 7.0, 8.0
    cache.zero_pages([0, 3])
    for page in (0, 3):
        assert not cache.keys[:, page].any()
        assert not cache.values[:, page].any()
    assert torch.all(cache.keys[:, 2] == 7.0)
    assert torch.all(cache.values[:, 2] == 8.0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_pages_that_nobody_used_take_no_memory() -> None:
    """Zeros are handed out by the system on first touch; a cache that wrote them would need all its memory at start."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    cache = KvCache(num_layers=4, num_pages=64 * 128, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    assert cache.keys.numel() * 2 == 2**29
    cache.keys[3, -1] = 1.0
    assert resident_bytes() - before < 2**26
