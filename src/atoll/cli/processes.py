"""`atoll train` in several processes: which of them speaks, and how they are started on one machine.

They are started by torch's own launcher, the one behind `torchrun`: it tells each its place, ends all when one fails, and hands signals on. A process
of a machine that is not its first says nothing, since all would say the same: what one of them fails with reaches the first (train.team).

Used by train, land and main.
"""

from __future__ import annotations

import os
import sys

from atoll.errors import ConfigError, Interrupted

_SPOKESMAN = "0"
_STOPPED = 130
_STOP_S = "600"  # for the step at hand and its checkpoint, before a process that was asked to stop is killed


def launched_processes() -> int:
    """How many processes torchrun has started for one job; 1 where none has."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the first of all: the one with results."""
    return launched_processes() == 1 or os.environ["RANK"] == _SPOKESMAN


def is_spokesman() -> bool:
    """Whether this process is its machine's first: the one with messages."""
    return launched_processes() == 1 or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == _SPOKESMAN


def refuse_processes(what: str) -> None:
    """Raises ConfigError under torchrun."""
    if (count := launched_processes()) > 1:
        raise ConfigError(
            f"several processes train one adapter together, but torchrun has started {count} for {what}",
            hint="run it without torchrun: one process trains many adapters over one base",
        )


def run_processes(count: int) -> int:
    """Run this very command line in `count` processes of this machine, which share its cores; returns the exit code."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from atoll.cli.environment import usable_cores

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say in a sentence what it says in a page
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ.get("OMP_NUM_THREADS", usable_cores())) // count))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_S)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        run_id="atoll",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "atoll", *sys.argv[1:])
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        return _STOPPED if _STOPPED in codes else 1
    except (SignalException, KeyboardInterrupt):
        raise Interrupted("stopped by a signal", hint="what was finished is kept: run the same command again to go on") from None
    return 0
