"""From prompts and completions to token rows with labels and places, and PyReFT's three functions that do so for lists of texts.

A prompt's tokens are the same with and without its completion behind it, so that training and generation edit the same places: where a tokenizer
would merge across the boundary, the two are tokenised apart. An end-of-sequence token is a token like any other: it is attended to and learned, also
where padding uses the same id.

Used by data.py and by callers of `make_*_data_module`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from atoll.data.prompt import added_tokens, tokenize
from atoll.errors import DataError
from atoll.reft.collators import ReftDataCollator
from atoll.reft.positions import get_intervention_locations, parse_positions

IGNORE_INDEX = -100  # a label that no loss counts


class TokenRow(NamedTuple):
    """token_ids[:num_prompt] is the prompt, the rest is learned."""

    token_ids: list[int]
    num_prompt: int

    @property
    def labels(self) -> list[int]:
        """The token ids, with IGNORE_INDEX over the prompt."""
        return [IGNORE_INDEX] * self.num_prompt + self.token_ids[self.num_prompt :]


class ReftRows(Dataset[dict[str, Any]]):
    """Rows in a list, as a map-style data set: what the data modules give for training."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def encode_pairs(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], stop: bool = True) -> list[TokenRow]:
    """The tokens of each prompt and completion, with an end-of-sequence token if `stop`, cut to tokenizer.model_max_length at the end.

    Raises DataError, naming the row by its number from 0, for an empty prompt and where nothing is left to learn.
    """
    if len(prompts) != len(completions):
        raise DataError(f"there are {len(prompts)} inputs, but {len(completions)} outputs", hint="give one output for each input")
    before, _ = added_tokens(tokenizer)
    limit = int(tokenizer.model_max_length)
    end = [tokenizer.eos_token_id] if stop else []
    if end == [None]:
        raise DataError("the tokenizer has no end-of-sequence token to teach", hint="set tokenizer.eos_token, or pass nonstop=True")
    together = tokenize([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], tokenizer)
    apart = tokenize(completions, tokenizer)
    rows = []
    for number, (prompt, whole, alone) in enumerate(zip(tokenize(prompts, tokenizer), together, apart, strict=True)):
        num_prompt = len(before) + len(prompt)
        completion = whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
        token_ids = (before + prompt + completion + end)[:limit]
        if not num_prompt:
            raise DataError(f"row {number} has an empty prompt, so there is nothing to edit or continue")
        if len(token_ids) <= num_prompt:
            raise DataError(
                f"row {number} has a prompt of {num_prompt} tokens, which leaves nothing to learn within a length of {limit}",
                hint="raise tokenizer.model_max_length, shorten the prompt, or leave the row out",
            )
        rows.append(TokenRow(token_ids, num_prompt))
    return rows


def make_last_position_supervised_data_module(
    tokenizer: Any, model: Any, inputs: Sequence[str], outputs: Sequence[str], num_interventions: int = 1, nonstop: bool = False
) -> dict[str, Any]:
    """{train_dataset, eval_dataset: None, data_collator} for a trainer: each intervention edits the last prompt token.

    Rows have input_ids, labels (the prompt's are -100) and intervention_locations [num_interventions][1]. Raises DataError as `encode_pairs` does.
    """
    return _data_module(tokenizer, model, inputs, outputs, nonstop, first_n=0, last_n=1, num_interventions=num_interventions)


def make_last_position_supervised_chat_data_module(
    tokenizer: Any, model: Any, inputs: Sequence[str], outputs: Sequence[str], num_interventions: int = 1, nonstop: bool = False
) -> dict[str, Any]:
    """make_last_position_supervised_data_module by PyReFT's other name: the inputs are chats that a template has already made texts of."""
    return make_last_position_supervised_data_module(tokenizer, model, inputs, outputs, num_interventions, nonstop)


def make_multiple_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """As make_last_position_supervised_data_module, with `positions` such as f7+l7; for the places' order see get_intervention_locations."""
    first_n, last_n = parse_positions(positions)
    places = {"first_n": first_n, "last_n": last_n, "num_interventions": num_interventions, "share_weights": share_weights}
    return _data_module(tokenizer, model, inputs, outputs, nonstop, **places)


def _data_module(tokenizer: Any, model: Any, inputs: Sequence[str], outputs: Sequence[str], nonstop: bool, **places: Any) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    rows = [
        {
            "input_ids": row.token_ids,
            "intervention_locations": get_intervention_locations(last_position=row.num_prompt, **places),
            "labels": row.labels,
        }
        for row in encode_pairs(tokenizer, inputs, outputs, stop=not nonstop)
    ]
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model, label_pad_token_id=IGNORE_INDEX, padding="longest")
    return {"train_dataset": ReftRows(rows), "eval_dataset": None, "data_collator": ReftDataCollator(data_collator=collator)}
