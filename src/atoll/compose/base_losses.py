"""The base's own label losses, with what many rows begin with computed once.

Rows with the same shots before their prompts share thousands of tokens; their keys and values stand in pages that all of them name.

Used by controls.py and in_context.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.compose.losses import FORWARD_TOKENS, check_rows
from atoll.data.batches import micro_batches
from atoll.data.encode import EncodedRow
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.kv_cache import PAGE_TOKENS, KvCache

_WORTH_SHARING = 2 * PAGE_TOKENS  # tokens that rows must begin with in common
_PREFILL_TOKENS = 2048  # of a common beginning, at a time


@torch.no_grad()
def base_losses(decoder: Decoder, rows: Sequence[EncodedRow]) -> Tensor:
    """[k] float32: the base's mean loss over each row's label tokens, in nats. Raises DataError as LabelLosses does."""
    check_rows(rows, decoder.shape.context)
    found = torch.empty(len(rows))
    for group, common in _alike(rows):
        # A rope that turns by a row's whole length gives the same beginning other keys in rows of other lengths; so does an encoder.
        apart = decoder.rotary.by_length or decoder.whole_prompts
        shared = 0 if len(group) == 1 or apart else common // PAGE_TOKENS * PAGE_TOKENS
        found[group] = _losses(decoder, [rows[index] for index in group], shared)
    return found


def _alike(rows: Sequence[EncodedRow]) -> list[tuple[list[int], int]]:
    """Rows in groups, and how many tokens all prompts of a group begin with in common (one token of each prompt is left out of that)."""
    groups: list[tuple[list[int], int]] = []
    for index in sorted(range(len(rows)), key=lambda index: rows[index].token_ids):
        row = rows[index]
        if groups:
            members, common = groups[-1]
            both = _common(rows[members[0]].token_ids[:common], row.token_ids[: row.first_label - 1])
            if both >= max(_WORTH_SHARING, common // 2):
                groups[-1] = ([*members, index], both)
                continue
        groups.append(([index], row.first_label - 1))
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _losses(decoder: Decoder, rows: Sequence[EncodedRow], shared: int) -> Tensor:
    """[len(rows)]: of rows whose first `shared` tokens, whole pages of them, are the same."""
    lengths = [len(row.token_ids) - 1 for row in rows]
    portions = micro_batches(range(len(rows)), lengths, FORWARD_TOKENS)
    front = list(range(shared // PAGE_TOKENS))
    own = [-(-(length - shared) // PAGE_TOKENS) for length in lengths]
    cache = _prefilled(decoder, rows[0].token_ids[:shared], front, max(sum(own[place] for place in portion) for portion in portions))
    found = torch.empty(len(rows))
    for portion in portions:
        members = [rows[place] for place in portion]
        tables, used = [], len(front)
        for place in portion:
            tables.append([*front, *range(used, used + own[place])])
            used += own[place]
        outputs: list[int] = []
        start = -shared
        for row in members:
            outputs += range(start + row.first_label - 1, start + len(row.token_ids) - 1)
            start += len(row.token_ids) - 1 - shared
        batch = PackedBatch.of(
            [row.token_ids[shared:-1] for row in members],
            context=[shared] * len(members),
            pages=tables if cache is not None else None,
            outputs=outputs,
            num_prompts=[row.num_prompt for row in members],
            device=decoder.device,
        )
        labels = torch.tensor([token for row in members for token in row.token_ids[row.first_label :]], device=decoder.device)
        each = decoder.label_losses(decoder.forward(batch, cache=cache), labels)
        found[portion] = torch.stack([part.mean() for part in each.split([row.num_labels for row in members])]).cpu()
    return found


def _prefilled(decoder: Decoder, tokens: Sequence[int], front: list[int], num_own: int) -> KvCache | None:
    """A cache whose first pages hold the keys and values of `tokens`, with room for so many more; None where nothing is shared."""
    if not front:
        return None
    cache = decoder.new_cache(len(front) + num_own)
    for start in range(0, len(tokens), _PREFILL_TOKENS):
        part = tokens[start : start + _PREFILL_TOKENS]
        decoder.forward(PackedBatch.of([part], context=[start], pages=[front], outputs="last", device=decoder.device), cache=cache)
    return cache
