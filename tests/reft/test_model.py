"""ReftModel.forward: edits exactly where it was asked, on every family, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.errors import RequestRefused
from atoll.reft import ReftConfig, get_reft_model
from atoll.reft.interventions import CLASSES
from reft_bases import BLOCKS, DECODERS, ENCODERS, WIDTH, at, batch, block, by_hand, logits, plain, reft_of, toy

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_edits_are_those_of_a_hook_written_by_hand(family: str) -> None:
    """Identity 9, with other places in every row and for every intervention."""
    model, base = toy(family), batch(rows=3)
    reft_model = reft_of(model, 0, 2)
    first, second = reft_model.interventions.values()
    places = [[[0, 6], [1, 2], [3, 4]], [[5, 1], [0, 6], [2, 2]]]
    expected = by_hand(model, base, [(block(model, 0), first, places[0]), (block(model, 2), second, [[5, 1], [0, 6], [2]])]).logits
    found = logits(reft_model, base, at(*places))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, plain(model, base), atol=1e-2)


@pytest.mark.parametrize(
    "component", ["block_input", "attention_input", "attention_output", "mlp_input", "mlp_activation", "mlp_output", "query_output"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "roberta", "opt"])
def test_every_component_is_edited_at_its_places_alone(family: str, component: str) -> None:
    """A place's edit inside a block reaches that place and, in a decoder, later ones; never an earlier one, never another row."""
    model, base = toy(family), batch()
    width = 48 if component == "mlp_activation" else WIDTH
    reft_model = reft_of(model, 1, component=component, embed_dim=width)
    before = plain(model, base)
    after = logits(reft_model, base, at([[4], [-1]]))
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0], atol=1e-4)
    if family not in ENCODERS:
        assert torch.equal(after[0, :4], before[0, :4])
        assert not torch.allclose(after[0, 4], before[0, 4], atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_edits_a_base_of_any_dtype(name: str) -> None:
    """PyReFT's default dtype, bfloat16, fails on a float32 base and its R fails on a bfloat16 one."""
    for dtype in (torch.float32, torch.bfloat16):
        reft_model = reft_of(toy("llama").to(dtype), 1, cls=CLASSES[name], dtype=torch.bfloat16)
        found = logits(reft_model, batch(), at([[1], [2]]))
        assert found.dtype == dtype
        assert not torch.equal(found, plain(reft_model.model, batch()))


def test_rows_and_places_that_are_not_named_keep_their_bits() -> None:
    """Identities 1, 10 and 19: no place, the base's logits to the bit; one place, everything before it."""
    model, base = toy("llama"), batch(rows=3)
    reft_model, before = reft_of(model), plain(model, base)
    for none in (at([[-1]] * 3, [[-1]] * 3), at([[]] * 3, [[]] * 3), at([[-1, -5]] * 3, [[-1, -1]] * 3)):
        assert torch.equal(logits(reft_model, base, none), before)
    after = logits(reft_model, base, at([[-1], [3], [-1]], [[-1], [-1], [-1]]))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(after[1, :3], before[1, :3])
    assert (after[1, 3:] != before[1, 3:]).any(1).all()
    last = logits(reft_model, base, at([[-1]] * 3, [[2]] * 3))  # the last block's output at a place is read at that place alone
    assert [bool((last[0, place] != before[0, place]).any()) for place in range(7)] == [place == 2 for place in range(7)]


def test_padding_places_edit_nothing_where_pyreft_edits_a_token() -> None:
    """A short prompt's missing places are negative; PyReFT takes -1 as the last token of the padded row, often of the answer."""
    model, base = toy("llama"), batch(rows=1)
    reft_model = reft_of(model, 1)
    after = logits(reft_model, base, at([[0, 1, -1, -1]]))
    torch.testing.assert_close(after, logits(reft_model, base, at([[0, 1]])), rtol=0, atol=1e-6)
    assert not torch.allclose(after, logits(reft_model, base, at([[0, 1, 6]])), atol=1e-3)


def test_a_place_named_twice_is_edited_once() -> None:
    """PyReFT's scatter leaves open which of two equal places wins; with dropout they differ."""
    reft_model = reft_of(toy("llama"), 1, dropout=0.5).eval()
    torch.testing.assert_close(logits(reft_model, batch(), at([[2, 2, 5]] * 2)), logits(reft_model, batch(), at([[2, 5]] * 2)), **CLOSE)


def test_forms_of_unit_locations() -> None:
    """PyReFT's shorthands, tensors, and rows of unequal numbers of places."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model)
    long = logits(reft_model, base, at([[3], [3]], [[3], [3]]))
    for short in (
        {"base": 3},
        {"base": [3]},
        {"sources->base": 3},
        {"sources->base": (None, 3)},
        {"sources->base": (0, 3)},
        {"sources->base": (None, [3])},
        {"base": [[[3], [3]]] * 2},
        {"sources->base": (None, torch.tensor([[[3], [3]]] * 2))},
        {"sources->base": ([[[0]] * 2] * 2, [[[3], [3]]] * 2)},
    ):
        assert torch.equal(logits(reft_model, base, short), long), short
    everywhere = logits(reft_model, base, None)
    for form in ({"sources->base": (None, None)}, {"sources->base": ([None] * 2, [None] * 2)}, at([list(range(7))] * 2, [list(range(7))] * 2)):
        torch.testing.assert_close(logits(reft_model, base, form), everywhere, **CLOSE)
    ragged = logits(reft_model, base, at([[0, 1, 2], [4]], [[6], [5, 6]]))
    assert torch.equal(ragged, logits(reft_model, base, at([[0, 1, 2], [4, -1, -1]], [[6, -1], [5, 6]])))


@pytest.mark.parametrize(
    ("unit_locations", "named"),
    [
        (at([[3], [3]]), "1 interventions, but the model has 2"),
        (at([[3]] * 3, [[3]] * 3), "3 rows, but the batch has 2"),
        (at([[7], [3]], [[3], [3]]), "place 7 of row 0"),
        (at([[3], [3]], [[3], [1, 9]]), "intervention 1 is to edit place 9 of row 1"),
        ({"sources->base": (None, [[3, 3], [3, 3]])}, "must be a list for each row"),
        ({"sources": 3}, "unit_locations is"),
        ([[3]], "unit_locations is"),
    ],
)
def test_wrong_places_are_named(unit_locations: Any, named: str) -> None:
    """PyReFT's answer to most of these is an index out of range somewhere below."""
    with pytest.raises(RequestRefused, match=named):
        reft_of(toy("llama"))(batch(), unit_locations=unit_locations)


def test_sources_are_refused() -> None:
    for wrong in ({"sources": [batch()]}, {"source_representations": {"a": 1}}):
        with pytest.raises(RequestRefused, match="sources"):
            reft_of(toy("llama"))(batch(), **wrong)


def test_two_interventions_at_one_place_act_one_after_the_other() -> None:
    """In the order of the configuration, as in PyReFT."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model, 1, 1)
    first, second = reft_model.interventions.values()
    both = by_hand(model, base, [(block(model, 1), first, [[2], [2]]), (block(model, 1), second, [[2], [2]])]).logits
    torch.testing.assert_close(logits(reft_model, base, {"base": 2}), both, **CLOSE)


def test_subspaces_reach_each_row() -> None:
    """[intervention][row]: disjoint parts of one R add up at the edited place of the last block."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model, BLOCKS - 1, component="mlp_output")

    def last_mlp(subspaces: Any) -> Tensor:
        found: list[Tensor] = []
        handle = block(model, BLOCKS - 1).register_forward_hook(lambda _, args, output: found.append(output))
        logits(reft_model, base, {"base": 3}, subspaces=subspaces)
        handle.remove()
        return found[0]

    nothing, one, two, both = (last_mlp([[chosen, chosen]]) for chosen in ([], [0, 1], [3], [0, 1, 3]))
    torch.testing.assert_close(both - nothing, (one - nothing) + (two - nothing), **CLOSE)
    mixed = last_mlp([[[0, 1], [3]]])
    assert torch.equal(mixed[0], one[0])
    assert torch.equal(mixed[1], two[1])
    assert torch.equal(last_mlp([0, 1]), one)
    assert torch.equal(last_mlp(None), last_mlp([[None, None]]))
    with pytest.raises(RequestRefused, match="subspaces"):
        last_mlp([[[0]] * 2] * 2)


def test_a_users_own_class_is_handed_rows_by_places() -> None:
    """The shape [rows, places, width], and whatever further keywords the call has."""

    class Mine(nn.Module):
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, scale: float = 1.0) -> Tensor:
            assert base.shape == (2, 2, WIDTH)
            return base * scale

    model = toy("llama")
    reft_model = get_reft_model(model, ReftConfig(representations={"layer": 1, "intervention": Mine()}))
    assert torch.equal(logits(reft_model, batch(), at([[0, 3]] * 2)), plain(model, batch()))
    scaled = logits(reft_model, batch(), at([[0, 3]] * 2), intervention_additional_kwargs={"scale": 2.0})
    assert not torch.equal(scaled, plain(model, batch()))


