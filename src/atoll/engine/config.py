"""The engine's limits: rows, tokens a row, tokens a step, waiting requests, bytes. Every field's description is also its help text.

Used by engine.py, and by whoever makes an engine (workflows, server, cli).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from atoll.config import Section

_DEFAULT_KV_BYTES = 2 << 30


class EngineConfig(Section):
    """What one engine may hold and do in a step."""

    max_rows: int = Field(default=64, ge=1, le=4096, description="Sequences that run at once: rows of a decode step.")
    max_row_tokens: int | None = Field(
        default=None, ge=2, description="Tokens one row may hold, prompt and answer together. Default: the base's context length, 2,048 at most."
    )
    max_step_tokens: int = Field(
        default=2048, ge=2, description="Tokens one step computes: running rows first, prompts with what is left, in chunks if need be."
    )
    max_waiting: int = Field(default=10_000, ge=1, description="Requests that may wait; more are refused.")
    num_pages: int | None = Field(
        default=None, ge=1, description="Pages of 32 tokens in the KV cache, shared by all rows. Default: what kv_bytes gives, or full rows need."
    )
    kv_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of the KV cache; memory is taken as it is used. Default: enough for max_rows full rows, 2 GiB at most.",
    )
    reuse_prefixes: bool = Field(
        default=True, description="Keep the keys and values of prompts and answers, so that requests of the same scope that begin alike reuse them."
    )
    kernel: Literal["auto", "native", "plain"] = Field(
        default="auto", description="The forward: compiled for this processor (native), plain torch (plain), or native where it runs (auto)."
    )
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

    @model_validator(mode="after")
    def _say_the_cache_once(self) -> Self:
        if self.num_pages is not None and self.kv_bytes is not None:
            raise ValueError("num_pages and kv_bytes both say how large the KV cache is: give one of them")
        return self

    def row_tokens(self, context_length: int) -> int:
        """The tokens a row holds over a base of that context length."""
        return min(context_length, 2048) if self.max_row_tokens is None else min(context_length, self.max_row_tokens)

    def cache_pages(self, row_tokens: int, page_tokens: int, page_bytes: int) -> int:
        """The pages of the KV cache, each of page_tokens tokens and page_bytes bytes, for rows of row_tokens."""
        if self.num_pages is not None:
            return self.num_pages
        if self.kv_bytes is not None:
            return max(1, self.kv_bytes // page_bytes)
        one_row = -(-row_tokens // page_tokens)
        return max(one_row, min(self.max_rows * one_row, _DEFAULT_KV_BYTES // page_bytes))
