"""Several adapters into one: the adapter algebra.

Every function takes parents and one weight each, and returns an ordinary Adapter of float32 factors with scaling 1, which is served, stored and
trained like any other. The exact sum ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ needs no arithmetic: the factors are stacked (`cat`), whatever the parents' ranks, scalings,
layers and targets, and `compress` brings the rank down with the least error there is. The other methods are named after what defines them and mean
what they mean there. A site that only some parents change gets only their terms. No matrix of a linear's size [d_out, d_in] is ever built, except by
`by_deltas`, one site at a time. ReFT edits are composed by `cat` alone (composed_edits.py); the others refuse parents that have any.

Every function raises ConfigError for no parents, weights that are not one finite number each, and a rank below 1; AdapterFormatError for a parent
with values that are not finite; UnsupportedAdapter for a classifier's. Merging tensors entry by entry is in sparsify.py.

Used by serving.merging for a request's merged adapters, and by compose.result for what a search found.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import AdapterFormatError, BaseMismatch, ConfigError, RequestRefused, UnsupportedAdapter
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.composed_edits import cat_edits
from atoll.model.dora import refuse_dora
from atoll.model.reft import ReftSpec
from atoll.model.sites import Site, in_block_order, in_file_order, module_path
from atoll.model.sparsify import Merge, weighted_sum

_NULL = 1e-6  # singular values below this part of the largest are rounding of float32 factors, not directions


class Term(NamedTuple):
    """One parent's part at a site: wᵢ and its factors, in float32."""

    weight: float
    a: Tensor
    b: Tensor
    scaling: float


class Compressed(NamedTuple):
    """An adapter of lower rank, and the share of the squared norm of the updates that it kept: of all sites together, and where least was kept."""

    adapter: Adapter
    energy_kept: float
    least_energy_kept: float


Combine = Callable[[Site, Sequence[Term]], tuple[Tensor, Tensor]]


