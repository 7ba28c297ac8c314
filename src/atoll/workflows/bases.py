"""Bases that several jobs share: each loaded once for the dtype, device and rounding that jobs train in.

Used by many.py and landing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.config import QuantizationConfig, TrainConfig
from atoll.workflows.start import Progress

if TYPE_CHECKING:
    from atoll.model.base import Base


class Bases:
    """The bases of some training configs, loaded when first asked for."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.loaded: dict[tuple[str, str, str, QuantizationConfig | None], Base] = {}

    def of(self, job: TrainConfig) -> Base:
        """The base that a job trains over. Raises what load_base raises."""
        from atoll.model.base import load_base

        key = (job.base, job.trainer.dtype, job.trainer.device, job.quantization)
        if key not in self.loaded:
            self.loaded[key] = load_base(job.base, dtype=key[1], device=key[2], quantization=key[3], progress=self._progress)
        return self.loaded[key]
