"""One request's merged adapters: what was asked (MergeSpec), its identity (merge_digest), and the adapter it means (merge).

A merge is a pure function of its parents' contents and of the parameters its method uses, so the digest of those is the merged adapter's name: the
registry merges once and serves it like any other adapter. Names of methods are LoRAX's and PEFT's; what each computes is in model.composed.

    linear, cat          Σ wᵢ ΔWᵢ, exact, any ranks. LoRAX computes `product` under the name linear, PEFT √w of each factor; both add cross terms.
    svd                  the same, compressed to `rank` (by default the largest of the parents' ranks)
    product, lorahub     (Σ wᵢ Bᵢ) (Σ wᵢ Aᵢ), what LoraHub's weights are made for; equal ranks
    magnitude_prune, ties, dare_linear, dare_ties   on the factors as PEFT does it; equal ranks, need a density
    knots                TIES in a basis that the parents share; any ranks, needs a density

Adapters with ReFT edits are merged by linear and cat alone, without a rank: those add edits up exactly, the others are about factors of matrices.

Used by the registry, which resolves ids to adapters and calls merge in its worker pool; importing this file brings in no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from atoll.config_adapter import MAX_RANK
from atoll.errors import BaseMismatch, RequestRefused
from atoll.model.reft import MAX_PARTS
from atoll.serving.loading import labels_of

if TYPE_CHECKING:
    from atoll.model.adapter import Adapter
    from atoll.model.sparsify import Merge

_SAME = {"linear": "cat", "lorahub": "product"}  # two names of one method have one digest
_THINNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties", "knots")
_ELECTING = ("ties", "dare_ties", "knots")
_STACKING = ("cat", "svd", "knots")
_RANDOM = ("dare_linear", "dare_ties")
STRATEGIES = ("linear", "cat", "svd", "product", "lorahub", *_THINNING)
MAJORITY_SIGNS = ("total", "frequency")
MAX_WEIGHT = 1000.0  # far beyond any use; keeps a request from making infinities out of good adapters
_DIGEST_FORM = 1  # raise when the same spec would give other factors than before


@dataclass(frozen=True)
class MergeSpec:
    """Which adapters to merge, with which weights, and how; checked when made, raising RequestRefused.

    density is the share of entries that the thinning strategies keep; majority_sign_method is for those that elect signs; seed draws DARE's masks;
    rank, for any strategy, compresses the result.
    """

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise RequestRefused("at least one adapter ID must be provided when setting `adapters`", hint="name the adapters in merged_adapters.ids")
        if len(self.ids) != len(self.weights):
            raise RequestRefused(
                "number of adapter IDs must match number of adapter weights", hint=f"found {len(self.ids)} ids and {len(self.weights)} weights"
            )
        if not all(self.ids):
            raise RequestRefused("merged_adapters.ids holds an empty id", hint="the base has no id: leave it out, merged adapters are added to it")
        for weight in self.weights:
            if not abs(weight) <= MAX_WEIGHT:  # NaN too
                raise RequestRefused(f"merged_adapters.weights holds {weight}, expected numbers from {-MAX_WEIGHT} to {MAX_WEIGHT}")
        if self.strategy not in STRATEGIES:
            near = get_close_matches(self.strategy, STRATEGIES, n=1)
            raise RequestRefused(
                f"merge_strategy is {self.strategy!r:.60}, expected one of {', '.join(STRATEGIES)}", hint=f"did you mean {near[0]!r}?" if near else ""
            )
        if self.majority_sign_method not in MAJORITY_SIGNS:
            raise RequestRefused(f"majority_sign_method is {self.majority_sign_method!r:.60}, expected one of {', '.join(MAJORITY_SIGNS)}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.density is not None and not 0 <= self.density <= 1:
            raise RequestRefused(f"density is {self.density}, expected a number from 0 to 1", hint="it is the share of entries to keep")
        if self.method in _THINNING and not self.density:
            raise RequestRefused(
                f"merge_strategy {self.strategy!r} needs a density above 0, found {self.density}: nothing would be kept, and the base would answer",
                hint="give the share of entries to keep, such as 0.5",
            )
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise RequestRefused(f"rank is {self.rank}, expected a whole number from 1 to {MAX_RANK}")
        if not 0 <= self.seed < 1 << 64:
            raise RequestRefused(f"seed is {self.seed}, expected a whole number from 0 to 2^64 - 1")

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        weights: Sequence[float],
        *,
        merge_strategy: str | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        seed: int | None = None,
        rank: int | None = None,
        max_merged: int,
    ) -> MergeSpec:
        """A spec from a request's `merged_adapters`, where null means the default. Raises RequestRefused beyond `max_merged` adapters."""
        if len(ids) > max_merged:
            raise RequestRefused(
                f"merged_adapters names {len(ids)} adapters, but at most {max_merged} can be merged for a request",
                hint="compose them once, publish the result and ask for that",
            )
        return cls(
            tuple(ids),
            tuple(float(weight) for weight in weights),
            merge_strategy or "linear",
            density,
            majority_sign_method or "total",
            seed or 0,
            rank,
        )

    @property
    def method(self) -> str:
        """The strategy by the one name that its synonyms share."""
        return _SAME.get(self.strategy, self.strategy)

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything besides the parents that the result depends on, as JSON; what the method does not use is left out."""
        found: dict[str, Any] = {"method": self.method, "weights": [float(weight) + 0.0 for weight in self.weights]}  # + 0.0: -0 is 0
        if self.method in _THINNING:
            found["density"] = float(self.density or 0)
        if self.method in _ELECTING:
            found["majority_sign_method"] = self.majority_sign_method
        if self.method in _RANDOM and self.density != 1:
            found["seed"] = self.seed
        if self.rank is not None:
            found["rank"] = self.rank
        return found


def merge_digest(spec: MergeSpec, parent_digests: Sequence[str]) -> str:
    """The identity of the merged adapter: sha256 in hex over the parents' digests, in order, and every parameter that matters. Names do not."""
    content = {"atoll-merge": _DIGEST_FORM, "parents": [str(digest) for _, digest in zip(spec.ids, parent_digests, strict=True)], **spec.parameters}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def merge(spec: MergeSpec, parents: Sequence[Adapter], digests: Sequence[str] | None = None, *, max_rank: int = MAX_RANK) -> Adapter:
    """The adapter that `spec` means; parents[i] is the adapter spec.ids[i]. Its manifest records them (and their `digests`), weights and method.

    Raises RequestRefused (ranks that the method cannot merge, a result of more than `max_rank` or not finite) or BaseMismatch (parents of different
    bases).
    """
    from atoll.model import composed
    from atoll.model.adapter import Adapter
    from atoll.model.composed_edits import stacked_edits
    from atoll.model.dora import refuse_dora

    _check_same_base(spec, parents)
    if spec.method != "cat" or spec.rank is not None:
        composed.refuse_edits(parents, f"{spec.strategy} with a rank" if spec.method == "cat" else spec.strategy, spec.ids)
    refuse_dora(parents, spec.strategy, spec.ids)
    rank = spec.rank
    if rank is None and spec.method == "svd":
        rank = max(parent.max_rank for parent in parents)
    if rank is not None and rank > max_rank:
        raise RequestRefused(f"the merged adapter would have rank {rank}; the limit is {max_rank}", hint="ask for a lower rank")
    if spec.method in _STACKING:
        _check_stack(spec, composed.stacked_rank(parents), MAX_RANK if rank is not None else max_rank)
    if spec.method == "cat":
        _check_parts(spec, *stacked_edits(parents))
    adapter, kept = _merged(spec, parents), {}
    _check_finite(spec, adapter)
    if rank is not None:
        adapter, energy, least = composed.compress(adapter, rank)
        kept = {"energy_kept": round(energy, 6), "least_energy_kept": round(least, 6)}
    return Adapter(adapter.spec, adapter.modules, _manifest(spec, parents, digests, kept), adapter.edits)


