"""What a composition is in the end: an ordinary adapter, whose manifest says of what it was made and how.

The adapter has the very updates that the search scored: stacked factors (cat) or LoraHub's factor sums (product). Stacking adds ranks up, so the
result may be compressed; how much of its updates' energy that keeps is returned and recorded.

Used by workflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.compose.candidates import FORMS
from atoll.compose.pool import Pool
from atoll.compose.search import Found
from atoll.errors import ConfigError
from atoll.model import composed
from atoll.model.adapter import Adapter, LoraModule


class Composed(NamedTuple):
    """The adapter, and the share of its updates' squared norm that compressing kept (1 where it was not compressed)."""

    adapter: Adapter
    energy_kept: float


def compose(pool: Pool, weights: Tensor, *, form: str = "cat", rank: int | None = None, record: Mapping[str, Any] | None = None) -> Composed:
    """The adapter of given weights [N], or [N, L] with one for each layer, compressed to `rank` if it has more.

    Adapters of weight 0 are left out. record joins the "composition" of the manifest (see `record_of`); its base, prompt and task are the caller's
    to add.
    Raises ConfigError for weights that are not finite or an unknown form, and what model.composed raises.
    """
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}", hint=f"choose one of {', '.join(FORMS)}")
    weights = weights.detach().float().cpu()
    assert weights.shape in ((pool.num,), (pool.num, pool.num_layers)), weights.shape
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


def _parent(pool: Pool, index: int, weight: Tensor) -> dict[str, Any]:
    """An entry of the manifest's parents. The hub reads one number: with a weight for each layer it is their mean, and all stand beside it."""
    entry: dict[str, Any] = {"name": pool.names[index], "digest": pool.digests[index], "weight": float(weight.mean())}
    return {**entry, "layer_weights": weight.tolist()} if weight.dim() else entry


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
