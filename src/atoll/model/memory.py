"""What the libraries below keep in memory: more of what is freed, fewer of the products that were prepared.

glibc gives blocks above a threshold back to the system at each free; a training step allocates and frees gigabytes that way, and the kernel clears
every page again. With the threshold at its maximum a step on two cores got 10 to 15 % faster (docs/notebook.md). Nothing happens on other systems.

For every new number of tokens torch prepares each product anew, some 40 a training step of 0.2 MB each, and keeps a thousand in oneDNN's cache and in
its own. As bounded here oneDNN's still has those of several steps; what torch's own misses is found there, which costs 3 µs (docs/notebook.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's mallopt parameters
_MIB = 1 << 20
_PREPARED = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}  # torch's own, oneDNN's; 256: of several jobs' short rows too


def bound_prepared_products() -> None:
    """Bound the caches of prepared products; without effect once this process has multiplied. What the environment says stays.

    It is the environment that is written: processes that this one starts inherit the bounds.
    """
    for name, value in _PREPARED.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Ask glibc to serve blocks up to 32 MiB (its largest threshold) from the heap and to keep the heap. True if it took all three settings."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_MMAP_THRESHOLD, 32 * _MIB), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 * _MIB)])


def release_memory() -> None:
    """Give what `keep_freed_memory` kept back to the system: between jobs, not between steps."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
