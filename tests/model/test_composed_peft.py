"""The adapter algebra against PEFT's add_weighted_adapter: equal updates where PEFT computes what it says, and where not, how ours differs and why.

PEFT 0.21. Updates are compared, s B A at every site, since factors of the same update may differ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model
from torch import Tensor

from atoll.model import sparsify
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.bank import LoraBank
from atoll.model.composed import by_deltas, by_factors, cat, compress
from atoll.model.decoder import Decoder
from atoll.model.sites import Site, module_path
from atoll.model.sparsify import Merge

pytest.importorskip("peft")

SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32 updates with entries of about 0.3
WEIGHTS = [0.8, -0.6]
SEED = 11


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture(scope="module")
def twins(decoder: Decoder) -> list[Adapter]:
    """Two adapters of one shape, as methods on factors need them, with different alpha."""
    return [random_adapter(decoder, 8, seed=1), random_adapter(decoder, 8, seed=2, alpha=5.0)]


@pytest.fixture(scope="module")
def three(twins: list[Adapter]) -> list[Adapter]:
    """The twins, and the first one's updates written with other factors: entries disagree though updates do not."""
    generator = torch.Generator().manual_seed(9)
    modules = {}
    for site, module in twins[0].modules.items():
        turn = torch.linalg.qr(torch.randn(module.rank, module.rank, generator=generator))[0]
        modules[site] = LoraModule(turn.T @ module.a, module.b @ turn, module.scaling)
    return [*twins, Adapter(twins[0].spec, modules)]