def _check_stack(spec: MergeSpec, stacked: int, limit: int) -> None:
    """Before any work: ranks add up to what the result has, or (compressed) to what its cost grows with."""
    if stacked > limit:
        raise RequestRefused(
            f"merging {len(spec.ids)} adapters with {spec.strategy!r} stacks their ranks to {stacked}; the limit is {limit}",
            hint="merge fewer adapters" if limit == MAX_RANK else "merge fewer adapters, or give a rank to compress the result to",
        )


def _check_parts(spec: MergeSpec, num_parts: int, rank: int) -> None:
    """Edits have limits of their own: what an adapter file may hold."""
    limits = (("gives ReFT parts that cannot be joined:", num_parts, MAX_PARTS), ("stacks the ranks of ReFT edits to", rank, MAX_RANK))
    for what, found, limit in limits:
        if found > limit:
            raise RequestRefused(f"merging {len(spec.ids)} adapters {what} {found}; the limit is {limit}", hint="merge fewer adapters")


def _check_finite(spec: MergeSpec, adapter: Adapter) -> None:
    """A parent's huge values, or weights on top of them, must not reach the batch as infinities."""
    for site, module in adapter.modules.items():
        if not (bool(module.a.isfinite().all()) and bool(module.b.isfinite().all())):
            raise RequestRefused(
                f"merging {', '.join(spec.ids)} overflows at layer {site.layer} {site.target}: the factors are not finite there",
                hint="use smaller weights, or look at the adapters' norms",
            )
    for place, edit in adapter.edits.items():
        if not all(bool(tensor.isfinite().all()) for tensor in edit.tensors.values()):
            raise RequestRefused(
                f"merging {', '.join(spec.ids)} overflows at the edit of layer {place.layer}'s {place.component}: it is not finite there",
                hint="use smaller weights, or look at the adapters' norms",
            )


