"""Bases that several jobs share: each loaded once for the dtype and device that jobs train in.

Used by many.py and landing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.config import TrainConfig
from atoll.workflows.start import Progress

if TYPE_CHECKING:
    from atoll.model.base import Base


class Bases:
    """The bases of some training configs, loaded when first asked for."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.loaded: dict[tuple[str, str, str], Base] = {}

    def of(self, job: TrainConfig) -> Base:
        """The base that a job trains over. Raises what load_base raises."""
        from atoll.model.base import load_base

        key = (job.base, job.trainer.dtype, job.trainer.device)
        if key not in self.loaded:
            self.loaded[key] = load_base(job.base, dtype=key[1], device=key[2], progress=self._progress)
        return self.loaded[key]
