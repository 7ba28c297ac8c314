"""Adapters of one generic base, stacked at each linear, and what a weighting of them changes there.

As in compose, a candidate is only a vector of weights, and P candidates are P equal blocks of a batch's rows. Two forms say what it means:

    cat      ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ: all adapters run stacked, and a candidate is a factor on z = x Aᵀ.
    product  ΔW = (Σ wᵢ √sᵢ Bᵢ)(Σ wᵢ √sᵢ Aᵢ), LoraHub's: the factors of each candidate are summed, for all candidates in one product.

Both are differentiable in the weights. Scaling is each adapter's own. Used by lorahub.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import BaseMismatch, ConfigError
from atoll.model.adapter import AdapterSpec, LoraModule
from atoll.model.generic import Change, GenericModel
from atoll.model.generic_adapter import GenericAdapter


class Stack(NamedTuple):
    """All adapters' factors at one linear: a [R, d_in], b [R, d_out] with the scalings in it, owner [R] int64 (the adapter of each row)."""

    owner: Tensor
    a: Tensor
    b: Tensor


class Factors(NamedTuple):
    """For the product form: the adapters [n] int64 that change a linear; a [n, r * d_in], b [n, r * d_out], √|scaling| in each, its sign in b."""

    owner: Tensor
    a: Tensor
    b: Tensor
    rank: int


@dataclass(frozen=True)
class GenericPool:
    """Adapters that fit a model, by their names."""

    model: GenericModel
    adapters: tuple[GenericAdapter, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, adapters: Sequence[GenericAdapter], model: GenericModel, names: Sequence[str]) -> GenericPool:
        """Raises ConfigError for no adapters, BaseMismatch for one that does not fit."""
        if not adapters:
            raise ConfigError("there are no adapters to compose", hint="name at least one")
        for name, adapter in zip(names, adapters, strict=True):
            try:
                adapter.check_fits(model.linears)
            except BaseMismatch as error:
                raise BaseMismatch(f"adapter {name!r}: {error.message}", hint=error.hint) from error
        return cls(model, tuple(adapters), tuple(names))

    @property
    def num(self) -> int:
        """N, the number of adapters."""
        return len(self.adapters)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """The linears that any adapter changes, in the model's order."""
        return tuple(place for place in self.model.linears if any(place in adapter.modules for adapter in self.adapters))

    def changes(self, weights: Tensor, form: str = "cat") -> dict[str, Change]:
        """What the candidates weights [P, N], or [P, N, L] with one for each layer, add at each linear, to rows in P equal blocks.

        Raises ConfigError for the product form where ranks differ.
        """
        weights = weights.to(self.model.device)
        changes: dict[str, Change] = {}
        for place in self.places:
            here = weights if weights.dim() == 2 else weights[:, :, self.model.layer_of[place]]
            if form == "cat":
                stack = self._stacks[place]
                changes[place] = partial(_add_mixed, here.index_select(1, stack.owner).to(stack.a.dtype), stack)
            else:
                factors = self._factors[place]
                changes[place] = partial(_add_product, here.index_select(1, factors.owner).to(factors.a.dtype), factors)
        return changes

    @cached_property
    def _stacks(self) -> Mapping[str, Stack]:
        stacks = {}
        for place in self.places:
            here = self._at(place)
            owner = torch.tensor([index for index, module in here for _ in range(module.rank)], dtype=torch.int64, device=self.model.device)
            b = torch.cat([(module.b.float() * module.scaling).T for _, module in here])
            stacks[place] = Stack(owner, self._placed(torch.cat([module.a.float() for _, module in here])), self._placed(b))
        return stacks

    @cached_property
    def _factors(self) -> Mapping[str, Factors]:
        factors = {}
        for place in self.places:
            here = self._at(place)
            rank = _equal_rank(place, here)
            a = torch.stack([(module.a.float() * math.sqrt(abs(module.scaling))).flatten() for _, module in here])
            b = torch.stack([(module.b.float().T * _signed_root(module.scaling)).flatten() for _, module in here])
            owner = torch.tensor([index for index, _ in here], dtype=torch.int64, device=self.model.device)
            factors[place] = Factors(owner, self._placed(a), self._placed(b), rank)
        return factors

    def _at(self, place: str) -> list[tuple[int, LoraModule]]:
        return [(index, adapter.modules[place]) for index, adapter in enumerate(self.adapters) if place in adapter.modules]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, self.model.dtype).contiguous()

    @torch.no_grad()
    def compose(self, weights: Tensor, form: str = "cat") -> GenericAdapter:
        """The adapter of given weights [N] or [N, L], in float32 with scaling 1. Raises as `changes` does."""
        modules: dict[str, LoraModule] = {}
        for place in self.places:
            here = self._at(place)
            own = (weights if weights.dim() == 1 else weights[:, self.model.layer_of[place]]).tolist()
            if form == "cat":
                a = torch.cat([module.a.float() for _, module in here])
                b = torch.cat([own[index] * module.scaling * module.b.float() for index, module in here], 1)
            else:
                _equal_rank(place, here)
                terms = [(own[index] * math.sqrt(abs(module.scaling)), own[index] * _signed_root(module.scaling), module) for index, module in here]
                a = torch.stack([strength * module.a.float() for strength, _, module in terms]).sum(0)
                b = torch.stack([strength * module.b.float() for _, strength, module in terms]).sum(0)
            modules[place] = LoraModule(a, b.contiguous(), 1.0)
        return GenericAdapter(self._spec_of(modules), modules, task_type=self.adapters[0].task_type)

    def _spec_of(self, modules: Mapping[str, LoraModule]) -> AdapterSpec:
        """The spec that says of each linear what its module has; short names where all linears of a name are changed, else paths."""
        last = {place: place.rsplit(".", 1)[-1] for place in self.model.linears}
        whole = all(place in modules for place in self.model.linears if last[place] in {last[changed] for changed in modules})
        rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
        pattern = {place: module.rank for place, module in modules.items() if module.rank != rank}
        return AdapterSpec(
            base=self.adapters[0].spec.base or self.model.name,
            rank=rank,
            alpha=float(rank),
            target_modules=tuple(sorted({last[place] for place in modules})) if whole else tuple(modules),
            rank_pattern=pattern,
            alpha_pattern={place: float(own) for place, own in pattern.items()},
        )


