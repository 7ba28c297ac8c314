"""Encoded rows as packed training batches: which tokens go in, which hidden states predict a label, whose adapter each row uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.apply_edits import edit_rows
from atoll.model.batch import AdapterBatch, PackedBatch, Segment

if TYPE_CHECKING:
    from atoll.train.weights import TrainableAdapter


@dataclass(frozen=True)
class LabelledBatch:
    """A packed batch, the labels [N] int64 of the hidden states it outputs, and how many tokens of each row are its prompt."""

    batch: PackedBatch
    labels: Tensor
    num_prompts: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        return int(self.labels.numel())


def label_batch(rows: Sequence[EncodedRow], device: torch.device | str) -> LabelledBatch:
    """Pack rows without their last token (nothing follows it); the state at i predicts token i + 1."""
    outputs: list[int] = []
    labels: list[int] = []
    start = 0
    for row in rows:
        first = row.first_label
        outputs.extend(range(start + first - 1, start + len(row.token_ids) - 1))
        labels.extend(row.token_ids[first:])
        start += len(row.token_ids) - 1
    batch = PackedBatch.of([row.token_ids[:-1] for row in rows], outputs=outputs, device=device)
    return LabelledBatch(batch, torch.tensor(labels, dtype=torch.int64, device=device), tuple(row.num_prompt for row in rows))


def adapter_batch(packed: LabelledBatch, weights: Sequence[TrainableAdapter]) -> AdapterBatch:
    """Row i under weights[i], for one forward and its backward. Several jobs may share a batch: each gets the gradients of its own rows."""
    batch = packed.batch
    parts = {key: job.parts for key, job in {id(job): job for job in weights}.items()}  # fused once a job, not once a row
    segments: list[Segment] = []
    for (start, stop), job in zip(pairwise(batch.row_starts), weights, strict=True):
        if segments and segments[-1].weights is job and segments[-1].stop == start:
            segments[-1] = segments[-1]._replace(stop=stop)
        elif job.has_lora:
            segments.append(Segment(start, stop, job))
    edited = zip(batch.row_starts, batch.lengths, packed.num_prompts, weights, strict=False)
    rows = [(start, 0, count, num_prompt, parts[id(job)]) for start, count, num_prompt, job in edited]
    return AdapterBatch(tuple(segments), edits=edit_rows(rows, batch.token_ids.device))
