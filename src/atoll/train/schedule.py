"""The learning rate of every step: linear warmup, then one of the schedules."""

from __future__ import annotations

import math

from atoll.config import TrainerConfig


def learning_rate(step: int, total_steps: int, config: TrainerConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`.

    Warmup covers warmup_steps, or else ceil(warmup_fraction * total_steps) steps, and never starts at 0: its first step takes peak / warmup.
    Schedules that fall end at final_fraction of the peak one step after the last; inverse_sqrt is peak * sqrt(w / (w + steps since the warmup)), w
    the warmup's.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    match config.schedule:
        case "cosine":
            height = _cosine(done)
        case "cosine_with_restarts":
            height = _cosine(config.cycles * done % 1)
        case "linear":
            height = 1 - done
        case "warmup_stable_decay":
            height = min(1.0, (1 - done) / config.decay_fraction)
        case "inverse_sqrt":
            return config.learning_rate * math.sqrt(max(1, warmup) / (max(1, warmup) + step - warmup))
        case _:
            return config.learning_rate
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * height)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
