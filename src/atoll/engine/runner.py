"""One step's tensors: rows of tokens in, hidden states out.

Rows are put in the order the forward likes: single tokens first, then longer rows, each sorted by adapter, so that equal adapters are neighbours and
form one segment. Where single tokens use more than a few adapters, one batched product a site for all of them replaces their segments.

Used by engine.py (prompts and decoding) and scoring.py. It keeps nothing between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atoll.engine.pool import AdapterPool
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder
from atoll.model.kv_cache import KvCache

Outputs = Literal["none", "last", "all"]

LOGIT_ROWS = 256  # rows whose logits exist at a time: 256 x 49,152 float32 are 50 MB
_MAX_DECODE_SEGMENTS = 2  # adapters among single-token rows that get a segment each; more are gathered: cost grows with rows, not with adapters


class Row(NamedTuple):
    """New tokens of one row, behind the `context` tokens that KV row `kv_row` has. outputs: the tokens whose hidden states are wanted.

    prompt_length: the whole prompt's, so that a chunk of it is rotated as the whole would be.
    """

    token_ids: Sequence[int]
    context: int
    kv_row: int
    adapter: str | None
    outputs: Outputs = "last"
    prompt_length: int = 0


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D], the wanted hidden states; spans[i] = (start, stop) are row i's among them, in the order the rows were given."""

    hidden: Tensor
    spans: tuple[tuple[int, int], ...]

    def of(self, row: int) -> Tensor:
        """The wanted hidden states of one row."""
        start, stop = self.spans[row]
        return self.hidden[start:stop]

    def last(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), D]: the last hidden state of each of these rows."""
        index = [self.spans[row][1] - 1 for row in rows]
        if index == list(range(self.hidden.shape[0])):
            return self.hidden
        return self.hidden[torch.tensor(index, device=self.hidden.device)]


class Runner:
    """Runs rows over one decoder, one KV cache and the resident adapters of one pool."""

    def __init__(self, decoder: Decoder, cache: KvCache, pool: AdapterPool) -> None:
        self._decoder, self._cache, self._pool = decoder, cache, pool

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], *, store: bool = True) -> StepOutput:
        """One forward of all rows. store=False leaves the cache as it is, so that several rows may continue one KV row."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids) > 1, rows[i].adapter or ""))
        packed = [rows[i] for i in order]
        wanted: list[int] = []
        spans: list[tuple[int, int]] = [(0, 0)] * len(rows)
        start = 0
        for i, row in zip(order, packed, strict=True):
            stop = start + len(row.token_ids)
            before = len(wanted)
            wanted.extend(range(start, stop) if row.outputs == "all" else [stop - 1] if row.outputs == "last" else ())
            spans[i] = (before, len(wanted))
            start = stop
        batch = PackedBatch.of(
            [row.token_ids for row in packed],
            context=[row.context for row in packed],
            kv_rows=[row.kv_row for row in packed],
            outputs=wanted,
            store=store,
            final_lengths=[max(row.prompt_length, row.context + len(row.token_ids)) for row in packed],
            device=self._decoder.device,
        )
        hidden = self._decoder.forward(batch, self._adapters(packed, batch.row_starts), self._cache)
        return StepOutput(hidden, tuple(spans))

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32, a fresh tensor that the caller may write into."""
        with torch.inference_mode():
            return self._decoder.logits(hidden)

    def scrub(self, kv_row: int, num_tokens: int) -> None:
        """Zero what a failed sequence wrote: another's masked attention would still multiply a NaN by zero, which is NaN."""
        with torch.inference_mode():
            self._cache.keys[:, kv_row, :, :num_tokens] = 0
            self._cache.values[:, kv_row, :, :num_tokens] = 0

    def _adapters(self, packed: Sequence[Row], starts: Sequence[int]) -> AdapterBatch:
        """Segments of neighbouring rows with one adapter; single-token rows as bank rows where their adapters are many."""
        num_single = sum(len(row.token_ids) == 1 for row in packed)
        distinct = {row.adapter for row in packed[:num_single]} - {None}
        gathered = len(distinct) > _MAX_DECODE_SEGMENTS
        segments: list[Segment] = []
        for (single, adapter), group in groupby(range(len(packed)), key=lambda i: (i < num_single, packed[i].adapter)):
            members = list(group)
            if adapter is not None and not (single and gathered):
                segments.append(Segment(starts[members[0]], starts[members[-1] + 1], self._pool.slot(adapter)))
        if not gathered:
            return AdapterBatch(tuple(segments))
        pairs = [(i, row.adapter) for i, row in enumerate(packed[:num_single]) if row.adapter is not None]
        return AdapterBatch(tuple(segments), self._pool.bank_rows([i for i, _ in pairs], [adapter for _, adapter in pairs]))
