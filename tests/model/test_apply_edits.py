"""model/apply_edits.py in the forward: transformers with hand-written hooks is the reference, and what is not edited keeps its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model
from tests.written_reft import EVERY_FORM, hooked, moved_intervention, written
from torch import Tensor

from atoll.model.adapter import Adapter, AdapterSpec
from atoll.model.apply_edits import EditedPart, FixedEdits, apply_edits, edit_rows, edited_parts
from atoll.model.bank import LoraBank
from atoll.model.batch import AdapterBatch, EditRows, EditWeights, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import COMPONENTS, METHODS, Edit, EditSite, Intervention, ReftSpec

HIDDEN = 64
PLACES = [Positions.parse(form) for form in ("f2+l3", "f3", "l1", "all_prompt", [0, 2, -1])]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return decoder_of(model)


def adapter_of(*specs: ReftSpec, hidden: int = HIDDEN) -> Adapter:
    """An adapter of these parts with nothing zero in it."""
    spec = AdapterSpec.reft_only("tiny", specs)
    sites = enumerate(spec.edit_sites(3))
    return Adapter(spec, {}, edits={site: moved_intervention(specs[site.part], hidden, seed, site.layer) for seed, site in sites})


def edited_logits(decoder: Decoder, adapter: Adapter, rows: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> list[Tensor]:
    bank = decoder.new_bank()
    slot = bank.load(adapter)
    with torch.no_grad():
        return packed_logits(decoder, rows, [slot] * len(rows), prompts)


def hooked_logits(model: Any, adapter: Adapter, row: Sequence[int], num_prompt: int) -> Tensor:
    with torch.no_grad(), hooked(model, adapter, num_prompt):
        logits: Tensor = model(torch.tensor([list(row)])).logits[0]
    return logits


# --- against transformers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("method", METHODS)
def test_an_edited_forward_is_transformers_with_hooks(model: Any, decoder: Decoder, method: str, component: str) -> None:
    """Every method at every component, on the first and the last layer, for prompts shorter than their rows."""
    adapter = adapter_of(ReftSpec(method, rank=3, layers=(0, 2), component=component, positions=PLACES[0]))
    prompts = [5, 3, 12, 1]
    for row, num_prompt, logits in zip(ROWS, prompts, edited_logits(decoder, adapter, ROWS, prompts), strict=True):
        torch.testing.assert_close(logits, hooked_logits(model, adapter, row, num_prompt), **CLOSE)
        assert (logits - packed_logits(decoder, [row])[0]).abs().max() > 0.01, "the edit moves nothing"


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_every_form_of_edit_is_applied_as_written(model: Any, decoder: Decoder, form: dict[str, Any]) -> None:
    """Activations, the second bias and weights, on all layers."""
    adapter = adapter_of(ReftSpec(rank=2, **form))
    for row, logits in zip(ROWS, edited_logits(decoder, adapter, ROWS), strict=True):
        torch.testing.assert_close(logits, hooked_logits(model, adapter, row, len(row)), rtol=0, atol=5e-5)


@pytest.mark.parametrize("positions", PLACES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_every_form_of_positions_edits_its_tokens(model: Any, decoder: Decoder, positions: Positions, tied: bool) -> None:
    """Tied and untied, ranks that differ by layer; rows are of 1 to 12 tokens, so sides are cut and listed places are missing."""
    adapter = adapter_of(ReftSpec(rank=2, rank_pattern={1: 5}, positions=positions, tied=tied))
    for row, logits in zip(ROWS, edited_logits(decoder, adapter, ROWS), strict=True):
        torch.testing.assert_close(logits, hooked_logits(model, adapter, row, len(row)), **CLOSE)


def test_several_parts_read_one_state_and_add_up(model: Any, decoder: Decoder) -> None:
    """Two parts that overlap on tokens and on components: neither may read what the other wrote."""
    one = ReftSpec(rank=3, positions=Positions(last=4))
    two = ReftSpec("direft", rank=2, positions=Positions(all_prompt=True), activation="tanh", weight=0.5)
    other = ReftSpec("lobireft", rank=2, component="mlp_input", layers=(1,))
    adapter = adapter_of(one, two, other)
    for row, logits in zip(ROWS, edited_logits(decoder, adapter, ROWS), strict=True):
        torch.testing.assert_close(logits, hooked_logits(model, adapter, row, len(row)), **CLOSE)


def test_equal_tensors_on_both_sides_are_the_tied_adapter(decoder: Decoder) -> None:
    """Untied only means that the two may differ."""
    tied = adapter_of(ReftSpec(rank=3))
    spec = ReftSpec(rank=3, tied=False)
    edits = {EditSite(0, site.layer, site.component, side): found for site, found in tied.edits.items() for side in (0, 1)}
    untied = Adapter(AdapterSpec.reft_only("tiny", [spec]), {}, edits=edits)
    for one, other in zip(edited_logits(decoder, tied, ROWS), edited_logits(decoder, untied, ROWS), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------------------------------------------------------


class Live:
    """EditWeights of tensors in training: fused anew, with gradients."""

    def __init__(self, adapter: Adapter, part: int, side: int) -> None:
        self.adapter, self.part, self.side = adapter, part, side

    def edit(self, layer: int, component: int) -> Edit | None:
        found = self.adapter.edits.get(EditSite(self.part, layer, COMPONENTS[component], self.side))
        return None if found is None else found.edit(self.adapter.spec.reft[self.part])


def trained(adapter: Adapter) -> Adapter:
    """The same adapter with float32 leaves that want gradients."""
    leaves = {
        site: Intervention(**{name: tensor.clone().requires_grad_() for name, tensor in found.tensors.items()})
        for site, found in adapter.edits.items()
    }
    return Adapter(adapter.spec, {}, edits=leaves)


def live_batch(adapter: Adapter, batch: PackedBatch) -> AdapterBatch:
    sides: list[list[EditWeights]] = [[Live(adapter, part, side) for side in range(spec.sides)] for part, spec in enumerate(adapter.spec.reft)]
    parts = [EditedPart(spec.positions, (own[0], own[-1])) for spec, own in zip(adapter.spec.reft, sides, strict=True)]
    rows = zip(batch.row_starts, batch.lengths, strict=False)
    return AdapterBatch(edits=edit_rows((start, 0, count, count, parts) for start, count in rows))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_training_gradients_are_autograds_through_transformers(model: Any, decoder: Decoder, component: str, layer: int) -> None:
    """The first edit meets states that want no gradient yet, the next ones states that do; both are written in place."""
    adapter = adapter_of(ReftSpec(rank=2, layers=tuple(range(layer, 3)), component=component, tied=False, positions=PLACES[0]))
    batch = PackedBatch.of(ROWS)
    seeds = torch.randn(batch.num_tokens, 320, generator=torch.Generator().manual_seed(1)).split(batch.lengths)
    ours, theirs = trained(adapter), trained(adapter)
    logits = decoder.logits(decoder.forward(batch, live_batch(ours, batch))).split(batch.lengths)
    torch.stack([(one * seed).sum() for one, seed in zip(logits, seeds, strict=True)]).sum().backward()
    for row, seed in zip(ROWS, seeds, strict=True):
        with hooked(model, theirs, len(row)):
            (model(torch.tensor([row])).logits[0] * seed).sum().backward()
    for site, found in ours.edits.items():
        for name, tensor in found.tensors.items():
            expected = theirs.edits[site].tensors[name].grad
            assert tensor.grad is not None, (site, name)
            assert expected is not None
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_base_in_bfloat16_trains_at_every_component(model: Any) -> None:
    """Sums of edits are float32 and rounded into a bfloat16 state; the gradient must come back through that."""
    decoder = decoder_of(model, torch.bfloat16)
    ours = trained(adapter_of(*(ReftSpec(rank=2, component=component) for component in COMPONENTS)))
    batch = PackedBatch.of(ROWS[:2])
    decoder.logits(decoder.forward(batch, live_batch(ours, batch))).square().mean().backward()
    for found in ours.edits.values():
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any() for tensor in found.tensors.values())


def test_a_narrow_state_is_rounded_once(decoder: Decoder) -> None:
    """bfloat16 states of attention_input and the like: the float32 sum of all edits of a token, then one rounding. Others keep their bits."""
    one, two = ReftSpec(rank=3, positions=Positions(last=2)), ReftSpec("direft", rank=2, positions=Positions(all_prompt=True))
    adapter = adapter_of(one, two)
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()
    rows = edit_rows([(2, 0, 4, 4, edited_parts(adapter))])
    found = apply_edits(hidden.clone(), 0, COMPONENTS.index("block_output"), rows)
    wide = hidden.double()
    wide[2:6] += written(two, adapter.edits[EditSite(1, 0, "block_output", 0)], hidden[2:6])
    wide[4:6] += written(one, adapter.edits[EditSite(0, 0, "block_output", 0)], hidden[4:6])
    torch.testing.assert_close(found, wide.float().bfloat16(), rtol=2**-8, atol=1e-6)
    assert (found != wide.float().bfloat16()).float().mean() < 0.01, "only where float32 itself stood between two values"
    assert torch.equal(found[:2], hidden[:2])
    assert torch.equal(found[6:], hidden[6:])


# --- the shape of the work ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11])
def test_a_prompt_in_chunks_is_the_prompt_at_once(decoder: Decoder, chunk: int) -> None:
    """Places count from the prompt's start, whatever part of it a step brings; generated tokens behind it are not edited."""
    slot = decoder.new_bank().load(adapter_of(ReftSpec(rank=3, tied=False, positions=PLACES[0]), ReftSpec("direft", rank=2, positions=PLACES[4])))
    row, num_prompt = list(range(5, 19)), 11
    whole = packed_logits(decoder, [row], [slot], [num_prompt])[0]
    cache, parts, start = decoder.new_cache(2), [], 0
    while start < len(row):
        stop = min(start + chunk, num_prompt if start < num_prompt else start + 1)
        batch = PackedBatch.of([row[start:stop]], context=[start], pages=[[1]])
        edits = edit_rows([(0, start, stop - start, num_prompt, slot.parts)])
        assert not edits or start < num_prompt, "a step that only decodes has no edits"
        parts.append(decoder.logits(decoder.forward(batch, AdapterBatch(edits=edits), cache)))
        start = stop
    torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)


