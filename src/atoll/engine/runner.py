"""One step's tensors: rows of tokens in, hidden states out.

Rows are put in the order the forward likes: single tokens first, then longer rows, each sorted by adapter, so that equal adapters are neighbours and
form one segment. Where the bank gathers and single tokens use more than a few adapters, one batched product a site for all of them replaces their
segments. ReFT is beside that: rows with prompt tokens name the tokens that are edited, and a row whose adapter has nothing but edits is the base's to
everything else, in every step after its prompt without any cost.

Used by step.py (prompts and decoding), scoring.py and embedding.py. It keeps nothing between calls.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.engine.pool import AdapterPool
from atoll.engine.sampler import Draw
from atoll.errors import ConfigError
from atoll.model.apply_edits import edit_rows
from atoll.model.batch import BASE_ONLY, AdapterBatch, EditRows, PackedBatch, Segment

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
            "the native kernel cannot run here: it needs a base in bfloat16, held whole, on a CPU that it knows, and a C++ compiler",
            hint='kernel "auto" takes plain torch where it cannot',
        )
    return found if found is not None else base.decoder


class Row(NamedTuple):
    """New tokens of one row, behind the `context` tokens that its pages have. outputs: the tokens whose hidden states are wanted.

    num_prompt: the whole prompt's length, so that a chunk of it is rotated and edited as the whole would be.
    """

    token_ids: Sequence[int]
    context: int
    pages: Sequence[int]
    adapter: str | None
    num_prompt: int
    outputs: Outputs = "last"


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D], the wanted hidden states; spans[i] = (start, stop) are row i's among them, in the order the rows were given.

    broken: the rows whose edited tokens have states that are not finite. The last token need not show it: it may be out of their sight.
    """

    hidden: Tensor
    spans: Sequence[tuple[int, int]]
    broken: Sequence[int] = ()

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
        lora = [row.adapter if row.adapter is not None and self._pool.changes_linears(row.adapter) else None for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids) > 1, lora[i] or ""))
        packed = [rows[i] for i in order]
        starts = [0, *accumulate(len(row.token_ids) for row in packed)]
        wanted: list[int] = []
        spans: list[tuple[int, int]] = [(0, 0)] * len(rows)
        for i, row, start, stop in zip(order, packed, starts, starts[1:], strict=False):
            before = len(wanted)
            if row.outputs == "last":
                wanted.append(stop - 1)
            elif row.outputs == "all":
                wanted.extend(range(start, stop))
            spans[i] = (before, len(wanted))
        edits = self._edits(packed, starts)
        edited = [token for found in edits for token in found.tokens.tolist()]
        batch = PackedBatch.of(
            [row.token_ids for row in packed],
            context=[row.context for row in packed],
            pages=[row.pages for row in packed],
            outputs=wanted + edited,
            num_prompts=[row.num_prompt for row in packed],
            final_lengths=[max(row.num_prompt, row.context + len(row.token_ids)) for row in packed],
            device=self._decoder.device,
        )
        adapters = self._adapters([lora[i] for i in order], starts, sum(len(row.token_ids) == 1 for row in packed), edits)
        hidden = self._decoder.forward(batch, adapters, self._cache)
        if not edited:
            return StepOutput(hidden, spans)
        tokens = _not_finite(hidden[len(wanted) :], edited)
        return StepOutput(hidden[: len(wanted)], spans, sorted({order[bisect_right(starts, token) - 1] for token in tokens}))

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

    def _adapters(self, lora: Sequence[str | None], starts: Sequence[int], num_single: int, edits: tuple[EditRows, ...]) -> AdapterBatch:
        """Segments of neighbouring rows with one adapter; single-token rows as bank rows where their adapters are many and the bank gathers.

        lora: each packed row's adapter where that changes linears; the first num_single rows have one token.
        """
        distinct = set(lora[:num_single]) - {None}
        gathered = self._pool.gathers and len(distinct) > _MAX_DECODE_SEGMENTS
        segments: list[Segment] = []
        first = 0
        for (single, adapter), group in groupby((i < num_single, adapter) for i, adapter in enumerate(lora)):
            last = first + sum(1 for _ in group)
            if adapter is not None and not (single and gathered and self._pool.slot(adapter).gathers):
                segments.append(Segment(starts[first], starts[last], self._pool.slot(adapter)))
            first = last
        if not gathered:
            return AdapterBatch(tuple(segments), edits=edits) if segments or edits else BASE_ONLY
        pairs = [(i, adapter) for i, adapter in enumerate(lora[:num_single]) if adapter is not None and self._pool.slot(adapter).gathers]
        return AdapterBatch(tuple(segments), self._pool.bank_rows([i for i, _ in pairs], [adapter for _, adapter in pairs]), edits)

    def _edits(self, packed: Sequence[Row], starts: Sequence[int]) -> tuple[EditRows, ...]:
        """The tokens that ReFT edits; none of rows that are beyond their prompts."""
        found = [
            (start, row.context, len(row.token_ids), row.num_prompt, parts)
            for row, start in zip(packed, starts, strict=False)
            if row.context < row.num_prompt and row.adapter is not None and (parts := self._pool.slot(row.adapter).parts)
        ]
        return edit_rows(found, self._decoder.device) if found else ()


def _not_finite(states: Tensor, tokens: Sequence[int]) -> list[int]:
    """Those of `tokens` whose normed states [n, D] have a NaN or an infinity. Their sums tell: those of finite ones stay far from overflowing."""
    finite = torch.isfinite(states.sum(-1, dtype=torch.float32)).tolist()
    return [token for token, good in zip(tokens, finite, strict=True) if not good]
