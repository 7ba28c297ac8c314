"""The adapter algebra: exact sums, LoraHub's product, KnOTS held to its definition on dense matrices. What PEFT also has: test_composed_peft.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, peft_model, random_adapter, random_reft, reference
from tests.conftest import tiny_model
from torch import Tensor

from atoll.errors import AdapterFormatError, BaseMismatch, ConfigError, RequestRefused, UnsupportedAdapter
from atoll.model import sparsify
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.adapter_files import read_adapter
from atoll.model.bank import LoraBank
from atoll.model.composed import by_deltas, by_factors, cat, compress, knots, product, stacked_rank
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.sites import Site, module_path

SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32 updates with entries of about 0.3


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture(scope="module")
def parents(decoder: Decoder) -> list[Adapter]:
    """Three adapters that agree in nothing: rank, alpha, rsLoRA, patterns, targets, layers."""
    return [
        random_adapter(decoder, 4, seed=1),
        random_adapter(decoder, 6, seed=2, use_rslora=True, alpha=3.0, rank_pattern={"k_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 9.0}),
        random_adapter(decoder, 3, seed=3, target_modules=("q_proj", "down_proj"), layers_to_transform=(0, 2)),
    ]


@pytest.fixture(scope="module")
def twins(decoder: Decoder) -> list[Adapter]:
    """Two adapters of one shape, as methods on factors need them, with different alpha."""
    return [random_adapter(decoder, 8, seed=1), random_adapter(decoder, 8, seed=2, alpha=5.0)]


def delta(adapter: Adapter, site: Site) -> Tensor:
    """s B A, or a zero where the adapter changes nothing."""
    module = adapter.modules.get(site)
    return torch.zeros(()) if module is None else module.scaling * (module.b.float() @ module.a.float())


def weighted(parents: Sequence[Adapter], weights: Sequence[float], site: Site) -> Tensor:
    return sum((weight * delta(parent, site) for parent, weight in zip(parents, weights, strict=True)), torch.zeros(()))


def assert_is_sum(adapter: Adapter, parents: Sequence[Adapter], weights: Sequence[float]) -> None:
    assert set(adapter.modules) == {site for parent in parents for site in parent.modules}
    for site in adapter.modules:
        torch.testing.assert_close(delta(adapter, site), weighted(parents, weights, site), **SAME)


def rotated(adapter: Adapter, seed: int = 9) -> Adapter:
    """The same updates written with other factors: (B M)(M⁻¹ A)."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for site, module in adapter.modules.items():
        turn = torch.linalg.qr(torch.randn(module.rank, module.rank, generator=generator))[0]
        modules[site] = LoraModule(turn.T @ module.a, module.b @ turn, module.scaling)
    return Adapter(adapter.spec, modules)


# --- the exact sum ----------------------------------------------------------------------------------------------------------------------------


def test_cat_is_the_weighted_sum_of_the_updates(parents: list[Adapter]) -> None:
    """The one meaning of a weight: ranks, alphas, rsLoRA, patterns, targets and layers of the parents all differ, and none may leak into another."""
    weights = [0.7, -1.3, 2.0]
    merged = cat(parents, weights)
    assert_is_sum(merged, parents, weights)
    assert merged.modules[Site(0, "q_proj")].rank == 4 + 6 + 3
    assert merged.modules[Site(1, "k_proj")].rank == 4 + 2, "a site that only some parents have gets only their terms"
    assert stacked_rank(parents) == merged.max_rank
    assert all(module.a.dtype == module.b.dtype == torch.float32 and module.scaling == 1.0 for module in merged.modules.values())


def test_one_adapter_of_weight_one_is_itself_to_the_bit(decoder: Decoder, parents: list[Adapter]) -> None:
    """Merging must not cost a rounding: in a bfloat16 bank the merged adapter has the very bits of its only parent."""
    for parent in parents:
        banks = [LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.bfloat16) for _ in range(2)]
        one, other = banks[0].load(parent), banks[1].load(cat([parent], [1.0]))
        for layer in range(decoder.shape.num_layers):
            for group in range(4):
                mine, its = one.update(layer, group), other.update(layer, group)
                if mine is None or its is None:
                    assert mine is its
                    continue
                assert torch.equal(mine.a, its.a)
                assert all(torch.equal(p.b, q.b) for p, q in zip(mine.parts, its.parts, strict=True))