def test_index_lists_name_each_edited_token_once() -> None:
    """Rows with the same tensors share a list; tied sides share one too; rows past their prompts are in none."""
    spec = ReftSpec(rank=2, positions=Positions(2, 1))
    tied, untied = edited_parts(adapter_of(spec)), edited_parts(adapter_of(ReftSpec(rank=2, positions=Positions(2, 1), tied=False)))
    rows = [(0, 0, 6, 5, tied), (6, 3, 4, 8, tied), (10, 9, 1, 9, tied), (11, 0, 4, 9, untied), (15, 0, 2, 2, ())]
    found = {id(rows.weights): rows.tokens.tolist() for rows in edit_rows(rows)}
    assert found == {id(tied[0].sides[0]): [0, 1, 4], id(untied[0].sides[0]): [11, 12]}
    assert tied[0].sides[0] is tied[0].sides[1]
    assert edit_rows([(0, 9, 1, 9, tied)]) == ()


def test_a_tokens_edits_are_summed_in_the_order_of_parts() -> None:
    """A neighbour whose chunk has only places of the second part must not turn the order of a sum, and with it the last bit, around."""
    parts = edited_parts(adapter_of(ReftSpec(rank=2, positions=Positions(first=2)), ReftSpec(rank=3, positions=Positions(all_prompt=True))))
    found = edit_rows([(0, 4, 3, 9, parts), (3, 0, 4, 4, parts)])
    assert [rows.weights for rows in found] == [part.sides[0] for part in parts]
    assert [rows.tokens.tolist() for rows in found] == [[3, 4], [0, 1, 2, 3, 4, 5, 6]]


