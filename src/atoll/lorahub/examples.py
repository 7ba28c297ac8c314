"""The examples of the new task as get_loss of one's own finds them: a small data set that is used like one of Hugging Face's.

Rows have input, output, input_ids, attention_mask and labels, padded to one length, with -100 at places that are no label. For an encoder-decoder
base the labels are the output's tokens; for a decoder they stand in the same row as the input, as transformers' causal models take them.

Used by pairs.py, decoders.py and compatible.py, and by callables of the user's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from atoll.errors import DataError
from atoll.model.generic import IGNORED

MAX_TOKENS = 2048  # of an input and of an output, as in LoraHub; longer ones are cut

_log = logging.getLogger(__name__)


class ExampleDataset:
    """Columns of equal length. dataset[3] is a row, dataset[:8] a dict of columns, dataset["labels"] a column; len and iteration count rows."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = {name: list(values) for name, values in columns.items()}

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    @property
    def digest(self) -> str:
        """sha256 in hex over the tokens, for the manifest of what is composed from them."""
        tokens = [self._columns["input_ids"], self._columns["labels"]]
        return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: int | slice) -> dict[str, Any]: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}


def encode_pairs(tokenizer: Any, inputs: Sequence[str], outputs: Sequence[str]) -> ExampleDataset:
    """The data set for an encoder-decoder base, tokenised as LoraHub does: all rows together, cut and padded on the right."""
    taken = tokenizer(list(inputs), max_length=MAX_TOKENS, padding=True, truncation=True)
    wanted = tokenizer(list(outputs), max_length=MAX_TOKENS, padding=True, truncation=True)["input_ids"]
    cut = sum(len(row) == MAX_TOKENS and row[-1] != tokenizer.pad_token_id for row in (*taken["input_ids"], *wanted))
    if cut:
        _log.warning("%d of %d inputs and outputs reach %d tokens and may have been cut", cut, 2 * len(inputs), MAX_TOKENS)
    labels = [[IGNORED if token == tokenizer.pad_token_id else token for token in row] for row in wanted]
    if not all(any(token != IGNORED for token in row) for row in labels):
        raise DataError("an example's output has no tokens, so it has no loss", hint="fill it in, or drop the example")
    return ExampleDataset(
        {
            "input": inputs,
            "output": outputs,
            "input_ids": taken["input_ids"],
            "attention_mask": taken["attention_mask"],
            "labels": labels,
        }
    )


def unpadded(dataset: ExampleDataset) -> list[tuple[list[int], list[int]]]:
    """Each pair's own input and label tokens."""
    return [
        ([token for token, kept in zip(row["input_ids"], row["attention_mask"], strict=True) if kept], [t for t in row["labels"] if t != IGNORED])
        for row in dataset
    ]