def test_signs_cancel_and_order_does_not_matter(parents: list[Adapter]) -> None:
    """Adding and taking away the same adapter is nothing; a sum has no order."""
    for parent in parents:
        assert_is_sum(cat([parent], [-1.0]), [parent], [-1.0])
        nothing = cat([parent, parent], [1.0, -1.0])
        assert all(delta(nothing, site).abs().max() < 1e-6 for site in nothing.modules)
    there, back = cat(parents, [1.0, 2.0, 3.0]), cat(parents[::-1], [3.0, 2.0, 1.0])
    for site in there.modules:
        torch.testing.assert_close(delta(there, site), delta(back, site), **SAME)


def test_a_merged_adapter_beside_others_answers_as_the_merged_weights(decoder: Decoder, parents: list[Adapter]) -> None:
    """What serving does: rows of base, a parent and the merge in one packed batch, against a model whose weights had W + Σ wᵢ ΔWᵢ added by hand."""
    weights, model = [0.5, 1.0, -0.5], tiny_model("llama")
    with torch.no_grad():
        for site in parents[0].modules:
            model.get_submodule(module_path(site)).weight.add_(weighted(parents, weights, site))
        bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
        merged = bank.load(cat(parents, weights))
        slots = [merged, None, bank.load(parents[1]), merged]
        together = packed_logits(decoder, ROWS, slots)
        for row in (0, 3):
            torch.testing.assert_close(together[row], reference(model, ROWS[row]), rtol=0, atol=5e-5)
            assert (together[row] - packed_logits(decoder, [ROWS[row]])[0]).abs().max() > 0.01, "the merge moves logits"


