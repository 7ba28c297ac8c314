"""ReftModel.generate: the prompt's places are edited once, at the right tokens, however the tokens are fed to the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.errors import RequestRefused, UnsupportedAdapter
from atoll.reft import LoreftIntervention, ReftConfig, ReftModel, get_reft_model
from reft_bases import WIDTH, at, batch, block, tokens, toy

NEW = 6


def reft_of(model: Any, *layers: int) -> ReftModel:
    torch.manual_seed(7)
    entries = [{"layer": layer, "intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=4)} for layer in layers or (0, 2)]
    reft_model = get_reft_model(model, ReftConfig(representations=entries)).eval()
    with torch.no_grad():
        for intervention in reft_model.interventions.values():
            intervention.learned_source.bias.mul_(20)  # edits that change what is said
    return reft_model


def said(reft_model: ReftModel, base: dict[str, Tensor], unit_locations: Any, **kwargs: Any) -> Tensor:
    """The new tokens of greedy generation."""
    settings = {"intervene_on_prompt": True, "max_new_tokens": NEW, "do_sample": False, **kwargs}
    original, ids = reft_model.generate(base, unit_locations=unit_locations, **settings)
    assert original is None
    found: Tensor = ids[:, base["input_ids"].shape[1] :]
    return found


def looped(reft_model: ReftModel, base: dict[str, Tensor], unit_locations: Any) -> Tensor:
    """Greedy generation as a loop of whole forwards, without a cache."""
    ids, start = base["input_ids"], base["input_ids"].shape[1]
    for _ in range(NEW):
        with torch.no_grad():
            _, outputs = reft_model({"input_ids": ids}, unit_locations=unit_locations)
        ids = torch.cat([ids, outputs.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


PLACES = at([[0, 6], [1, 2]], [[5, -1], [6, 3]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_cached_generation_is_the_loop_of_whole_forwards(family: str) -> None:
    """Identity 11: edits reach the cache once; and they change what is said."""
    reft_model, base = reft_of(toy(family)), batch()
    found = said(reft_model, base, PLACES)
    assert torch.equal(found, looped(reft_model, base, PLACES))
    if family != "opt":  # the toy one says one token for ever
        assert not torch.equal(found, reft_model.model.generate(**base, max_new_tokens=NEW, do_sample=False)[:, 7:])


@pytest.mark.parametrize(
    "way", [{"prefill_chunk_size": size} for size in (1, 2, 3, 5, 7, 9)] + [{"use_cache": False}, {"cache_implementation": "static"}]
)
def test_the_prompt_may_come_in_any_pieces(way: dict[str, Any]) -> None:
    """Identity 12: PyReFT counts hook calls, and fails or edits nothing when the first call is not the whole prompt."""
    reft_model, base = reft_of(toy("llama")), batch()
    assert torch.equal(said(reft_model, base, PLACES, **way), said(reft_model, base, PLACES))


def test_padding_on_either_side_changes_nothing() -> None:
    """Places count with the padding, so they move with it; a batch of rows of unequal lengths says what each row says alone."""
    reft_model = reft_of(toy("llama"))
    long, short = tokens(1, 7), tokens(1, 4, seed=3)
    alone = [
        said(reft_model, {"input_ids": long, "attention_mask": torch.ones_like(long)}, at([[0, 6]], [[5]])),
        said(reft_model, {"input_ids": short, "attention_mask": torch.ones_like(short)}, at([[0, 3]], [[2]])),
    ]
    left = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)])
    base = {"input_ids": left, "attention_mask": (left != 0).long()}
    assert torch.equal(said(reft_model, base, at([[0, 6], [3, 6]], [[5], [5]])), torch.cat(alone))
    assert torch.equal(said(reft_model, base, at([[0, 6], [3, 6]], [[5], [5]]), prefill_chunk_size=2), torch.cat(alone))
    right = torch.cat([long, torch.cat([short, torch.zeros(1, 3, dtype=torch.int64)], 1)])
    with torch.no_grad():
        padded = {"input_ids": right, "attention_mask": (right != 0).long()}
        _, whole = reft_model(padded, unit_locations=at([[0, 6], [0, 3]], [[5], [2]]))
        _, single = reft_model({"input_ids": short}, unit_locations=at([[0, 3]], [[2]]))
        _, on_padding = reft_model(padded, unit_locations=at([[0, 6], [0, 3, 5]], [[5, -1], [2, 6]]))
    torch.testing.assert_close(whole.logits[1:, :4], single.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(on_padding.logits[1, :4], whole.logits[1, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True}])
def test_beams_need_no_places_of_their_own(way: dict[str, Any]) -> None:
    """Rows are repeated by transformers; PyReFT wants the caller to repeat the places, which still works."""
    reft_model, base = reft_of(toy("llama")), batch()
    together = said(reft_model, base, PLACES, **way)
    answers = way.get("num_return_sequences", 1)
    assert len(together) == 2 * answers
    for row, (first, second) in enumerate([([0, 6], [5, -1]), ([1, 2], [6, 3])]):
        single = {name: tensor[row : row + 1] for name, tensor in base.items()}
        assert torch.equal(together[row * answers : (row + 1) * answers], said(reft_model, single, at([first], [second]), **way))
    repeated = torch.tensor(PLACES["sources->base"][1]).repeat_interleave(way["num_beams"], dim=1).tolist()
    assert torch.equal(said(reft_model, base, {"sources->base": (None, repeated)}, **way), together)


def test_several_sampled_answers_are_each_edited() -> None:
    """num_return_sequences: an edit of everything to one constant direction shows in all of them."""
    reft_model, base = reft_of(toy("llama")), batch()
    torch.manual_seed(0)
    found = said(reft_model, base, PLACES, do_sample=True, num_return_sequences=3, top_k=1)
    assert torch.equal(found, said(reft_model, base, PLACES).repeat_interleave(3, 0))


def test_a_batch_says_what_its_rows_say_alone() -> None:
    reft_model, base = reft_of(toy("llama")), batch(rows=3)
    places = [[[0, 6], [1, 2], [4, -1]], [[5], [-1], [6]]]
    together = said(reft_model, base, at(*places))
    for row in range(3):
        single = {name: tensor[row : row + 1] for name, tensor in base.items()}
        assert torch.equal(together[row : row + 1], said(reft_model, single, at(*[[rows[row]] for rows in places])))


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}])
def test_generated_tokens_are_edited_if_the_prompt_is_not_meant(way: dict[str, Any]) -> None:
    """intervene_on_prompt=False, PyReFT's default: every token after the first is edited as it is read, the prompt is not."""
    reft_model, base = reft_of(toy("llama")), batch()
    ids = base["input_ids"]
    for _ in range(NEW):
        places = list(range(7, ids.shape[1])) or [-1]
        with torch.no_grad():
            _, outputs = reft_model({"input_ids": ids}, unit_locations=at([places] * 2, [places] * 2))
        ids = torch.cat([ids, outputs.logits[:, -1].argmax(-1, keepdim=True)], 1)
    for asked in (None, {"base": 0}, at([[0], [0]], [[0], [0]])):
        assert torch.equal(said(reft_model, base, asked, intervene_on_prompt=False, **way), ids[:, 7:])
    first_row = said(reft_model, base, at([[0], [-1]], [[0], [-1]]), intervene_on_prompt=False, **way)
    assert torch.equal(first_row[0], ids[0, 7:])
    assert torch.equal(first_row[1], reft_model.model.generate(**base, max_new_tokens=NEW, do_sample=False)[1, 7:])
    with pytest.raises(RequestRefused, match="intervene_on_prompt"):
        said(reft_model, base, {"base": 3}, intervene_on_prompt=False)


