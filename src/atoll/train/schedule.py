"""The learning rate of every step: linear warmup, then cosine, linear or constant."""

from __future__ import annotations

import math

from atoll.config import TrainerConfig


def learning_rate(step: int, total_steps: int, config: TrainerConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`.

    Warmup covers ceil(warmup_fraction * total_steps) steps and never starts at 0: its first step takes peak / warmup. Cosine and linear end at 0 one
    step after the last.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return config.learning_rate * (1 - done)
        case _:
            return config.learning_rate
