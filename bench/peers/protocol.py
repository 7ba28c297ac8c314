"""How a contestant of the serving bench talks: one JSON object a line, orders on stdin, answers on stdout.

The first line gives the worker its options (base, adapters, threads); it loads, answers {"ready": ...} and then obeys one order at a time. What
libraries print goes to stderr, which the bench keeps as the worker's log. Standard library only, because it runs inside every peer's environment.

Used by the *_worker.py programs; the other end is workers.py.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Contestant(Protocol):
    """What a worker can do. Times are measured here, inside the worker, around the peer's own call.

    details: the settings worth printing. batch: all requests at once; the answers' token ids (or texts, where a peer gives no ids). stream: one
    request; the moments (perf_counter seconds) its tokens came. A contestant may have more methods: an order's "do" is a method's name.
    """

    def details(self) -> dict[str, Any]: ...

    def batch(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]: ...

    def stream(self, prompt: list[int], new_tokens: int) -> dict[str, Any]: ...


def run_worker(make: Callable[[dict[str, Any]], Contestant]) -> None:
    """Obey orders until stdin ends. A failed order answers {"error": ...} and the worker goes on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the bench's to handle: it ends its workers itself
    die_with_parent()
    contestant = make(json.loads(sys.stdin.readline()))
    answers.write(json.dumps({"ready": contestant.details()}) + "\n")
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        gc.collect()
        try:
            answer = getattr(contestant, order.pop("do"))(**order)
        except Exception as error:  # told to the bench, which leaves this contestant's figure out
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def die_with_parent() -> None:
    """Ask Linux to kill this process when the bench dies, however it dies (even while this process is stopped)."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def timed_batch(call: Callable[[], list[list[int]]], new_tokens: int) -> dict[str, Any]:
    """Time a call that answers a whole batch, and check that every answer has the length that was asked for."""
    started = time.perf_counter()
    answers = call()
    seconds = time.perf_counter() - started
    lengths = {len(answer) for answer in answers}
    if lengths != {new_tokens}:
        raise RuntimeError(f"answers of {sorted(lengths)} tokens where {new_tokens} were asked for")
    return {"seconds": seconds, "tokens": new_tokens * len(answers), "token_ids": answers}


def step_times(moments: Sequence[float], rows_a_step: int, losses: Sequence[float]) -> dict[str, Any]:
    """A training run's figures: seconds and rows of all steps but the first, which warms up. moments: the start's, and one after each step."""
    return {
        "seconds": moments[-1] - moments[1],
        "rows": rows_a_step * (len(moments) - 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def stream_times(started: float, moments: Sequence[float]) -> dict[str, Any]:
    """One streamed answer's figures: seconds of all of it, milliseconds to the first token, median milliseconds between tokens."""
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return {
        "seconds": moments[-1] - started,
        "tokens": len(moments),
        "ttft_ms": 1000 * (moments[0] - started),
        "itl_ms": 1000 * statistics.median(gaps) if gaps else None,
    }
