"""Which prompt tokens a ReFT adapter edits: written once (`f7+l7`), resolved by one function that training, serving and evaluation share.

Positions are places in the prompt as it was given, counted from its first token whatever padding, chunks or cached pages there are, so they are fixed
the moment the prompt's length is known. Generated tokens are never edited.

Used by reft.py (a spec holds a Positions) and by everybody who builds a batch with edits (`Positions.resolve`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.errors import AdapterFormatError

PREFIX, SUFFIX = 0, 1  # sides: untied adapters have tensors of their own for each
ALL_PROMPT = "all_prompt"

_PART = re.compile(r"([fl])([0-9]{1,5})")
_MAX_LISTED = 1024
_FARTHEST = 99_999  # place that a list, or a count, can name
_FORMS = "write f<n> for the first n prompt tokens, l<n> for the last n, both as f7+l7, all_prompt, or a list such as [0, 1, -1]"


@dataclass(frozen=True)
class Positions:
    """first and last tokens of the prompt, or all of it, or listed places (negative ones count from the prompt's end)."""

    first: int = 0
    last: int = 0
    all_prompt: bool = False
    listed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.first > 0 or self.last > 0) + self.all_prompt + bool(self.listed) != 1 or self.first < 0 or self.last < 0:
            raise AdapterFormatError(f"positions {(self.first, self.last, self.all_prompt, self.listed)!r:.60} are not one of the forms", hint=_FORMS)

    @classmethod
    def parse(cls, text: str | Sequence[int]) -> Positions:
        """Read `f7+l7`, `f3`, `l1`, `all_prompt` or a list of places. Raises AdapterFormatError with the forms there are."""
        if not isinstance(text, str):
            places = list(text)
            if not places or not all(type(place) is int and abs(place) <= _FARTHEST for place in places):
                raise AdapterFormatError(f"positions {places!r:.60} is not a list of whole numbers up to {_FARTHEST}", hint=_FORMS)
            if len(places) > _MAX_LISTED:
                raise AdapterFormatError(f"positions lists {len(places)} places, but at most {_MAX_LISTED} are edited", hint=_FORMS)
            if len(set(places)) < len(places):
                raise AdapterFormatError(f"positions {places!r:.60} names a place twice", hint=_FORMS)
            return cls(listed=tuple(places))
        if text == ALL_PROMPT:
            return cls(all_prompt=True)
        parts = [_PART.fullmatch(part) for part in text.split("+")]
        counts = {part[1]: int(part[2]) for part in parts if part is not None}
        if None in parts or len(counts) < len(parts) or not any(counts.values()):
            raise AdapterFormatError(f"positions {text!r:.60} cannot be read", hint=_FORMS)
        return cls(first=counts.get("f", 0), last=counts.get("l", 0))

    def to_json(self) -> str | list[int]:
        """The form that `parse` reads."""
        if self.listed:
            return list(self.listed)
        if self.all_prompt:
            return ALL_PROMPT
        return "+".join(f"{letter}{count}" for letter, count in (("f", self.first), ("l", self.last)) if count)

    def __str__(self) -> str:
        return str(self.to_json())

    @property
    def has_sides(self) -> bool:
        """Whether there are two sides that an untied adapter can treat differently."""
        return bool(self.first and self.last)

    def resolve(self, num_prompt: int) -> tuple[range | tuple[int, ...], range | tuple[int, ...]]:
        """The edited places of a prompt of that many tokens, ascending: those of the prefix side and those of the suffix side. They never overlap.

        At most floor(n / 2) first and ceil(n / 2) last tokens of a prompt of n (ReFT, Wu et al. 2024, arXiv 2404.03592, section 4). All of a prompt,
        and listed places, are on the prefix side; a listed place that a prompt does not have is not edited.
        """
        if self.all_prompt:
            return range(num_prompt), ()
        if self.listed:
            places = {place if place >= 0 else num_prompt + place for place in self.listed}
            return tuple(sorted(place for place in places if 0 <= place < num_prompt)), ()
        first, last = min(self.first, num_prompt // 2), min(self.last, -(-num_prompt // 2))
        return range(first), range(num_prompt - last, num_prompt)
