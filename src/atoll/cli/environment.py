"""What must be settled before torch is imported: how many threads it uses, and that libraries below do not write to the terminal.

Used by main, once, before any command runs.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000", or microseconds of CPU allowed a period
PATIENT = {"GOMP_SPINCOUNT": "2000"}  # a thread that spins long at a barrier takes the core from the thread it waits for; see docs/notebook.md
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def prepare(threads: int | None) -> None:
    """Set the compute threads (None: OMP_NUM_THREADS, else every usable core), how they wait, and silence libraries; what is set already stays."""
    for name, value in {**QUIET, **PATIENT}.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # it reads the variable only once, when it is imported
            sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def usable_cores(quota_file: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()[:2]
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return cores
