"""What the libraries below keep in memory: more of what is freed, fewer of the products that were prepared.

A training step frees and takes gigabytes. glibc gives large blocks back to the system at each free, and the kernel clears every page again; where it
is told not to (10 to 15 % faster), small objects that were made between them cut its heap into pieces. So large tensors get memory of their own
(kernels/tensors.cpp: another 5 %, and less memory); glibc is told where that cannot be compiled. Numbers are in docs/notebook.md.

For every new number of tokens torch prepares each product anew, two dozen a training step of 0.2 to 0.3 MB each, and keeps a thousand in oneDNN's
cache and in its own. As bounded here oneDNN's still has those of several steps; what torch's own misses is found there, which costs 3 µs
(docs/notebook.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's mallopt parameters
_MIB = 1 << 20
_PREPARED = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}  # torch's own, oneDNN's


def bound_prepared_products() -> None:
    """Bound the caches of prepared products; without effect once this process has multiplied. What the environment says stays.

    It is the environment that is written: processes that this one starts inherit the bounds.
    """
    for name, value in _PREPARED.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, for the rest of this process. True if it could be done: on Linux."""
    if not sys.platform.startswith("linux"):
        return False
    library = _tensors()
    if library is not None and library.atoll_tensors_begin():
        return True
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # blocks up to 32 MiB (glibc's largest threshold) from the heap, and the heap is kept
    return all([mallopt(_MMAP_THRESHOLD, 32 * _MIB), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 * _MIB)])


def release_memory() -> None:
    """Give what `keep_freed_memory` kept back to the system: between jobs, not between steps."""
    if sys.platform.startswith("linux"):
        if (library := _tensors()) is not None:
            library.atoll_tensors_release()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _tensors() -> ctypes.CDLL | None:
    """The compiled memory for tensors; None where it cannot be had, or plain torch is asked for."""
    from atoll.model.kernels.build import load_library, usable_targets

    targets = usable_targets()
    library = load_library(targets[0], "tensors.cpp") if targets else None
    return library if library is not None and library.atoll_tensors_interface() == 1 else None
