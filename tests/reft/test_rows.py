"""Token rows and collators of the PyReFT interface: the boundary, the labels, and places that move with left padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atoll.errors import DataError
from atoll.reft.collators import ReftDataCollator, ReftRewardCollator
from atoll.reft.positions import NO_EDIT
from atoll.reft.rows import (
    IGNORE_INDEX,
    encode_pairs,
    make_last_position_supervised_chat_data_module,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from conftest import tiny_tokenizer

PROMPTS, ANSWERS = ["Who are you?", "Hi", "What is the colour of the sky?"], ["me", "hello", "blue"]


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def merging_tokenizer() -> Any:
    """Bytes, and one merge: "a" + "b" is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *letters, "ab"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")


def test_a_row_is_prompt_completion_and_end_and_learns_what_follows_the_prompt(tokenizer: Any) -> None:
    row = encode_pairs(tokenizer, ["ask"], ["yes"])[0]
    assert tokenizer.decode(row.token_ids) == "askyes</s>"
    assert row.num_prompt == 3
    assert row.labels == [IGNORE_INDEX] * 3 + row.token_ids[3:]
    assert encode_pairs(tokenizer, ["ask"], ["yes"], stop=False)[0].token_ids == row.token_ids[:-1]


def test_a_token_that_would_cross_the_boundary_is_split_at_it() -> None:
    """Masking by the length of the prompt alone would hide the answer's first letter, and edit a token that generation never sees."""
    tokenizer = merging_tokenizer()
    row = encode_pairs(tokenizer, ["xa"], ["b"])[0]
    assert row.num_prompt == 2
    assert row.token_ids[:2] == tokenizer("xa")["input_ids"]
    assert row.token_ids[2:] == [*tokenizer("b")["input_ids"], tokenizer.eos_token_id]
    whole = encode_pairs(tokenizer, ["x"], ["ab"])[0]
    assert len(whole.token_ids) == 3  # no boundary inside: the merge stays


def test_a_real_end_token_is_attended_to_and_learned_though_padding_is_the_same(tokenizer: Any) -> None:
    """PyReFT's data sets mask every token with the id of the padding, which after `pad_token = eos_token` is the answer's own end."""
    tokenizer.pad_token = tokenizer.eos_token
    module = make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS)
    batch = module["data_collator"]([module["train_dataset"][index] for index in range(3)])
    for row in range(3):
        tokens = len(PROMPTS[row]) + len(ANSWERS[row]) + 1
        assert batch["attention_mask"][row].tolist() == [1] * tokens + [0] * (batch["input_ids"].shape[1] - tokens)
        assert batch["labels"][row, tokens - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, tokens:] == IGNORE_INDEX).all()


def test_a_row_that_has_nothing_to_learn_is_named(tokenizer: Any) -> None:
    tokenizer.model_max_length = 5
    with pytest.raises(DataError, match="row 1 has a prompt of 7 tokens"):
        encode_pairs(tokenizer, ["ok", "too long"[:7]], ["a", "b"])
    assert len(encode_pairs(tokenizer, ["four"], ["answer"])[0].token_ids) == 5
    with pytest.raises(DataError, match="row 0 has an empty prompt"):
        encode_pairs(tokenizer, [""], ["a"])
    with pytest.raises(DataError, match="2 inputs, but 1 outputs"):
        encode_pairs(tokenizer, ["a", "b"], ["a"])


def test_the_last_position_module_edits_the_last_prompt_token(tokenizer: Any) -> None:
    module = make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, num_interventions=2)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
    assert module["eval_dataset"] is None
    assert [row["intervention_locations"] for row in module["train_dataset"]] == [[[len(prompt) - 1]] * 2 for prompt in PROMPTS]
    chat = make_last_position_supervised_chat_data_module(tokenizer, None, PROMPTS, ANSWERS, 2)
    assert list(chat["train_dataset"]) == list(module["train_dataset"])
    assert make_last_position_supervised_data_module(tokenizer, None, ["a"], ["b"], nonstop=True)["train_dataset"][0]["input_ids"][-1] != 2


def test_the_multiple_position_module_works_with_its_own_defaults(tokenizer: Any) -> None:
    module = make_multiple_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS)
    batch = module["data_collator"](list(module["train_dataset"]))
    assert batch["intervention_locations"].tolist() == [[[0, len(prompt) - 1]] for prompt in PROMPTS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_move_with_the_padding(tokenizer: Any, side: str) -> None:
    """PyReFT leaves them, so with left padding its edits fall on padding and on wrong tokens."""
    tokenizer.padding_side = side
    module = make_multiple_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, "f2+l2", num_interventions=2)
    rows = list(module["train_dataset"])
    batch = module["data_collator"](rows)
    for row, padded, mask, places in zip(rows, batch["input_ids"], batch["attention_mask"], batch["intervention_locations"], strict=True):
        meant = [[row["input_ids"][place] for place in one if place != NO_EDIT] for one in row["intervention_locations"]]
        assert [[int(padded[place]) for place in one if place != NO_EDIT] for one in places.tolist()] == meant
        assert all(mask[place] for one in places.tolist() for place in one if place != NO_EDIT)
    short = batch["intervention_locations"][1].tolist()  # "Hi": one token for each side
    assert [places[1] for places in short] == [NO_EDIT, NO_EDIT]


def test_rows_of_a_batch_may_have_different_numbers_of_places() -> None:
    tokenizer = tiny_tokenizer()
    from transformers import DataCollatorWithPadding

    collate = ReftDataCollator(data_collator=DataCollatorWithPadding(tokenizer))
    batch = collate(
        [
            {"input_ids": [7, 8, 9], "labels": 1, "intervention_locations": [[0, 1, 2]], "subspaces": [[0]]},
            {"input_ids": torch.tensor([7, 8]), "labels": 0, "intervention_locations": torch.tensor([[1]]), "subspaces": [[1]]},
        ]
    )
    assert batch["intervention_locations"].tolist() == [[[0, 1, 2]], [[1, NO_EDIT, NO_EDIT]]]
    assert batch["subspaces"].tolist() == [[[0]], [[1]]]
    assert batch["labels"].tolist() == [1, 0]
    none = collate([{"input_ids": [7], "intervention_locations": []}, {"input_ids": [8], "intervention_locations": []}])
    assert none["intervention_locations"].shape == (2, 0, 0)  # a base with LoRA and no edit trains by the same code


def test_a_pair_of_conversations_is_two_rows_of_a_batch(tokenizer: Any) -> None:
    pairs = [
        {
            "chosen_output": torch.tensor([5, 6, 7]),
            "chosen_output_mask": torch.ones(3, dtype=torch.int64),
            "rejected_output": torch.tensor([5, 6]),
            "rejected_output_mask": torch.ones(2, dtype=torch.int64),
            "intervention_locations": [[0, 1]],
        }
    ]
    tokenizer.padding_side = "left"
    batch = ReftRewardCollator(tokenizer)(pairs)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["reward"].tolist() == [1.0, 0.0]
    assert batch["intervention_locations"].tolist() == [[[0, 1]], [[1, 2]]]
