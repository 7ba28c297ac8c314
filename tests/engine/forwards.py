"""The two forwards that the engine runs on, for tests that must hold for both: plain torch in float32, and the compiled one in bfloat16.

In float32 results are equal to rounding, so equal tokens can be demanded; the compiled forward gives the same bits however rows are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from atoll.engine.engine import Engine
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.kernels import build

DTYPES = {"plain": "float32", "native": "bfloat16"}

_NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not build.usable_targets() or build.compiler_path() is None, reason="no compiler, or a processor without AVX2 or NEON"),
)
both_forwards = pytest.mark.parametrize("forward", ["plain", _NATIVE], indirect=True, scope="module")


def cache_memory(engine: Engine) -> Any:
    """A tensor of everything, or of all keys, that the engine's cache holds."""
    cache: Any = engine._runner._cache
    return cache.memory if hasattr(cache, "memory") else cache.keys


def failing_forward(engine: Engine, key: str) -> Callable[..., Any]:
    """The engine's forward, raising whenever `key` is in the batch."""
    forward = engine._runner._decoder.forward

    def gathered(adapters: AdapterBatch, slot: Any) -> bool:
        buckets: Sequence[Any] = adapters.bank_rows.buckets if adapters.bank_rows is not None else ()
        return any(rows._stack.rank == slot.bucket and slot.index in rows._index.tolist() for rows in buckets)

    def edits(adapters: AdapterBatch, slot: Any) -> bool:
        return any(rows.weights is side for rows in adapters.edits for part in slot.parts for side in part.sides)

    def raising(batch: PackedBatch, adapters: AdapterBatch, cache: Any) -> Any:
        slot = engine._pool.slot(key) if key in engine._pool.resident() else None
        if slot is not None and (any(segment.weights == slot for segment in adapters.segments) or gathered(adapters, slot) or edits(adapters, slot)):
            raise RuntimeError("kernel refused")
        return forward(batch, adapters, cache)

    return raising