def test_no_places_and_the_prompt_meant_is_every_token_of_every_step() -> None:
    """Steering, as AxBench does it."""
    reft_model, base = reft_of(toy("llama")), batch()
    assert torch.equal(said(reft_model, base, None), looped(reft_model, base, None))
    assert torch.equal(said(reft_model, base, None, prefill_chunk_size=3), looped(reft_model, base, None))


def test_decoding_is_the_bases_own() -> None:
    """After the prompt no intervention is called: generation costs what the base's costs."""
    reft_model, base, calls = reft_of(toy("llama")), batch(), []
    for intervention in reft_model.interventions.values():
        intervention.register_forward_hook(lambda *_: calls.append(1))
    said(reft_model, base, PLACES)
    assert len(calls) == 2


def test_subspaces_choose_what_acts() -> None:
    """The composition notebook's call, and rows that name different subspaces, also with beams."""
    reft_model, base = reft_of(toy("llama"), 1), batch()
    first, second = (said(reft_model, base, {"base": 6}, subspaces=[[chosen] * 2]) for chosen in ([0, 1], [2, 3]))
    mixed = said(reft_model, base, {"base": 6}, subspaces=[[[0, 1], [2, 3]]])
    assert torch.equal(mixed[0], first[0])
    assert torch.equal(mixed[1], second[1])
    assert torch.equal(said(reft_model, base, {"base": 6}, subspaces=[[[], []]]), said(reft_model, base, {"base": -1}))
    beams = said(reft_model, base, {"base": 6}, subspaces=[[[0, 1], [2, 3]]], num_beams=3)
    single = {name: tensor[1:] for name, tensor in base.items()}
    assert torch.equal(beams[1:], said(reft_model, single, {"base": 6}, subspaces=[[[2, 3]]], num_beams=3))


