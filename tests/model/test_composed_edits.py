"""The adapter algebra of ReFT: sums of edits are exact, whatever the parents are, and no other method touches edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model
from tests.written_reft import EVERY_FORM, hooked
from torch import Tensor

from atoll.errors import BaseMismatch, RequestRefused
from atoll.model import sparsify
from atoll.model.adapter import Adapter, AdapterSpec
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.composed import by_deltas, by_factors, cat, compress, knots, product
from atoll.model.composed_edits import stacked_edits
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import EditSite

ENDS = Positions(2, 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return decoder_of(model)


@pytest.fixture(scope="module")
def parents(decoder: Decoder) -> list[Adapter]:
    """LoRA, ReFT of every kind that joins or does not, and both in one."""
    return [
        random_adapter(decoder, 4, seed=1),
        random_reft(decoder, 2, rank=3),
        random_reft(decoder, 3, method="direft", rank=2, layers=(0, 2), rank_pattern={2: 5}),
        random_reft(decoder, 4, lora=6, rank=2, tied=False),
        random_reft(decoder, 5, rank=2, activation="tanh"),
        random_reft(decoder, 6, method="orthogonal_direft", rank=2, activation="tanh"),
        random_reft(decoder, 7, method="consreft", rank=2, component="mlp_output", positions=Positions(listed=(0, -1))),
        random_reft(decoder, 8, method="noreft", rank=3, bias=True),
    ]


@torch.no_grad()
def answers(decoder: Decoder, adapter: Adapter | None) -> list[Tensor]:
    slot = None if adapter is None else decoder.new_bank().load(adapter)
    return packed_logits(decoder, ROWS, [slot] * len(ROWS))


def same(one: Sequence[Tensor], other: Sequence[Tensor], **close: float) -> None:
    for mine, its in zip(one, other, strict=True):
        torch.testing.assert_close(mine, its, **(close or CLOSE))


def test_a_sum_of_edits_is_the_hooks_of_all_parents_at_once(model: Any, decoder: Decoder) -> None:
    """Σ wᵢ Δᵢ(h), every Δ from the state before any of them: what composing means, and nothing that a file format or a table needs may change it."""
    given = [
        random_reft(decoder, 2, rank=3, positions=ENDS),
        random_reft(decoder, 3, method="direft", rank=2, layers=(0, 2), positions=ENDS),
        random_reft(decoder, 4, rank=2, activation="silu", positions=Positions(all_prompt=True)),
    ]
    weights = [0.7, -1.3, 0.5]
    logits = answers(decoder, cat(given, weights))
    for row, found in zip(ROWS, logits, strict=True):
        with torch.no_grad(), hooked(model, _side_by_side(given, weights), len(row)):
            torch.testing.assert_close(found, model(torch.tensor([row])).logits[0], rtol=0, atol=5e-5)


def _side_by_side(parents: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The parents' parts as they are, none joined."""
    specs = [replace(parent.spec.reft[0], weight=weight) for parent, weight in zip(parents, weights, strict=True)]
    edits = {EditSite(index, site.layer, site.component, site.side): e for index, p in enumerate(parents) for site, e in p.edits.items()}
    return Adapter(AdapterSpec.reft_only("tiny", specs), {}, edits=edits)


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_weight_one_is_the_adapter_itself(decoder: Decoder, form: dict[str, Any]) -> None:
    """Not a bit is lost on the way through a composition of one."""
    parent = random_reft(decoder, 3, rank=3, positions=ENDS, **form)
    for one, other in zip(answers(decoder, cat([parent], [1.0])), answers(decoder, parent), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_weights_scale_negate_and_cancel(decoder: Decoder, form: dict[str, Any]) -> None:
    """A weight means strength: twice 0.5 is one, minus one undoes; the joined part is as good as parts of their own."""
    parent = random_reft(decoder, 3, rank=3, **form)
    same(answers(decoder, cat([parent, parent], [0.5, 0.5])), answers(decoder, parent))
    same(answers(decoder, cat([parent, parent], [1.0, -1.0])), answers(decoder, None))
    same(answers(decoder, cat([parent, parent], [-0.5, -0.5])), answers(decoder, cat([parent], [-1.0])))
    same(answers(decoder, cat([cat([parent], [-1.0]), parent], [1.0, 1.0])), answers(decoder, None))


def test_order_and_nesting_do_not_matter(decoder: Decoder, parents: list[Adapter]) -> None:
    """A sum has no order, and a composition composes again."""
    weights = [0.5, 1.0, -0.5, 0.25, 1.0, 0.5, -1.0, 0.3]
    whole = answers(decoder, cat(parents, weights))
    same(whole, answers(decoder, cat(parents[::-1], weights[::-1])), rtol=0, atol=5e-5)
    nested = cat([cat(parents[:3], weights[:3]), cat(parents[3:], [2 * weight for weight in weights[3:]])], [1.0, 0.5])
    same(whole, answers(decoder, nested), rtol=0, atol=5e-5)


def test_lora_and_reft_become_one_with_both(decoder: Decoder) -> None:
    """How a LoRA adapter and a ReFT adapter work on one request: the bits of LoRA's factors, and the edits beside them."""
    lora, reft = random_adapter(decoder, 4, seed=1), random_reft(decoder, 2, rank=3)
    both = cat([lora, reft], [1.0, 1.0])
    assert both.spec.kind == "lora+reft"
    by_hand = Adapter(replace(lora.spec, reft=reft.spec.reft), lora.modules, edits=reft.edits)
    same(answers(decoder, both), answers(decoder, by_hand))
    assert cat([reft], [1.0]).spec.kind == "reft"
    assert cat([reft, reft], [1.0, 2.0]).spec.rank == 6
    assert cat([lora], [1.0]).spec.kind == "lora"


def test_parts_are_joined_where_that_is_exact(decoder: Decoder, parents: list[Adapter]) -> None:
    """One pair of products for all adapters of a kind; an activation beside a subtraction, other tokens or other places stay apart."""
    merged = cat(parents, [1.0] * len(parents))
    assert (len(merged.spec.reft), 3 + 5 + 3) == stacked_edits(parents)
    joined = merged.spec.reft[0]
    assert (joined.method, joined.layers, joined.weight) == ("direft", None, 1.0)
    assert [joined.rank_at(layer) for layer in range(3)] == [3 + 2 + 3, 3 + 3, 3 + 5 + 3]
    assert [part.activation for part in merged.spec.reft].count("tanh") == 2
    assert len(merged.spec.reft) == 5
    twice = cat([parents[4], parents[4], parents[5], parents[5]], [1.0] * 4)
    assert [part.method for part in twice.spec.reft] == ["loreft", "loreft", "direft"]
    merged.check_fits(decoder.shape.linears, decoder.shape.num_layers)


def test_a_composition_is_a_file_like_any_other(decoder: Decoder, parents: list[Adapter], tmp_path: Path) -> None:
    """Stored, read back, and served with the same bits."""
    merged = cat(parents, [0.5, 1.0, -0.5, 0.25, 1.0, 0.5, -1.0, 0.3])
    write_adapter(tmp_path, merged)
    back = read_adapter(tmp_path)
    assert back.spec == merged.spec
    for one, other in zip(answers(decoder, back), answers(decoder, merged), strict=True):
        assert torch.equal(one, other)


def test_parents_in_training_or_in_bfloat16_give_float32_without_gradients(decoder: Decoder) -> None:
    """As for LoRA's factors."""
    live = random_reft(decoder, 2)
    for found in live.edits.values():
        found.r.requires_grad_()
    half = random_reft(decoder, 3)
    half = Adapter(half.spec, {}, edits={site: _cast(found) for site, found in half.edits.items()})
    for parents in ([live], [half], [live, half]):
        merged = cat(parents, [0.5] * len(parents))
        tensors = [tensor for found in merged.edits.values() for tensor in found.tensors.values()]
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.is_contiguous() for tensor in tensors)