@torch.no_grad()
def test_what_is_not_edited_keeps_its_bits(decoder: Decoder) -> None:
    """Base rows beside edited ones, and the tokens of an edited row before its first edited place: the base's own bits."""
    slot = decoder.new_bank().load(adapter_of(ReftSpec(rank=3, positions=Positions(last=2))))
    base = packed_logits(decoder, ROWS)
    mixed = packed_logits(decoder, ROWS, [slot, None, slot, None])
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(mixed[3], base[3])
    for index in (0, 2):
        assert torch.equal(mixed[index][:-2], base[index][:-2])
        assert ((mixed[index][-2:] - base[index][-2:]).abs().amax(1) > 0.01).all()


@torch.no_grad()
def test_an_adapter_without_a_place_in_the_prompt_is_the_base(decoder: Decoder) -> None:
    """P = ∅: a listed place that the prompt does not have."""
    slot = decoder.new_bank().load(adapter_of(ReftSpec(rank=3, positions=Positions(listed=(40,)))))
    for one, other in zip(packed_logits(decoder, ROWS, [slot] * 4), packed_logits(decoder, ROWS), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_an_edit_reaches_later_tokens_through_later_layers_only(decoder: Decoder) -> None:
    """The last layer's edit changes its own token and nothing after it: no layer is left whose keys and values could carry it."""
    base = packed_logits(decoder, ROWS[:1])[0]
    for layer, touched in ((2, [1]), (1, list(range(1, 8)))):
        slot = decoder.new_bank().load(adapter_of(ReftSpec(rank=3, layers=(layer,), positions=Positions(listed=(1,)))))
        logits = packed_logits(decoder, ROWS[:1], [slot])[0]
        assert [token for token in range(8) if not torch.equal(logits[token], base[token])] == touched


@torch.no_grad()
def test_rows_of_every_kind_in_any_order_are_each_alone(decoder: Decoder) -> None:
    """Base, LoRA, ReFT of two ranks and positions, and LoRA + ReFT in one batch: who stands beside a row must not matter."""
    bank = decoder.new_bank()
    made = [
        random_adapter(decoder, 8, seed=1),
        random_reft(decoder, 2, rank=4),
        random_reft(decoder, 3, method="direft", rank=8, component="attention_output", positions=Positions(all_prompt=True)),
        random_reft(decoder, 4, lora=6, rank=2, tied=False, positions=Positions(3, 2)),
    ]
    slots = [None, *map(bank.load, made)]
    rows = [ROWS[0], ROWS[2], ROWS[1], ROWS[0][::-1], ROWS[2][1:]]
    alone = [packed_logits(decoder, [row], [slot])[0] for row, slot in zip(rows, slots, strict=True)]
    assert all((one - packed_logits(decoder, [row])[0]).abs().max() > 0.01 for one, row in list(zip(alone, rows, strict=True))[1:])
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 1, 4, 0, 2]):
        together = packed_logits(decoder, [rows[i] for i in order], [slots[i] for i in order])
        for i, logits in zip(order, together, strict=True):
            torch.testing.assert_close(logits, alone[i], **CLOSE)


