"""Candidates are what they say: rows of one batch give each weighting the answer that its composed adapter gives alone."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter
from tests.compose.scenes import mixed_adapters
from tests.conftest import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atoll.compose.candidates import Candidates, cheaper_way, merged_cost, mixed_cost
from atoll.compose.pool import Pool
from atoll.compose.result import compose
from atoll.errors import BaseMismatch, ConfigError, UnsupportedAdapter
from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
from atoll.model.apply import linear
from atoll.model.bank import LoraBank
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.composed import cat, product
from atoll.model.decoder import Decoder
from atoll.model.reft import ReftSpec
from atoll.model.sites import GATE_UP, QKV

WAYS = ("mixed", "merged")


def random_weights(num: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def logits_of(decoder: Decoder, pool: Pool, weights: Tensor, *, form: str = "cat", way: str | None = None) -> list[list[Tensor]]:
    """For each candidate, the logits of each of ROWS, from one forward."""
    batch = PackedBatch.of(ROWS * len(weights))
    hidden = decoder.forward(batch, Candidates(pool, form).batch(weights, batch.num_tokens, way=way))
    rows = decoder.logits(hidden).split(list(batch.lengths))
    return [list(rows[start : start + len(ROWS)]) for start in range(0, len(rows), len(ROWS))]


def alone(decoder: Decoder, adapter: Adapter) -> list[Tensor]:
    """The logits of ROWS with one resident adapter, as it is served."""
    slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(adapter)
    return packed_logits(decoder, ROWS, [slot] * len(ROWS))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_each_candidate_answers_as_its_composed_adapter(decoder: Decoder, pool: Pool, way: str) -> None:
    """The one promise: what a search scores is what is published, for parents that agree in nothing."""
    weights = random_weights(5, pool.num)
    base = packed_logits(decoder, ROWS)
    for row, found in zip(weights, logits_of(decoder, pool, weights, way=way), strict=True):
        assert_same(found, alone(decoder, cat(pool.adapters, row.tolist())))
        assert max(float((one - other).abs().max()) for one, other in zip(found, base, strict=True)) > 1e-2, "it must move something"


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_one_hot_weights_are_the_adapter_alone(decoder: Decoder, pool: Pool, way: str) -> None:
    """A weight of 1 means the adapter as trained, with its own alpha, rank and rsLoRA."""
    for adapter, found in zip(pool.adapters, logits_of(decoder, pool, torch.eye(pool.num), way=way), strict=True):
        assert_same(found, alone(decoder, adapter))


@torch.no_grad()
def test_zero_weights_are_the_base_to_the_bit(decoder: Decoder, pool: Pool) -> None:
    """Beside other candidates in the batch too: a candidate of nothing adds exactly nothing."""
    weights = torch.stack([torch.ones(pool.num), torch.zeros(pool.num)])
    batch = PackedBatch.of(ROWS * 2)
    base = decoder.logits(decoder.forward(batch)).split(list(batch.lengths))[len(ROWS) :]
    for found, expected in zip(logits_of(decoder, pool, weights, way="mixed")[1], base, strict=True):
        assert torch.equal(found, expected)
    assert_same(logits_of(decoder, pool, weights, way="merged")[1], list(base))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", [QKV, GATE_UP])
def test_the_update_is_linear_in_the_weights(decoder: Decoder, pool: Pool, way: str, group: int) -> None:
    """At every linear: f(2 u - 3 v) = 2 f(u) - 3 f(v). LoraHub's product has no such meaning of a weight."""
    weight = decoder.layers[1].weights[group]
    x, candidates = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)), Candidates(pool)

    def update(weights: Tensor) -> Tensor:
        added = linear(x, weight, None, 1, group, candidates.batch(weights[None], len(x), way=way))
        return added - x @ weight.T

    u, v = random_weights(2, pool.num)
    torch.testing.assert_close(update(2 * u - 3 * v), 2 * update(u) - 3 * update(v), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_weights_may_differ_between_layers(decoder: Decoder, pool: Pool, way: str) -> None:
    """Equal in all layers, they are the weights of one an adapter; different ones make the adapter that compose makes of them."""
    flat, weights = random_weights(2, pool.num), random_weights(2, pool.num, pool.num_layers)
    repeated = flat.unsqueeze(2).expand(-1, -1, pool.num_layers)
    for one, other in zip(logits_of(decoder, pool, repeated, way=way), logits_of(decoder, pool, flat, way=way), strict=True):
        assert_same(one, other)
    for row, found in zip(weights, logits_of(decoder, pool, weights, way=way), strict=True):
        assert_same(found, alone(decoder, compose(pool, row).adapter))


@torch.no_grad()
def test_the_product_form_is_lorahubs(decoder: Decoder, equals: Pool) -> None:
    """(Σ w B)(Σ w A): the composition that is published has the cross terms that were searched with, and w and -w are one candidate."""
    weights = random_weights(4, equals.num)
    found = logits_of(decoder, equals, weights, form="product")
    for row, answers in zip(weights, found, strict=True):
        assert_same(answers, alone(decoder, product(equals.adapters, row.tolist())))
    for one, other in zip(found, logits_of(decoder, equals, -weights, form="product"), strict=True):
        assert_same(one, other)
    layered = random_weights(2, equals.num, equals.num_layers, seed=3)
    for row, answers in zip(layered, logits_of(decoder, equals, layered, form="product"), strict=True):
        assert_same(answers, alone(decoder, compose(equals, row, form="product").adapter))


def test_the_product_form_takes_equal_ranks_and_any_sites(decoder: Decoder, pool: Pool) -> None:
    """Sums of factors exist only between factors of one shape, and the message says where they differ; sites may."""
    with pytest.raises(ConfigError, match="layer 0 q_proj they have ranks 3, 4, 6"):
        logits_of(decoder, pool, torch.ones(1, pool.num), form="product")
    some = [random_adapter(decoder, 4, seed=1, target_modules=("q_proj",)), random_adapter(decoder, 4, seed=2, target_modules=("v_proj", "q_proj"))]
    found = logits_of(decoder, Pool.of(some, decoder), torch.tensor([[0.5, 2.0]]), form="product")[0]
    with torch.no_grad():
        assert_same(found, alone(decoder, product(some, [0.5, 2.0])))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bases_with_biases_and_head_norms_too(family: str) -> None:
    """The merged way replaces the base's product, so what the base adds to it must not get lost."""
    other = decoder_of(tiny_model(family))
    pool = Pool.of(mixed_adapters(other), other)
    weights = random_weights(2, pool.num)
    for way in WAYS:
        for row, found in zip(weights, logits_of(other, pool, weights, way=way), strict=True):
            assert_same(found, alone(other, cat(pool.adapters, row.tolist())))


def flops_of(decoder: Decoder, adapters: AdapterBatch, batch: PackedBatch) -> int:
    # it knows addmm, but not that form of it
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, out_shape=None, **options: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        decoder.forward(batch, adapters)
    return counter.get_total_flops()


@pytest.mark.parametrize("num", [1, 6])
def test_the_counted_costs_are_the_ones_that_are_paid(decoder: Decoder, pool: Pool, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between the two ways is by count, so the counts must be those of the products that run."""
    monkeypatch.setattr("atoll.compose.candidates._ELEMENT", 2)  # the base's own term
    monkeypatch.setattr("atoll.compose.candidates._THIN", 1)
    batch, weights, candidates = PackedBatch.of(ROWS * num), random_weights(num, pool.num), Candidates(pool)
    plain = flops_of(decoder, BASE_ONLY, batch)
    for way, counted in (("mixed", mixed_cost(pool, batch.num_tokens // num)), ("merged", merged_cost(pool, num))):
        paid = flops_of(decoder, candidates.batch(weights, batch.num_tokens, way=way), batch) - plain
        assert paid == counted * num, way


def test_long_examples_are_merged_and_short_ones_mixed(pool: Pool) -> None:
    """Stacked adapters cost a share of every token, merging a fixed amount."""
    assert [cheaper_way(pool, 8, tokens) for tokens in (1, 20, 2000, 50_000)] == ["mixed", "mixed", "merged", "merged"]


def test_a_pool_says_what_it_holds(decoder: Decoder, pool: Pool) -> None:
    """Counts for the dry run and the memory limit."""
    assert (pool.num, pool.num_layers, pool.ranks) == (4, 3, (4, 6, 3, 5))
    assert pool.num_bytes == 4 * sum(adapter.num_parameters for adapter in pool.adapters)
    assert pool.first_layer == 0
    upper = [random_adapter(decoder, layers_to_transform=(2,)), random_adapter(decoder, layers_to_transform=(1, 2))]
    assert Pool.of(upper, decoder).first_layer == 1


def test_a_pool_refuses_by_name_what_it_cannot_weight(decoder: Decoder, pool: Pool) -> None:
    """Edits of hidden states, adapters of another base, and nothing at all."""
    shape = decoder.shape
    spec = AdapterSpec(base="tiny", rank=2, alpha=2.0, target_modules=(), reft=(ReftSpec("loreft", 2),))
    edits = new_adapter(spec, shape.linears, shape.num_layers, torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedAdapter, match="'tone' is reft: it edits hidden states"):
        Pool.of([pool.adapters[0], edits], decoder, ["good", "tone"])
    wide = decoder_of(tiny_model("llama", hidden_size=32, intermediate_size=48))
    with pytest.raises(BaseMismatch, match="'other': layer 0 q_proj"):
        Pool.of([random_adapter(wide)], decoder, ["other"])
    with pytest.raises(ConfigError, match="no adapters"):
        Pool.of([], decoder)
