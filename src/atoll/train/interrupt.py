"""Ctrl-C or SIGTERM between the steps of long work: what is done is kept, and nothing is torn apart in the middle.

Used by loop.py and by the searches of compose.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(*, in_team: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question that the loop asks between steps; a second one interrupts at once.

    Only the main thread gets signals: elsewhere the answer is always no. in_team: of several processes each gets the terminal's signal, and again
    from the launcher, which also hands on SIGTERM: all ask only.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set() and not in_team:
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
