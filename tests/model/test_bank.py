"""model/bank.py: resident adapters keep their place and their values while others come and go."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model

from atoll.errors import BaseMismatch
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.bank import LoraBank, Slot, bucket_of
from atoll.model.decoder import Decoder
from atoll.model.reft import COMPONENTS, ReftSpec
from atoll.model.sites import Site


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture
def bank(decoder: Decoder) -> LoraBank:
    return LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)


@torch.no_grad()
def answer(decoder: Decoder, slot: Slot | None) -> torch.Tensor:
    return packed_logits(decoder, ROWS[:1], [slot])[0]


@pytest.mark.parametrize(("rank", "bucket"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1024, 1024)])
def test_ranks_are_padded_to_a_power_of_two(rank: int, bucket: int) -> None:
    """Buckets bound both the padding and the number of stacks."""
    assert bucket_of(rank) == bucket


def test_a_bank_that_grows_keeps_what_it_holds(decoder: Decoder, bank: LoraBank) -> None:
    """Nine adapters of one bucket grow its stack twice; slots handed out before must still give their adapter."""
    adapters = [random_adapter(decoder, 8, seed=seed) for seed in range(9)]
    first = bank.load(adapters[0])
    before = answer(decoder, first)
    slots = [first, *(bank.load(adapter) for adapter in adapters[1:])]
    assert len({slot.index for slot in slots}) == 9
    assert bank.stack(8).capacity == 16
    assert torch.equal(answer(decoder, first), before)
    alone = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
    for adapter, slot in zip(adapters[1:], slots[1:], strict=True):
        assert torch.equal(answer(decoder, slot), answer(decoder, alone.load(adapter)))


def test_a_reused_slot_holds_nothing_of_its_last_adapter(decoder: Decoder, bank: LoraBank) -> None:
    """A factor left over from the adapter before (at a site or rank that the new one does not have) would mix two customers' adapters."""
    bank.load(random_adapter(decoder, 8, seed=3))  # somebody stays, or an empty bucket would give its memory back
    everywhere = bank.load(random_adapter(decoder, 8, seed=1))
    bank.unload(everywhere)
    narrow = random_adapter(decoder, 3, seed=2, target_modules=("q_proj",), layers_to_transform=(1,))
    slot = bank.load(narrow)
    assert slot.index == everywhere.index, "the test wants the same place"
    clean = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(narrow)
    assert torch.equal(answer(decoder, slot), answer(decoder, clean))
    for layer in range(decoder.shape.num_layers):
        for group in range(4):
            assert torch.equal(bank.stack(8).a[layer][group][slot.index], clean.bank.stack(8).a[layer][group][clean.index])
        for target, b in bank.stack(8).b[layer].items():
            assert torch.equal(b[slot.index], clean.bank.stack(8).b[layer][target][clean.index])


def test_the_padding_of_a_rank_adds_nothing(decoder: Decoder, bank: LoraBank) -> None:
    """Rank 12 stands in a bucket of 16: the same answer as unpadded."""
    from atoll.train.weights import TrainableAdapter

    adapter = random_adapter(decoder, 12, rank_pattern={"v_proj": 5}, alpha_pattern={"k_proj": 1.5})
    with torch.no_grad():
        plain = packed_logits(decoder, ROWS[:1], [TrainableAdapter(adapter, decoder.shape.linears)])[0]
    torch.testing.assert_close(answer(decoder, bank.load(adapter)), plain, **CLOSE)


def test_an_adapter_that_does_not_fit_takes_no_slot(decoder: Decoder, bank: LoraBank) -> None:
    """A refused load that kept a slot would fill the pool with nothing."""
    good = random_adapter(decoder, 8)
    bad = Adapter(good.spec, {**good.modules, Site(2, "up_proj"): LoraModule(torch.zeros(8, 63), torch.zeros(96, 8), 1.0)})
    keeper, slot = bank.load(good), bank.load(good)
    free = list(bank.stack(8).free)
    with pytest.raises(BaseMismatch, match="layer 2 up_proj"):
        bank.load(bad)
    assert bank.stack(8).free == free
    bank.unload(slot)
    assert sorted(bank.stack(8).free) == sorted([*free, slot.index])
    bank.unload(keeper)
    with pytest.raises(KeyError):
        bank.stack(8)  # the last adapter of a bucket takes the bucket's memory with it


@pytest.mark.parametrize("others", [0, 1])
def test_a_slot_cannot_be_freed_twice(others: int, decoder: Decoder, bank: LoraBank) -> None:
    """The second time it would be somebody else's."""
    slot = bank.load(random_adapter(decoder, 8))
    for seed in range(others):
        bank.load(random_adapter(decoder, 8, seed=seed))
    bank.unload(slot)
    with pytest.raises(AssertionError, match="freed twice"):
        bank.unload(slot)


def test_a_bucket_that_nobody_uses_gives_its_memory_back(decoder: Decoder, bank: LoraBank) -> None:
    """One adapter of rank 256 that came by must not hold its stack for the rest of a server's life; the next one finds a clean place."""
    adapter = random_adapter(decoder, 40)
    slot = bank.load(adapter)
    before = answer(decoder, slot)
    bank.unload(slot)
    with pytest.raises(KeyError):
        bank.stack(64)
    assert torch.equal(answer(decoder, bank.load(adapter)), before)


