"""The two things every forward takes: rows' tokens end to end, and which adapter each token uses.

A PackedBatch has no padding: B rows of any length stand behind one another, T tokens in all. A row may continue a sequence whose earlier tokens are
in the KV cache (`context`), so prefill, chunked prefill, decode, scoring and training are one form. An AdapterBatch names segments of those T tokens.

Used by decoder.py; built by train (no cache, adapters that need gradients) and by the engine's runner (cache, adapters in a bank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from atoll.model.apply import AdapterWeights, BankRows, BlockWeights
    from atoll.model.reft import Edit


@dataclass(frozen=True)
class PackedBatch:
    """B rows, T tokens.

    token_ids [T] int64; positions [T] int64, each token's place in its sequence; row_starts B + 1 bounds; context B counts of tokens that the row
    already has in the cache; pages B page tables, each naming the pages of the row's context and new tokens in order (None: no cache);
    output_index [N] int64, the tokens whose hidden states are wanted (None: all). Rows may share pages of their contexts, never one that a row
    writes into. final_lengths: each row's length once all of its prompt is in, where the prompt comes in chunks; rope types that depend on the
    length need it. follows, without a cache: for each row, the row whose tokens stand before its own and are `context` many (a beginning that several
    rows share, computed once), or -1; a row that is followed follows none itself. num_prompts: how many tokens of each row's sequence are its
    prompt, for bases that read prompts apart.
    """

    token_ids: Tensor
    positions: Tensor
    row_starts: tuple[int, ...]
    context: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...] | None = None
    output_index: Tensor | None = None
    final_lengths: tuple[int, ...] | None = None
    follows: tuple[int, ...] | None = None
    num_prompts: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        *,
        context: Sequence[int] | None = None,
        pages: Sequence[Sequence[int]] | None = None,
        outputs: str | Sequence[int] = "all",
        final_lengths: Sequence[int] | None = None,
        follows: Sequence[int] | None = None,
        num_prompts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """Pack token lists. outputs: "all", "last" (each row's last token), or indices into the packed tokens."""
        starts = (0, *accumulate(len(row) for row in rows))
        before = tuple(context) if context is not None else (0,) * len(rows)
        positions = list(chain.from_iterable(range(ctx, ctx + len(row)) for row, ctx in zip(rows, before, strict=True)))
        if outputs == "all":
            index = None
        elif outputs == "last":
            index = torch.tensor([stop - 1 for stop in starts[1:]], dtype=torch.int64, device=device)
        else:
            index = torch.as_tensor(list(outputs), dtype=torch.int64, device=device)
        return cls(
            torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            starts,
            before,
            tuple(map(tuple, pages)) if pages is not None else None,
            index,
            tuple(final_lengths) if final_lengths is not None else None,
            tuple(follows) if follows is not None else None,
            tuple(num_prompts) if num_prompts is not None else None,
        )

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return self.row_starts[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """New tokens a row."""
        return tuple(stop - start for start, stop in zip(self.row_starts, self.row_starts[1:], strict=False))

    @cached_property
    def row_of_token(self) -> Tensor:
        """[T] int64: the row each token belongs to."""
        counts = torch.tensor(self.lengths, device=self.token_ids.device)
        return torch.repeat_interleave(torch.arange(self.num_rows, device=self.token_ids.device), counts)


class Segment(NamedTuple):
    """Tokens start to stop (exclusive) of a packed batch use one adapter's weights."""

    start: int
    stop: int
    weights: AdapterWeights


class EditWeights(Protocol):
    """Anything that can say how a hidden state is edited: one side of a resident adapter's ReFT part, or the tensors of a training job."""

    def edit(self, layer: int, component: int) -> Edit | None:
        """The edit at (layer, index into reft.COMPONENTS); None where nothing is edited."""
        ...


class EditRows(NamedTuple):
    """Tokens [n] int64 of a packed batch, each once, whose hidden states are edited by the same tensors. Made by apply_edits.edit_rows."""

    tokens: Tensor
    weights: EditWeights


@dataclass(frozen=True)
class AdapterBatch:
    """Which adapter each token uses; tokens in no segment and in no bank row use the base alone.

    segments do not overlap. bank_rows, if given, covers single-token rows (decode) whose adapters stand in a bank: one product a site for all of
    them. edits: tokens with ReFT, independent of the two; none in a step that only decodes. blocks: weights of the base with adapters merged in, for
    all tokens; without gradients.
    """

    segments: tuple[Segment, ...] = ()
    bank_rows: BankRows | None = None
    edits: tuple[EditRows, ...] = ()
    blocks: BlockWeights | None = None

    @classmethod
    def single(cls, weights: AdapterWeights, num_tokens: int) -> AdapterBatch:
        """All tokens use one adapter: what training one job passes."""
        return cls((Segment(0, num_tokens, weights),))


BASE_ONLY = AdapterBatch()