def test_the_unedited_answer_comes_along_if_asked() -> None:
    reft_model, base = reft_of(toy("llama")), batch()
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    original, edited = reft_model.generate(base, unit_locations=PLACES, intervene_on_prompt=True, output_original_output=True, **settings)
    assert torch.equal(original, reft_model.model.generate(**base, **settings))
    assert torch.equal(edited[:, 7:], said(reft_model, base, PLACES))


def test_places_beyond_the_prompt_are_refused() -> None:
    with pytest.raises(RequestRefused, match="place 7 of row 0"):
        said(reft_of(toy("llama")), batch(), {"base": 7})


def test_an_encoder_with_a_decoder_does_not_generate() -> None:
    """Whose prompt would it be? Refused rather than guessed; its forward can be edited by paths."""
    model = toy("t5")
    entries = {"component": "encoder.block[1].output", "intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)}
    reft_model = get_reft_model(model, ReftConfig(representations=entries)).eval()
    with pytest.raises(UnsupportedAdapter, match="encoder"):
        reft_model.generate(batch(), unit_locations={"base": 1}, intervene_on_prompt=True)
    with torch.no_grad():
        _, outputs = reft_model({**batch(), "decoder_input_ids": tokens(2, 3)}, unit_locations={"base": 1})
        assert not torch.equal(outputs.logits, model(**batch(), decoder_input_ids=tokens(2, 3)).logits)


def test_speculation_by_a_draft_model_is_the_same_generation() -> None:
    """The base reads several tokens a step, and forgets some again."""
    reft_model, base = reft_of(toy("llama")), {name: tensor[:1] for name, tensor in batch().items()}
    one = at([[0, 6]], [[5]])
    assert torch.equal(said(reft_model, base, one, assistant_model=toy("llama", seed=5)), said(reft_model, base, one))


def test_two_threads_with_two_models_on_one_base() -> None:
    """A call's edits belong to its thread."""
    from concurrent.futures import ThreadPoolExecutor

    model, base = toy("llama"), batch()
    models = [reft_of(model, 0), reft_of(model, 2)]
    alone = [said(reft_model, base, {"base": 6}) for reft_model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = list(pool.map(lambda reft_model: said(reft_model, base, {"base": 6}), models))
            assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert block(model, 0)._forward_hooks
