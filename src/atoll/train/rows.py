"""Encoded rows as packed training batches: which tokens go in, which hidden states predict a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.batch import PackedBatch


@dataclass(frozen=True)
class LabelledBatch:
    """A packed batch and the labels [N] int64 of the hidden states it outputs."""

    batch: PackedBatch
    labels: Tensor

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
    return LabelledBatch(batch, torch.tensor(labels, dtype=torch.int64, device=device))
