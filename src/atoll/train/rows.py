"""Encoded rows as packed training batches: which tokens go in, which hidden states predict a label, whose adapter each row uses.

A batch is made of groups, each some rows of one job. Where a group's rows begin alike (the instruction of a task, mostly), the beginning goes in
once, as a row that the others follow: with causal attention its states do not depend on what comes after, so losses and gradients are the same for
fewer tokens. This is not so where something is drawn by place in the batch (dropout) or depends on a row's length; then nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.data.masking import MaskedRow
from atoll.model.apply_edits import edit_rows
from atoll.model.batch import AdapterBatch, PackedBatch, Segment

if TYPE_CHECKING:
    from atoll.model.positions import Positions
    from atoll.train.weights import TrainableAdapter

_SHARING_PAYS = 48  # tokens saved; for fewer, attention in one more block costs as much


class RowGroup(NamedTuple):
    """Rows of one job that are computed together; the first `shared` tokens of all are equal and go in once (0: nothing is shared)."""

    rows: Sequence[EncodedRow]
    shared: int = 0


@dataclass(frozen=True)
class LabelledBatch:
    """A packed batch, and the labels [N] int64 of the hidden states it outputs.

    Of each packed row (a shared beginning is one): num_prompts, how many tokens of its sequence are the prompt; owners, the index of its group.
    label_spans: (start, stop) of each group's labels.
    """

    batch: PackedBatch
    labels: Tensor
    num_prompts: tuple[int, ...]
    owners: tuple[int, ...]
    label_spans: tuple[tuple[int, int], ...]

    @property
    def num_labels(self) -> int:
        return int(self.labels.numel())


def shared_beginning(rows: Sequence[EncodedRow], positions: Iterable[Positions] = ()) -> int:
    """How many first tokens of all rows may go in once; 0 where that saves too little.

    Every row keeps a token of its own before its first label. positions: of a ReFT adapter; a token that some rows edit and others do not is not
    shared, nor what comes after it.
    """
    if len(rows) < 2:
        return 0
    most = min(row.first_label for row in rows) - 1
    least, greatest = min(row.token_ids[:most] for row in rows), max(row.token_ids[:most] for row in rows)
    shared = next((place for place, (one, other) in enumerate(zip(least, greatest, strict=True)) if one != other), most)
    for position in positions:
        sides = [tuple(set(places) for places in position.resolve(row.num_prompt)) for row in rows]
        differing = {place for side in zip(*sides, strict=True) for place in set.union(*side) - set.intersection(*side)}
        shared = min([shared, *differing])
    return shared if (len(rows) - 1) * shared >= _SHARING_PAYS else 0


def label_batch(rows: Sequence[EncodedRow], device: torch.device | str, shared: int = 0) -> LabelledBatch:
    """One group of rows, packed."""
    return pack_groups([RowGroup(rows, shared)], device)


def pack_groups(groups: Sequence[RowGroup], device: torch.device | str) -> LabelledBatch:
    """Pack rows without their last token (nothing follows it); the state at i predicts token i + 1, or a hidden token its own place's."""
    packed: list[Sequence[int]] = []
    context, follows, num_prompts, owners, outputs, labels = [], [], [], [], [], []  # type: ignore[var-annotated]
    spans, start = [], 0

    def add(token_ids: Sequence[int], before: int, follow: int, num_prompt: int, owner: int) -> None:
        packed.append(token_ids)
        context.append(before)
        follows.append(follow)
        num_prompts.append(num_prompt)
        owners.append(owner)

    for owner, (rows, shared) in enumerate(groups):
        first_label, beginning = len(labels), -1
        if shared:
            beginning = len(packed)
            add(rows[0].token_ids[:shared], 0, -1, rows[0].num_prompt, owner)
            start += shared
        for row in rows:
            if isinstance(row, MaskedRow):
                outputs.extend(start + place for place in row.places)
                labels.extend(row.hidden)
                add(row.token_ids, 0, -1, row.num_prompt, owner)
                start += len(row.token_ids)
                continue
            first, count = row.first_label - shared, len(row.token_ids) - 1 - shared
            outputs.extend(range(start + first - 1, start + count))
            labels.extend(row.token_ids[row.first_label :])
            add(row.token_ids[shared:-1], shared, beginning, row.num_prompt, owner)
            start += count
        spans.append((first_label, len(labels)))
    batch = PackedBatch.of(
        packed, context=context, outputs=outputs, follows=follows if max(follows) >= 0 else None, num_prompts=num_prompts, device=device
    )
    return LabelledBatch(batch, torch.tensor(labels, dtype=torch.int64, device=device), tuple(num_prompts), tuple(owners), tuple(spans))


def adapter_batch(packed: LabelledBatch, weights: Sequence[TrainableAdapter]) -> AdapterBatch:
    """Group i under weights[i], for one forward and its backward. Several jobs may share a batch: each gets the gradients of its own rows."""
    batch = packed.batch
    parts = {key: job.parts for key, job in {id(job): job for job in weights}.items()}  # fused once a job, not once a row
    jobs = [weights[owner] for owner in packed.owners]
    segments: list[Segment] = []
    for (start, stop), job in zip(pairwise(batch.row_starts), jobs, strict=True):
        if segments and segments[-1].weights is job and segments[-1].stop == start:
            segments[-1] = segments[-1]._replace(stop=stop)
        elif job.has_lora or job.head:
            segments.append(Segment(start, stop, job))
    places = zip(batch.row_starts, batch.context, batch.lengths, packed.num_prompts, jobs, strict=False)
    rows = [(start, context, count, num_prompt, parts[id(job)]) for start, context, count, num_prompt, job in places]
    return AdapterBatch(tuple(segments), edits=edit_rows(rows, batch.token_ids.device))