def test_slot_bytes_are_what_a_slot_takes(decoder: Decoder, bank: LoraBank) -> None:
    """The pool's budget is in bytes; an estimate below the truth would exceed the machine's memory."""
    adapter = random_adapter(decoder, 12, target_modules=("q_proj",))
    bank.load(adapter)
    stack = bank.stack(16)
    tensors = [*(a for layer in stack.a for a in layer), *(b for layer in stack.b for b in layer.values())]
    assert bank.slot_bytes(adapter) == sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)


def test_the_scaling_is_folded_in_before_rounding(decoder: Decoder) -> None:
    """bfloat16(s B) is one rounding; bfloat16(s) bfloat16(B) would be three."""
    bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.bfloat16)
    adapter = random_adapter(decoder, 8, alpha=8 / 3)
    slot = bank.load(adapter)
    site = Site(1, "down_proj")
    update = slot.update(1, 3)
    assert update is not None
    module = adapter.modules[site]
    assert torch.equal(update.parts[0].b, (module.b * module.scaling).T.bfloat16())
    assert update.parts[0].scaling == 1.0


def test_groups_that_an_adapter_does_not_change_cost_nothing(decoder: Decoder, bank: LoraBank) -> None:
    """No product where no row has factors."""
    slot = bank.load(random_adapter(decoder, 8, target_modules=("v_proj",)))
    assert slot.update(0, 0) is not None
    assert [slot.update(0, group) for group in (1, 2, 3)] == [None] * 3
    rows = bank.rows([0], [slot]).buckets[0]
    assert rows.gathered(0, 0) is not None
    assert rows.gathered(0, 2) is None


# --- ReFT ---------------------------------------------------------------------------------------------------------------------------------------


def edit_bytes(slot: Slot) -> int:
    """Bytes of every fused tensor of a slot, each once."""
    sides = {id(side): side for part in slot.parts for side in part.sides}.values()
    edits = [side.edit(layer, component) for side in sides for layer in range(3) for component in range(len(COMPONENTS))]
    return sum(tensor.numel() * tensor.element_size() for edit in edits if edit is not None for tensor in (edit.a, edit.b, edit.u))


@pytest.mark.parametrize(
    "part",
    [{"rank": 3}, {"rank": 3, "tied": False}, {"rank": 2, "layers": (1,), "rank_pattern": {1: 7}}, {"activation": "relu"}, {"method": "lobireft"}],
    ids=str,
)
def test_edits_are_counted_as_they_are_held(decoder: Decoder, bank: LoraBank, part: dict[str, object]) -> None:
    """Tied sides once; W and R apart take twice the rank. Alone they take no LoRA memory, beside LoRA they come on top."""
    alone, both = random_reft(decoder, **part), random_reft(decoder, lora=8, **part)
    assert bank.slot_bytes(alone) == edit_bytes(bank.load(alone))
    assert bank.slot_bytes(both) - bank.slot_bytes(alone) == bank.slot_bytes(random_adapter(decoder, 8))
    assert edit_bytes(bank.load(both)) == bank.slot_bytes(alone)


def test_an_adapter_of_edits_takes_no_place_in_a_stack(decoder: Decoder, bank: LoraBank) -> None:
    """Half a megabyte of edits must not cost a LoRA's twenty. Its slots are still counted, freed once, and never two adapters' at a time."""
    slots = [bank.load(random_reft(decoder, seed)) for seed in range(3)]
    with pytest.raises(KeyError):
        bank.stack(8)
    lora = bank.load(random_adapter(decoder, 8))
    assert len({(slot.bucket, slot.index) for slot in (*slots, lora)}) == 4
    assert all(slot.update(layer, group) is None for slot in slots for layer in range(3) for group in range(4))
    assert not lora.parts
    rows = bank.rows([0, 1, 2], [slots[0], lora, slots[1]])
    assert [bucket.tokens.tolist() for bucket in rows.buckets] == [[1]], "decode rows with nothing to add are left out"
    bank.unload(slots[0])
    assert (bank.load(random_reft(decoder, 9)).bucket, slots[1].bucket) == (slots[0].bucket, slots[0].bucket)
    with pytest.raises(AssertionError, match="freed twice"):
        bank.unload(slots[0])


def test_an_edit_that_does_not_fit_takes_no_slot(decoder: Decoder, bank: LoraBank) -> None:
    """A layer too many, or states of another width: found when it is loaded, in a sentence, not in the middle of a batch."""
    wide = random_reft(decoder_of(tiny_model("llama", hidden_size=32)))
    with pytest.raises(BaseMismatch, match="layer 0 block_output: the edit has tensors"):
        bank.load(wide)
    deep = random_reft(decoder_of(tiny_model("llama", num_hidden_layers=4)), layers=(3,))
    with pytest.raises(BaseMismatch, match="edits layer 3, but the base has 3 layers"):
        bank.load(deep)
    whole = random_reft(decoder)
    half = Adapter(whole.spec, {}, edits={site: found for site, found in whole.edits.items() if site.layer})
    with pytest.raises(BaseMismatch, match="has no tensors for the edit of layer 0's block_output"):
        bank.load(half)
    assert ReftSpec().max_rank == bank.load(whole).parts[0].sides[0].edit(2, COMPONENTS.index("block_output")).b.shape[0]  # type: ignore[union-attr]
