"""The label losses of a search: those of training, row by row, for every candidate, with exact gradients in the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapters import decoder_of, random_adapter
from tests.compose.scenes import equal_adapters, examples
from tests.conftest import tiny_model
from torch import Tensor

from atoll.compose.losses import LabelLosses, losses
from atoll.compose.pool import Pool
from atoll.data.encode import EncodedRow
from atoll.errors import DataError
from atoll.model.bank import LoraBank
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.composed import cat
from atoll.model.decoder import Decoder
from atoll.model.loss import label_losses
from atoll.train.rows import label_batch

ROWS = examples(5)


def some_weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.7


@torch.no_grad()
def test_losses_are_those_of_training_for_each_candidate_and_example(decoder: Decoder, pool: Pool) -> None:
    """The number that is searched on is the number that `train` would report for the composed adapter on that row."""
    weights = some_weights(3, pool.num)
    found = losses(decoder, pool, weights, ROWS)
    assert (found.shape, found.dtype) == ((3, 5), torch.float32)
    for values, row in zip(found, weights, strict=True):
        slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(cat(pool.adapters, row.tolist()))
        for value, example in zip(values, ROWS, strict=True):
            packed = label_batch([example], "cpu")
            hidden = decoder.forward(packed.batch, AdapterBatch.single(slot, packed.batch.num_tokens))
            torch.testing.assert_close(value, label_losses(hidden, decoder.head, packed.labels).sum() / example.num_labels, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 17, 40, 200])
def test_portions_change_nothing(decoder: Decoder, pool: Pool, tokens: int) -> None:
    """What a forward has room for is a matter of memory: rows and candidates come in any order and number and get the same losses."""
    weights, order = some_weights(7, pool.num), [3, 0, 4]
    whole = losses(decoder, pool, weights, ROWS)
    parted = LabelLosses(decoder, pool, ROWS, forward_tokens=tokens)
    torch.testing.assert_close(parted.scores(weights, order), whole[:, order], rtol=1e-5, atol=1e-5)
    assert parted.at_once(order) <= max(1, tokens // 3)


@torch.no_grad()
def test_a_repeated_call_gives_the_same_bits(decoder: Decoder, pool: Pool) -> None:
    """Batches are kept between calls; a search that is run again must read the same numbers from them."""
    kept, weights = LabelLosses(decoder, pool, ROWS), some_weights(3, pool.num)
    first = kept.scores(weights, range(5))
    kept.scores(-weights, range(5))
    assert torch.equal(kept.scores(weights, range(5)), first)


def slope(decoder: Decoder, pool: Pool, weights: Tensor, direction: Tensor, form: str, step: float = 2e-3) -> Tensor:
    """[P, k]: the central difference of the losses along a direction."""
    with torch.no_grad():
        ahead, behind = (losses(decoder, pool, weights + sign * step * direction, ROWS, form=form) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("form", ["cat", "product"])
def test_gradients_in_the_weights_are_exact(decoder: Decoder, pool: Pool, equals: Pool, form: str, layered: bool) -> None:
    """Against finite differences along random directions, for weights an adapter and weights an adapter and layer, in both forms."""
    used = pool if form == "cat" else equals
    shape = (2, used.num, used.num_layers) if layered else (2, used.num)
    weights = some_weights(*shape).requires_grad_()
    found = losses(decoder, used, weights, ROWS, form=form)
    for seed in (1, 2):
        direction = some_weights(*shape, seed=seed)
        expected = slope(decoder, used, weights.detach(), direction, form)
        for candidate in range(2):
            for example in range(5):
                gradient = torch.autograd.grad(found[candidate, example], weights, retain_graph=True)[0]
                assert torch.equal(gradient[1 - candidate], torch.zeros_like(gradient[0])), "a candidate's loss depends on its own weights alone"
                torch.testing.assert_close((gradient * direction).sum(), expected[candidate, example], rtol=2e-2, atol=2e-3)


def test_gradients_are_zero_where_lorahub_starts(decoder: Decoder, equals: Pool) -> None:
    """w = 0 is a saddle of the product form: a gradient method that began there would stay. The exact form has no such point."""
    for form, still in (("product", True), ("cat", False)):
        weights = torch.zeros(1, equals.num, requires_grad=True)
        losses(decoder, equals, weights, ROWS, form=form).sum().backward()
        assert weights.grad is not None
        assert bool((weights.grad == 0).all()) == still


def test_layers_below_the_first_that_changes_are_run_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's states there are the same for all candidates: kept, and with the same losses and gradients as without."""
    upper = Pool.of([random_adapter(decoder, 4, seed=seed, layers_to_transform=(2,)) for seed in (1, 2)], decoder)
    weights = some_weights(3, 2).requires_grad_()
    calls = []
    original = Decoder.residual_before
    monkeypatch.setattr(Decoder, "residual_before", lambda self, *given: calls.append(1) or original(self, *given))
    kept = LabelLosses(decoder, upper, ROWS)
    results = [kept.scores(weights, range(5)) for _ in range(3)]
    assert calls == [1]
    gradient = torch.autograd.grad(results[-1].sum(), weights)[0]
    monkeypatch.setattr(Pool, "first_layer", 0)
    plain = LabelLosses(decoder, upper, ROWS).scores(weights, range(5))
    torch.testing.assert_close(results[-1], plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), weights)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lowest", [0, 2])
