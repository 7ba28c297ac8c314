"""Attention while labels are scored: transformers' numbers for fewer products, and transformers' own modules afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_t5 import generic_model, random_t5_adapter, t5_tokenizer, tiny_t5
from torch import Tensor, nn

from atoll.model import t5_attention
from atoll.model.generic import GenericModel, Pairs
from atoll.model.generic_pool import GenericPool

# Long inputs of unequal length (a mask) and short labels, for which absorbing pays; and inputs of one length, which have no mask.
LONG = [([5 + (7 * place) % 300 for place in range(length)], [9 + length, 12, 1]) for length in (60, 41, 52)]
EVEN = [(row[:40], labels) for row, labels in LONG]
TARGETS = [("q", "v"), ("q", "k", "v", "o"), ("EncDecAttention.v", "wo"), ("EncDecAttention.k",), ("SelfAttention.k",)]


def mt5_model() -> GenericModel:
    """A toy mT5 with T5's toy weights: the same function in a module of another name."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    t5 = tiny_t5()
    settings = {key: value for key, value in t5.config.to_dict().items() if key not in ("model_type", "architectures")}
    model = MT5ForConditionalGeneration(MT5Config(**settings)).float().eval()
    model.load_state_dict(t5.state_dict())
    return GenericModel("tiny-mt5", Path("tiny-mt5"), model, t5_tokenizer())


def pool_of(model: GenericModel, targets: tuple[str, ...]) -> GenericPool:
    shapes = dict(model.linears)
    return GenericPool.of([random_t5_adapter(shapes, seed, targets=targets) for seed in (1, 2)], model, ["one", "two"])


def plain(model: GenericModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave transformers' attention in place."""
    monkeypatch.setattr(model, "_attentions", {})


def counted(model: GenericModel, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The linears of these names that are run by the encoder's states, as they are run. Hooks would count as somebody else's."""
    calls: list[str] = []
    for place, module in model.model.named_modules():
        if place.endswith(tuple(f"EncDecAttention.{name}" for name in names)):

            def run(x: Tensor, place: str = place, original: Any = module.forward) -> Any:
                calls.append(place)
                return original(x)

            monkeypatch.setattr(module, "forward", run)
    return calls


@pytest.mark.parametrize("rows", [LONG, EVEN], ids=["padded", "even"])
@pytest.mark.parametrize("form", ["cat", "product"])
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("make", [generic_model, mt5_model])
def test_losses_and_gradients_are_those_of_transformers(
    make: Any, targets: tuple[str, ...], form: str, rows: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever linears the adapters change, of either stack, in both forms, without and with a mask."""
    model, pairs = make(), Pairs.of(rows, 0)
    pool, found = pool_of(model, targets), []
    for step in range(2):
        if step:
            plain(model, monkeypatch)
        weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        losses = model.label_losses(pairs, pool.changes(weights, form), 3)
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), weights)[0]))
        with torch.no_grad():
            torch.testing.assert_close(model.label_losses(pairs, pool.changes(weights.detach(), form), 3), losses, rtol=0, atol=2e-5)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["layered", "known encoder", "eager"])
def test_every_way_to_a_forward_gives_transformers_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight for each layer; an encoder that no adapter changes, so that its states are given; masks of numbers instead of booleans."""
    model, pairs = generic_model(), Pairs.of(LONG, 0)
    pool = pool_of(model, ("EncDecAttention.q", "EncDecAttention.v"))
    weights = torch.randn(3, 2, model.num_layers, generator=torch.Generator().manual_seed(0))
    if kind == "eager":
        model.model.set_attn_implementation("eager")
    changes = pool.changes(weights if kind == "layered" else weights[..., 0])
    encoded = model.encode(pairs) if kind == "known encoder" else None
    mine = model.label_losses(pairs, changes, 3, encoded)
    plain(model, monkeypatch)
    torch.testing.assert_close(mine, model.label_losses(pairs, changes, 3, encoded), rtol=0, atol=2e-5)


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real search computes in: losses of about six nats, each within a hundredth or two of float32's."""
    model, pairs = generic_model(), Pairs.of(LONG, 0)
    weights = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    plain(model, monkeypatch)
    truth = model.label_losses(pairs, pool_of(model, ("q", "v")).changes(weights), 6)
    half = GenericModel("tiny-t5", Path("tiny-t5"), tiny_t5().bfloat16(), t5_tokenizer())
    found = half.label_losses(pairs, pool_of(half, ("q", "v")).changes(weights), 6)
    torch.testing.assert_close(found, truth, rtol=0, atol=0.06)


