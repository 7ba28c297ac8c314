"""The adapters that may be composed, flat: at every fused linear one A and one B of all of them, as the forward reads them.

A pool is made once for a search. A candidate is then only a vector of weights, one an adapter (or one an adapter and layer): no adapter is copied or
loaded again, however many candidates are tried. Scaling is folded into B in float32 before rounding, as a served adapter's is, so ranks, alphas,
rsLoRA, targets and layers may all differ.

Used by candidates.py (what differs between candidates), result.py (the adapters themselves) and retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import BaseMismatch, ConfigError, UnsupportedAdapter
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.apply import Part
from atoll.model.decoder import Decoder
from atoll.model.generic_adapter import GenericAdapter
from atoll.model.sites import GROUPS, Site

FAR = 4.0  # times the median norm, up to which adapters are alike: 17 trained on real tasks lie between 0.8 and 2.2


class Stack(NamedTuple):
    """All adapters' factors at one fused linear, in the compute dtype: a [R, d_in], owner [R] int64 (the adapter of each row), and the members.

    A member's b [R_member, d_out] has each adapter's scaling in it. runs: for each member, (adapter, first row of b, last row + 1) of those it has.
    """

    a: Tensor
    owner: Tensor
    parts: tuple[Part, ...]
    runs: tuple[tuple[tuple[int, int, int], ...], ...]


class Factors(NamedTuple):
    """One member of a fused linear for the product form: the adapters [n] int64 that change it, and their factors as rows, √|scaling| in each.

    a [n, r * d_in], b [n, r * d_out] (transposed, with the scaling's sign); columns out_start to out_stop of the fused output are its own.
    """

    owner: Tensor
    a: Tensor
    b: Tensor
    rank: int
    out_start: int
    out_stop: int


def why_not(adapter: Adapter) -> tuple[str, str]:
    """(why an adapter cannot be weighed by the search, the way out), or two empty strings where it can."""
    if adapter.edits:
        way_out = "leave it out of the search; edits can be added to the result with fixed weights (merge strategy cat)"
        return f"{adapter.spec.kind}: it edits hidden states, and the search weights LoRA factors only", way_out
    if adapter.spec.use_dora:
        way_out = "leave it out of the search, or train it as a plain LoRA"
        return "a DoRA adapter: its magnitudes belong to its own update, which has no weighted sum", way_out
    return "", ""


@dataclass(frozen=True)
class Pool:
    """Adapters of one base, checked against it.

    stacks holds what stands at (layer, group); linears is the base's {target: (d_out, d_in)}, groups its linears that share an input. can_merge:
    whether the base computes blocks of merged weights.
    """

    adapters: tuple[Adapter, ...]
    names: tuple[str, ...]
    digests: tuple[str | None, ...]
    linears: Mapping[str, tuple[int, int]]
    num_layers: int
    stacks: Mapping[tuple[int, int], Stack]
    groups: Sequence[Sequence[str]] = GROUPS
    can_merge: bool = True

    @classmethod
    def of(
        cls, adapters: Sequence[Adapter], decoder: Decoder, names: Sequence[str] | None = None, digests: Sequence[str | None] | None = None
    ) -> Pool:
        """Stack adapters that fit the decoder's base. names are for messages and the result's manifest; digests say which versions they are.

        Raises ConfigError for no adapters, UnsupportedAdapter for one that edits hidden states and for an encoder's, BaseMismatch for one that does
        not fit.
        """
        if not adapters:
            raise ConfigError("there are no adapters to compose", hint="name at least one adapter of the hub")
        if decoder.classifies:
            raise UnsupportedAdapter(
                "the base is an encoder: each of its adapters has a classifier of its own, and classifiers cannot be weighted",
                hint="train one adapter on all classes, or compose over a base that writes text",
            )
        shape = decoder.shape
        known = tuple(names) if names is not None else tuple(f"adapter {index}" for index in range(1, len(adapters) + 1))
        for name, adapter in zip(known, adapters, strict=True):
            reason, way_out = why_not(adapter)
            if reason:
                raise UnsupportedAdapter(f"adapter {name!r} is {reason}", hint=way_out)
            try:
                adapter.check_fits(shape.linears, shape.num_layers)
            except BaseMismatch as error:
                raise BaseMismatch(f"adapter {name!r}: {error.message}", hint=error.hint) from error
        stacks = {
            (layer, group): stack
            for layer in range(shape.num_layers)
            for group in range(len(shape.groups))
            if (stack := _stack(adapters, shape.linears, layer, group, decoder)) is not None
        }
        digests = tuple(digests or (None,) * len(adapters))
        can_merge = not decoder.whole_prompts  # a prompt that is read apart has no blocks of equal length
        return cls(tuple(adapters), known, digests, dict(shape.linears), shape.num_layers, stacks, shape.groups, can_merge)

    @property
    def num(self) -> int:
        """N, the number of adapters."""
        return len(self.adapters)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each adapter's largest rank."""
        return tuple(adapter.max_rank for adapter in self.adapters)

    @property
    def num_bytes(self) -> int:
        """Memory of the stacked factors; the adapters' own tensors are not counted."""
        return sum((stack.a.numel() + sum(part.b.numel() for part in stack.parts)) * stack.a.itemsize for stack in self.stacks.values())

    @cached_property
    def first_layer(self) -> int:
        """The lowest layer that any adapter changes: below it, all candidates are the base."""
        return min(layer for layer, _ in self.stacks)

    @cached_property
    def acts(self) -> Tensor:
        """[N, L] bool: whether an adapter changes a layer. Where it does not, a weight of its own for that layer means nothing."""
        found = torch.zeros(self.num, self.num_layers, dtype=torch.bool)
        for index, adapter in enumerate(self.adapters):
            found[index, sorted({site.layer for site in adapter.modules})] = True
        return found

    @cached_property
    def reach(self) -> tuple[float, ...]:
        """What `reach` says of the adapters."""
        return reach(self.adapters)

    @cached_property
    def factors(self) -> Mapping[tuple[int, int], tuple[Factors, ...]]:
        """The members of every fused linear for the product form, made on first use. Raises ConfigError where ranks differ at a site."""
        return {key: self._factors(*key) for key in self.stacks}

    def _factors(self, layer: int, group: int) -> tuple[Factors, ...]:
        like = self.stacks[layer, group].a
        found, column = [], 0
        for target in self.groups[group]:
            start, column = column, column + self.linears[target][0]
            here = [(index, module) for index, module in enumerate(_modules(self.adapters, Site(layer, target))) if module is not None]
            if not here:
                continue
            ranks = {module.rank for _, module in here}
            if len(ranks) > 1:
                listed = ", ".join(map(str, sorted(ranks)))
                raise ConfigError(
                    f"the product form needs adapters of equal rank, but at layer {layer} {target} they have ranks {listed}",
                    hint="use the form cat, which takes any ranks, or leave adapters out",
                )
            roots = [abs(module.scaling) ** 0.5 for _, module in here]
            a = torch.stack([(module.a.float() * root).flatten() for (_, module), root in zip(here, roots, strict=True)])
            signed = [root if module.scaling >= 0 else -root for (_, module), root in zip(here, roots, strict=True)]
            b = torch.stack([(module.b.float().T * root).flatten() for (_, module), root in zip(here, signed, strict=True)])
            owner = torch.tensor([index for index, _ in here], dtype=torch.int64, device=like.device)
            found.append(Factors(owner, a.to(like), b.to(like), ranks.pop(), start, column))
        return tuple(found)


def reach(adapters: Sequence[Adapter | GenericAdapter]) -> tuple[float, ...]:
    """For each adapter, 1, or by how much the Frobenius norm of its update is beyond 4 times the median: its weight should move by so much less."""
    norms = torch.tensor([math.hypot(*map(update_norm, adapter.modules.values())) for adapter in adapters], dtype=torch.float64)
    known = norms[torch.isfinite(norms) & (norms > 0)]
    if not len(known):
        return (1.0,) * len(adapters)
    return tuple((norms / (FAR * known.median())).nan_to_num(1.0, posinf=1.0).clamp(min=1.0).tolist())


def update_norm(module: LoraModule) -> float:
    """‖s B A‖ in the Frobenius norm. In float64."""
    return abs(module.scaling) * product_norm(module.a, module.b)


def product_norm(a: Tensor, b: Tensor) -> float:
    """‖B A‖ from two r x r products: ‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ). a [r, d_in], b [d_out, r]; in float64."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _modules(adapters: Sequence[Adapter], site: Site) -> list[LoraModule | None]:
    return [adapter.modules.get(site) for adapter in adapters]


def _stack(adapters: Sequence[Adapter], linears: Mapping[str, tuple[int, int]], layer: int, group: int, decoder: Decoder) -> Stack | None:
    """What stands at one fused linear; None where no adapter changes it."""
    rows, owners, parts, runs = [], [], [], []
    rank = column = 0
    for target in decoder.shape.groups[group]:
        start, column = column, column + linears[target][0]
        here = [(index, module) for index, module in enumerate(_modules(adapters, Site(layer, target))) if module is not None]
        if not here:
            continue
        rows += [module.a for _, module in here]
        owners += [index for index, module in here for _ in range(module.rank)]
        b = torch.cat([(module.b.float() * module.scaling).T for _, module in here])
        parts.append(Part(rank, rank + len(b), start, column, b.to(decoder.device, decoder.dtype).contiguous(), 1.0))
        rank += len(b)
        stops = list(accumulate(module.rank for _, module in here))
        runs.append(tuple((index, stop - module.rank, stop) for (index, module), stop in zip(here, stops, strict=True)))
    if not parts:
        return None
    a = torch.cat([row.to(decoder.device, decoder.dtype) for row in rows])
    return Stack(a, torch.tensor(owners, dtype=torch.int64, device=decoder.device), tuple(parts), tuple(runs))
