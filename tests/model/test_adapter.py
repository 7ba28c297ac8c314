"""model/adapter.py: which sites an adapter reaches, with which rank and scaling, as PEFT reads the same config."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from atoll.errors import AdapterFormatError, BaseMismatch
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter
from atoll.model.sites import TARGETS, Site, module_path, parse_peft_key, peft_key

SHAPES = {
    "q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
    "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96),
}  # fmt: skip


def spec(**changes: Any) -> AdapterSpec:
    return AdapterSpec(**{"base": "tiny", "rank": 8, "alpha": 16.0, **changes})


def fresh(seed: int = 0, **changes: Any) -> Adapter:
    return new_adapter(spec(**changes), SHAPES, 3, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("changes", "sites"),
    [
        ({}, [(layer, target) for layer in range(3) for target in TARGETS]),
        ({"target_modules": ("v_proj", "q_proj")}, [(layer, target) for layer in range(3) for target in ("q_proj", "v_proj")]),
        ({"target_modules": ("q_proj",), "layers_to_transform": (2, 0)}, [(0, "q_proj"), (2, "q_proj")]),
        ({"target_modules": ("layers.1.self_attn.q_proj", "down_proj")}, [(0, "down_proj"), (1, "q_proj"), (1, "down_proj"), (2, "down_proj")]),
        ({"target_modules": ("model.layers.1.mlp.up_proj",)}, [(1, "up_proj")]),
        ({"target_modules": ("roj", "proj", "elf_attn.q_proj")}, []),
    ],
    ids=["all", "by name", "some layers", "by path", "by full path", "only whole names match"],
)
def test_the_sites_of_a_spec(changes: dict[str, Any], sites: list[tuple[int, str]]) -> None:
    """One site too few is a part of the adapter that is silently not applied."""
    assert spec(**changes).sites(3) == [Site(*site) for site in sites]


@pytest.mark.parametrize(
    "pattern", [{"q_proj": 4, "layers.1.self_attn.q_proj": 2}, {"layers.1.self_attn.q_proj": 2, "q_proj": 4}, {"self_attn.q_proj": 3}, {}]
)
def test_patterns_are_looked_up_as_peft_does(pattern: dict[str, int]) -> None:
    """When two entries name a module, PEFT takes the first; another choice would give other ranks and another scaling for the same file."""
    from peft.utils.other import get_pattern_key

    asked = spec(rank_pattern=pattern, alpha_pattern=pattern)
    for site in asked.sites(3):
        path = module_path(site)
        rank = pattern.get(get_pattern_key(pattern.keys(), path), 8)
        alpha = pattern.get(get_pattern_key(pattern.keys(), path), 16.0)
        assert asked.rank_at(site) == rank
        assert asked.scaling_at(site) == alpha / rank
        assert replace(asked, use_rslora=True).scaling_at(site) == alpha / math.sqrt(rank)


def test_a_layer_that_the_base_does_not_have_is_refused() -> None:
    """An adapter of a deeper base must not shrink to the layers that exist."""
    with pytest.raises(BaseMismatch, match=r"names layer 5, but the base has 3 layers \(0 to 2\)"):
        spec(layers_to_transform=(0, 5)).sites(3)


def test_a_fresh_adapter_starts_at_the_base_and_from_its_seed() -> None:
    """B is zero, so training starts from the base; A follows from the seed alone, in PEFT's range."""
    adapter = fresh(seed=3, rank_pattern={"down_proj": 2})
    for site, module in adapter.modules.items():
        d_out, d_in = SHAPES[site.target]
        rank = 2 if site.target == "down_proj" else 8
        assert module.a.shape == (rank, d_in)
        assert module.b.shape == (d_out, rank)
        assert module.rank == rank
        assert not module.b.any()
        bound = 1 / math.sqrt(d_in)
        assert 0.8 * bound < module.a.abs().max() <= bound
        assert module.a.dtype == torch.float32
    again, other = fresh(seed=3, rank_pattern={"down_proj": 2}), fresh(seed=4, rank_pattern={"down_proj": 2})
    site = Site(1, "k_proj")
    assert torch.equal(adapter.modules[site].a, again.modules[site].a)
    assert not torch.equal(adapter.modules[site].a, other.modules[site].a)
    assert adapter.max_rank == 8
    assert adapter.num_parameters == sum(rank * (d_out + d_in) for t, (d_out, d_in) in SHAPES.items() for rank in [2 if t == "down_proj" else 8]) * 3


def test_an_adapter_without_sites_is_refused() -> None:
    """It would train nothing for an hour."""
    with pytest.raises(AdapterFormatError, match="changes no module") as found:
        fresh(target_modules=("layers.7.mlp.up_proj",))
    assert "q_proj" in found.value.hint


def changed(adapter: Adapter, site: Site, **shapes: tuple[int, int]) -> Adapter:
    module = adapter.modules[site]
    new = LoraModule(torch.zeros(shapes.get("a", tuple(module.a.shape))), torch.zeros(shapes.get("b", tuple(module.b.shape))), 1.0)
    return Adapter(adapter.spec, {**adapter.modules, site: new})


def test_an_adapter_for_another_base_is_refused_at_the_first_site_that_differs() -> None:
    """The most expensive mistake: a wrong base gives wrong answers, or a shape error from deep inside torch."""
    fresh().check_fits(SHAPES, 3)
    with pytest.raises(BaseMismatch, match="layer 1 k_proj: the adapter's factors are for a 32 x 48 linear, the base has 32 x 64") as found:
        changed(fresh(), Site(1, "k_proj"), a=(8, 48)).check_fits(SHAPES, 3)
    assert found.value.hint == "use the base that the adapter was made for: tiny"
    with pytest.raises(BaseMismatch, match="layer 2 up_proj: the adapter's factors are for a 128 x 64 linear, the base has 96 x 64"):
        changed(fresh(), Site(2, "up_proj"), b=(128, 8)).check_fits(SHAPES, 3)


def test_an_adapter_of_a_deeper_base_is_refused() -> None:
    """Three layers of factors for a base of two."""
    with pytest.raises(BaseMismatch, match="changes layer 2, but the base has 2 layers"):
        fresh().check_fits(SHAPES, 2)


def test_an_adapter_of_a_shallower_base_is_refused() -> None:
    """Its config covers all layers, its file only three: the fourth would silently stay the base's."""
    with pytest.raises(BaseMismatch, match=r"covers model\.layers\.3\.self_attn\.q_proj, but its file has no factors for it"):
        fresh().check_fits(SHAPES, 4)


@pytest.mark.parametrize("site", [Site(0, "q_proj"), Site(17, "down_proj"), Site(9999, "o_proj")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_file_names_go_there_and_back(site: Site, factor: str) -> None:
    """The names are PEFT's; a site that came back as another one would move a factor to another layer."""
    assert parse_peft_key(peft_key(site, factor)) == (site, factor)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.１.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.10000.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.mlp.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.1.self_attn.kv_proj.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
        "x.base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight\n",
    ],
)
def test_other_names_are_no_sites(key: str) -> None:
    """Two spellings of one site (layer 01 and layer 1) would let a file hold a factor twice."""
    assert parse_peft_key(key) is None
