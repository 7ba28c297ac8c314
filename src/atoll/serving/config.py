"""What a server may take in and hold: limits, adapter sources, keys. Every field's description is also its help text.

The one idea: whatever a request can multiply has a cap here, and the defaults are the safe ones (this machine only, no foreign sources).

Used by service.py, the HTTP routes and `atoll serve`. Imports no torch.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from atoll.config import Section
from atoll.engine.config import EngineConfig


class ComposeLimits(Section):
    """What compositions over HTTP may ask of this machine. They run one at a time, each in a process beside the server."""

    enabled: bool = Field(default=True, description="Whether keys with the scope publish may compose adapters over HTTP.")
    max_waiting: int = Field(default=8, ge=0, description="Compositions that wait behind the one that runs; beyond it the answer is 429.")
    per_key: int = Field(default=4, ge=1, description="Compositions of one key running and waiting at once; beyond it the answer is 429.")
    kept_per_key: int = Field(default=16, ge=1, description="Finished compositions of one key whose result is kept; the oldest go first.")
    threads: int = Field(default=1, ge=1, le=1024, description="Compute threads of a composition; serving keeps the other cores.")
    nice: int = Field(default=10, ge=0, le=19, description="How far a composition steps back behind the server for the processor (nice).")
    job_s: float = Field(default=3600.0, gt=0, description="Seconds that a composition may take, with its controls; beyond it, it has failed.")
    max_examples: int = Field(default=256, ge=1, description="Examples of one composition.")
    max_test_rows: int = Field(default=2000, ge=0, description="Test rows of one composition.")
    max_row_chars: int = Field(default=16_000, ge=1, description="Characters of one row, with its prompt filled in.")
    max_row_tokens: int = Field(default=2048, ge=2, description="Tokens of one row; never more than the base's context.")
    max_top_k: int = Field(default=32, ge=1, description="Adapters that one composition searches over.")
    max_seeds: int = Field(default=10, ge=1, description="Draws of examples that one composition is repeated for.")
    max_budget: int = Field(default=2000, ge=1, description="Evaluations of one search.")
    max_time_s: float = Field(default=600.0, gt=0, description="Seconds of one search.")


class ServeConfig(Section):
    """One server: the base it serves, where it listens, and its limits."""

    base: str = Field(min_length=1, description="Base model: an alias, a folder, a .gguf file or a Hugging Face id.")
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; one that others reach needs keys.")
    port: int = Field(default=3000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Limits of the engine.")

    max_concurrent_requests: int = Field(default=1024, ge=1, description="Requests running and waiting at once; beyond it the answer is 429.")
    per_key_requests: int = Field(default=256, ge=1, description="Requests of one key running and waiting at once; beyond it the answer is 429.")
    max_best_of: int = Field(default=8, ge=1, le=128, description="Answers that one request may ask for (best_of, n).")
    max_stop_sequences: int = Field(default=16, ge=0, description="Stop strings of one request.")
    max_stop_length: int = Field(default=256, ge=1, description="Characters of one stop string.")
    max_input_tokens: int | None = Field(default=None, ge=1, description="Tokens of one prompt. Default: what a row holds, less one.")
    max_total_tokens: int | None = Field(default=None, ge=2, description="Tokens of prompt and answer together. Default: what a row holds.")
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Bytes of one request's body; uploads of adapters have max_adapter_bytes.")
    max_inputs: int = Field(default=64, ge=1, description="Texts in one request for embeddings, classes or completions.")
    max_embedding_inputs: int = Field(default=2048, ge=1, description="Texts in one request for embeddings, which are computed in batches.")
    max_merged: int = Field(default=16, ge=1, description="Adapters that one request may merge.")
    request_timeout_s: float = Field(default=600.0, gt=0, description="Seconds after which a request ends with what it has.")
    drain_s: float = Field(default=30.0, ge=0, description="Seconds that running requests get to finish when the server stops.")

    local_root: Path | None = Field(default=None, description="Folder whose adapters may be named with source local. Without it that source is off.")
    allow_hf: bool = Field(default=False, description="Let requests name adapters of the Hugging Face hub.")
    s3_prefixes: tuple[str, ...] = Field(default=(), description="URLs (s3://bucket/prefix) below which adapters may be named with source s3.")
    max_adapter_bytes: int = Field(default=1 << 30, ge=1, description="Bytes of one adapter's files.")
    max_registered: int = Field(default=4096, ge=1, description="Adapters kept in memory; those idle longest leave first.")
    registered_bytes: int = Field(default=8 << 30, ge=1, description="Bytes of adapters kept in memory; those idle longest leave first.")
    max_loading: int = Field(default=256, ge=1, description="Adapters being loaded or waiting for it; beyond it the answer is 429.")
    merged_bytes: int = Field(default=1 << 30, ge=1, description="Bytes of merged adapters kept in memory; those idle longest leave first.")
    loads_per_key: int = Field(default=8, ge=1, description="Adapters of one key loaded, or merged, at once; its others wait or get 429.")
    load_timeout_s: float = Field(default=120.0, gt=0, description="Seconds that loading one adapter may take.")
    load_workers: int = Field(default=2, ge=1, le=64, description="Adapters loaded at once from this machine, and as many from elsewhere.")
    negative_cache_s: float = Field(
        default=10.0,
        ge=0,
        description="Seconds during which an adapter that failed to load is not tried again; doubles with each failure, up to 300.",
    )
    compose: ComposeLimits = Field(default_factory=ComposeLimits, description="Limits of compositions over HTTP.")
    ignore_quantization: bool = Field(default=False, description="Also load adapters that were trained on a base rounded otherwise than this one.")
    preload: tuple[str, ...] = Field(default=(), description="Adapters of the hub to load and pin before the server answers.")
    default_adapter: str | None = Field(default=None, min_length=1, description="Adapter of requests that name none. Default: the base.")

    deployment_names: tuple[str, ...] = Field(
        default=(), description="Names that Predibase's path may call the base by, beside its own, its alias and the last part of its name."
    )
    stuck_s: float = Field(default=60.0, gt=0, description="Seconds without a step, while there is work, after which /health answers 503.")
    failing_requests: int = Field(default=16, ge=0, description="Requests that failed in a row after which /health answers 503; 0: never.")

    keys_file: Path | None = Field(default=None, description="File of API keys (atoll keys add). With it every route but health asks for a key.")
    allow_anonymous: bool = Field(default=False, description="Beside a keys file: let requests without a key infer. Only on this machine.")
    cors_origins: tuple[str, ...] = Field(default=(), description="Origins whose pages may call this server from a browser.")

    @model_validator(mode="after")
    def _stay_private_without_keys(self) -> Self:
        """A server that others reach must know who asks."""
        if not self.is_loopback and self.keys_file is None:
            raise ValueError(f"host {self.host!r} can be reached from elsewhere, which needs keys: `atoll keys add NAME`, then --keys FILE")
        if not self.is_loopback and self.allow_anonymous:
            raise ValueError(f"allow_anonymous is for this machine only, but host {self.host!r} can be reached from elsewhere")
        return self

    @model_validator(mode="after")
    def _total_holds_input(self) -> Self:
        if self.max_input_tokens is not None and self.max_total_tokens is not None and self.max_input_tokens >= self.max_total_tokens:
            raise ValueError(f"max_input_tokens ({self.max_input_tokens}) must be smaller than max_total_tokens ({self.max_total_tokens})")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host.casefold() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:  # another name: whatever it resolves to may change
            return False
