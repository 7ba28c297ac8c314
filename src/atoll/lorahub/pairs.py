"""Learning on an encoder-decoder base: the modules as one pool over transformers' forward, and label losses of many candidates in one batch.

What does not depend on the weights is kept: the tokens, and the encoder's states where no module changes the encoder.

Used by algorithm.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.data.batches import micro_batches
from atoll.lorahub.examples import ExampleDataset, encode_pairs, unpadded
from atoll.lorahub.modules import Module
from atoll.model.fingerprint import weights_hash
from atoll.model.generic import GenericModel, Pairs
from atoll.model.generic_adapter import GenericAdapter, read_generic_adapter, write_generic_adapter
from atoll.model.generic_pool import GenericPool

GROUP_TOKENS = 2048  # of a forward that is worth its overhead: examples of unequal length are not padded together beyond it
FORWARD_TOKENS = 2560  # of a forward at most: more do not make it faster, and what they compute no longer fits the cache
BACKWARD_TOKENS = 4096  # of a forward whose activations are kept
_KEPT_GROUPS = 256


class PairLearner:
    """algorithm.Learner over a GenericModel, which `finish` merges the result into."""

    def __init__(self, model: GenericModel, modules: Sequence[Module], inputs: Sequence[str], outputs: Sequence[str], form: str) -> None:
        adapters = [read_generic_adapter(module.folder) for module in modules]
        self.model, self.form = model, form
        self.pool = GenericPool.of(adapters, model, [module.name for module in modules])
        self.dataset: ExampleDataset = encode_pairs(model.tokenizer, inputs, outputs)
        self.num, self.num_layers = self.pool.num, model.num_layers
        self.pool.changes(torch.zeros(1, self.num), form)  # what the form cannot take is said before the search

    def scores(self, batch_size: int | None) -> PairScores:
        """Each example's mean label loss. batch_size: how many examples stand in a forward at most."""
        return PairScores(self.pool, unpadded(self.dataset), self.form, batch_size)

    @contextmanager
    def candidate(self, weights: Tensor) -> Iterator[Any]:
        """transformers' model with a candidate's weights [N] in it."""
        with self.model.changed(self.pool.changes(weights.unsqueeze(0), self.form)):
            yield self.model.model

    def composed(self, weights: Tensor) -> GenericAdapter:
        """The adapter of the weights [N] or [N, L]."""
        return self.pool.compose(weights.detach().cpu().float(), self.form)

    def finish(self, adapter: GenericAdapter, manifest: Mapping[str, Any], save_to: Path | None) -> tuple[Any, Any]:
        """Merge the adapter into transformers' model; returns that and its tokenizer. With save_to, its folder is written too."""
        if save_to is not None:
            base = {"name": self.model.name, "weights_fingerprint": weights_hash(self.model.path)}
            record = {**manifest, "base": base}
            write_generic_adapter(save_to, GenericAdapter(adapter.spec, adapter.modules, record, adapter.task_type))
        self.model.merge(adapter)
        return self.model.model, self.model.tokenizer


class PairScores:
    """compose.objective.Scores: the mean loss over an example's label tokens, in nats."""

    differentiable = True

    def __init__(self, pool: GenericPool, rows: Sequence[tuple[Sequence[int], Sequence[int]]], form: str, batch_size: int | None = None) -> None:
        self._pool, self._model, self._rows, self._form = pool, pool.model, list(rows), form
        self._batch_size = batch_size or len(self._rows)
        self._lengths = [len(tokens) + len(labels) for tokens, labels in rows]
        self._pairs: dict[tuple[int, ...], tuple[Pairs, Tensor | None]] = {}

    @property
    def num_adapters(self) -> int:
        return self._pool.num

    @property
    def num_layers(self) -> int:
        return self._model.num_layers

    @property
    def num_examples(self) -> int:
        return len(self._rows)

    def at_once(self, examples: Sequence[int]) -> int:
        """How many candidates one forward takes."""
        return max(1, FORWARD_TOKENS // max(self._lengths[example] for example in examples))

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        """The examples in groups that can be differentiated at a time, for so many candidates together."""
        return self._groups(examples, num_candidates, BACKWARD_TOKENS)

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, len(examples)] float32. weights [P, N] or [P, N, L]. With gradients, all rows stand in one graph: pass what `portions` gave."""
        if torch.is_grad_enabled() and weights.requires_grad:
            return self._forward(weights, tuple(examples))
        column = {example: place for place, example in enumerate(examples)}
        found = torch.empty(len(weights), len(examples), dtype=torch.float32, device=weights.device)
        step = self.at_once(examples)
        with torch.no_grad():
            for start in range(0, len(weights), step):
                part = weights[start : start + step]
                for group in self._groups(examples, len(part), GROUP_TOKENS):
                    found[start : start + step, [column[example] for example in group]] = self._forward(part, tuple(group))
        return found

    def _groups(self, examples: Sequence[int], num_candidates: int, tokens: int) -> list[list[int]]:
        """Examples of like length, as many as make up a forward of so many tokens and no more than the batch size."""
        groups = micro_batches(list(examples), self._lengths, max(1, tokens // num_candidates))
        return [group[start : start + self._batch_size] for group in groups for start in range(0, len(group), self._batch_size)]

    def _forward(self, weights: Tensor, examples: tuple[int, ...]) -> Tensor:
        pairs, encoded = self._batch(examples)
        losses = self._model.label_losses(pairs, self._pool.changes(weights, self._form), len(weights), encoded)
        return losses.to(weights.device)

    def _batch(self, examples: tuple[int, ...]) -> tuple[Pairs, Tensor | None]:
        """The examples as a batch, and what the encoder says to them where that is the same for all candidates."""
        if examples not in self._pairs:
            while len(self._pairs) >= _KEPT_GROUPS:
                self._pairs.pop(next(iter(self._pairs)))
            pairs = Pairs.of([self._rows[example] for example in examples], self._model.tokenizer.pad_token_id, self._model.device)
            self._pairs[examples] = pairs, None if self._model.in_encoder(self._pool.places) else self._model.encode(pairs)
        return self._pairs[examples]
