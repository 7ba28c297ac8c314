"""train/schedule.py: the learning rate of every step, in numbers."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from atoll.config_trainer import Schedule, TrainerConfig
from atoll.train.schedule import learning_rate


def rates(total: int, **config: Any) -> list[float]:
    asked = TrainerConfig(learning_rate=0.1, **config)
    return [learning_rate(step, total, asked) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]),
        ("cosine", [0.05, 0.1, 0.1, 0.0853553, 0.05, 0.0146447]),
    ],
)
def test_warmup_then_the_schedule(schedule: str, expected: list[float]) -> None:
    """Two of six steps warm up; cosine and linear reach zero one step after the last, so that no step is wasted at zero."""
    assert rates(6, schedule=schedule, warmup_fraction=0.3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"schedule": "linear", "final_fraction": 0.5}, [0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625]),
        ({"schedule": "cosine", "final_fraction": 0.1}, [0.05, 0.1, 0.1, 0.0868198, 0.055, 0.0231802]),
        ({"schedule": "cosine_with_restarts"}, [0.05, 0.1, 0.1, 0.05, 0.1, 0.05]),
        ({"schedule": "warmup_stable_decay", "decay_fraction": 0.5}, [0.05, 0.1, 0.1, 0.1, 0.1, 0.05]),
        ({"schedule": "inverse_sqrt"}, [0.05, 0.1, 0.1, 0.0816497, 0.0707107, 0.0632456]),
    ],
)
def test_other_schedules(config: dict[str, Any], expected: list[float]) -> None:
    """Against the formulas by hand; warmup_steps decides instead of a share."""
    assert rates(6, warmup_steps=2, warmup_fraction=0.9, **config) == pytest.approx(expected, abs=1e-6)


def test_no_warmup_starts_at_the_top() -> None:
    """warmup_fraction 0 means none, not one step."""
    assert rates(4, schedule="linear", warmup_fraction=0.0) == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_the_first_step_is_never_taken_at_zero() -> None:
    """A step at rate 0 costs as much as any other."""
    assert rates(1000, warmup_fraction=0.03)[0] == pytest.approx(0.1 / 30)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_single_step_takes_the_full_rate(schedule: str) -> None:
    """max_steps: 1 must train."""
    assert rates(1, schedule=schedule) == [0.1]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_rates_stay_above_zero_and_at_most_the_peak(schedule: str) -> None:
    """Whatever the length, up once and down once."""
    for total in (1, 2, 7, 100):
        found = rates(total, schedule=schedule, warmup_fraction=0.1)
        assert all(0 < rate <= 0.1 for rate in found)
        top = found.index(max(found))
        assert found[:top] == sorted(found[:top])
        if schedule != "cosine_with_restarts":
            assert found[top:] == sorted(found[top:], reverse=True)