def cat(parents: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, exactly, by stacking ranks: A = [A₁; A₂; …], B = [w₁ s₁ B₁, w₂ s₂ B₂, …]. The rank is the sum of the ranks.

    Weight and scaling go into B, as the bank folds scaling: one parent of weight 1 has the parent's own bits there, in any dtype. Edits add up
    likewise, Δ = Σ wᵢ Δᵢ, so a LoRA and a ReFT adapter become one with both.
    """

    def combine(site: Site, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        return torch.cat([term.a for term in terms]), torch.cat([term.weight * term.scaling * term.b for term in terms], 1)

    weights = _checked(parents, weights)
    parts, edits = cat_edits(parents, weights)
    modules = _combined(parents, weights, combine)
    return Adapter(_spec_of(modules, [parent.spec for parent in parents], parts), modules, edits=edits)


def product(parents: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """ΔW = (Σ wᵢ √sᵢ Bᵢ) (Σ wᵢ √sᵢ Aᵢ): LoraHub's composition, which is also what LoRAX calls linear. Equal ranks at each site.

    A weight acts on both factors: w alone has the strength w², w and -w are the same, and two parents add cross terms wᵢ wⱼ Bᵢ Aⱼ. LoraHub and LoRAX
    take the first adapter's scaling for all; where the parents' scalings agree, this is their formula. Where they do not, each keeps its own.
    """

    def combine(site: Site, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        _check_equal_ranks("product", site, terms)
        strengths = torch.tensor([term.weight * abs(term.scaling) ** 0.5 for term in terms])
        signs = torch.tensor([_sign(term.scaling) for term in terms])
        a, b = torch.stack([term.a for term in terms]), torch.stack([term.b for term in terms])
        return weighted_sum(a, strengths), weighted_sum(b, strengths * signs)

    return _composed(parents, weights, combine, "product")


def by_factors(parents: Sequence[Adapter], weights: Sequence[float], merge: Merge, method: str) -> Adapter:
    """The A's merged entry by entry, and the B's, each with √|wᵢ sᵢ| and the sign on A: PEFT's `ties`, `dare_linear`, … Equal ranks at each site.

    Cheap, and what clients of LoRAX and PEFT know by those names. But cross terms Bᵢ Aⱼ arise, and an entry of a factor has no meaning of its own
    (B A = (B M)(M⁻¹ A)); `by_deltas` and `knots` have neither trouble. `method` is for messages.
    """

    def combine(site: Site, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        _check_equal_ranks(method, site, terms)
        strengths = [term.weight * term.scaling for term in terms]
        roots = torch.tensor([abs(strength) ** 0.5 for strength in strengths])
        signs = torch.tensor([_sign(strength) for strength in strengths])
        return merge(torch.stack([term.a for term in terms]), roots * signs), merge(torch.stack([term.b for term in terms]), roots)

    return _composed(parents, weights, combine, method)


def by_deltas(parents: Sequence[Adapter], weights: Sequence[float], merge: Merge, rank: int) -> Compressed:
    """The updates sᵢ Bᵢ Aᵢ merged entry by entry, as the papers define it, then the best adapter of `rank`: PEFT's `ties_svd`, `dare_linear_svd`, …

    Thinning makes a full-rank matrix out of a low-rank one, so something is always cut. Builds the dense updates of one site at a time, and takes
    tens of times longer than everything else here: not for a request.
    """
    rank = _checked_rank(rank)
    kept: list[tuple[float, float]] = []

    def combine(site: Site, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        deltas = torch.stack([term.scaling * (term.b @ term.a) for term in terms])
        merged = merge(deltas, torch.tensor([term.weight for term in terms])).double()
        if not bool(merged.isfinite().all()):
            raise ConfigError(
                f"the merged update overflows at layer {site.layer} {site.target}", hint="use smaller weights, or look at the adapters' norms"
            )
        wide = merged.shape[0] < merged.shape[1]
        # The eigenvectors of the smaller Gram matrix are one side's singular vectors; projecting on them is the best approximation of that rank.
        values, vectors = torch.linalg.eigh(merged @ merged.T if wide else merged.T @ merged)
        values, basis = values.flip(0).clamp(min=0)[:rank], vectors.flip(1)[:, :rank]
        kept.append((float(values.sum()), float(merged.square().sum())))
        return (basis.T @ merged, basis) if wide else (basis.T, merged @ basis)

    return _compressed(_composed(parents, weights, combine, "by_deltas"), kept)


def knots(parents: Sequence[Adapter], weights: Sequence[float], merge: Merge) -> Adapter:
    """The updates merged entry by entry in a basis they share (KnOTS, Stoica et al. 2024, arXiv 2410.19735). Any ranks.

    [s₁ B₁ A₁, s₂ B₂ A₂, …] = U [C₁, C₂, …] with U the left singular vectors, so an entry of Cᵢ = Uᵀ sᵢ Bᵢ Aᵢ says how much of one output direction
    parent i has, and equal entries mean the same for all parents. The Cᵢ [R, d_in] are merged, and ΔW = U C. With `sparsify.ties` this is KnOTS-TIES
    (each site thinned by itself); with a plain weighted sum it is the exact sum again. U comes from thin factors: no update is ever built.
    """

    def combine(site: Site, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(torch.cat([term.scaling * term.b.double() for term in terms], 1))
        blocks = r.split([term.a.shape[0] for term in terms], 1)
        stack = torch.stack([block @ term.a.double() for block, term in zip(blocks, terms, strict=True)])
        values, vectors = torch.linalg.eigh(torch.einsum("nri,nsi->rs", stack, stack))
        # Directions that no parent has are left out, or they would count as entries when the rest is thinned; one stays where there is none.
        used = max(1, int((values > values[-1] * _NULL**2).sum()))
        basis = vectors[:, -used:].flip(1)
        coordinates = torch.einsum("rk,nri->nki", basis, stack).float()
        return merge(coordinates, torch.tensor([term.weight for term in terms])), q @ basis

    return _composed(parents, weights, combine, "knots")


@torch.no_grad()
def compress(adapter: Adapter, rank: int) -> Compressed:
    """The adapter of at most `rank` at each site whose updates are nearest (least squared error), exact where the update's true rank is no more.

    B = Q_B R_B, Aᵀ = Q_A R_A, and a small SVD of R_B R_Aᵀ [R, R], in float64; the singular values go to both factors alike. Sites of lower rank stay,
    and none gets more rank than its linear is wide.
    """
    rank = _checked_rank(rank)
    refuse_edits([adapter], "compress")
    refuse_dora([adapter], "compress")
    _refuse_heads([adapter], "compressed")
    _check_finite(adapter, "the adapter")
    modules: dict[Site, LoraModule] = {}
    kept: list[tuple[float, float]] = []
    for site, module in adapter.modules.items():
        a, b = module.a.double(), module.b.double() * module.scaling
        if module.rank <= rank:
            modules[site] = LoraModule(a.float(), b.float(), 1.0)
            energy = float(((b.T @ b) * (a @ a.T)).sum())
            kept.append((energy, energy))
            continue
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        kept.append((float(values[:rank].square().sum()), float(values.square().sum())))
        roots = values[:rank].sqrt()
        modules[site] = LoraModule((roots[:, None] * (v[:rank] @ q_a.T)).float(), ((q_b @ u[:, :rank]) * roots).float(), 1.0)
    return _compressed(Adapter(_spec_of(modules, [adapter.spec]), modules, adapter.manifest), kept)


def stacked_rank(parents: Sequence[Adapter]) -> int:
    """The largest rank that `cat` of these parents' LoRA has at any site, without making it."""
    ranks: Counter[Site] = Counter()
    for parent in parents:
        ranks.update({site: module.rank for site, module in parent.modules.items()})
    return max(ranks.values(), default=0)


def refuse_edits(parents: Sequence[Adapter], method: str, names: Sequence[str] = ()) -> None:
    """Raise RequestRefused where a parent has ReFT edits, which only `cat` can compose. names: what to call the parents."""
    for index, parent in enumerate(parents):
        if parent.spec.reft:
            name = repr(names[index]) if names else str(index + 1)
            raise RequestRefused(
                f"{method} cannot merge adapter {name}, which has ReFT edits ({parent.spec.kind})",
                hint="linear and cat, without a rank, add edits up exactly; the other methods are for LoRA factors",
            )


def _checked(parents: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    """The weights as numbers, once parents and weights are what the module's docstring says."""
    if not parents or len(parents) != len(weights):
        raise ConfigError(f"there are {len(parents)} adapters and {len(weights)} weights to compose", hint="give adapters, and one weight for each")
    found = []
    for index, (parent, weight) in enumerate(zip(parents, weights, strict=True), 1):
        try:
            found.append(float(weight))
        except (TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ConfigError(f"the weight of adapter {index} is {weight!r:.60}, expected a finite number", hint="leave an adapter out by weight 0")
        _check_finite(parent, f"adapter {index}")
    return found


def _check_finite(adapter: Adapter, name: str) -> None:
    places = {f"layer {site.layer} {site.target}": (module.a, module.b) for site, module in adapter.modules.items()}
    edits = {f"part {site.part + 1} at layer {site.layer}'s {site.component}": tuple(edit.tensors.values()) for site, edit in adapter.edits.items()}
    for place, tensors in (places | edits).items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise AdapterFormatError(f"{name} has values that are not finite (NaN or infinity) at {place}", hint="train it again, or leave it out")


def _checked_rank(rank: int) -> int:
    """A whole number of any kind, from 1."""
    try:
        found = operator.index(rank)
    except TypeError:
        found = 0
    if found < 1:
        raise ConfigError(f"the rank to compress to is {rank!r:.60}, expected a whole number of at least 1", hint="give a rank such as 8")
    return found


def _refuse_heads(adapters: Sequence[Adapter], what: str) -> None:
    if any(adapter.head for adapter in adapters):
        raise UnsupportedAdapter(f"adapters with classifier heads cannot be {what}: their classes are not the same", hint="train one on all classes")


def _sign(value: float) -> float:
    return -1.0 if value < 0 else 1.0


def _check_equal_ranks(method: str, site: Site, terms: Sequence[Term]) -> None:
    ranks = [term.a.shape[0] for term in terms]
    if len(set(ranks)) > 1:
        raise RequestRefused(
            f"{method} needs adapters of equal rank, but at layer {site.layer} {site.target} they have ranks {', '.join(map(str, ranks))}",
            hint="linear, svd and knots take any ranks",
        )


def _composed(parents: Sequence[Adapter], weights: Sequence[float], combine: Combine, method: str) -> Adapter:
    """The adapter of _combined's modules, for a method that has no meaning for edits."""
    weights = _checked(parents, weights)
    refuse_edits(parents, method)
    modules = _combined(parents, weights, combine)
    return Adapter(_spec_of(modules, [parent.spec for parent in parents]), modules)


@torch.no_grad()
def _combined(parents: Sequence[Adapter], weights: Sequence[float], combine: Combine) -> dict[Site, LoraModule]:
    """combine(site, terms) -> (A, B) at every site that any parent changes, in file order. Raises UnsupportedAdapter for classifiers."""
    _refuse_heads(parents, "merged")
    refuse_dora(parents, "merging")
    modules: dict[Site, LoraModule] = {}
    for site in in_file_order({site for parent in parents for site in parent.modules}):
        a, b = combine(site, _terms(site, parents, weights))
        modules[site] = LoraModule(a.float().contiguous(), b.float().contiguous(), 1.0)
    return modules


def _terms(site: Site, parents: Sequence[Adapter], weights: Sequence[float]) -> list[Term]:
    """The parents that change a site. Raises BaseMismatch if their factors are for linears of different sizes."""
    terms: list[Term] = []
    for index, (parent, weight) in enumerate(zip(parents, weights, strict=True)):
        module = parent.modules.get(site)
        if module is None:
            continue
        term = Term(weight, module.a.float(), module.b.float(), module.scaling)
        if terms and (term.a.shape[1], term.b.shape[0]) != (terms[0].a.shape[1], terms[0].b.shape[0]):
            raise BaseMismatch(
                f"adapter {index + 1} cannot be merged with those before it: at layer {site.layer} {site.target} its factors are for a "
                f"{term.b.shape[0]} x {term.a.shape[1]} linear, theirs for {terms[0].b.shape[0]} x {terms[0].a.shape[1]}",
                hint="merge adapters of one base",
            )
        terms.append(term)
    return terms


def _compressed(adapter: Adapter, kept: Sequence[tuple[float, float]]) -> Compressed:
    """kept holds a (kept, whole) pair of squared norms for each site; nothing kept of nothing is all."""
    total = sum(whole for _, whole in kept)
    shares = [min(1.0, part / whole) for part, whole in kept if whole > 0]
    return Compressed(adapter, min(1.0, sum(part for part, _ in kept) / total) if total > 0 else 1.0, min(shares, default=1.0))


def _spec_of(modules: Mapping[Site, LoraModule], parents: Sequence[AdapterSpec], parts: tuple[ReftSpec, ...] = ()) -> AdapterSpec:
    """The spec that says of each site what its module has: this rank, scaling 1 (alpha = rank), and no site more; and the ReFT parts as given.

    Short where it can be: names of targets where every layer has them all, else each site by its path; a rank pattern by target, else by path.
    """
    if not modules:
        return AdapterSpec.reft_only(parents[0].base, parts)
    layers, targets = sorted({site.layer for site in modules}), in_block_order(site.target for site in modules)
    # A parent that names targets without layers changes all layers of its base, however many there are; so does the result then.
    everywhere = any(spec.layers_to_transform is None and any("." not in name for name in spec.target_modules) for spec in parents)
    short = not any("*" in target for target in targets)  # a name that is a path with a star could not be written
    if short and len(modules) == len(layers) * len(targets):
        names, chosen = tuple(targets), None if everywhere and layers == list(range(len(layers))) else tuple(layers)
    else:
        names, chosen = tuple(_path(site) for target in targets for site in sorted(modules, key=_path) if site.target == target), None
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    pattern: dict[str, int] = {}
    for target in targets:
        ranks = {site: module.rank for site, module in modules.items() if site.target == target}
        if short and len(set(ranks.values())) == 1:
            pattern[target] = next(iter(ranks.values()))
        else:
            pattern.update({_path(site): found for site, found in ranks.items()})
    pattern = {name: found for name, found in pattern.items() if found != rank}
    return AdapterSpec(
        base=parents[0].base,
        rank=rank,
        alpha=float(rank),
        target_modules=names,
        rank_pattern=pattern,
        alpha_pattern={name: float(found) for name, found in pattern.items()},
        layers_to_transform=chosen,
        reft=parts,
        fan_in_fan_out=parents[0].fan_in_fan_out,
        task_type=parents[0].task_type,
    )


def _path(site: Site) -> str:
    """A name that means this site alone, in the form of PEFT's patterns: "layers.3.self_attn.q_proj"."""
    return module_path(site).removeprefix("model.")
