"""PyReFT's data sets: what their items are, row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import ConfigError, DataError
from atoll.reft.collators import ReftDataCollator, ReftRewardCollator
from atoll.reft.data import (
    ReftClassificationDataset,
    ReftDataset,
    ReftGenerationDataset,
    ReftPreferenceDataset,
    ReftRawDataset,
    ReftRewardDataset,
    ReftSupervisedDataset,
)
from atoll.reft.positions import NO_EDIT
from conftest import tiny_tokenizer

PLACES: dict[str, Any] = {"position": "f2+l1", "num_interventions": 2, "share_weights": True}
ALPACA = {"instruction_field": "instruction", "input_field": "input"}


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def text(tokenizer: Any, token_ids: Any) -> str:
    return str(tokenizer.decode(token_ids))


def test_an_item_is_what_generation_sees(tokenizer: Any) -> None:
    """No token is put before the row: PyReFT's padding token there shifts all position ids against generation."""
    rows = [{"ask": "Who are you?", "say": "me"}]
    data = ReftGenerationDataset("t", None, tokenizer, dataset=rows, prompt_field="ask", completion_field="say", **PLACES)
    item = data[0]
    assert set(item) == {"input_ids", "labels", "attention_mask", "intervention_locations", "id"}
    assert text(tokenizer, item["input_ids"]) == "Who are you?me</s>"
    assert item["input_ids"][: len(rows[0]["ask"])].tolist() == tokenizer("Who are you?")["input_ids"]
    assert item["labels"].tolist() == [-100] * 12 + item["input_ids"].tolist()[12:]
    assert item["attention_mask"].tolist() == [1] * 15
    assert item["intervention_locations"] == [[0, 1, 11]] * 2
    assert (len(data), item["id"]) == (1, 0)


def test_items_are_copies(tokenizer: Any) -> None:
    data = ReftRawDataset("t", None, tokenizer, dataset=[{"instruction": "a", "output": "b"}], **PLACES)
    data[0]["input_ids"][0] = 99
    assert data[0]["input_ids"][0] != 99


def test_supervised_rows_stand_in_alpacas_prompt(tokenizer: Any) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "hi"},
        {"instruction": "Go.", "output": "on"},
    ]
    data = ReftSupervisedDataset("t", None, tokenizer, dataset=rows, output_field="output", **ALPACA, **PLACES)
    first, second = (text(tokenizer, data[index]["input_ids"]) for index in (0, 1))
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert "### Input" not in second
    assert text(tokenizer, data[2]["input_ids"]).endswith("### Response:\non</s>")
    prompt = len(second) - len("hi</s>")
    assert data[1]["intervention_locations"] == [[0, 1, prompt - 1]] * 2  # the last token of the prompt, not the one before
    without = ReftSupervisedDataset("t", None, tokenizer, dataset=rows, output_field="output", no_stop=True, **ALPACA, **PLACES)
    assert text(tokenizer, without[0]["input_ids"]).endswith("### Response:\n3")


def test_raw_rows_give_prompts_alone_where_they_are_tested(tokenizer: Any) -> None:
    rows = [{"instruction": "abc", "output": "d", "subspaces": [1]}]
    train = ReftRawDataset("t", None, tokenizer, dataset=rows, **PLACES)
    test = ReftRawDataset("t", None, tokenizer, data_split="test", dataset=rows, **PLACES)
    assert train.raw_dataset is None
    assert test.raw_dataset == rows
    assert text(tokenizer, test.input_ids[0]) == "abc"
    assert test.labels is None
    assert train.subspaces == [[[1], [1]]]
    assert train.labels[0].tolist()[:3] == [-100] * 3
    assert train.intervention_locations == [[[0, 2, NO_EDIT]] * 2]  # at most half of the prompt are first tokens


def test_classification_labels_are_numbers_texts_or_none(tokenizer: Any) -> None:
    rows = [{"text": "good film", "label": 1, "word": "yes"}]
    places = {**PLACES, "input_field": "text"}
    assert ReftClassificationDataset("t", None, tokenizer, dataset=rows, label_field="label", **places)[0]["labels"] == 1
    assert text(tokenizer, ReftClassificationDataset("t", None, tokenizer, dataset=rows, label_field="word", **places)[0]["labels"]) == "yes"
    whole = ReftClassificationDataset("t", None, tokenizer, dataset=rows, label_field="text", **places)[0]
    assert torch.equal(whole["labels"], whole["input_ids"])
    bare = ReftClassificationDataset("t", None, tokenizer, dataset=rows, label_field=None, **places)[0]
    assert "labels" not in bare
    assert bare["intervention_locations"][0] == [0, 1, 8]


