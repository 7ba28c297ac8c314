"""model/kv_cache.py: rows have one owner, are handed out lowest first, and cost memory only when used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from atoll.model.kv_cache import KvCache


def small(num_rows: int = 4, dtype: torch.dtype = torch.float32) -> KvCache:
    return KvCache(num_layers=3, num_rows=num_rows, row_tokens=16, num_kv_heads=2, head_size=8, dtype=dtype)


def test_the_lowest_free_row_is_handed_out_first() -> None:
    """Decode attends over rows 0 to the highest one in use; rows handed out high would make it read idle ones."""
    cache = small()
    assert [cache.take() for _ in range(3)] == [0, 1, 2]
    cache.give_back(1)
    cache.give_back(0)
    assert [cache.take(), cache.take(), cache.take()] == [0, 1, 3]
    assert cache.num_free == 0


def test_a_row_cannot_be_given_back_twice() -> None:
    """The second giver would free a row that by then belongs to somebody else: two users in one memory."""
    cache = small()
    row = cache.take()
    cache.give_back(row)
    with pytest.raises(AssertionError, match="row 0 is given back but nobody holds it"):
        cache.give_back(row)


def test_the_integrity_check_finds_leaks_and_double_owners() -> None:
    """The engine runs this on itself; a check that passes on a leak would let a server fill up over days."""
    cache = small()
    rows = [cache.take(), cache.take()]
    cache.check(rows)
    with pytest.raises(AssertionError, match="leak"):
        cache.check(rows[:1])
    with pytest.raises(AssertionError, match="leak"):
        cache.check([*rows, 3])
    with pytest.raises(AssertionError, match="two owners"):
        cache.check([*rows, rows[0]])
    cache.give_back(rows[0])
    cache.check([rows[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_bytes_and_zeros(dtype: torch.dtype) -> None:
    """Admission counts token_bytes; and every place must start finite, since a masked NaN still poisons a sum."""
    cache = small(dtype=dtype)
    assert cache.keys.shape == cache.values.shape == (3, 4, 2, 16, 8)
    assert cache.keys.dtype == dtype
    assert cache.token_bytes * 4 * 16 == 2 * cache.keys.numel() * dtype.itemsize
    assert not cache.keys.any()
    assert not cache.values.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_rows_that_nobody_used_take_no_memory() -> None:
    """Zeros are handed out by the system on first touch; a cache that wrote them would need all its memory at start."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    cache = KvCache(num_layers=4, num_rows=64, row_tokens=4096, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    assert cache.keys.numel() * 2 == 2**29
    cache.keys[3, 63, :, 4095] = 1.0
    assert resident_bytes() - before < 2**26
