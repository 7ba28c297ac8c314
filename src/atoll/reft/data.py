"""PyReFT's data sets: rows of a file, of the Hugging Face hub or of a list, tokenised, with the places that each intervention edits.

A subclass says in `tokenize` what its rows mean; all else is here. Nothing is prepended to a row (PyReFT puts a padding token before each, for its
padded places to fall on): places that a short prompt lacks are NO_EDIT, so a row is what generation will see. `last_position` is the number of prompt
tokens, so that `l1` is the prompt's last token.

Used by callers of atoll.reft, who write subclasses too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from atoll.data.rows import read_rows
from atoll.errors import ConfigError, DataError
from atoll.reft.positions import get_intervention_locations, parse_positions
from atoll.reft.rows import IGNORE_INDEX, encode_pairs

# The prompts of Stanford Alpaca, with and without an input; the last line ends before the response.
_HEAD = "Below is an instruction that describes a task"
_TAIL = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
ALPACA_WITH_INPUT = f"{_HEAD}, paired with an input that provides further context. {_TAIL}%s\n\n### Input:\n%s\n\n### Response:\n"
ALPACA = f"{_HEAD}. {_TAIL}%s\n\n### Response:\n"

_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_LONGEST = 1 << 30  # a model_max_length above this is a tokenizer's way of saying that it has none


class ReftDataset(Dataset[dict[str, Any]]):
    """Items are {input_ids, labels, attention_mask [T], intervention_locations [num_interventions][n], id, and subspaces where a row has them}.

    task and data_path name a data set of the hub, or data_path a file of rows; `dataset` (a sequence of dicts, or a data set of the `datasets`
    package) goes before both. max_n_example rows are drawn with `seed`. Among the keywords, `position` (f7+l7) and `num_interventions` are needed,
    `share_weights` is understood, and subclasses read the names of their columns.

    A subclass writes `tokenize(item) -> (fields, number of prompt tokens)`, and may override preprocess, postprocess and load_dataset. A field
    attention_mask of its own is kept; without one, every token is attended to. Raises AtollErrors that name the row.
    """

    fields_to_mask: tuple[str, ...] = ("input_ids",)

    def __init__(
        self,
        task: str,
        data_path: str | None,
        tokenizer: Any,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name in ("position", "num_interventions"):
            if name not in kwargs:
                raise ConfigError(f"{type(self).__name__} needs {name}", hint='for example position="f7+l7", num_interventions=4')
        self.tokenizer, self.task, self.data_path, self.data_split, self.dataset = tokenizer, task, data_path, data_split, dataset
        self.seed, self.max_n_example = seed, max_n_example
        self.first_n, self.last_n = parse_positions(kwargs["position"])
        self.preprocess(kwargs)
        self.task_dataset = self.load_dataset()
        self.raw_dataset = self.task_dataset if data_split != "train" else None
        self.postprocess(kwargs)
        self.result: list[dict[str, Any]] = []
        for number, item in enumerate(self.task_dataset):
            fields, num_prompt = self._tokenized(number, item)
            self.result.append(self.compute_intervention_and_subspaces(number, item, fields, num_prompt, **kwargs))

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.result[index].items()}

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A row's fields (input_ids, labels …) as tensors, and its number of prompt tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no tokenize")

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Called with the keywords before the rows are read."""

    def postprocess(self, kwargs: dict[str, Any]) -> None:
        """Called with the keywords after the rows are read."""

    def load_dataset(self) -> Any:
        """The rows, `max_n_example` of them drawn at random if that is set."""
        rows = self.dataset
        if rows is None and self.data_path is not None and self.data_path.endswith(_FILES):
            rows = [dict(row.values) for row in read_rows(Path(self.data_path))]
        elif rows is None:
            rows = self._from_hub()
        if self.max_n_example is None or self.max_n_example >= len(rows):
            return rows
        if hasattr(rows, "select"):
            return rows.shuffle(seed=self.seed).select(range(self.max_n_example))
        return random.Random(self.seed).sample(list(rows), self.max_n_example)

    def get_intervention_locations(self, **kwargs: Any) -> list[list[int]]:
        """positions.get_intervention_locations, for subclasses to override."""
        return get_intervention_locations(**kwargs)

    def compute_intervention_and_subspaces(
        self, id: int, data_item: Mapping[str, Any], result: dict[str, Any], last_position: int, **kwargs: Any
    ) -> dict[str, Any]:
        """`result` with its places, masks, id and subspaces. last_position is the number of prompt tokens."""
        given = {**kwargs, "last_position": last_position, "first_n": self.first_n, "last_n": self.last_n}
        result["intervention_locations"] = self.get_intervention_locations(**given)
        result["id"] = id
        for name in self.fields_to_mask:
            mask = "attention_mask" if len(self.fields_to_mask) == 1 else f"{name}_mask"
            result.setdefault(mask, torch.ones(len(result[name]), dtype=torch.int64))
        if data_item.get("subspaces") is not None:
            result["subspaces"] = [data_item["subspaces"]] * kwargs["num_interventions"]
        return result

    def _tokenized(self, number: int, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        try:
            return self.tokenize(item)
        except KeyError as error:
            raise DataError(f"row {number} has no column {error.args[0]!r}", hint=f"its columns are {', '.join(map(str, item))}") from error
        except DataError as error:  # encode_pairs counts the rows of its call, which is this one
            raise DataError(error.message.replace("row 0", f"row {number}", 1), hint=error.hint) from error

    def _from_hub(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"reading data set {self.task!r} of the hub needs the datasets package", hint="pip install datasets, or pass dataset=[...] or a file"
            ) from error
        return datasets.load_dataset(*(name for name in (self.task, self.data_path) if name is not None), split=self.data_split)

    def _encoded(self, prompt: str, completion: str, stop: bool = True) -> tuple[dict[str, Any], int]:
        row = encode_pairs(self.tokenizer, [prompt], [completion], stop)[0]
        return {"input_ids": torch.tensor(row.token_ids), "labels": torch.tensor(row.labels)}, row.num_prompt

    def _text(self, text: str) -> Tensor:
        """The tokens of a whole text [T], with all that the tokenizer adds, cut to its model_max_length."""
        limit = self.tokenizer.model_max_length
        cut = {"truncation": True, "max_length": limit} if limit < _LONGEST else {}
        return torch.tensor(self.tokenizer(text, **cut)["input_ids"])


class ReftSupervisedDataset(ReftDataset):
    """Alpaca's rows: instruction_field, input_field (may be absent or empty) and output_field; no_stop leaves the end-of-sequence token out."""

    def __init__(self, *args: Any, no_stop: bool = False, **kwargs: Any) -> None:
        self.no_stop = no_stop
        super().__init__(*args, **kwargs)

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.instruction_field, self.input_field, self.output_field = _fields(kwargs, "instruction_field", "input_field", "output_field")

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        return self._encoded(_alpaca(item, self.instruction_field, self.input_field), item[self.output_field], stop=not self.no_stop)


class ReftGenerationDataset(ReftDataset):
    """A prompt_field and a completion_field, joined as they are."""

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.prompt_field, self.completion_field = _fields(kwargs, "prompt_field", "completion_field")

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        return self._encoded(item[self.prompt_field], item[self.completion_field])


class ReftRawDataset(ReftDataset):
    """Rows of `instruction` and `output`, joined as they are; in splits other than train, the instruction alone. Columns are attributes."""

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        if self.data_split == "train":
            return self._encoded(item["instruction"], item["output"])
        prompt = self._text(item["instruction"])
        return {"input_ids": prompt}, len(prompt)

    def __getattr__(self, name: str) -> Any:
        if name not in ("input_ids", "attention_mask", "intervention_locations", "labels", "subspaces", "id"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        rows = self.__dict__.get("result", [])
        return [row[name] for row in rows] if rows and name in rows[0] else None


class ReftClassificationDataset(ReftDataset):
    """One text, input_field, edited at its first and last tokens; label_field is a number or class, a text, or None for rows without labels."""

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.input_field, self.label_field = _fields(kwargs, "input_field", "label_field")

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        token_ids = self._text(item[self.input_field])
        result: dict[str, Any] = {"input_ids": token_ids}
        if self.label_field is not None:
            label = item[self.label_field]
            result["labels"] = self._text(label) if isinstance(label, str) else label
        return result, len(token_ids)


class ReftPreferenceDataset(ReftDataset):
    """Alpaca's prompts with chosen_output_field and rejected_output_field: the model reads the rejected answer and learns to write the chosen one.

    The shorter of the two is padded, masked and without labels there. Splits other than train hold prompts alone.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.instruction_field, self.input_field = _fields(kwargs, "instruction_field", "input_field")
        self.chosen_output_field, self.rejected_output_field = _fields(kwargs, "chosen_output_field", "rejected_output_field")

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        prompt = _alpaca(item, self.instruction_field, self.input_field)
        if self.data_split != "train":
            token_ids = self._text(prompt)
            return {"input_ids": token_ids}, len(token_ids)
        read, num_prompt = self._encoded(prompt, item[self.rejected_output_field])
        written, _ = self._encoded(prompt, item[self.chosen_output_field])
        token_ids, labels = read["input_ids"], written["labels"]
        length = max(len(token_ids), len(labels))
        result = {
            "input_ids": _lengthened(token_ids, length, self.tokenizer.pad_token_id),
            "labels": _lengthened(labels, length, IGNORE_INDEX),
            "attention_mask": _lengthened(torch.ones_like(token_ids), length, 0),
        }
        return result, num_prompt


class ReftRewardDataset(ReftDataset):
    """Pairs of conversations (conv_A_field, conv_B_field; with prompt_field: two answers to it), for a reward model; see ReftRewardCollator.

    With reward fields the better one is the chosen one, else conversation A is. Their common beginning is the prompt.
    """

    fields_to_mask = ("chosen_output", "rejected_output")

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.conv_A_field, self.conv_B_field = _fields(kwargs, "conv_A_field", "conv_B_field")
        self.prompt_field = kwargs.get("prompt_field")
        self.conv_A_reward_field, self.conv_B_reward_field = kwargs.get("conv_A_reward_field"), kwargs.get("conv_B_reward_field")

    def tokenize(self, item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        chosen, rejected = (self._conversation(item, field) for field in (self.conv_A_field, self.conv_B_field))
        result: dict[str, Any] = {}
        if self.conv_A_reward_field is not None and self.conv_B_reward_field is not None:
            best, worst = item[self.conv_A_reward_field], item[self.conv_B_reward_field]
            if best < worst:
                chosen, rejected, best, worst = rejected, chosen, worst, best
            result = {"chosen_reward": best, "rejected_reward": worst}
        shared = min(len(chosen), len(rejected))
        differing = (chosen[:shared] != rejected[:shared]).nonzero()
        num_prompt = int(differing[0]) if len(differing) else shared
        return {**result, "chosen_output": chosen, "rejected_output": rejected}, num_prompt

    def _conversation(self, item: Mapping[str, Any], field: str) -> Tensor:
        turns = item[field]
        if self.prompt_field is not None:
            turns = [{"role": "user", "content": item[self.prompt_field]}, {"role": "assistant", "content": turns}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        # A template's own BOS goes, since the tokenizer adds one.
        return self._text(text.removeprefix(self.tokenizer.bos_token or ""))


def _fields(kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if name not in kwargs]
    if missing:
        raise ConfigError(f"the data set needs {missing[0]}", hint=f"give the columns' names: {', '.join(names)}")
    return [kwargs[name] for name in names]


def _alpaca(item: Mapping[str, Any], instruction_field: str, input_field: str) -> str:
    instruction, given = item[instruction_field], item.get(input_field)
    return ALPACA_WITH_INPUT % (instruction, given) if given else ALPACA % (instruction,)


def _lengthened(values: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), value)])