def _cast(found: Any) -> Any:
    return type(found)(**{name: tensor.bfloat16() for name, tensor in found.tensors.items()})


@pytest.mark.parametrize("lora", [0, 4])
def test_what_is_for_factors_refuses_edits(decoder: Decoder, lora: int) -> None:
    """Averaging R and W is no average of edits: they would be served as something that nobody trained."""
    given = [random_adapter(decoder, 4), random_reft(decoder, 2, lora=lora)]
    ways = {
        "product": lambda: product(given, [1.0, 1.0]),
        "ties": lambda: by_factors(given, [1.0, 1.0], sparsify.ties(0.5), "ties"),
        "by_deltas": lambda: by_deltas(given, [1.0, 1.0], sparsify.ties(0.5), 4),
        "knots": lambda: knots(given, [1.0, 1.0], sparsify.ties(0.5)),
    }
    for name, way in ways.items():
        with pytest.raises(RequestRefused, match=f"{name} cannot merge adapter 2, which has ReFT edits") as refused:
            way()
        assert "linear and cat" in refused.value.hint
    with pytest.raises(RequestRefused, match="compress cannot merge"):
        compress(given[1], 2)


def test_edits_of_states_of_other_sizes_are_refused(decoder: Decoder) -> None:
    """Adapters of two bases."""
    other = random_reft(decoder_of(tiny_model("llama", hidden_size=32)), component="mlp_input")
    with pytest.raises(BaseMismatch, match=r"adapter 2 cannot be merged.*32 dimensions, they edit 64"):
        cat([random_reft(decoder), other], [1.0, 1.0])