def merged_by_peft(adapters: Sequence[Adapter], weights: Sequence[float], folder: Path, seed: int | None = 0, **how: Any) -> Any:
    """PEFT's model with these adapters and, as "merged", what add_weighted_adapter makes of them.

    It draws DARE's masks from torch's global generator, seeded here after the place of the new adapter is made, which draws too; None: not seeded.
    """
    theirs = peft_model(tiny_model("llama"), adapters[0], folder / "0", trainable=False)
    for index, adapter in enumerate(adapters[1:], 1):
        write_adapter(folder / f"parent{index}", adapter)
        theirs.load_adapter(folder / f"parent{index}", f"parent{index}")  # named "1", it would be taken for a layer when PEFT saves
    names = ["default", *(f"parent{index}" for index in range(1, len(adapters)))]
    inject = theirs.base_model.inject_adapter
    theirs.base_model.inject_adapter = lambda *given: (inject(*given), None if seed is None else torch.manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(names, list(weights), "merged", **how)
    return theirs


def updates_in(theirs: Any, name: str = "merged") -> dict[Site, Tensor]:
    """The update of one of PEFT's adapters at every site that it has."""
    found = {}
    with torch.no_grad():
        for layer in range(3):
            for target in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                module = theirs.get_submodule(f"base_model.model.{module_path(Site(layer, target))}")
                if name in getattr(module, "lora_A", {}):
                    found[Site(layer, target)] = module.get_delta_weight(name)
    return found


def peft_updates(adapters: Sequence[Adapter], weights: Sequence[float], folder: Path, seed: int | None = 0, **how: Any) -> dict[Site, Tensor]:
    return updates_in(merged_by_peft(adapters, weights, folder, seed, **how))


def delta(adapter: Adapter, site: Site) -> Tensor:
    """s B A."""
    module = adapter.modules[site]
    return module.scaling * (module.b.float() @ module.a.float())


def assert_equal(ours: Adapter, theirs: dict[Site, Tensor], **close: float) -> None:
    assert set(ours.modules) == set(theirs)
    for site, update in theirs.items():
        torch.testing.assert_close(delta(ours, site), update, **(close or SAME))


def merge_of(method: str, density: float) -> tuple[str, sparsify.MajoritySign, Merge]:
    """(PEFT's name, its majority_sign_method, ours) of a method, "ties frequency" being ties with the other vote."""
    name, _, vote = method.partition(" ")
    sign: sparsify.MajoritySign = "frequency" if vote else "total"
    generator = torch.Generator().manual_seed(SEED)
    ours: dict[str, Callable[[], Merge]] = {
        "linear": lambda: sparsify.weighted_sum,
        "magnitude_prune": lambda: sparsify.magnitude_prune(density),
        "ties": lambda: sparsify.ties(density, sign),
        "dare_linear": lambda: sparsify.dare_linear(density, generator),
        "dare_ties": lambda: sparsify.dare_ties(density, sign, generator),
    }
    return name, sign, ours[name]()


# --- equal --------------------------------------------------------------------------------------------------------------------------------------


def test_cat_and_svd_are_pefts(decoder: Decoder, twins: list[Adapter], tmp_path: Path) -> None:
    """The two that PEFT calls precise, over other ranks, alphas and targets, one weight negative."""
    mixed = [twins[0], random_adapter(decoder, 3, seed=4), random_adapter(decoder, 2, seed=5, alpha=7.0, target_modules=("q_proj", "down_proj"))]
    weights = [*WEIGHTS, 1.7]
    assert_equal(cat(mixed, weights), peft_updates(mixed, weights, tmp_path / "cat", combination_type="cat"))
    for rank in (6, None):  # without a rank PEFT takes the largest of the parents'
        ours = compress(cat(mixed, weights), rank or 8).adapter
        assert_equal(ours, peft_updates(mixed, weights, tmp_path / f"svd-{rank}", combination_type="svd", svd_rank=rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "ties frequency", "dare_linear", "dare_ties", "dare_ties frequency"])
def test_methods_on_factors_are_pefts(three: list[Adapter], method: str, density: float, tmp_path: Path) -> None:
    """Clients know these names from PEFT: with three adapters, one weight negative, the same masks must give the same update at every site."""
    name, sign, merge = merge_of(method, density)
    weights = [*WEIGHTS, 0.5]
    theirs = peft_updates(three, weights, tmp_path, SEED, combination_type=name, density=density, majority_sign_method=sign)
    assert_equal(by_factors(three, weights, merge, name), theirs)


@pytest.mark.parametrize("method", ["ties", "ties frequency", "magnitude_prune", "dare_linear", "dare_ties"])
def test_methods_on_updates_are_pefts(twins: list[Adapter], method: str, tmp_path: Path) -> None:
    """The papers' own definitions, on the dense update: PEFT's names end in _svd."""
    name, sign, merge = merge_of(method, 0.4)
    ours = by_deltas(twins, WEIGHTS, merge, 7)
    theirs = peft_updates(twins, WEIGHTS, tmp_path, SEED, combination_type=f"{name}_svd", density=0.4, svd_rank=7, majority_sign_method=sign)
    assert_equal(ours.adapter, theirs, rtol=1e-4, atol=1e-5)
    assert 0.1 < ours.least_energy_kept <= ours.energy_kept < 1.0


@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize("method", ["cat", "linear", "magnitude_prune", "ties", "dare_linear"])
def test_one_adapter_is_weighted_alike_in_all_methods(twins: list[Adapter], method: str, weight: float, tmp_path: Path) -> None:
    """The one meaning of a weight, also in PEFT: w times the update, where nothing is thinned and nothing is beside it."""
    theirs = peft_updates(twins[1:], [weight], tmp_path, combination_type=method, density=1.0)
    assert_equal(cat(twins[1:], [weight]), theirs)
    if method != "cat":
        assert_equal(by_factors(twins[1:], [weight], merge_of(method, 1.0)[2], method), theirs)


def test_what_peft_merged_and_saved_is_read_as_ours(twins: list[Adapter], tmp_path: Path) -> None:
    """A user's merged adapter is an adapter: from PEFT's file, the logits that PEFT has and that our own merge has."""
    theirs = merged_by_peft(twins, WEIGHTS, tmp_path / "parents", combination_type="cat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's config on disk, and this base has none
        theirs.save_pretrained(tmp_path / "saved", selected_adapters=["merged"])
    read = read_adapter(tmp_path / "saved" / "merged")
    theirs.set_adapter("merged")
    decoder = decoder_of(tiny_model("llama"))
    bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
    with torch.no_grad():
        expected = reference(theirs, ROWS[0])
        for adapter in (read, cat(twins, WEIGHTS)):
            torch.testing.assert_close(packed_logits(decoder, ROWS[:1], [bank.load(adapter)])[0], expected, **CLOSE)


# --- other on purpose -------------------------------------------------------------------------------------------------------------------------------


def test_pefts_linear_has_cross_terms_and_ours_by_that_name_is_the_sum(twins: list[Adapter], tmp_path: Path) -> None:
    """√w on both factors makes wᵢ sᵢ Bᵢ Aᵢ, and B₁ A₂ that nobody trained: as large as the sum itself. We compute PEFT's for who asks for it."""
    theirs = peft_updates(twins, WEIGHTS, tmp_path, combination_type="linear")
    exact = cat(twins, WEIGHTS)
    for site, update in theirs.items():
        assert (update - delta(exact, site)).norm() > 0.5 * delta(exact, site).norm()


def test_peft_scales_a_merge_of_rslora_by_a_root_of_the_rank_and_ours_does_not(decoder: Decoder, tmp_path: Path) -> None:
    """Its result inherits use_rslora from the first adapter, with alpha = rank: √R times too strong, but right the other way round. Ours is exact."""
    pair = [random_adapter(decoder, 4, seed=1, use_rslora=True, alpha=3.0), random_adapter(decoder, 5, seed=2)]
    exact = cat(pair, WEIGHTS)
    assert_equal(exact, peft_updates(pair[::-1], WEIGHTS[::-1], tmp_path / "back", combination_type="cat"))
    for site, update in peft_updates(pair, WEIGHTS, tmp_path / "there", combination_type="cat").items():
        torch.testing.assert_close(update, math.sqrt(4 + 5) * delta(exact, site), **SAME)


def test_peft_drops_layers_that_the_first_adapter_lacks_and_ours_keeps_them(decoder: Decoder, tmp_path: Path) -> None:
    """Its result has the first adapter's layers_to_transform; what the others change elsewhere is lost without a word."""
    pair = [random_adapter(decoder, 4, seed=1, layers_to_transform=(0,)), random_adapter(decoder, 4, seed=2, layers_to_transform=(0, 2))]
    theirs = peft_updates(pair, WEIGHTS, tmp_path, combination_type="cat")
    ours = cat(pair, WEIGHTS)
    assert {site.layer for site in theirs} == {0}
    assert {site.layer for site in ours.modules} == {0, 2}
    for site, update in theirs.items():
        torch.testing.assert_close(delta(ours, site), update, **SAME)


def test_pefts_dare_follows_the_global_generator_and_ours_a_seed_of_its_own(twins: list[Adapter], tmp_path: Path) -> None:
    """Whatever was drawn before changes PEFT's masks, so its merge cannot be made again; ours leaves the global generator alone, too."""
    site = Site(0, "q_proj")
    theirs = [peft_updates(twins, WEIGHTS, tmp_path / str(seed), seed, combination_type="dare_linear", density=0.5)[site] for seed in (1, 2)]
    assert (theirs[0] - theirs[1]).norm() > 0.1 * theirs[0].norm()
    ours = []
    for before in (1, 2):
        torch.manual_seed(before)
        drawn = torch.random.get_rng_state()
        ours.append(by_factors(twins, WEIGHTS, sparsify.dare_linear(0.5, torch.Generator().manual_seed(SEED)), "dare_linear"))
        assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(delta(ours[0], site), delta(ours[1], site))