@torch.no_grad()
@pytest.mark.parametrize(("targets", "made"), [(("q",), 0), (("EncDecAttention.k",), 2)])
def test_keys_and_values_of_the_encoders_states_are_not_made(targets: tuple[str, ...], made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what it is for; keys that an adapter changes are, in both of the decoder's layers."""
    model = generic_model()
    calls = counted(model, ("k", "v"), monkeypatch)
    model.label_losses(Pairs.of(LONG, 0), pool_of(model, targets).changes(torch.ones(1, 2)))
    assert len(calls) == made


@torch.no_grad()
@pytest.mark.parametrize(("length", "made"), [(20, 0), (11, 2)])
def test_values_that_lora_changes_are_made_where_they_are_fewer(length: int, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three labels and four heads mix twelve times: for fewer states than that, the update of each state costs less."""
    monkeypatch.setattr(t5_attention, "_WORTH", 0.0)
    model, pairs = generic_model(), Pairs.of([([5 + place for place in range(length)], [9, 12, 1])], 0)
    changes = pool_of(model, ("EncDecAttention.v",)).changes(torch.ones(1, 2))
    calls = counted(model, ("v",), monkeypatch)
    mine = model.label_losses(pairs, changes)
    assert len(calls) == made
    plain(model, monkeypatch)
    torch.testing.assert_close(mine, model.label_losses(pairs, changes), rtol=0, atol=2e-5)


@torch.no_grad()
def test_short_inputs_have_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are as many queries as states, absorbing costs more: transformers' module runs, with the same losses."""
    model, pairs = generic_model(), Pairs.of([([7, 8, 9], [5, 6, 7, 8, 1])], 0)
    calls = counted(model, ("v",), monkeypatch)
    found = model.label_losses(pairs, {})
    assert len(calls) == 2
    plain(model, monkeypatch)
    torch.testing.assert_close(found, model.label_losses(pairs, {}), rtol=0, atol=2e-5)


@torch.no_grad()
def test_hooks_of_others_keep_their_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that stands around the forward, and one that is no hook of ours: both count, as with transformers' modules."""
    model, pairs = generic_model(), Pairs.of(LONG, 0)
    outer = pool_of(model, ("q", "v")).changes(torch.ones(1, 2))
    with model.changed(outer):
        mine = model.label_losses(pairs, {})
    torch.testing.assert_close(mine, model.label_losses(pairs, outer), rtol=0, atol=2e-5)
    assert not torch.allclose(mine, model.label_losses(pairs, {}), atol=1e-3)


def test_transformers_modules_are_whole_afterwards() -> None:
    """Also after a forward that failed: whoever gets the merged model runs transformers' code."""
    model = generic_model()

    def fail(x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("stop")

    model.label_losses(Pairs.of(LONG, 0), {})
    with pytest.raises(RuntimeError, match="stop"):
        model.label_losses(Pairs.of(LONG, 0), {"decoder.block.0.layer.0.SelfAttention.q": fail})
    assert not [place for place, module in model.model.named_modules() if "forward" in vars(module)]


def test_other_modules_are_left_alone() -> None:
    """A class that is not known may mean something else by the same names."""

    class Attention(nn.Module):
        is_decoder = is_causal = False

    assert t5_attention.attentions_of(nn.ModuleDict({"attention": Attention()})) == {}
    older, biased = tiny_t5(), tiny_t5()
    for module in older.modules():
        vars(module).pop("is_causal", None)  # transformers 5.0 has no such attribute
    assert t5_attention.attentions_of(older) == {}
    biased.encoder.block[0].layer[0].SelfAttention.k = nn.Linear(32, 32)
    assert "encoder.block.0.layer.0.SelfAttention" not in t5_attention.attentions_of(biased)
    known = t5_attention.attentions_of(tiny_t5())
    assert sorted(known) == sorted(
        [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in (0, 1)] + [f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in (0, 1)]
    )
