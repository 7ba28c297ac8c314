"""What is published: an ordinary adapter, exact or compressed, that says of what it is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.compose.scenes import Bowl, examples

from atoll.compose.objective import FewShot, Objective
from atoll.compose.pool import Pool
from atoll.compose.result import compose, record_of
from atoll.compose.search import search
from atoll.errors import ConfigError
from atoll.hub.intake import read_manifest
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.composed import cat, product
from atoll.model.sites import Site

WEIGHTS = torch.tensor([0.5, 0.0, -1.25, 2.0])


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert one.spec == other.spec
    assert list(one.modules) == list(other.modules)
    for site, module in one.modules.items():
        assert torch.equal(module.a, other.modules[site].a), site
        assert torch.equal(module.b, other.modules[site].b), site


def test_the_result_is_the_composed_adapter(pool: Pool, equals: Pool) -> None:
    """By the algebra that serving merges with; adapters of weight 0 take no rank."""
    used = [adapter for adapter, weight in zip(pool.adapters, WEIGHTS, strict=True) if weight]
    assert_equal(compose(pool, WEIGHTS).adapter, cat(used, [0.5, -1.25, 2.0]))
    used = [adapter for adapter, weight in zip(equals.adapters, WEIGHTS, strict=True) if weight]
    assert_equal(compose(equals, WEIGHTS, form="product").adapter, product(used, [0.5, -1.25, 2.0]))


def test_weights_of_layers_are_in_the_updates(pool: Pool, equals: Pool) -> None:
    """On the update in the exact form, on both factors in LoraHub's."""
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    site = Site(1, "v_proj")
    for form, used in (("cat", pool), ("product", equals)):
        found = compose(used, weights, form=form).adapter.modules[site]
        whole = (cat if form == "cat" else product)(used.adapters, weights[:, 1].tolist()).modules[site]
        torch.testing.assert_close(found.b @ found.a, whole.b @ whole.a)


def test_compressing_says_what_it_keeps(pool: Pool) -> None:
    """Stacked ranks add up; what a lower rank loses is told, in the return and in the manifest."""
    whole, energy = compose(pool, WEIGHTS)
    assert (whole.max_rank, energy) == (4 + 5, 1.0), "two adapters change v_proj, three q_proj with 4 + 3"
    small, energy = compose(pool, WEIGHTS, rank=4)
    assert small.max_rank == 4
    assert 0.3 < energy < 1.0
    assert small.manifest["composition"]["energy_kept"] == round(energy, 6)
    assert compose(pool, WEIGHTS, rank=64).energy_kept == 1.0


def test_nothing_but_zeros_is_an_adapter_that_does_nothing(pool: Pool) -> None:
    """A search may find that the base is best, and its result must still be published and served."""
    adapter, _ = compose(pool, torch.zeros(4))
    assert adapter.modules
    assert all(not module.b.any() for module in adapter.modules.values())


def test_the_manifest_rebuilds_it(pool: Pool, tmp_path: Path) -> None:
    """Parents with digests and weights, method, seed, examples: as the hub reads it, and the same for the same search."""
    few = FewShot(examples(5))

    def made() -> Adapter:
        found = search(Objective(Bowl([0.5, 0.0, -0.5, 1.0])), 4, "cma", budget=24, seed=7)
        return compose(pool, found.weights, rank=8, record=record_of(found, examples_digest=few.digest)).adapter

    adapter = made()
    manifest = adapter.manifest
    assert manifest == made().manifest
    assert (manifest["kind"], manifest["format"]) == ("composed", 1)
    assert [(parent["name"], parent["digest"]) for parent in manifest["parents"]] == [("one", "d1"), ("two", "d2"), ("three", None), ("four", "d4")]
    recorded = manifest["composition"]
    assert (recorded["method"], recorded["seed"], recorded["examples"], recorded["form"], recorded["rank"]) == ("cma", 7, few.digest, "cat", 8)
    assert recorded["evaluations"] <= 24
    again = compose(pool, torch.tensor([parent["weight"] for parent in manifest["parents"]]), rank=8).adapter
    assert_equal(again, adapter)
    write_adapter(tmp_path / "made", adapter)
    assert_equal(read_adapter(tmp_path / "made"), adapter)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "base": {"name": "tiny"}}))
    assert read_manifest(tmp_path / "manifest.json")["kind"] == "composed"


def test_a_weight_for_each_layer_is_recorded_beside_the_mean(pool: Pool) -> None:
    """The hub keeps one number a parent."""
    weights = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, -3.0]])
    parents = compose(pool, weights).adapter.manifest["parents"]
    assert [(parent["name"], parent["weight"]) for parent in parents] == [("one", 1.0), ("three", 1.0), ("four", -1.0)]
    assert parents[0]["layer_weights"] == [0.0, 1.0, 2.0]


def test_weights_that_are_no_numbers_and_forms_that_are_none_are_refused(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="not finite"):
        compose(pool, torch.tensor([0.0, float("nan"), 0.0, 0.0]))
    with pytest.raises(ConfigError, match="no form 'sum'"):
        compose(pool, WEIGHTS, form="sum")
