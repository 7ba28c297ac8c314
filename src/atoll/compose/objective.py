"""What a search minimises: the scores of some examples, weighted and summed, plus a regulariser of the weights.

    value(w) = Σₑ cₑ scoreₑ(w) + regulariser(w)

By default cₑ = 1/k and the regulariser is 0.05 mean|w|: a true mean of losses, and a strength that means the same for any number of examples and
adapters. LoraHub divides a mean loss by the number of examples once more, so that its loss counts for 1/k of what it says.

Some examples may be held out: they are in no value, only in the decision when to stop. With very few examples that costs too many of them; folds then
let every example be held out from a search of its own beside the real one (gradient.py). Nothing here is ever chosen on the test set.

Used by search.py. Scores come from losses.py and metrics.py, or from any object with the same four members.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from atoll.compose.losses import check_rows
from atoll.data.encode import EncodedRow
from atoll.errors import ConfigError

NOT_FINITE = 1e9  # what a candidate is worth whose score is not a number: optimisers rank it last, and do not compute with infinities

Regulariser = Callable[[Tensor], Tensor]  # weights [P, …] -> [P], differentiable


class Scores(Protocol):
    """How good candidates are on examples; smaller is better. Scores that are differentiable are losses, none of them below zero."""

    differentiable: bool

    @property
    def num_adapters(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_examples(self) -> int: ...

    def at_once(self, examples: Sequence[int]) -> int:
        """How many candidates are scored together on these examples: a search looks at the clock and for Ctrl-C in between."""
        ...

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        """The examples in groups that can be differentiated at a time. Asked only where `differentiable`."""
        ...

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, len(examples)] float32 of weights [P, N] or [P, N, L]; differentiable where gradients are enabled and the weights ask for them."""
        ...


@dataclass(frozen=True)
class FewShot:
    """The examples of the new task, encoded as for training: prompt, completion, EOS."""

    rows: Sequence[EncodedRow]

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex over the tokens, for the manifest of what is composed from them."""
        content = [[list(row.token_ids), row.first_label] for row in self.rows]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    @property
    def all_alike(self) -> bool:
        """Whether all inputs are the same, so that nothing can be held out that was not seen."""
        return len(self._alike(0)) < 2

    def hold_out(self, share: float, seed: int) -> tuple[int, ...]:
        """Examples to hold out: at least one and not all, drawn by `seed`; equal inputs together, or one would have been seen.

        Raises ConfigError where there are too few for that, or all are alike.
        """
        if not 0 < share < 1:
            raise ConfigError(f"the share of examples to hold out is {share}, expected a number between 0 and 1", hint="0.25 is a good start")
        if len(self.rows) < 2:
            raise ConfigError("one example cannot be held out of one", hint="give more examples, or hold none out")
        groups = self._alike(seed)
        if len(groups) < 2:
            raise ConfigError(f"the {len(self.rows)} examples have one and the same input, so none can be held out", hint="give other examples")
        num, taken = max(1, round(share * len(self.rows))), list[int]()
        for group in groups[:-1]:
            if not taken or len(taken) + len(group) <= num:
                taken += group
        return tuple(sorted(taken))

    def folds(self, num: int, seed: int) -> tuple[tuple[int, ...], ...]:
        """The examples in `num` groups of nearly equal size, drawn by `seed`; fewer groups where fewer inputs differ, none where all are alike.

        Examples with equal inputs share a group, or one that is held out would have been seen. Raises ConfigError for fewer examples than groups, or
        one group.
        """
        if not 2 <= num <= len(self.rows):
            raise ConfigError(f"{len(self.rows)} examples cannot be cut into {num} folds", hint="use 2 folds or more, and no more than examples")
        groups = self._alike(seed)
        if len(groups) < 2:
            return ()
        found: list[list[int]] = [[] for _ in range(num)]
        for group in groups:
            min(found, key=len).extend(group)
        return tuple(tuple(sorted(fold)) for fold in found if fold)

    def _alike(self, seed: int) -> list[list[int]]:
        """The examples in groups of equal inputs, in an order drawn by `seed`."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index in self._shuffled(seed):
            row = self.rows[index]
            alike.setdefault(tuple(row.token_ids[: row.first_label]), []).append(index)
        return list(alike.values())

    def _shuffled(self, seed: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"atoll few-shot {seed}").shuffle(order)
        return order


def l1(strength: float = 0.05, acts: Tensor | None = None) -> Regulariser:
    """strength * mean|w| (0: none): keeps weights small and many of them near zero. LoraHub's own, of which its article writes the sum.

    acts [N, L] bool (`Pool.acts`): the mean of weights [P, N, L] is over these alone, so that layers that an adapter lacks do not thin it out.
    """
    if acts is None or bool(acts.all()):
        return lambda weights: strength * weights.flatten(1).abs().mean(1)
    has = acts.float() / acts.sum()
    return lambda weights: strength * ((weights.abs() * has).flatten(1).sum(1) if weights.dim() == 3 else weights.abs().mean(1))


class Objective:
    """Scores, what each example counts, the regulariser, and which examples are kept for the decision when to stop."""

    def __init__(
        self,
        scores: Scores,
        regulariser: Regulariser | None = None,
        *,
        importance: Sequence[float] | None = None,
        held_out: Sequence[int] = (),
        folds: Sequence[Sequence[int]] = (),
    ) -> None:
        """regulariser: l1() if None. importance: cₑ, 1/k each if None. held_out, folds: see FewShot; not both."""
        num = scores.num_examples
        self.scores, self.regulariser = scores, regulariser or l1()
        self.importance = torch.tensor(list(importance) if importance is not None else [1 / num] * num, dtype=torch.float32)
        self.held_out, self.folds = tuple(held_out), tuple(tuple(fold) for fold in folds)
        self.searched = tuple(example for example in range(num) if example not in set(self.held_out))
        assert len(self.importance) == num, "one importance for each example"
        assert not (self.held_out and self.folds), "examples are held out once, or in folds"
        if not self.searched:
            raise ConfigError("all examples are held out, so there is nothing to search on", hint="hold fewer out")

    @property
    def num_adapters(self) -> int:
        return self.scores.num_adapters

    @property
    def num_layers(self) -> int:
        return self.scores.num_layers

    def coefficients(self, examples: Sequence[int]) -> Tensor:
        """[k]: what each example counts in a value that stands for the whole but is made of `examples` alone; 0 for the others."""
        chosen = torch.zeros_like(self.importance)
        chosen[list(examples)] = self.importance[list(examples)]
        return chosen * (self.importance.sum() / chosen.sum())

    def value(self, scores: Tensor, examples: Sequence[int], weights: Tensor) -> Tensor:
        """[P] of scores [P, len(examples)]: as if the examples left out scored like those given."""
        values = scores @ self.coefficients(examples)[list(examples)] + self.regulariser(weights)
        return torch.where(torch.isfinite(values), values, NOT_FINITE)
