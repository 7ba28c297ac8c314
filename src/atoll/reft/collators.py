"""From rows to one padded batch, with each row's places moved to where its tokens stand.

Padding on the left shifts a row's tokens, so its places shift with them; NO_EDIT stays what it is. Rows may have different numbers of places.

Used by data.py's data modules and by trainers; a collator of the user's can wrap another with ReftDataCollator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.reft.positions import NO_EDIT

_APART = ("intervention_locations", "subspaces")  # what a tokenizer's padding knows nothing of


@dataclass
class ReftDataCollator:
    """Pads token rows by `data_collator` (any of transformers', e.g. DataCollatorForSeq2Seq) and adds the ReFT columns."""

    data_collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `data_collator` gives, and intervention_locations [B, num_interventions, n] and subspaces [B, num_interventions, k], int64."""
        batch = dict(self.data_collator([{key: _plain(value) for key, value in row.items() if key not in _APART} for row in instances]))
        return _add_columns(batch, instances)


@dataclass
class ReftRewardCollator:
    """Two rows for each pair of conversations: the chosen one, then the rejected one.

    Rewards are the pair's, or 1 and 0. The other fields are those of `tokenizer.pad`.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """input_ids and attention_mask [2 B, T], reward [2 B], intervention_locations [2 B, num_interventions, n] of ReftRewardDataset's items."""
        rows = [
            {
                "input_ids": _plain(pair[f"{kind}_output"]),
                "attention_mask": _plain(pair[f"{kind}_output_mask"]),
                "reward": float(pair.get(f"{kind}_reward", default)),
                **{name: pair[name] for name in _APART if name in pair},
            }
            for pair in features
            for kind, default in (("chosen", 1.0), ("rejected", 0.0))
        ]
        batch = self.tokenizer.pad(
            [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows],
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=self.return_tensors,
        )
        return _add_columns({**batch, "reward": torch.tensor([row["reward"] for row in rows])}, rows)


def _add_columns(batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if "intervention_locations" in rows[0]:
        locations = _stacked([row["intervention_locations"] for row in rows])
        skipped = torch.tensor([_left_padding(row["input_ids"], padded) for row, padded in zip(rows, batch["input_ids"], strict=True)])
        batch["intervention_locations"] = torch.where(locations < 0, NO_EDIT, locations + skipped[:, None, None])
    if rows[0].get("subspaces") is not None:
        batch["subspaces"] = torch.tensor([_plain(row["subspaces"]) for row in rows])
    return batch


def _left_padding(row: Any, padded: Tensor) -> int:
    """How many tokens were put before `row`. Read off the tokens: whether a row's own beginning is masked is its own affair."""
    return 0 if padded[: len(row)].tolist() == _plain(row) else len(padded) - len(row)


def _stacked(rows: Sequence[Any]) -> Tensor:
    """[B, num_interventions, n] of nested lists or tensors, filled up with NO_EDIT."""
    lists = [_plain(row) for row in rows]
    width = max((len(places) for row in lists for places in row), default=0)
    filled = [[[*places, *[NO_EDIT] * (width - len(places))] for places in row] for row in lists]
    return torch.tensor(filled, dtype=torch.int64).view(len(lists), len(lists[0]), width)  # also where there is no intervention at all


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
