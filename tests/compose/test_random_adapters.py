"""Random adapters: as large as the originals, reproducible, and nothing like them."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import random_adapter, random_reft
from tests.compose.scenes import mixed_adapters

from atoll.compose.pool import Pool, update_norm
from atoll.compose.random_adapters import random_like, random_pool
from atoll.errors import UnsupportedAdapter
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder
from atoll.model.sites import Site


def test_every_update_has_the_originals_shape_and_norm(decoder: Decoder) -> None:
    """A control of another strength would lose or win for that alone. The norm is taken from thin factors, and is that of the dense update."""
    for adapter in mixed_adapters(decoder):
        drawn = random_like(adapter, seed=3)
        assert drawn.spec == adapter.spec
        assert set(drawn.modules) == set(adapter.modules)
        for site, module in adapter.modules.items():
            mine = drawn.modules[site]
            assert (mine.a.shape, mine.b.shape, mine.scaling) == (module.a.shape, module.b.shape, module.scaling)
            dense = [float((m.scaling * m.b @ m.a).norm()) for m in (module, mine)]
            assert dense[1] == pytest.approx(dense[0], rel=1e-4)
            assert update_norm(module) == pytest.approx(dense[0], rel=1e-4)
            cosine = torch.cosine_similarity((module.b @ module.a).flatten(), (mine.b @ mine.a).flatten(), dim=0)
            assert abs(float(cosine)) < 0.2


def test_seed_name_and_site_say_which_numbers_are_drawn(decoder: Decoder) -> None:
    """Two adapters of one pool must not be the same random direction, and neither must two layers; the same call is the same adapter."""
    adapter = random_adapter(decoder, 4)
    here, there = Site(0, "q_proj"), Site(1, "q_proj")
    first = random_like(adapter, 1, "a").modules[here].a
    assert torch.equal(first, random_like(adapter, 1, "a").modules[here].a)
    for other in (
        random_like(adapter, 2, "a").modules[here].a,
        random_like(adapter, 1, "b").modules[here].a,
        random_like(adapter, 1, "a").modules[there].a,
    ):
        assert not torch.allclose(first, other, atol=0.1)


def test_an_adapter_that_changes_nothing_stays_so(decoder: Decoder) -> None:
    """Its norm is zero, and nothing may be divided by it."""
    adapter = random_adapter(decoder, 4)
    fresh = Adapter(adapter.spec, {site: LoraModule(m.a.bfloat16(), torch.zeros_like(m.b), m.scaling) for site, m in adapter.modules.items()})
    drawn = random_like(fresh, 0)
    assert all(not module.b.any() and bool(torch.isfinite(module.a).all()) for module in drawn.modules.values())
    assert {module.a.dtype for module in drawn.modules.values()} == {torch.float32}


def test_a_random_pool_stands_beside_the_real_one(decoder: Decoder, pool: Pool) -> None:
    """One for each, with names that nobody takes for the real ones and no digest of a version that it is not."""
    drawn = random_pool(pool, decoder, seed=5)
    assert drawn.names == ("random: one", "random: two", "random: three", "random: four")
    assert drawn.digests == (None,) * 4
    assert drawn.ranks == pool.ranks
    twice = random_pool(Pool.of([pool.adapters[0]] * 2, decoder, ["same", "same"]), decoder, seed=5)
    here = Site(0, "q_proj")
    assert not torch.equal(twice.adapters[0].modules[here].a, twice.adapters[1].modules[here].a)


def test_edits_have_no_random_stand_in(decoder: Decoder) -> None:
    with pytest.raises(UnsupportedAdapter, match="reft"):
        random_like(random_reft(decoder, rank=2), 0)
