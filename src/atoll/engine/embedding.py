"""Texts to vectors: the final hidden states of the base or an adapter, averaged over a text's tokens or of its last one.

Used by engine.py, as a job of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.engine.jobs import Job, Lack, Lender, Text
from atoll.engine.request import EmbedRequest
from atoll.engine.step import not_finite


class EmbedJob(Job[list[float]]):
    """One vector of D float32 numbers a text."""

    def __init__(self, items: Sequence[EmbedRequest]) -> None:
        super().__init__([item.adapter for item in items], items[0].scope if items else "")
        self._items = items
        self._vectors: list[list[float]] = [[] for _ in items]
        self._todo = deque(sorted(range(len(items)), key=lambda i: items[i].adapter or ""))
        self.finished = not items

    def step(self, lender: Lender) -> Lack | None:
        members: list[int] = []
        texts: list[Text] = []
        room, lack = lender.max_tokens, None
        failed = True
        try:
            while self._todo and (not texts or len(self._items[self._todo[0]].prompt_ids) <= room):
                item = self._items[self._todo[0]]
                text = lender.borrow(item.prompt_ids, item.adapter)
                if isinstance(text, Lack):
                    lack = text
                    break
                texts.append(text)
                members.append(self._todo.popleft())
                room -= len(text.tokens)
            for index, vector in zip(members, self._pooled(lender, members, texts), strict=True):
                if not torch.isfinite(vector).all():
                    raise not_finite(self._items[index].adapter)
                self._vectors[index] = vector.tolist()
            failed = False
        finally:
            lender.give_back(texts, failed=failed)
        self.num_done += len(members)
        self.finished = not self._todo
        return None if members else lack

    def _pooled(self, lender: Lender, members: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        means = [self._items[index].pooling == "mean" for index in members]
        sums: list[Tensor | None] = [None] * len(texts)
        for chunks, out in lender.forwards(texts, lambda i, at_end: "all" if means[i] else "last" if at_end else "none"):
            for row, (index, _, _) in enumerate(chunks):
                found = out.of(row).float().sum(0)  # of one hidden state, or of none, where the last is wanted
                before = sums[index]
                sums[index] = found if before is None else before + found
        return [total / len(text.tokens) if mean else total for total, text, mean in zip(sums, texts, means, strict=True) if total is not None]

    def _results(self) -> list[list[float]]:
        return self._vectors