def test_the_pair_the_output_object_and_the_unedited_output() -> None:
    reft_model, base = reft_of(toy("llama")), batch()
    first, second = reft_model(base, unit_locations={"base": 1})
    assert first is None
    original, edited = reft_model(base, unit_locations={"base": 1}, output_original_output=True)
    assert torch.equal(original.logits, reft_model.model(**base).logits)
    assert torch.equal(edited.logits, second.logits)
    named = reft_model(base, unit_locations={"base": 1}, return_dict=True)
    assert torch.equal(named.intervened_outputs.logits, second.logits)
    assert named.original_outputs is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_labels_give_the_bases_loss_and_gradients_of_the_interventions_alone(family: str) -> None:
    """The base is frozen, and trainable are exactly the adapter's numbers."""
    model, base = toy(family), batch()
    reft_model = reft_of(model)
    labels = torch.tensor([0, 2]) if family == "roberta" else base["input_ids"]
    _, outputs = reft_model(base, unit_locations={"base": [0, 3]}, labels=labels)
    outputs.loss.backward()
    trained = {name for name, tensor in reft_model.named_parameters() if tensor.grad is not None and tensor.grad.abs().max() > 0}
    assert trained == {name for name, tensor in reft_model.named_parameters() if tensor.requires_grad}
    assert all(name.startswith("interventions.") for name in trained)
    assert reft_model.count_parameters() == reft_model.count_parameters(include_model=True) == 2 * (2 * WIDTH * 4 + 4)
    assert len(reft_model.get_trainable_parameters()) == len(trained)


def test_a_base_of_embeddings_and_positions_is_edited_too() -> None:
    """inputs_embeds instead of ids."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model)
    embedded = {"inputs_embeds": model.get_input_embeddings()(base["input_ids"]), "attention_mask": base["attention_mask"]}
    assert torch.equal(logits(reft_model, embedded, {"base": 3}), logits(reft_model, base, {"base": 3}))
    with pytest.raises(RequestRefused, match="input_ids"):
        reft_model({"pixel_values": torch.zeros(2, 3)})


def test_a_step_after_a_cache_counts_on_from_it() -> None:
    """Places are those of the row, not of the piece that a call brings."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model)
    whole = logits(reft_model, base, at([[1, 5]] * 2, [[1, 6]] * 2))
    with torch.no_grad():
        _, first = reft_model({"input_ids": base["input_ids"][:, :4]}, unit_locations=at([[1]] * 2, [[1]] * 2), use_cache=True)
        rest = {"input_ids": base["input_ids"][:, 4:], "past_key_values": first.past_key_values}
        _, second = reft_model(rest, unit_locations=at([[1, 5]] * 2, [[1, 6]] * 2))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **CLOSE)
