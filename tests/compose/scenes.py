"""What the tests of compose share: adapters that agree in nothing, examples, and scores that need no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tests.adapters import random_adapter
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder


def mixed_adapters(decoder: Decoder) -> list[Adapter]:
    """Four adapters with different rank, alpha, rsLoRA, patterns, targets and layers; one reads and writes another site than all others."""
    return [
        random_adapter(decoder, 4, seed=1),
        random_adapter(decoder, 6, seed=2, use_rslora=True, alpha=3.0, rank_pattern={"k_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 9.0}),
        random_adapter(decoder, 3, seed=3, target_modules=("q_proj", "down_proj"), layers_to_transform=(0, 2)),
        random_adapter(decoder, 5, seed=4, target_modules=("v_proj", "gate_proj", "o_proj"), alpha=1.5),
    ]


def equal_adapters(decoder: Decoder, num: int = 4, **spec: object) -> list[Adapter]:
    """Adapters of rank 4 at the same sites, with different alphas."""
    return [random_adapter(decoder, 4, seed=10 + index, alpha=4.0 + 2 * index, **spec) for index in range(num)]


def strong(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with a larger B: on a tiny random base, what it does to the labels is then more than a shade."""
    return Adapter(adapter.spec, {site: LoraModule(m.a, m.b * factor, m.scaling) for site, m in adapter.modules.items()})


def examples(num: int, seed: int = 0, prompt: int = 6, answer: int = 3) -> list[EncodedRow]:
    """Random rows of unequal length: about `prompt` prompt tokens and `answer` labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num):
        num_prompt, num_answer = prompt + index % 4, answer + index % 3
        tokens = torch.randint(5, 300, (num_prompt + num_answer,), generator=generator).tolist()
        rows.append(EncodedRow(tokens, num_prompt, f"few.jsonl:{index + 1}"))
    return rows


class Bowl:
    """Scores without a model: Σ (w - target_e)² for example e, whose targets lie around one. Counts the rows that were asked for."""

    def __init__(self, target: Sequence[float], num_examples: int = 5, spread: float = 0.0, differentiable: bool = True, at_once: int = 1000) -> None:
        generator = torch.Generator().manual_seed(7)
        self.targets = torch.tensor(target) + spread * torch.randn(num_examples, len(target), generator=generator)
        self.differentiable = differentiable
        self.rows = 0
        self._at_once = at_once

    @property
    def num_adapters(self) -> int:
        return self.targets.shape[1]

    @property
    def num_layers(self) -> int:
        return 3

    @property
    def num_examples(self) -> int:
        return len(self.targets)

    def at_once(self, examples: Sequence[int]) -> int:
        return self._at_once

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        return [list(examples)[:2], list(examples)[2:]] if len(examples) > 2 else [list(examples)]

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        self.rows += len(weights) * len(examples)
        flat = weights if weights.dim() == 2 else weights.mean(2)
        return (flat.unsqueeze(1) - self.targets[list(examples)]).square().sum(2)


class Valley(Bowl):
    """A narrow, bent valley (Rosenbrock's), the same for all examples: no search is soon at its bottom."""

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        self.rows += len(weights) * len(examples)
        flat = weights if weights.dim() == 2 else weights.mean(2)
        floor = (1.2 - flat).square().sum(1) + 100 * (flat[:, 1:] - flat[:, :-1].square()).square().sum(1)
        return floor.unsqueeze(1).expand(-1, len(examples))