@pytest.mark.parametrize("chosen", [(0,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_merged_adapter_is_a_file_that_peft_reads(decoder: Decoder, parents: list[Adapter], chosen: tuple[int, ...], tmp_path: Path) -> None:
    """Unequal ranks and sites end in rank patterns and paths of modules: read back they must mean the same sites, ranks and scaling, to PEFT too."""
    merged = cat([parents[index] for index in chosen], [0.8] * len(chosen))
    merged.check_fits(decoder.shape.linears, decoder.shape.num_layers)
    theirs = peft_model(tiny_model("llama"), merged, tmp_path / "merged", trainable=False)
    back = read_adapter(tmp_path / "merged")
    assert back.spec == merged.spec
    for site, module in merged.modules.items():
        assert torch.equal(back.modules[site].a, module.a)
        assert torch.equal(back.modules[site].b, module.b)
        assert back.modules[site].scaling == 1.0
    with torch.no_grad():
        bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
        torch.testing.assert_close(packed_logits(decoder, ROWS[:1], [bank.load(back)])[0], reference(theirs, ROWS[0]), **CLOSE)


def test_the_spec_of_a_merge_says_no_more_than_its_sites(decoder: Decoder) -> None:
    """An adapter of layer 0 alone must not claim the other layers of its base, nor one of all layers be bound to their number without need."""
    first = random_adapter(decoder, 4, target_modules=("q_proj",), layers_to_transform=(0,))
    assert cat([first, first], [1.0, 1.0]).spec.layers_to_transform == (0,)
    path = random_adapter(decoder, 4, target_modules=("layers.0.self_attn.q_proj",))
    assert cat([path], [1.0]).spec.layers_to_transform == (0,)
    everywhere = random_adapter(decoder, 4, target_modules=("q_proj",))
    assert cat([first, everywhere], [1.0, 1.0]).spec.layers_to_transform is None
    mixed = cat([first, random_adapter(decoder, 4, target_modules=("v_proj",))], [1.0, 1.0])
    assert "layers.0.self_attn.q_proj" in mixed.spec.target_modules
    assert set(mixed.spec.sites(3)) == set(mixed.modules)


def test_parents_of_any_dtype_give_float32_without_gradients(twins: list[Adapter]) -> None:
    """A stored bfloat16 adapter must be weighed in float32; one in training must not keep its graph alive in a served merge."""
    half = Adapter(twins[0].spec, {site: LoraModule(m.a.bfloat16(), m.b.bfloat16(), m.scaling) for site, m in twins[0].modules.items()})
    live = Adapter(twins[1].spec, {site: LoraModule(m.a.clone().requires_grad_(), m.b, m.scaling) for site, m in twins[1].modules.items()})
    merged = cat([half, live], [0.3, 0.4])
    assert_is_sum(merged, [half, twins[1]], [0.3, 0.4])
    assert not any(module.a.requires_grad or module.b.requires_grad for module in merged.modules.values())


def test_parents_for_linears_of_other_sizes_are_refused(twins: list[Adapter]) -> None:
    """Stacking factors of two bases would be a shape error deep inside, or worse, fit by chance at some sites."""
    other = random_adapter(decoder_of(tiny_model("llama", intermediate_size=128)), 8)
    with pytest.raises(BaseMismatch, match=r"adapter 2 cannot be merged.*layer 0 gate_proj.*128 x 64.*96 x 64"):
        cat([twins[0], other], [1.0, 1.0])


# --- compression ------------------------------------------------------------------------------------------------------------------------------


def test_compressing_to_the_true_rank_loses_nothing(parents: list[Adapter]) -> None:
    """svd is exact where it can be: the same adapter three times has the rank of one, and a rank beyond the stack's changes nothing."""
    thrice = compress(cat([parents[0]] * 3, [0.5, 0.25, 2.0]), 4)
    assert thrice.adapter.max_rank == 4
    assert thrice.energy_kept == pytest.approx(1.0)
    assert_is_sum(thrice.adapter, [parents[0]], [2.75])
    whole = compress(cat(parents, [1.0, -2.0, 0.5]), 100)
    assert (whole.energy_kept, whole.least_energy_kept) == (1.0, 1.0)
    assert_is_sum(whole.adapter, parents, [1.0, -2.0, 0.5])


def test_a_rank_above_a_linears_width_is_compressed_to_that_width() -> None:
    """Grouped heads make k and v narrow: a stack of adapters has more rank there than any update of theirs can."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(40, 64, generator=generator), torch.randn(16, 40, generator=generator)
    spec = AdapterSpec(base="any", rank=40, alpha=40.0, target_modules=("k_proj",), layers_to_transform=(0,))
    site = Site(0, "k_proj")
    for rank, width in ((32, 16), (16, 16), (7, 7)):
        small, kept, _ = compress(Adapter(spec, {site: LoraModule(a, b, 1.0)}), rank)
        assert small.modules[site].rank == width
        assert kept == pytest.approx(1.0) if width == 16 else kept < 0.9
        if width == 16:
            torch.testing.assert_close(delta(small, site), b @ a, rtol=0, atol=1e-4)


def test_compressing_is_the_best_there_is_and_says_what_it_kept(parents: list[Adapter]) -> None:
    """Against the SVD of the dense update: same matrix, same share of energy, and the spec of the new ranks."""
    exact = cat(parents, [1.0, 1.0, 1.0])
    small = compress(exact, 5)
    kept, whole, shares = 0.0, 0.0, []
    for site in exact.modules:
        u, values, v = torch.linalg.svd(weighted(parents, [1.0] * 3, site), full_matrices=False)
        torch.testing.assert_close(delta(small.adapter, site), (u[:, :5] * values[:5]) @ v[:5], **SAME)
        kept, whole = kept + float(values[:5].square().sum()), whole + float(values.square().sum())
        shares.append(float(values[:5].square().sum() / values.square().sum()))
    assert small.energy_kept == pytest.approx(kept / whole, rel=1e-4)
    assert small.least_energy_kept == pytest.approx(min(shares), rel=1e-4)
    assert small.adapter.spec.rank == 5 == small.adapter.max_rank
    assert set(small.adapter.spec.sites(3)) == set(exact.modules)
    nothing = compress(cat([parents[0], parents[0]], [1.0, -1.0]), 2)
    assert all(delta(nothing.adapter, site).abs().max() < 1e-5 for site in nothing.adapter.modules), "a sum of nothing has no direction to keep"


# --- LoraHub's product ------------------------------------------------------------------------------------------------------------------------


def test_product_is_lorahubs_formula(decoder: Decoder) -> None:
    """(Σ w B)(Σ w A) times the common scaling, so weights searched by LoraHub mean here what they meant there."""
    twins = [random_adapter(decoder, 8, seed=seed) for seed in (1, 2)]
    merged = product(twins, [0.5, -1.5])
    for site, module in merged.modules.items():
        mine, other = (twin.modules[site] for twin in twins)
        formula = mine.scaling * ((0.5 * mine.b - 1.5 * other.b) @ (0.5 * mine.a - 1.5 * other.a))
        torch.testing.assert_close(module.b @ module.a, formula, **SAME)


def test_product_keeps_each_adapters_own_scaling(twins: list[Adapter]) -> None:
    """LoraHub and LoRAX apply the first adapter's alpha to all, so the order would change the answer."""
    for twin in twins:
        assert_is_sum(product([twin], [1.0]), [twin], [1.0])
        assert_is_sum(product([twin], [-2.0]), [twin], [4.0])
    there, back = product(twins, [1.0, 0.5]), product(twins[::-1], [0.5, 1.0])
    for site in there.modules:
        torch.testing.assert_close(delta(there, site), delta(back, site), **SAME)
    negative = Adapter(twins[0].spec, {site: LoraModule(m.a, m.b, -m.scaling) for site, m in twins[0].modules.items()})
    assert_is_sum(product([negative], [1.0]), [negative], [1.0])


def test_methods_on_factors_refuse_unequal_ranks(parents: list[Adapter]) -> None:
    """Factors of other ranks cannot be added; the way out is a method that takes them."""
    for method in ("product", "ties"):
        with pytest.raises(RequestRefused, match=f"{method} needs adapters of equal rank.*layer 0 q_proj they have ranks 4, 6") as refused:
            product(parents[:2], [1, 1]) if method == "product" else by_factors(parents[:2], [1, 1], sparsify.ties(0.5), method)
        assert "knots" in refused.value.hint


# --- KnOTS --------------------------------------------------------------------------------------------------------------------------------------


def test_knots_is_its_definition_on_dense_matrices(parents: list[Adapter]) -> None:
    """Thin factors must give what the SVD of [ΔW₁, ΔW₂, …] gives: the same shared basis, coordinates and vote, at any ranks."""
    weights, merge = [1.0, 0.5, 2.0], sparsify.ties(0.5)
    merged = knots(parents, weights, merge)
    for site in merged.modules:
        terms = [(delta(parent, site).double(), weight) for parent, weight in zip(parents, weights, strict=True) if site in parent.modules]
        u, values, _ = torch.linalg.svd(torch.cat([update for update, _ in terms], 1), full_matrices=False)
        u = u[:, values > 1e-6 * values[0]]
        coordinates = torch.stack([u.T @ update for update, _ in terms])
        dense = u @ merge(coordinates, torch.tensor([weight for _, weight in terms]).double())
        torch.testing.assert_close(delta(merged, site).double(), dense, rtol=1e-4, atol=1e-5)
    assert all(merged.spec.rank_at(site) == module.rank for site, module in merged.modules.items())


def test_knots_of_a_plain_sum_is_the_sum(parents: list[Adapter]) -> None:
    """The basis loses nothing: only the vote and the thinning change an update."""
    assert_is_sum(knots(parents, [1.0, -1.0, 0.5], sparsify.weighted_sum), parents, [1.0, -1.0, 0.5])
    assert_is_sum(knots(parents[1:2], [1.0], sparsify.ties(1.0)), parents[1:2], [1.0])


def test_knots_sees_that_two_adapters_are_the_same(twins: list[Adapter]) -> None:
    """The same update written with other factors: in the shared basis both agree everywhere, while entries of the factors disagree by chance."""
    disguised = [twins[0], rotated(twins[0])]
    assert_is_sum(knots(disguised, [1.0, 1.0], sparsify.ties(1.0)), twins[:1], [1.0])
    by_entries = by_factors(disguised, [1.0, 1.0], sparsify.ties(1.0), "ties")
    site = Site(0, "q_proj")
    assert (delta(by_entries, site) - delta(twins[0], site)).norm() > 0.3 * delta(twins[0], site).norm()


def test_knots_of_adapters_that_change_nothing(decoder: Decoder, twins: list[Adapter]) -> None:
    """A fresh adapter's B is zero: there is no direction to share, and that is no crash."""
    fresh = Adapter(twins[0].spec, {site: LoraModule(m.a, torch.zeros_like(m.b), m.scaling) for site, m in twins[0].modules.items()})
    nothing = knots([fresh, fresh], [1.0, 1.0], sparsify.ties(0.5))
    assert nothing.max_rank == 1
    assert all(not delta(nothing, site).any() for site in nothing.modules)
    assert_is_sum(knots([fresh, twins[1]], [1.0, 1.0], sparsify.ties(1.0)), [twins[1]], [1.0])
    assert compress(cat([fresh, fresh], [1.0, 1.0]), 4).energy_kept == 1.0


# --- entry by entry -----------------------------------------------------------------------------------------------------------------------------


def test_the_vote_by_hand() -> None:
    """By total 3 - 1 - 1 > 0 elects plus, by frequency two of three elect minus; zeros neither vote nor count; a draw elects plus."""
    stack = torch.tensor([[[3.0, 1.0, 2.0]], [[-1.0, 0.0, -2.0]], [[-1.0, 2.0, 0.0]]])
    ones = torch.ones(3)
    assert sparsify.ties(1.0, "total")(stack, ones).tolist() == [[3.0, 1.5, 2.0]]
    assert sparsify.ties(1.0, "frequency")(stack, ones).tolist() == [[-1.0, 1.5, 2.0]]
    assert sparsify.ties(1.0, "total")(stack, torch.tensor([-2.0, 1.0, 1.0])).tolist() == [[-6.0, 0.0, -4.0]], "weights come after the vote"


def test_keeping_the_largest_keeps_exactly_so_many_of_each() -> None:
    """Each tensor by itself, also among equal magnitudes, as bfloat16 files have them."""
    stack = torch.stack([torch.arange(-6.0, 6.0).reshape(3, 4), torch.ones(3, 4)])
    thin = sparsify.keep_largest(stack, 0.4)
    assert (thin != 0).sum((1, 2)).tolist() == [4, 4]
    assert sorted(thin[0][thin[0] != 0].abs().tolist()) == [4.0, 5.0, 5.0, 6.0]
    assert torch.equal(sparsify.keep_largest(stack, 1.0), stack)


def test_dare_scales_up_what_it_keeps_and_repeats_with_its_seed() -> None:
    """Without the rescaling the merged adapter would be weaker by the density; without a seed of its own no merge could be cached or repeated."""
    ones = torch.ones(1, 200, 200)
    drawn = [sparsify.keep_random(ones, 0.25, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert sorted(drawn[0].unique().tolist()) == [0.0, 4.0]
    assert float(drawn[0].mean()) == pytest.approx(1.0, abs=0.05)


def test_a_merge_of_merges_is_a_merge(parents: list[Adapter]) -> None:
    """The result is an adapter like any other, also to the algebra."""
    inner = cat(parents[:2], [0.5, 2.0])
    assert_is_sum(cat([inner, parents[2]], [3.0, 1.0]), parents, [1.5, 6.0, 1.0])
    assert dataclasses.replace(inner.spec, base="x").kind == "lora"


# --- what is refused --------------------------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Sequence[Adapter], Sequence[float]], object]] = {
    "cat": cat,
    "product": product,
    "by_factors": lambda parents, weights: by_factors(parents, weights, sparsify.ties(0.5), "ties"),
    "by_deltas": lambda parents, weights: by_deltas(parents, weights, sparsify.ties(0.5), 4),
    "knots": lambda parents, weights: knots(parents, weights, sparsify.ties(0.5)),
}


@pytest.mark.parametrize("method", METHODS)
def test_parents_and_weights_that_make_no_sum_are_refused(twins: list[Adapter], method: str) -> None:
    """A weight that is NaN made an adapter of NaN, and no parents an IndexError."""
    for parents, weights, message in (
        ([], [], "there are 0 adapters and 0 weights to compose"),
        (twins, [1.0], "there are 2 adapters and 1 weights to compose"),
        (twins, [1.0, float("nan")], "the weight of adapter 2 is nan, expected a finite number"),
        (twins, [float("inf"), 1.0], "the weight of adapter 1 is inf, expected a finite number"),
        (twins, ["much", 1.0], "the weight of adapter 1 is 'much', expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$") as caught:
            METHODS[method](parents, weights)
        assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parent_that_is_not_finite_is_named_with_its_place(twins: list[Adapter], value: float) -> None:
    """Decompositions of such matrices end in errors of linear algebra, or spread the NaN over a whole site."""
    place = Site(1, "o_proj")
    module = twins[1].modules[place]
    broken = Adapter(twins[1].spec, {**twins[1].modules, place: LoraModule(module.a * value, module.b, module.scaling)})
    for method in METHODS.values():
        with pytest.raises(AdapterFormatError, match=r"^adapter 2 has values that are not finite .* at layer 1 o_proj$"):
            method([twins[0], broken], [1.0, 1.0])
    with pytest.raises(AdapterFormatError, match=r"^the adapter has values that are not finite .* at layer 1 o_proj$"):
        compress(broken, 2)


def test_an_edit_that_is_not_finite_is_named_with_its_place(decoder: Decoder) -> None:
    edits = random_reft(decoder, rank=2, layers=(1,), positions=Positions.parse("f1"))
    for edit in edits.edits.values():
        edit.r.mul_(float("nan"))
    with pytest.raises(AdapterFormatError, match=r"^adapter 1 has values .* at part 1 at layer 1's block_output$"):
        cat([edits], [1.0])


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", None])
def test_a_rank_that_is_none_is_refused(twins: list[Adapter], rank: object) -> None:
    """Rank 0 made an adapter of nothing, -1 one of all but the last direction."""
    for call in (lambda: compress(twins[0], rank), lambda: by_deltas(twins, [1.0, 1.0], sparsify.ties(0.5), rank)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"the rank to compress to is {rank!r}, expected a whole number of at least 1"):
            call()


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan"), "0.5"])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    """1.5 kept everything and -0.5 failed in the middle of a merge."""
    generator, stack = torch.Generator(), torch.ones(2, 3, 3)
    for call in (
        lambda: sparsify.magnitude_prune(density),
        lambda: sparsify.ties(density),
        lambda: sparsify.dare_linear(density, generator),
        lambda: sparsify.dare_ties(density, "total", generator),
        lambda: sparsify.keep_largest(stack, density),
        lambda: sparsify.keep_random(stack, density, generator),
    ):
        with pytest.raises(ConfigError, match=f"the density is {density!r}, expected a number above 0 and at most 1"):
            call()
    with pytest.raises(ConfigError, match="the majority sign is 'all', expected one of total, frequency"):
        sparsify.ties(0.5, "all")  # type: ignore[arg-type]


def test_updates_that_overflow_are_said_to(twins: list[Adapter]) -> None:
    huge = Adapter(twins[0].spec, {site: LoraModule(module.a * 1e30, module.b * 1e30, 1.0) for site, module in twins[0].modules.items()})
    with pytest.raises(ConfigError, match="the merged update overflows at layer 0 q_proj"):
        by_deltas([huge, twins[1]], [1.0, 1.0], sparsify.ties(0.5), 4)


def test_a_classifier_is_not_compressed_without_its_head(twins: list[Adapter]) -> None:
    """The head is part of what was trained; dropping it in silence would leave an adapter that answers something else."""
    classifier = dataclasses.replace(twins[0], head={"classifier.weight": torch.zeros(2, 64)})
    with pytest.raises(UnsupportedAdapter, match="classifier heads cannot be compressed"):
        compress(classifier, 2)
