"""Candidates of a pool as blocks of one packed batch: P weightings of N adapters, and nothing else that differs between the blocks.

Two forms say what a candidate is:

    cat      ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, the exact sum. Also with a weight for each adapter and layer.
    product  ΔW = (Σ wᵢ √sᵢ Bᵢ)(Σ wᵢ √sᵢ Aᵢ), LoraHub's: w and -w are the same, and every two adapters add a cross term.

cat is computed in one of two ways, whichever is counted to be cheaper. *Mixed*: all adapters are run stacked, and a candidate is a factor on
z = x Aᵀ; the work grows with the tokens and the sum of ranks, and it has gradients. *Merged*: each site's updates are built once for all candidates
and summed into P weights, which are used and forgotten; the work grows with the candidates alone. product merges factors, which stay thin.

Used by losses.py and metrics.py for every forward of a search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atoll.compose.pool import Pool
from atoll.model.apply import Part, Update
from atoll.model.batch import AdapterBatch, Segment

FORMS = ("cat", "product")
# What merging costs beside its FLOPs, measured on CPUs in FLOPs of a large product: B A of a low rank runs at a quarter of its speed, and every
# element of a merged weight is written and read.
_THIN, _ELEMENT = 4.0, 128.0
_PIECE = 3 << 20  # elements of updates that are built at a time: enough for a product to be fast, few enough to be in the cache when they are summed


class Candidates:
    """Turns weights into the AdapterBatch of a forward. Keeps the memory that merged weights are written into."""

    def __init__(self, pool: Pool, form: str = "cat") -> None:
        assert form in FORMS, form
        self.pool, self.form = pool, form
        self._space = torch.empty(0)

    def batch(self, weights: Tensor, num_tokens: int, *, way: str | None = None) -> AdapterBatch:
        """P candidates whose tokens stand in P equal blocks, num_tokens in all. weights [P, N], or [P, N, L] with one for each layer.

        Differentiable in weights where gradients are enabled and the weights ask for them. way: "mixed" or "merged" instead of the cheaper one.
        """
        num = len(weights)
        assert num_tokens % num == 0, (num, num_tokens)
        trained = torch.is_grad_enabled() and weights.requires_grad
        if self.form == "product":
            each, shared = num_tokens // num, _Products(self.pool, weights)
            return AdapterBatch(tuple(Segment(p * each, (p + 1) * each, _Product(shared, p)) for p in range(num)))
        if way is None:
            way = "mixed" if trained or not self.pool.can_merge else cheaper_way(self.pool, num, num_tokens // num)
        if way == "mixed":
            return AdapterBatch.single(_Mixed(self.pool, weights), num_tokens)
        return AdapterBatch(blocks=_Merged(self, weights))

    def space(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor, good until the next call."""
        size = int(torch.Size(shape).numel())
        if self._space.numel() < size or self._space.dtype != like.dtype or self._space.device != like.device:
            self._space = like.new_empty(size)
        return self._space[:size].view(shape)


def of_layer(weights: Tensor, layer: int) -> Tensor:
    """[P, N]: the weights that hold in a layer."""
    return weights if weights.dim() == 2 else weights[:, :, layer]


def cheaper_way(pool: Pool, num: int, tokens_each: int) -> str:
    """How the cat form costs least for `num` candidates of so many tokens each: "mixed" or "merged"."""
    return "mixed" if mixed_cost(pool, tokens_each) <= merged_cost(pool, num) else "merged"


def mixed_cost(pool: Pool, tokens_each: int) -> float:
    """FLOPs that running all adapters adds to the base's work for one candidate: x Aᵀ once, z B for each member."""
    per_token = sum(stack.a.numel() + sum(part.b.numel() for part in stack.parts) for stack in pool.stacks.values())
    return 2.0 * tokens_each * per_token


