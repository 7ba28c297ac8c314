"""train/weights.py: one flat vector of masters that the forward sees as fused factors."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import ROWS, decoder_of, packed_logits, random_adapter
from tests.conftest import tiny_model

from atoll.model.adapter import Adapter
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.sites import Site
from atoll.train.weights import TrainableAdapter


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture
def adapter(decoder: Decoder) -> Adapter:
    """Mixed ranks, some members of a group missing, one layer left out."""
    return random_adapter(
        decoder, 4, target_modules=("q_proj", "v_proj", "up_proj", "down_proj"), rank_pattern={"v_proj": 3}, layers_to_transform=(0, 2)
    )


def same(one: Adapter, other: Adapter) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        torch.equal(m.a, other.modules[s].a) and torch.equal(m.b, other.modules[s].b) and m.scaling == other.modules[s].scaling
        for s, m in one.modules.items()
    )


def test_an_adapter_goes_in_and_comes_out_bit_for_bit(decoder: Decoder, adapter: Adapter) -> None:
    """Fusing, transposing and flattening must lose nothing; and what comes out is a copy, not a window on weights that train on."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    out = weights.adapter()
    assert same(out, adapter)
    assert out.spec == adapter.spec
    assert weights.values.numel() == adapter.num_parameters
    with torch.no_grad():
        weights.values.zero_()
    assert same(out, adapter)


def test_values_of_another_step_can_be_taken_out(decoder: Decoder, adapter: Adapter) -> None:
    """The best step's values are kept as one vector; reading them must not disturb the running ones."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    best = weights.values.detach().clone()
    with torch.no_grad():
        weights.values.mul_(2)
    assert same(weights.adapter(best), adapter)
    site = Site(2, "v_proj")
    assert torch.equal(weights.adapter().modules[site].b, 2 * adapter.modules[site].b)


def test_an_optimizer_over_the_vector_moves_the_forward(decoder: Decoder, adapter: Adapter) -> None:
    """Factors are slices of the vector; if they were copies, training would change numbers that nothing reads."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    before = packed_logits(decoder, ROWS[:1], [weights])[0].detach()
    optimizer = torch.optim.AdamW([weights.values], lr=1e-2)
    batch = PackedBatch.of(ROWS[:1])
    decoder.forward(batch, AdapterBatch.single(weights, batch.num_tokens)).sum().backward()
    assert weights.values.grad is weights.grads
    assert weights.grads.count_nonzero() > 0.9 * weights.grads.numel(), "every factor must have its slice of the gradient"
    optimizer.step()
    assert not torch.equal(packed_logits(decoder, ROWS[:1], [weights])[0], before)


def test_gradients_add_up_until_they_are_zeroed(decoder: Decoder, adapter: Adapter) -> None:
    """Accumulation over micro-batches lives from this: the same batch twice is twice the gradient."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    batch = PackedBatch.of(ROWS[:2])

    def backward() -> None:
        decoder.forward(batch, AdapterBatch.single(weights, batch.num_tokens)).square().sum().backward()

    backward()
    once = weights.grads.clone()
    backward()
    torch.testing.assert_close(weights.grads, 2 * once)
    weights.grads.zero_()
    backward()
    assert torch.equal(weights.grads, once)


def test_dropped_gradients_come_back_as_zeros_in_the_same_places(decoder: Decoder, adapter: Adapter) -> None:
    """Between steps a job has none; leaves must find their slices again, and nobody may read memory that is not there."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    batch, found = PackedBatch.of(ROWS[:2]), []
    for _ in range(2):
        weights.zero_grads()
        decoder.forward(batch, AdapterBatch.single(weights, batch.num_tokens)).square().sum().backward()
        found.append(weights.grads.clone())
        weights.drop_grads()
        with pytest.raises(AssertionError, match="dropped"):
            _ = weights.grads
    assert torch.equal(found[0], found[1])
    assert found[0].any()


def test_every_step_and_site_draws_its_own_dropout_mask(decoder: Decoder) -> None:
    """torch's CPU generator reads only the low 32 bits of a seed, so seeds built by shifting repeated themselves every 1,024 steps."""
    weights = TrainableAdapter(random_adapter(decoder, 2, dropout=0.1), decoder.shape.linears)
    seeds = set()
    steps = [*range(50), *range(1024, 1074), *range(2**20, 2**20 + 50)]
    for step in steps:
        weights.dropout_seed = (17 * 1_000_003 + step) * 1024
        for layer in range(3):
            for group in range(4):
                update = weights.update(layer, group)
                assert update is not None
                seeds.add(update.dropout_seed)
    assert max(seeds) < 2**32
    assert len(seeds) == len(steps) * 12


def test_a_seed_as_long_as_a_date_and_time_works(decoder: Decoder) -> None:
    """People write seed: 20260131120000; the mask's seed grows with it past what torch accepts."""
    weights = TrainableAdapter(random_adapter(decoder, 2, dropout=0.5), decoder.shape.linears)
    plain = packed_logits(decoder, ROWS[:1], [weights])[0]
    weights.dropout_seed = (20260131120000 * 1_000_003 + 5) * 1024
    assert not torch.equal(packed_logits(decoder, ROWS[:1], [weights])[0], plain)