@pytest.mark.parametrize(("chosen", "rejected"), [("y", "a long no"), ("a long yes", "n")])
def test_preference_rows_read_the_rejected_answer_and_learn_the_chosen(tokenizer: Any, chosen: str, rejected: str) -> None:
    rows = [{"instruction": "ask", "input": "", "good": chosen, "bad": rejected}]
    fields = {**ALPACA, "chosen_output_field": "good", "rejected_output_field": "bad", **PLACES}
    item = ReftPreferenceDataset("t", None, tokenizer, dataset=rows, **fields)[0]
    num_prompt = int((item["labels"] != -100).nonzero()[0])
    length = num_prompt + max(len(chosen), len(rejected)) + 1
    assert [len(item[name]) for name in ("input_ids", "labels", "attention_mask")] == [length] * 3
    read = item["input_ids"][item["attention_mask"] == 1]
    assert text(tokenizer, read[num_prompt:]) == rejected + "</s>"
    assert text(tokenizer, item["labels"][item["labels"] != -100]) == chosen + "</s>"
    assert len(read) == num_prompt + len(rejected) + 1  # the end token is attended to
    test = ReftPreferenceDataset("t", None, tokenizer, data_split="test", dataset=rows, **fields)[0]
    assert len(test["input_ids"]) == num_prompt


def test_reward_rows_are_ordered_by_reward_and_share_their_beginning(tokenizer: Any) -> None:
    rows = [{"ask": "2+2?", "a": "5", "b": "4", "ra": 0.1, "rb": 0.9}]
    fields = {**PLACES, "conv_A_field": "a", "conv_B_field": "b", "prompt_field": "ask", "conv_A_reward_field": "ra", "conv_B_reward_field": "rb"}
    data = ReftRewardDataset("t", None, tokenizer, dataset=rows, **fields)
    item = data[0]
    assert "4" in text(tokenizer, item["chosen_output"])
    assert (item["chosen_reward"], item["rejected_reward"]) == (0.9, 0.1)
    shared = text(tokenizer, item["chosen_output"]).index("4")
    last = item["intervention_locations"][0][-1]
    assert text(tokenizer, item["chosen_output"][: last + 1]) == text(tokenizer, item["chosen_output"])[:shared]
    assert rows[0]["a"] == "5"  # PyReFT writes conversations into the caller's rows
    batch = ReftRewardCollator(tokenizer)([item, item])
    assert batch["reward"].tolist() == pytest.approx([0.9, 0.1, 0.9, 0.1])
    assert batch["intervention_locations"].shape == (4, 2, 3)


def test_rows_come_from_files_and_some_are_drawn_by_seed(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"question {number}", "output": "x"} for number in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(ReftRawDataset("t", str(file), tokenizer, **PLACES)) == 20

    def drawn(seed: int) -> list[str]:
        data = ReftRawDataset("t", str(file), tokenizer, seed=seed, max_n_example=5, **PLACES)
        return [text(tokenizer, ids) for ids in data.input_ids]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 5
    assert len(ReftRawDataset("t", str(file), tokenizer, max_n_example=50, **PLACES)) == 20


def test_a_subclass_says_what_its_rows_mean(tokenizer: Any) -> None:
    """The way PyReFT is extended: tokenize gives the fields and the number of prompt tokens."""

    class Shouted(ReftDataset):
        def preprocess(self, kwargs: dict[str, Any]) -> None:
            self.ending = kwargs["ending"]

        def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
            token_ids = torch.tensor(self.tokenizer(item["text"].upper() + self.ending)["input_ids"])
            return {"input_ids": token_ids, "labels": token_ids.clone()}, len(item["text"])

    data = Shouted("t", None, tokenizer, dataset=[{"text": "hey"}, {"text": "a"}], ending="!", **PLACES)
    assert text(tokenizer, data[0]["input_ids"]) == "HEY!"
    assert data[0]["intervention_locations"] == [[0, 2, NO_EDIT]] * 2
    from transformers import DataCollatorForSeq2Seq

    collate = ReftDataCollator(data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer))
    batch = collate([data[0], data[1]])
    assert batch["intervention_locations"].tolist() == [[[0, 2, NO_EDIT]] * 2, [[0, NO_EDIT, NO_EDIT]] * 2]


def test_what_is_missing_is_named(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="needs position"):
        ReftRawDataset("t", None, tokenizer, dataset=[], num_interventions=1)
    with pytest.raises(ConfigError, match="needs completion_field"):
        ReftGenerationDataset("t", None, tokenizer, dataset=[], prompt_field="p", **PLACES)
    with pytest.raises(DataError, match="row 1 has no column 'output'"):
        ReftRawDataset("t", None, tokenizer, dataset=[{"instruction": "a", "output": "b"}, {"instruction": "a"}], **PLACES)
    with pytest.raises(DataError, match="row 1 has an empty prompt"):
        ReftRawDataset("t", None, tokenizer, dataset=[{"instruction": "a", "output": "b"}, {"instruction": "", "output": "b"}], **PLACES)