@pytest.mark.parametrize("component", ["block_input", "mlp_output"])
def test_entering_at_the_first_edited_layer_is_the_whole_forward(decoder: Decoder, component: str) -> None:
    """Training reuses the states below the lowest edit: they must be what the whole forward has there, and stay as they are."""
    ours = trained(adapter_of(ReftSpec(rank=2, layers=(1, 2), component=component)))
    batch = PackedBatch.of(ROWS)
    adapters = live_batch(ours, batch)
    stored = decoder.residual_before(1, batch)
    kept = stored.clone()
    entered = decoder.forward(batch, adapters, entering=(1, stored))
    assert torch.equal(entered, decoder.forward(batch, adapters))
    entered.square().sum().backward()
    assert all(tensor.grad is not None for found in ours.edits.values() for tensor in found.tensors.values())
    assert torch.equal(stored, kept)


# --- dropout, and what is loaded ------------------------------------------------------------------------------------------------------------------


def test_dropout_hides_a_share_of_the_edit_and_is_off_once_loaded() -> None:
    """PyReFT drops whole hidden states, and keeps doing so after eval(); here Δ alone is thinned, in training alone."""
    spec = ReftSpec(rank=4, dropout=0.25, positions=Positions(all_prompt=True))
    adapter = adapter_of(spec)
    fixed = edited_parts(adapter)[0].sides[0].edit(0, COMPONENTS.index("block_output"))
    assert fixed is not None
    assert fixed.dropout == 0
    hidden = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(0))
    whole = _edited(hidden, fixed)
    dropped = _edited(hidden, fixed._replace(dropout=0.25, dropout_seed=3))
    hidden_share = float((dropped == 0).float().mean())
    assert abs(hidden_share - 0.25) < 0.01
    torch.testing.assert_close(dropped[dropped != 0], whole[dropped != 0] / 0.75, rtol=1e-4, atol=1e-5)
    assert torch.equal(dropped, _edited(hidden, fixed._replace(dropout=0.25, dropout_seed=3)))
    assert not torch.equal(dropped, _edited(hidden, fixed._replace(dropout=0.25, dropout_seed=4)))


def _edited(hidden: Tensor, edit: Edit) -> Tensor:
    rows = (EditRows(torch.arange(len(hidden)), FixedEdits({(0, 0): edit})),)
    return apply_edits(hidden.clone(), 0, 0, rows) - hidden


def test_a_loaded_adapter_keeps_its_own_tensors(decoder: Decoder) -> None:
    """A job that goes on training, or a cache that drops the file's tensors, must not move what is served."""
    adapter = adapter_of(ReftSpec("direft", rank=3))
    slot = LoraBank(decoder.shape.linears, 3, torch.float32).load(adapter)
    before = packed_logits(decoder, ROWS[:1], [slot])[0]
    for found in adapter.edits.values():
        for tensor in found.tensors.values():
            tensor.zero_()
    assert torch.equal(packed_logits(decoder, ROWS[:1], [slot])[0], before)