def _add_mixed(mix: Tensor, stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """y + Σ (mix ∘ (x Aᵀ)) B. mix [P, R]; x [P * k, T, d_in], y [P * k, T, d_out]."""
    z = (x.reshape(-1, x.shape[-1]) @ stack.a.T).view(len(mix), -1, mix.shape[1]) * mix.unsqueeze(1)
    return _added(y, (z.flatten(0, 1) @ stack.b).view(y.shape))


def _add_product(weights: Tensor, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
    """y + (x A(w)ᵀ) B(w), with the factor sums of each candidate. weights [P, n]."""
    a = (weights @ factors.a).view(len(weights), factors.rank, -1)
    b = (weights @ factors.b).view(len(weights), factors.rank, -1)
    blocks = x.reshape(len(weights), -1, x.shape[-1])
    return _added(y, torch.bmm(torch.bmm(blocks, a.mT), b).view(y.shape))


def _added(y: Tensor, update: Tensor) -> Tensor:
    return y + update if torch.is_grad_enabled() else y.add_(update)


def _equal_rank(place: str, here: Sequence[tuple[int, LoraModule]]) -> int:
    ranks = {module.rank for _, module in here}
    if len(ranks) > 1:
        raise ConfigError(
            f"the product form needs adapters of equal rank, but at {place} they have ranks {', '.join(map(str, sorted(ranks)))}",
            hint="use the form cat, which takes any ranks, or leave adapters out",
        )
    return ranks.pop()


def _signed_root(scaling: float) -> float:
    return math.copysign(math.sqrt(abs(scaling)), scaling)
