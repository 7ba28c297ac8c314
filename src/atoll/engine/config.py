"""The engine's limits: rows, tokens a row, tokens a step, waiting requests, bytes of adapters. Every field's description is also its help text.

Used by engine.py, and by whoever makes an engine (workflows, server, cli).
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from atoll.config import Section


class EngineConfig(Section):
    """What one engine may hold and do in a step."""

    max_rows: int = Field(default=64, ge=1, le=4096, description="Sequences that run at once: rows of the KV cache and of a decode step.")
    max_row_tokens: int | None = Field(
        default=None, ge=2, description="Tokens one row may hold, prompt and answer together. Default: the base's context length, 2,048 at most."
    )
    max_step_tokens: int = Field(
        default=2048, ge=2, description="Tokens one step computes: running rows first, prompts with what is left, in chunks if need be."
    )
    max_waiting: int = Field(default=10_000, ge=1, description="Requests that may wait; more are refused.")
    adapter_bytes: int = Field(
        default=1 << 30, ge=1, description="Bytes that resident adapters may take; idle ones leave, least recently used first."
    )
    max_overtakes: int = Field(default=16, ge=0, description="How often later requests may pass one that waits for its adapter before it comes next.")

    @model_validator(mode="after")
    def _leave_room_for_prompts(self) -> Self:
        """With every row decoding, a step must still be able to take a prompt token, or prompts would starve."""
        if self.max_step_tokens <= self.max_rows:
            raise ValueError(f"max_step_tokens ({self.max_step_tokens}) must be larger than max_rows ({self.max_rows})")
        return self

    def row_tokens(self, context_length: int) -> int:
        """The tokens a row holds over a base of that context length."""
        return min(context_length, 2048) if self.max_row_tokens is None else min(context_length, self.max_row_tokens)
