"""Adapters that have learned nothing: the control that says whether a composition gains from what its adapters know, or from having weights to turn.

Merged adapters from a hub have been found to do hardly better than random ones of the same shape ("The Appeal and Reality of Recycling LoRAs with
Adaptive Merging", arXiv 2602.12323). So the same search also runs over these.

Used by controls.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from atoll.compose.pool import Pool, product_norm
from atoll.errors import UnsupportedAdapter
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder
from atoll.model.sites import Site


def random_pool(pool: Pool, decoder: Decoder, seed: int) -> Pool:
    """A pool of one random adapter for each of the pool's, of its shape and strength."""
    drawn = [random_like(adapter, seed, f"{place} {name}") for place, (adapter, name) in enumerate(zip(pool.adapters, pool.names, strict=True))]
    return Pool.of(drawn, decoder, [f"random: {name}" for name in pool.names])


def random_like(adapter: Adapter, seed: int, name: str = "") -> Adapter:
    """An adapter with the original's sites, ranks and scalings, Gaussian factors, and updates of the original's Frobenius norm at every site.

    A and B are drawn independently, and B is scaled so that ‖s B A‖ is the original's. float32. The numbers follow from the seed, the name and the
    site alone: adapters of one pool need different names. Raises UnsupportedAdapter for ReFT edits, which the search does not weight.
    """
    if adapter.edits:
        raise UnsupportedAdapter(
            f"a random adapter cannot stand for one that is {adapter.spec.kind}", hint="only LoRA factors are composed by a search"
        )
    return replace(adapter, modules={site: _drawn(module, site, seed, name) for site, module in adapter.modules.items()}, manifest={})


def _drawn(module: LoraModule, site: Site, seed: int, name: str) -> LoraModule:
    digest = hashlib.sha256(f"atoll random adapter {seed} {name} {site.layer} {site.target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))  # torch's CPU generator uses 32 bits of a seed
    a, b = torch.randn(module.a.shape, generator=generator), torch.randn(module.b.shape, generator=generator)
    return LoraModule(a, b * (product_norm(module.a, module.b) / product_norm(a, b)), module.scaling)