def merged_cost(pool: Pool, num: int) -> float:
    """FLOPs that merging adds for one of `num` candidates: its share of the products B A, a term for each adapter, and what counts as FLOPs."""
    total = 0.0
    for stack in pool.stacks.values():
        for part, runs in zip(stack.parts, stack.runs, strict=True):
            rank, d_out = part.b.shape
            total += d_out * stack.a.shape[1] * (_THIN * 2.0 * rank / num + 2.0 * len(runs) + _ELEMENT)
    return total


class _Mixed:
    """model.apply.AdapterWeights: all adapters of the pool, with each candidate's weights as the mix."""

    def __init__(self, pool: Pool, weights: Tensor) -> None:
        self._pool, self._weights = pool, weights

    def update(self, layer: int, group: int) -> Update | None:
        stack = self._pool.stacks.get((layer, group))
        if stack is None:
            return None
        return Update(stack.a, stack.parts, mix=of_layer(self._weights, layer).index_select(1, stack.owner))


class _Merged:
    """model.apply.BlockWeights: W + Σ wᵢ sᵢ Bᵢ Aᵢ of each candidate, rounded once."""

    def __init__(self, candidates: Candidates, weights: Tensor) -> None:
        self._candidates, self._weights = candidates, weights

    def merged(self, layer: int, group: int, weight: Tensor) -> Tensor | None:
        stack = self._candidates.pool.stacks.get((layer, group))
        if stack is None:
            return None
        num, d_in = len(self._weights), weight.shape[1]
        out = self._candidates.space(weight, num, *weight.shape)
        weights = torch.cat([of_layer(self._weights, layer).to(weight.dtype), weight.new_ones(num, 1)], 1)  # the last one is the base's own
        done = 0  # columns of the fused output that are written
        for part, runs in zip(stack.parts, stack.runs, strict=True):
            out[:, done : part.out_start] = weight[done : part.out_start]
            done = part.out_stop
            here = weights[:, [*(index for index, _, _ in runs), -1]]
            step = max(16, _PIECE // (d_in * max(num, len(runs) + 1)))
            for start in range(part.out_start, part.out_stop, step):
                stop = min(part.out_stop, start + step)
                terms = weight.new_empty(len(runs) + 1, stop - start, d_in)
                for place, (_, first, last) in enumerate(runs):
                    b = part.b[first:last, start - part.out_start : stop - part.out_start]
                    torch.mm(b.T, stack.a[part.rank_start + first : part.rank_start + last], out=terms[place])
                terms[-1] = weight[start:stop]
                torch.mm(here, terms.view(len(terms), -1), out=out[:, start:stop].view(num, -1))
        out[:, done:] = weight[done:]
        return out


class _Products:
    """Every candidate's merged factors at the site that was asked last; all candidates ask for a site before any asks for the next."""

    def __init__(self, pool: Pool, weights: Tensor) -> None:
        self._pool, self._weights = pool, weights
        self._at: tuple[int, int] | None = None
        self._updates: list[Update] = []

    def update(self, layer: int, group: int, candidate: int) -> Update | None:
        found = self._pool.factors.get((layer, group))
        if found is None:
            return None
        if self._at != (layer, group):
            self._at, self._updates = (layer, group), self._all(layer, group)
        return self._updates[candidate]

    def _all(self, layer: int, group: int) -> list[Update]:
        weights, num = of_layer(self._weights, layer), len(self._weights)
        rows, members, rank = [], [], 0
        for member in self._pool.factors[layer, group]:
            here = weights.index_select(1, member.owner).to(member.a.dtype)
            rows.append((here @ member.a).view(num, member.rank, -1))
            members.append((rank, member, (here @ member.b).view(num, member.rank, -1)))
            rank += member.rank
        a = torch.cat(rows, 1)
        return [Update(a[p], tuple(Part(first, first + m.rank, m.out_start, m.out_stop, b[p], 1.0) for first, m, b in members)) for p in range(num)]


class _Product:
    """model.apply.AdapterWeights of one candidate in the product form."""

    def __init__(self, shared: _Products, candidate: int) -> None:
        self._shared, self._candidate = shared, candidate

    def update(self, layer: int, group: int) -> Update | None:
        return self._shared.update(layer, group, self._candidate)
