"""The joined verbs: train and publish, evaluate and record, land, compose. The command line, the server and the library call these and nothing below.

    start.py      what every verb begins with: a folder that is its own, the hub, the packages it needs
    runs.py       the hub's record of a run, true however the run ends
    training.py   train and publish one adapter
    many.py       train and publish many at once, over bases.py; cancelling.py ends one of them
    measuring.py  evaluate
    landing.py    land
    sweeping.py   train every point of a sweep
    comparing.py  runs: found, followed, set side by side
    compose.py    compose: compose_plan, compose_search, compose_controls, compose_lines and compose_advice are its parts, compose_report its result

Everything is kept as it is done: an adapter is in the hub the moment its training ends, a score is a file before the next task is asked, and each is
found again by the digest of what it was made from. So a land that was stopped goes on, and one whose inputs changed redoes just what they touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.workflows.landing import land
from atoll.workflows.many import JobLine, train_many
from atoll.workflows.measuring import LandOutcome, evaluate
from atoll.workflows.start import Progress, locked
from atoll.workflows.sweeping import SweepOutcome, sweep
from atoll.workflows.training import RESULT_FILE, TrainOutcome, make_plan, prompt_ids, run_plan_in, train_and_publish

if TYPE_CHECKING:
    from atoll.workflows.compose import ComposeOutcome, compose_and_publish

__all__ = [
    "RESULT_FILE",
    "ComposeOutcome",
    "JobLine",
    "LandOutcome",
    "Progress",
    "SweepOutcome",
    "TrainOutcome",
    "compose_and_publish",
    "evaluate",
    "land",
    "locked",
    "make_plan",
    "prompt_ids",
    "run_plan_in",
    "sweep",
    "train_and_publish",
    "train_many",
]


def __getattr__(name: str) -> Any:
    """Composing needs torch at once, which the other verbs load when they run: its names are fetched on first use."""
    if name not in ("ComposeOutcome", "compose_and_publish"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from atoll.workflows import compose

    return getattr(compose, name)
