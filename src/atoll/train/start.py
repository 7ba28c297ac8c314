"""Where an adapter's training starts: the default (A random, B zero), and starts that are taken out of the base's weights.

PiSSA (Meng et al. 2024, arXiv 2404.02948) starts with the largest singular directions of W, OLoRA (Büyükakyüz 2024, arXiv 2406.01775) with the first
of its QR decomposition, and both train over W minus that start. The base is shared and never written, so here the start is one more update, not
trained, that is taken out beside the trained one: W x − s B₀ A₀ x + s B A x. What is saved is B A − B₀ A₀ as one LoRA of twice the rank, right on the
unchanged base, as PEFT converts it.

Used by plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import ConfigError
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter
from atoll.model.decoder import Decoder
from atoll.model.dora import row_norms
from atoll.model.sites import Site, module_path

DEFAULT, GAUSSIAN, OLORA, PISSA = "default", "gaussian", "olora", "pissa"


class Start(NamedTuple):
    """A fresh adapter, and the update that is taken out of the base beside it (its own start), or None."""

    adapter: Adapter
    removed: Mapping[Site, LoraModule] | None = None


def start_adapter(spec: AdapterSpec, decoder: Decoder, seed: int, init: str = DEFAULT, *, num_classes: int = 0) -> Start:
    """A fresh adapter of a spec over a base, with a fresh classifier head where the base is an encoder; init as in config_adapter.

    Raises ConfigError for more rank than a linear has dimensions.
    """
    shape = decoder.shape
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(spec, shape.linears, shape.num_layers, generator)
    if num_classes:
        adapter = replace(adapter, head=decoder.new_head(num_classes, generator))
    if init == GAUSSIAN:
        modules = {
            site: replace(module, a=torch.empty_like(module.a).normal_(0, 1 / module.rank, generator=generator))
            for site, module in adapter.modules.items()
        }
        adapter = replace(adapter, modules=modules)
    elif init != DEFAULT:
        modules = {site: _decomposed(decoder.weight(site).detach().float(), module, site, init, seed) for site, module in adapter.modules.items()}
        return Start(replace(adapter, modules=modules), {site: replace(module, scaling=-module.scaling) for site, module in modules.items()})
    if spec.use_dora:
        adapter = replace(adapter, modules={site: _with_magnitude(module, decoder.weight(site)) for site, module in adapter.modules.items()})
    return Start(adapter)


def converted(adapter: Adapter, removed: Mapping[Site, LoraModule]) -> Adapter:
    """The adapter that does on the unchanged base what `adapter` does on one without `removed`: A over A₀ and B beside −B₀, of twice the rank."""
    spec, root = adapter.spec, math.sqrt(2) if adapter.spec.use_rslora else 2.0  # so that every module's scaling stays what it is
    doubled = replace(
        spec,
        rank=2 * spec.rank,
        alpha=root * spec.alpha,
        rank_pattern={key: 2 * rank for key, rank in spec.rank_pattern.items()},
        alpha_pattern={key: root * alpha for key, alpha in spec.alpha_pattern.items()},
    )
    modules = {
        site: LoraModule(torch.cat([module.a, removed[site].a]), torch.cat([module.b, -removed[site].b], 1), doubled.scaling_at(site))
        for site, module in adapter.modules.items()
    }
    return replace(adapter, spec=doubled, modules=modules)


def _decomposed(weight: Tensor, module: LoraModule, site: Site, init: str, seed: int) -> LoraModule:
    """The start of one linear. PiSSA: A = √(S / s) Vᵀ, B = U √(S / s), so that s B A is W's best approximation of that rank; OLoRA: A = R, B = Q."""
    rank = module.rank
    if rank > min(weight.shape):
        raise ConfigError(
            f"{module_path(site)} is {weight.shape[0]} x {weight.shape[1]}, so init_lora_weights {init} cannot start with rank {rank}",
            hint=f"a rank of at most {min(weight.shape)}",
        )
    if init == OLORA:
        q, r = torch.linalg.qr(weight)
        return replace(module, a=r[:rank].contiguous(), b=q[:, :rank].contiguous())
    u, values, v = _singular(weight, rank, init, seed)
    roots = (values / module.scaling).sqrt()
    return replace(module, a=roots[:, None] * v, b=u * roots)


def _singular(weight: Tensor, rank: int, init: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, rank], the values, Vᵀ [rank, d_in]: exactly, or by a random sketch with as many power iterations as `pissa_niter_N` says."""
    if init == PISSA:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], values[:rank], v[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, values, v = torch.svd_lowrank(weight, rank, niter=int(init.removeprefix(f"{PISSA}_niter_")))
    return u, values, v.T


def _with_magnitude(module: LoraModule, weight: Tensor) -> LoraModule:
    """DoRA starts with the base's own lengths."""
    return replace(module, magnitude=row_norms(weight, module.a, module.b, module.scaling).cpu())