@pytest.mark.parametrize("layered", [False, True])
def test_a_beginning_that_all_examples_share_goes_in_once(decoder: Decoder, layered: bool, lowest: int) -> None:
    """Same losses and gradients as of each example by itself, for fewer tokens; also above layers that no adapter changes."""
    layers = tuple(range(lowest, decoder.shape.num_layers))
    used = Pool.of([random_adapter(decoder, 4, seed=seed, layers_to_transform=layers) for seed in (1, 2)], decoder)
    weights = some_weights(3, 2, *((used.num_layers,) if layered else ())).requires_grad_()
    beginning = examples(1, seed=9, prompt=24)[0].token_ids[:20]
    rows = [EncodedRow(beginning + row.token_ids, len(beginning) + row.num_prompt, row.where) for row in ROWS]
    scores = LabelLosses(decoder, used, rows)
    seen = tokens_of_forwards(scores, weights)
    assert seen == 3 * (20 + sum(len(row.token_ids) - 1 for row in ROWS))
    together, alone = scores.scores(weights, range(5)), torch.cat([scores.scores(weights, [example]) for example in range(5)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(found.sum(), weights)[0] for found in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(scores.scores(weights.detach(), range(5)), alone, rtol=1e-5, atol=1e-5)


def tokens_of_forwards(scores: LabelLosses, weights: Tensor) -> int:
    """How many tokens the candidates' forwards over all examples take."""
    counted: list[int] = []
    original = Decoder.forward

    def counting(self: Decoder, batch: PackedBatch, *given: Any, **named: Any) -> Tensor:
        counted.append(batch.num_tokens)
        return original(self, batch, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "forward", counting)
        scores.scores(weights, range(scores.num_examples))
    return sum(counted)


@torch.no_grad()
@pytest.mark.parametrize("form", ["cat", "product"])
@pytest.mark.parametrize("rows", ["the same", "one begins another", "a label right behind"])
def test_whatever_examples_share_their_losses_are_their_own(decoder: Decoder, equals: Pool, rows: str, form: str) -> None:
    """Equal rows, a row that is another's beginning, and prompts that are shared to their last token but one."""
    long = list(range(20, 60))
    made = {
        "the same": [EncodedRow([*long, 5, 6], 40, "1"), EncodedRow([*long, 5, 6], 40, "2")],
        "one begins another": [EncodedRow(long, 30, "1"), EncodedRow([*long, 7, 8, 9], 38, "2"), EncodedRow([*long, 9], 32, "3")],
        "a label right behind": [EncodedRow([*long, label, 2], 40, str(label)) for label in (5, 6, 7)],
    }[rows]
    scores, weights = LabelLosses(decoder, equals, made, form=form), some_weights(3, equals.num)
    alone = torch.cat([scores.scores(weights, [example]) for example in range(len(made))], 1)
    torch.testing.assert_close(scores.scores(weights, range(len(made))), alone, rtol=1e-5, atol=1e-5)


def test_a_beginning_leaves_the_size_of_forwards_as_it_is(decoder: Decoder, pool: Pool) -> None:
    """Attention lays the beginning beside every row, so a row takes the memory of its whole length."""
    beginning = examples(1, seed=9, prompt=100)[0].token_ids[:90]
    rows = [EncodedRow(beginning + row.token_ids, len(beginning) + row.num_prompt, row.where) for row in ROWS]
    scores = LabelLosses(decoder, pool, rows, forward_tokens=1100, backward_tokens=303)
    lengths = [len(row.token_ids) - 1 for row in rows]
    assert scores.at_once(range(5)) == 1100 // (5 * max(lengths))
    portions = scores.portions(range(5), 1)
    assert sorted(example for portion in portions for example in portion) == list(range(5)) and len(portions) == 2
    assert all(len(portion) * max(lengths[example] for example in portion) <= 303 for portion in portions)


@torch.no_grad()
@pytest.mark.parametrize("way", ["mixed", "merged"])
def test_bfloat16_gives_the_same_losses_to_its_precision(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compute dtype of every real search; the two ways round in different places, and neither may favour a candidate by that."""
    monkeypatch.setattr("atoll.compose.candidates.cheaper_way", lambda *counted: way)
    model = tiny_model("llama")
    full, half = decoder_of(model), decoder_of(model, torch.bfloat16)
    adapters, weights = equal_adapters(full), some_weights(6, 4)
    truth = losses(full, Pool.of(adapters, full), weights, ROWS)
    torch.testing.assert_close(losses(half, Pool.of(adapters, half), weights, ROWS), truth, rtol=0, atol=0.05)


def test_examples_that_cannot_be_scored_are_refused_by_place(decoder: Decoder, pool: Pool) -> None:
    """No examples, one without a label, one longer than the base's context."""
    with pytest.raises(DataError, match="no examples"):
        LabelLosses(decoder, pool, [])
    with pytest.raises(DataError, match=r"few\.jsonl:7: the example has no prompt token or no label"):
        LabelLosses(decoder, pool, [EncodedRow([5, 6], 2, "few.jsonl:7")])
    with pytest.raises(DataError, match=r"few\.jsonl:9: the example has 600 tokens, the base's context is 512"):
        LabelLosses(decoder, pool, [EncodedRow([5] * 600, 2, "few.jsonl:9")])
