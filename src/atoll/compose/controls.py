"""What a composition is compared with, each learning from some of the examples and measured on others.

    base             the base as it is
    best single      of the shortlist, the adapter whose loss on the examples is least, alone at weight 1
    uniform          the shortlist with 1/N each, not searched
    composed         what the search finds on the examples
    random adapters  the same search over adapters of the same shapes and norms that have learned nothing
    k-shot LoRA      LoRA trained on the examples
    in-context       the base with the examples in its prompt

Retrieval is part of what learns: in every fold the shortlist is what the fold's own examples alone would choose.

Used by workflows, with cross_validation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoll.compose.base_losses import base_losses
from atoll.compose.cross_validation import Contestant, Fold
from atoll.compose.few_shot_lora import train_on_examples
from atoll.compose.in_context import in_context_losses
from atoll.compose.losses import LabelLosses
from atoll.compose.measuring import Candidate, alone
from atoll.compose.pool import Pool
from atoll.compose.random_adapters import random_pool
from atoll.compose.result import losses_of
from atoll.compose.retrieval import Ranking
from atoll.compose.search import Found
from atoll.data.encode import EncodedRow
from atoll.data.task import Example, Task
from atoll.errors import Interrupted

if TYPE_CHECKING:
    from atoll.model.base import Base

BASE, BEST_SINGLE, UNIFORM, COMPOSED = "base", "best single", "uniform", "composed"
RANDOM, TRAINED, IN_CONTEXT = "random adapters", "k-shot LoRA", "in-context"

Search = Callable[[Pool, Sequence[EncodedRow], int, Callable[[], bool]], Found]  # (pool, rows to search on, seed, stop_asked)


class Controls:
    """The contestants over one base, task, set of examples and ranking of candidates."""

    def __init__(
        self,
        base: Base,
        task: Task,
        examples: Sequence[Example],
        rows: Sequence[EncodedRow],
        candidates: Sequence[Candidate],
        ranking: Ranking,
        search: Search,
        *,
        top_k: int = 10,
        form: str = "cat",
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """rows: the examples encoded as for training. ranking: of the candidates on these rows, with each fold's `learn` among its subsets.

        search: the very function that makes the real result. form: how it means its weights. rank: what its adapter is compressed to.
        """
        assert len(examples) == len(rows) == ranking.losses.shape[1], "examples, rows and ranking are not of the same examples"
        self._base, self._task, self._examples, self._rows = base, task, examples, rows
        self._candidates, self._ranking, self._search = candidates, ranking, search
        self._top_k, self._form, self._rank, self._seed = top_k, form, rank, seed
        self._held: tuple[tuple[int, ...], Pool] | None = None  # the pool asked for last: contestants of one fold share it
        self._base_losses: Tensor | None = None

    def contestants(self) -> dict[str, Contestant]:
        """All of them by name, in the order of a table."""
        return {
            BASE: self.base,
            BEST_SINGLE: self.best_single,
            UNIFORM: self.uniform,
            COMPOSED: self.composed,
            RANDOM: self.random,
            TRAINED: self.trained,
            IN_CONTEXT: self.in_context,
        }

    def pool(self, examples: Sequence[int] | None = None) -> Pool:
        """The shortlist that some of the examples (None: all) choose, loaded. The one asked for last is kept."""
        shortlist = tuple(ranked.index for ranked in self._ranking.best(self._top_k, examples))
        if self._held is None or self._held[0] != shortlist:
            self._held = None  # two shortlists need not be in memory at once
            chosen = [self._candidates[index] for index in shortlist]
            adapters = [candidate.load() for candidate in chosen]
            names, digests = [candidate.name for candidate in chosen], [candidate.digest for candidate in chosen]
            self._held = shortlist, Pool.of(adapters, self._base.decoder, names, digests)
        return self._held[1]

    def base(self, fold: Fold) -> Tensor:
        if self._base_losses is None:
            self._base_losses = base_losses(self._base.decoder, self._rows)
        return self._base_losses[list(fold.held_out)]

    def best_single(self, fold: Fold) -> Tensor:
        pool, known = self.pool(fold.learn), self._ranking.best(self._top_k, fold.learn)
        seen = [ranked.loss for ranked in known if ranked.loss is not None]
        if len(seen) < pool.num:  # ranked by something else than losses
            seen = alone(LabelLosses(self._base.decoder, pool, self._of(fold.learn))).mean(1).tolist()
        return self._measured(pool, torch.eye(pool.num)[seen.index(min(seen))], fold)

    def uniform(self, fold: Fold) -> Tensor:
        pool = self.pool(fold.learn)
        return self._measured(pool, torch.full((pool.num,), 1 / pool.num), fold)

    def composed(self, fold: Fold) -> Tensor:
        return self._searched(self.pool(fold.learn), fold)

    def random(self, fold: Fold) -> Tensor:
        return self._searched(random_pool(self.pool(fold.learn), self._base.decoder, self._seed), fold)

    def trained(self, fold: Fold) -> Tensor:
        decoder = self._base.decoder
        adapter = train_on_examples(decoder, self._of(fold.learn), base=self._base.name, seed=self._seed, stop_asked=fold.stop_asked)
        return self._measured(Pool.of([adapter], decoder), torch.ones(1), fold)

    def in_context(self, fold: Fold) -> Tensor:
        held_out, shots = ([self._examples[index] for index in indices] for indices in (fold.held_out, fold.learn))
        return in_context_losses(self._base, self._task, held_out, shots)

    def _searched(self, pool: Pool, fold: Fold) -> Tensor:
        found = self._search(pool, self._of(fold.learn), self._seed, fold.stop_asked)
        if found.stopped_by == "interrupted":
            raise Interrupted("the search was stopped")
        return losses_of(pool, found.weights, self._base.decoder, self._of(fold.held_out), form=self._form, rank=self._rank)

    def _measured(self, pool: Pool, weights: Tensor, fold: Fold) -> Tensor:
        held_out = self._of(fold.held_out)
        return LabelLosses(self._base.decoder, pool, held_out).scores(weights.unsqueeze(0), range(len(held_out)))[0]

    def _of(self, examples: Sequence[int]) -> list[EncodedRow]:
        return [self._rows[example] for example in examples]
