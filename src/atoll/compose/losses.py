"""The label losses of many candidates on a few examples: P x k rows in one forward, logits at the label tokens alone.

Row order is candidate by candidate, each with the same examples, so a candidate's tokens are one block (see candidates.py). Where the examples or the
candidates are too many for one forward, they come in portions; nothing else is lost by that. Where all examples of a portion begin alike (with their
task's instruction, mostly), a candidate computes the beginning once, as training does; portions are made as if it were not, since attention lays the
beginning beside each row. What does not depend on the weights is kept: the packed batches, and the base's hidden states below the first layer that
any adapter changes.

Used by objective.py and by metrics.py, which scores options with it; `losses` by whoever wants the numbers once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.compose.candidates import Candidates
from atoll.compose.pool import Pool
from atoll.data.batches import micro_batches
from atoll.data.encode import EncodedRow
from atoll.errors import DataError
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder
from atoll.train.rows import RowGroup, pack_groups, shared_beginning

FORWARD_TOKENS = 16384  # tokens of a forward: some 0.5 GB of activations at a hidden size of 576
BACKWARD_TOKENS = 2048  # tokens of a forward whose activations are kept for the backward, as in training
_KEPT_BATCHES = 64
_KEPT_STATES = 1 << 28  # bytes


def losses(decoder: Decoder, pool: Pool, weights: Tensor, rows: Sequence[EncodedRow], *, form: str = "cat") -> Tensor:
    """[P, k] float32: each candidate's mean loss over an example's label tokens, in nats.

    weights [P, N], or [P, N, L] with one for each layer; differentiable in them where they ask for it. Raises as LabelLosses does.
    """
    return LabelLosses(decoder, pool, rows, form=form).scores(weights, range(len(rows)))


class _Packed(NamedTuple):
    """P times the same examples: the batch, the labels, and the example [n] of each of one candidate's labels."""

    batch: PackedBatch
    labels: Tensor
    example_of_label: Tensor


class LabelLosses:
    """objective.Scores: the mean loss over an example's label tokens, in nats. rows: examples encoded as for training, with EOS."""

    differentiable = True

    def __init__(
        self,
        decoder: Decoder,
        pool: Pool,
        rows: Sequence[EncodedRow],
        *,
        form: str = "cat",
        forward_tokens: int = FORWARD_TOKENS,
        backward_tokens: int = BACKWARD_TOKENS,
    ) -> None:
        """Raises DataError for no rows, for a row without a label, and for one longer than the base's context."""
        check_rows(rows, decoder.shape.context)
        self.decoder, self.pool, self.rows = decoder, pool, tuple(rows)
        self.candidates = Candidates(pool, form)
        self._forward_tokens, self._backward_tokens = forward_tokens, backward_tokens
        self._shares = not (decoder.rotary.by_length or decoder.whole_prompts)
        self._lengths = [len(row.token_ids) - 1 for row in self.rows]
        self._packed: dict[tuple[tuple[int, ...], int], _Packed] = {}
        self._below: dict[tuple[int, ...], Tensor] = {}  # of some examples, the base's residual stream as it enters the first layer that changes

    @property
    def num_adapters(self) -> int:
        return self.pool.num

    @property
    def num_layers(self) -> int:
        return self.pool.num_layers

    @property
    def num_examples(self) -> int:
        return len(self.rows)

    def at_once(self, examples: Sequence[int]) -> int:
        """How many candidates one forward takes."""
        portions = micro_batches(examples, self._lengths, self._forward_tokens)
        return min(max(1, self._forward_tokens // self._size(portion)) for portion in portions)

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        """The examples in groups that can be differentiated at a time, for so many candidates together."""
        return micro_batches(examples, self._lengths, max(1, self._backward_tokens // num_candidates))

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, len(examples)] float32. weights [P, N] or [P, N, L]. With gradients, all rows stand in one graph: pass what `portions` gave."""
        examples = list(examples)
        if torch.is_grad_enabled() and weights.requires_grad:
            return self._forward(weights, tuple(examples))
        column = {example: place for place, example in enumerate(examples)}
        found = torch.empty(len(weights), len(examples), dtype=torch.float32, device=weights.device)
        for portion in micro_batches(examples, self._lengths, self._forward_tokens):
            step = max(1, self._forward_tokens // self._size(portion))
            columns = [column[example] for example in portion]
            for start in range(0, len(weights), step):
                with torch.no_grad():
                    found[start : start + step, columns] = self._forward(weights[start : start + step], tuple(portion))
        return found

    def _size(self, examples: Sequence[int]) -> int:
        """Tokens of a candidate's rows, padded as attention pads them."""
        return len(examples) * max(self._lengths[example] for example in examples)

    def _forward(self, weights: Tensor, examples: tuple[int, ...]) -> Tensor:
        packed, device = self._pack(examples, len(weights)), self.decoder.device
        adapters = self.candidates.batch(weights.to(device), packed.batch.num_tokens)
        hidden = self.decoder.forward(packed.batch, adapters, entering=self._entering(examples, len(weights)))
        each = self.decoder.label_losses(hidden, packed.labels).view(len(weights), -1)
        summed = each.new_zeros(len(weights), len(examples)).index_add(1, packed.example_of_label, each)
        return (summed / torch.bincount(packed.example_of_label, minlength=len(examples))).to(weights.device)

    def _pack(self, examples: tuple[int, ...], num: int) -> _Packed:
        key = (examples, num)
        if key not in self._packed:
            rows = [self.rows[example] for example in examples]
            group = RowGroup(rows, shared_beginning(rows) if self._shares else 0)
            labelled = pack_groups([group] * num, self.decoder.device)
            counts = torch.tensor([row.num_labels for row in rows])
            example_of_label = torch.repeat_interleave(torch.arange(len(rows)), counts).to(self.decoder.device)
            if len(self._packed) >= _KEPT_BATCHES:
                self._packed.pop(next(iter(self._packed)))
            self._packed[key] = _Packed(labelled.batch, labelled.labels, example_of_label)
        return self._packed[key]

    def _entering(self, examples: tuple[int, ...], num: int) -> tuple[int, Tensor] | None:
        """Where the candidates begin to differ, and the base's residual stream there, once for each; None where that is the first layer."""
        first = self.pool.first_layer
        if first == 0 or not self.decoder.can_enter:
            return None
        entering = self._below.get(examples)
        if entering is None:
            entering = self.decoder.residual_before(first, self._pack(examples, 1).batch)
            if entering.nbytes + sum(kept.nbytes for kept in self._below.values()) <= _KEPT_STATES:
                self._below[examples] = entering
        return first, entering.repeat(num, 1)


def check_rows(rows: Sequence[EncodedRow], context: int | None = None) -> None:
    """Raise DataError for no rows, and naming a row that has no label or is longer than the base's context."""
    if not rows:
        raise DataError("there are no examples to compose for", hint="give a few prompts with their completions; 5 to 100 are usual")
    for row in rows:
        if row.num_labels < 1 or row.first_label < 1:
            raise DataError(f"{row.where}: the example has no prompt token or no label token, so it has no loss", hint="fill it in, or drop the row")
        if context is not None and len(row.token_ids) > context:
            raise DataError(f"{row.where}: the example has {len(row.token_ids)} tokens, the base's context is {context}", hint="shorten its prompt")
