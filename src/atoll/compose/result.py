"""What a composition is in the end: an ordinary adapter, whose manifest says of what it was made and how.

The adapter has the very updates that the search scored: stacked factors (cat) or LoraHub's factor sums (product). Stacking adds ranks up, so the
result may be compressed; how much of its updates' energy that keeps is returned and recorded.

Used by workflows and controls.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.compose.candidates import FORMS
from atoll.compose.losses import LabelLosses
from atoll.compose.pool import Pool
from atoll.compose.search import Found
from atoll.config_adapter import MAX_RANK
from atoll.data.encode import EncodedRow
from atoll.errors import ConfigError
from atoll.model import composed
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder


class Composed(NamedTuple):
    """The adapter, and the share of its updates' squared norm that compressing kept (1 where it was not compressed)."""

    adapter: Adapter
    energy_kept: float


def compose(pool: Pool, weights: Tensor, *, form: str = "cat", rank: int | None = None, record: Mapping[str, Any] | None = None) -> Composed:
    """The adapter of given weights [N], or [N, L] with one for each layer, compressed to `rank` if it has more.

    Adapters of weight 0 are left out; so is a layer's weight where the adapter does not act on it. record joins "composition" in the manifest (see
    `record_of`); its base, prompt and task are the caller's to add.
    Raises ConfigError for weights that are not finite or an unknown form, and what model.composed raises.
    """
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}", hint=f"choose one of {', '.join(FORMS)}")
    weights = weights.detach().float().cpu()
    assert weights.shape in ((pool.num,), (pool.num, pool.num_layers)), weights.shape
    weights = in_force(pool, weights)
    if not bool(torch.isfinite(weights).all()):
        raise ConfigError("the composition weights are not finite", hint="search again, within narrower bounds")
    used = [index for index in range(pool.num) if bool((weights[index] != 0).any())] or [0]
    parents = [pool.adapters[index] for index in used]
    if weights.dim() == 2:
        parents = [_weighted(parent, weights[index], form) for parent, index in zip(parents, used, strict=True)]
        scalars = [1.0] * len(used)
    else:
        scalars = weights[used].tolist()
    adapter, energy = (composed.cat if form == "cat" else composed.product)(parents, scalars), 1.0
    if rank is not None and adapter.max_rank > rank:
        adapter, energy, _ = composed.compress(adapter, rank)
    manifest = {
        "format": 1,
        "kind": "composed",
        "parents": [_parent(pool, index, weights[index]) for index in used],
        "composition": {"form": form, "rank": rank, "energy_kept": round(energy, 6), **(record or {})},
    }
    return Composed(replace(adapter, manifest=manifest), energy)


def rank_limit(pool: Pool, form: str, rank: int | None) -> int | None:
    """The rank that a composition of the pool is compressed to: the one asked for, or what a file can hold; None where ranks add up to less."""
    stacked = composed.stacked_rank(pool.adapters) if form == "cat" else max(pool.ranks)
    limit = MAX_RANK if rank is None else rank
    return limit if stacked > limit else None


def losses_of(pool: Pool, weights: Tensor, decoder: Decoder, rows: Sequence[EncodedRow], *, form: str = "cat", rank: int | None = None) -> Tensor:
    """The loss [k] of each row under what `compose` makes of the weights: the compressed adapter, wherever the limit bites."""
    limit = rank_limit(pool, form, rank)
    if limit is not None:
        made, kept = compose(pool, weights, form=form, rank=limit)
        if kept < 1:
            pool, weights, form = Pool.of([made], decoder), torch.ones(1), "cat"
    with torch.no_grad():
        return LabelLosses(decoder, pool, rows, form=form).scores(weights.unsqueeze(0), range(len(rows)))[0]


def record_of(found: Found, *, examples_digest: str) -> dict[str, Any]:
    """A search as JSON, for the manifest. No times in it: the same search makes the same version."""
    return {
        "method": found.method,
        "seed": found.seed,
        "examples": examples_digest,
        "value": found.value,
        "held_out": found.held_out,
        "evaluations": found.evaluations,
        "stopped_by": found.stopped_by,
    }


def in_force(pool: Pool, weights: Tensor) -> Tensor:
    """Weights [N] as they are, or [N, L] with 0 in the layers that an adapter does not act on: a search leaves there whatever it began with."""
    return weights.where(pool.acts, 0.0) if weights.dim() == 2 else weights


def mean_weight(pool: Pool, index: int, weight: Tensor) -> float:
    """One number for the weight [] of an adapter, or [L]: the mean over the layers that it acts on."""
    return float(weight[pool.acts[index]].mean()) if weight.dim() and bool(pool.acts[index].any()) else float(weight.mean())


def own_layers(pool: Pool, index: int) -> tuple[int, ...] | None:
    """The layers that an adapter acts on; None for all."""
    has = pool.acts[index]
    return None if bool(has.all()) else tuple(has.nonzero().flatten().tolist())


def _parent(pool: Pool, index: int, weight: Tensor) -> dict[str, Any]:
    """An entry of the manifest's parents. The hub reads one number: with a weight for each layer it is their mean, and all stand beside it."""
    entry: dict[str, Any] = {"name": pool.names[index], "digest": pool.digests[index], "weight": mean_weight(pool, index, weight)}
    if not weight.dim():
        return entry
    layers = own_layers(pool, index)
    return {**entry, "layer_weights": weight.tolist(), **({} if layers is None else {"layers": list(layers)})}


def _weighted(adapter: Adapter, by_layer: Tensor, form: str) -> Adapter:
    """The adapter with each layer's weight in it, as the form means it: on the update (cat), or on both factors (product)."""
    modules = {}
    for site, module in adapter.modules.items():
        weight = float(by_layer[site.layer])
        if form == "cat":
            modules[site] = LoraModule(module.a, module.b, module.scaling * weight)
        else:
            modules[site] = LoraModule(module.a.float() * weight, module.b.float() * weight, module.scaling)
    return replace(adapter, modules=modules)