def _merged(spec: MergeSpec, parents: Sequence[Adapter]) -> Adapter:
    from atoll.model import composed

    if spec.method in ("cat", "svd"):
        return composed.cat(parents, spec.weights)
    if spec.method == "product":
        return composed.product(parents, spec.weights)
    if spec.method == "knots":
        return composed.knots(parents, spec.weights, _entrywise(spec))
    return composed.by_factors(parents, spec.weights, _entrywise(spec), spec.method)


def _entrywise(spec: MergeSpec) -> Merge:
    """How the thinning strategies merge a stack of tensors."""
    import torch

    from atoll.model import sparsify

    density = spec.density
    assert density is not None, "a thinning strategy without a density was refused when the spec was made"
    sign: sparsify.MajoritySign = "frequency" if spec.majority_sign_method == "frequency" else "total"
    if spec.method == "magnitude_prune":
        return sparsify.magnitude_prune(density)
    if spec.method in ("ties", "knots"):
        return sparsify.ties(density, sign)
    generator = torch.Generator().manual_seed(spec.seed)
    return sparsify.dare_linear(density, generator) if spec.method == "dare_linear" else sparsify.dare_ties(density, sign, generator)


def _check_same_base(spec: MergeSpec, parents: Sequence[Adapter]) -> None:
    """Parents whose manifests record other weights or another shape of their base cannot be added up. Names of bases prove nothing."""
    for key, what in (("weights_fingerprint", "weights"), ("config_hash", "config"), ("quantization", "rounding")):
        recorded: dict[str, str] = {}
        for adapter_id, parent in zip(spec.ids, parents, strict=True):
            found = (parent.manifest.get("base") or {}).get(key)
            if found:
                recorded.setdefault(found, adapter_id)
        if len(recorded) > 1:
            (first, one), (second, other) = list(recorded.items())[:2]
            raise BaseMismatch(
                f"adapters {one!r} and {other!r} were made for bases with other {what} ({first:.12} and {second:.12}), so they cannot be merged",
                hint="merge adapters of one base",
            )


def _manifest(spec: MergeSpec, parents: Sequence[Adapter], digests: Sequence[str] | None, kept: Mapping[str, float]) -> dict[str, Any]:
    """What the hub and the card say of it. Prompt, labels and stop tokens stay where all parents have the same; else they would be a guess."""
    bases = [dict(base) for parent in parents if (base := parent.manifest.get("base"))]
    says = [{**parent.manifest, "labels": list(labels_of(parent.manifest) or ())} for parent in parents]
    shared = {
        key: says[0][key] for key in ("prompt", "labels", "stop_token_ids") if says[0].get(key) and all(s.get(key) == says[0][key] for s in says)
    }
    known = digests if digests is not None else [None] * len(parents)
    return {
        "format": 1,
        "kind": "composed",
        "name": None,
        "base": max(bases, key=lambda base: sum(value is not None for value in base.values())) if bases else {"name": parents[0].spec.base or None},
        "prompt": None,
        "quantization": next((parent.manifest["quantization"] for parent in parents if parent.manifest.get("quantization")), None),
        "training": None,
        "parents": [{"digest": d, "name": i, "weight": w} for d, i, w in zip(known, spec.ids, spec.weights, strict=True)],
        "composition": {**spec.parameters, **kept},
        **shared,
    }
