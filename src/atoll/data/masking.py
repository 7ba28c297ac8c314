"""Tokens that are hidden from an encoder, to be told from those around them: masked-language training (Devlin et al. 2018, arXiv 1810.04805).

In every step a row has other hidden tokens, drawn from the seed, the step and the row alone, so a resumed run sees what it would have seen in peace.

Used by train (plan, job, rows) and the dry run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from atoll.data.encode import EncodedRow
from atoll.errors import ConfigError, DataError

_AS_MASK, _AS_ANOTHER = 0.8, 0.1  # of the hidden tokens: so many become the mask, so many another token, the others stay as they are


@dataclass(frozen=True)
class MaskedRow(EncodedRow):
    """A text some of whose tokens are hidden: at places[i] stood hidden[i]. All of its tokens go into a forward."""

    places: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def num_inputs(self) -> int:
        return len(self.token_ids)

    @property
    def num_labels(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: each with this probability, one at least in a row, none of `special`."""

    probability: float
    mask_id: int
    vocabulary: int
    special: frozenset[int]
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, probability: float, seed: int) -> Masking:
        """Raises ConfigError for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise ConfigError("the base's tokenizer has no mask token, so no token can be hidden", hint="choose a base that was trained with one")
        return cls(probability, tokenizer.mask_token_id, len(tokenizer), frozenset(tokenizer.all_special_ids), seed)

    def check(self, row: EncodedRow) -> None:
        """Raise DataError for a row of special tokens alone, of which none can be hidden."""
        if self.special.issuperset(row.token_ids):
            raise DataError(f"{row.where}: the text has no token that could be hidden", hint="leave the row out, or give it a text")

    def hide(self, row: EncodedRow, draw: str) -> MaskedRow:
        """The row with tokens hidden; the same for the same draw."""
        drawn, tokens = random.Random(f"atoll masks {self.seed} {draw}"), list(row.token_ids)
        open_places = [place for place, token in enumerate(tokens) if token not in self.special]
        places = [place for place in open_places if drawn.random() < self.probability]
        if not places and open_places:
            places = [drawn.choice(open_places)]
        for place in places:
            kind = drawn.random()
            if kind < _AS_MASK:
                tokens[place] = self.mask_id
            elif kind < _AS_MASK + _AS_ANOTHER:
                tokens[place] = drawn.randrange(self.vocabulary)
        return MaskedRow(tokens, row.num_prompt, row.where, places=tuple(places), hidden=tuple(row.token_ids[place] for place in places))
