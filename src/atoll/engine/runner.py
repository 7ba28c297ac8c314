"""One step's tensors: rows of tokens in, hidden states out.

Rows are put in the order the forward likes: single tokens first, then longer rows, each sorted by adapter, so that equal adapters are neighbours and
form one segment. Where the bank gathers and single tokens use more than a few adapters, one batched product a site for all of them replaces their
segments.

Used by step.py (prompts and decoding), scoring.py and embedding.py. It keeps nothing between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.engine.pool import AdapterPool
from atoll.engine.sampler import Draw
from atoll.errors import ConfigError
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch, Segment

if TYPE_CHECKING:
    from atoll.model.base import Base

Outputs = Literal["none", "last", "all"]

LOGIT_ROWS = 256  # rows whose logits exist at a time: 256 x 49,152 float32 are 50 MB
_MAX_DECODE_SEGMENTS = 2  # adapters among single-token rows that get a segment each; more are gathered: cost grows with rows, not with adapters


class PageMemory(Protocol):
    """The memory of a KV cache: model.kv_cache.KvCache, or the compiled forward's own."""

    num_pages: int
    token_bytes: int

    def copy_page(self, source: int, target: int) -> None: ...

    def zero_pages(self, pages: Sequence[int]) -> None: ...


class ServingDecoder(Protocol):
    """A base that serves: model.decoder.Decoder, or its compiled version. A cache and a bank belong to the decoder that made them."""

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, num_pages: int) -> Any: ...

    def new_bank(self) -> Any: ...

    def forward(self, batch: PackedBatch, adapters: AdapterBatch, cache: Any) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...


def serving_decoder(base: Base, kernel: str) -> ServingDecoder:
    """The forward that a config's kernel means: "plain", "native", or "auto". Raises ConfigError where native is asked for and cannot run."""
    if kernel == "plain":
        return base.decoder
    from atoll.model.kernels.decoder import compiled

    found = compiled(base.decoder)
    if found is None and kernel == "native":
        raise ConfigError(
            "the native kernel cannot run here: it needs a base in bfloat16 on a CPU that it knows, and a C++ compiler",
            hint='kernel "auto" takes plain torch where it cannot',
        )
    return found if found is not None else base.decoder


class Row(NamedTuple):
    """New tokens of one row, behind the `context` tokens that its pages have. outputs: the tokens whose hidden states are wanted.

    final_length: the whole prompt's, so that a chunk of it is rotated as the whole would be.
    """

    token_ids: Sequence[int]
    context: int
    pages: Sequence[int]
    adapter: str | None
    outputs: Outputs = "last"
    final_length: int = 0


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D], the wanted hidden states; spans[i] = (start, stop) are row i's among them, in the order the rows were given."""

    hidden: Tensor
    spans: Sequence[tuple[int, int]]

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

    def __init__(self, decoder: ServingDecoder, cache: PageMemory, pool: AdapterPool) -> None:
        self._decoder, self._cache, self._pool = decoder, cache, pool
        self.draw: Draw | None = getattr(decoder, "draw", None)  # the compiled forward's sampler

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> StepOutput:
        """One forward of all rows; their new tokens' keys and values go into their pages."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids) > 1, rows[i].adapter or ""))
        packed = [rows[i] for i in order]
        wanted: list[int] = []
        spans: list[tuple[int, int]] = [(0, 0)] * len(rows)
        start = 0
        for i, row in zip(order, packed, strict=True):
            stop = start + len(row.token_ids)
            before = len(wanted)
            if row.outputs == "last":
                wanted.append(stop - 1)
            elif row.outputs == "all":
                wanted.extend(range(start, stop))
            spans[i] = (before, len(wanted))
            start = stop
        batch = PackedBatch.of(
            [row.token_ids for row in packed],
            context=[row.context for row in packed],
            pages=[row.pages for row in packed],
            outputs=wanted,
            final_lengths=[max(row.final_length, row.context + len(row.token_ids)) for row in packed],
            device=self._decoder.device,
        )
        hidden = self._decoder.forward(batch, self._adapters(packed, batch.row_starts), self._cache)
        return StepOutput(hidden, spans)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32, a fresh tensor that the caller may write into."""
        return self._decoder.logits(hidden)

    @torch.inference_mode()
    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [N] and its token [N] for each of [N, D] hidden states."""
        return self._decoder.best(hidden)

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        """Give a fork its own copy of a page that it is about to write into."""
        self._cache.copy_page(source, target)

    @torch.inference_mode()
    def zero_pages(self, pages: Sequence[int]) -> None:
        """Clean pages that may hold values that are not finite."""
        self._cache.zero_pages(pages)

    def _adapters(self, packed: Sequence[Row], starts: Sequence[int]) -> AdapterBatch:
        """Segments of neighbouring rows with one adapter; single-token rows as bank rows where their adapters are many and the bank gathers."""
        num_single = sum(len(row.token_ids) == 1 for row in packed)
        distinct = {row.adapter for row in packed[:num_single]} - {None}
        gathered = self._pool.gathers and len(distinct) > _MAX_DECODE_SEGMENTS
        segments: list[Segment] = []
        first = 0
        for (single, adapter), group in groupby((i < num_single, row.adapter) for i, row in enumerate(packed)):
            last = first + sum(1 for _ in group)
            if adapter is not None and not (single and gathered):
                segments.append(Segment(starts[first], starts[last], self._pool.slot(adapter)))
            first = last
        if not gathered:
            return AdapterBatch(tuple(segments)) if segments else BASE_ONLY
        pairs = [(i, row.adapter) for i, row in enumerate(packed[:num_single]) if row.adapter is not None]
        return AdapterBatch(tuple(segments), self._pool.bank_rows([i for i, _ in pairs], [adapter for _, adapter in pairs]))
