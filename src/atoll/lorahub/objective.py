"""LoraHub's loss and regulariser under their own names, and callables of one's own as scores that a search can use.

A get_loss of one's own gets what LoraHub gives it: (example_dataset, model, batch_size), with the candidate in the model. It is called once for each
candidate and has no gradients, so the search goes by values. The default is recognised, and computed for many candidates in one batch instead.

Used by algorithm.py and compatible.py; the two defaults also by programs that build on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from atoll.lorahub.arguments import number

GetLoss = Callable[[Any, Any, int | None], SupportsFloat]
GetRegular = Callable[[Any], SupportsFloat]

STRENGTH = 0.05  # of LoraHub's regulariser


def default_get_loss(example_dataset: Any, model: Any, batch_size: int | None) -> float:
    """LoraHub's loss: the model's mean losses of the batches, summed, divided by the number of examples. batch_size None: all are one batch.

    Its size depends on batch_size, which is why learning uses the true mean where it finds this function, unless it is told to be compatible.
    """
    count = len(example_dataset)
    size = count if batch_size is None else min(count, batch_size)
    total = torch.zeros((), dtype=torch.float32)
    for start in range(0, count, size):
        rows = example_dataset[start : start + size]
        batch = {name: torch.tensor(rows[name], device=model.device) for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            total = total + model(**batch).loss.detach().float().cpu()
    return float(total) / count


def default_l1_regularization(weights: Sequence[float]) -> float:
    """0.05 mean|w|."""
    return STRENGTH * (sum([abs(weight) for weight in weights]) / len(weights))


def as_regulariser(get_regular: GetRegular) -> Callable[[Tensor], Tensor]:
    """A get_regular of one's own, called with each candidate's weights as a numpy array of float64, as atoll.compose wants it. No gradients."""
    return lambda weights: torch.tensor(
        [number("get_regular", get_regular(row)) for row in weights.detach().cpu().double().numpy()], dtype=torch.float32
    )


class CalledScores:
    """compose.objective.Scores of a callable: a candidate's weights [N] to one number, of all examples together."""

    differentiable = False
    num_examples = 1

    def __init__(self, call: Callable[[Tensor], SupportsFloat], num_adapters: int, num_layers: int) -> None:
        self._call, self.num_adapters, self.num_layers = call, num_adapters, num_layers

    def at_once(self, examples: Sequence[int]) -> int:
        return 1

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        raise AssertionError("a callable has no gradients")

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, 1]."""
        return torch.tensor([[number("get_loss", self._call(candidate))] for candidate in weights], dtype=torch.float32)
