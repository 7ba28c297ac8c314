"""Draw one row of a built-in task at random, with part of every vocabulary kept out of train.

A generator is a description (the keys of a task.json) and a function that draws one row. The row function asks a `Draw` for its words: while train
is made, a `Draw` never gives every fourth entry of a list, and while validation and test are made it takes half of its entries from there. So a model
that only remembers names, phrasings, schemas or tools of its training rows loses, without any task having to think about it.

Used by the *_tasks files, which write generators, and by generators.py, which runs them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
Slots = Mapping[str, "str | Sequence[str] | Callable[[Draw], str]"]

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{([a-z_]+)(\d?)\}")
SPACE_BEFORE_MARK = re.compile(r"\s+([,.?!;:])")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO](?!ne\b)|[uU]m)")


def words(text: str) -> tuple[str, ...]:
    """The comma-separated entries of `text`; line ends count as spaces."""
    return tuple(" ".join(piece.split()) for piece in text.split(",") if piece.strip())


def phrases(text: str) -> tuple[str, ...]:
    """The entries of `text`, one a line or several a line set apart by ` / `."""
    return tuple(piece.strip() for line in text.splitlines() for piece in line.split(" / ") if piece.strip())


def known_and_held_out(entries: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """`entries` without every fourth, and every fourth alone; the split depends on nothing but the order they are written in."""
    return [entry for index, entry in enumerate(entries) if index % 4 != 3], entries[3::4]


class Draw:
    """The random choices of one part (train, validation or test) of one task.

    The generator is the standard library's Mersenne twister, seeded with a string: the same rows on every machine and in every process.
    """

    def __init__(self, seed: str, *, train: bool) -> None:
        self.rng = random.Random(seed)
        self.train = train

    def any(self, entries: Sequence[T]) -> T:
        """One of `entries`, whatever the part: for what a model may well know from train, like labels or months."""
        return self.rng.choice(entries)

    def pick(self, entries: Sequence[T]) -> T:
        """One of `entries`: in train never a held-out one, elsewhere a held-out one half of the time."""
        known, held_out = known_and_held_out(entries)
        if self.train or not held_out or self.chance(0.5):
            return self.rng.choice(known)
        return self.rng.choice(held_out)

    def several(self, entries: Sequence[T], count: int) -> list[T]:
        """`count` different entries by `pick`, in random order."""
        chosen: list[T] = []
        while len(chosen) < count:
            entry = self.pick(entries)
            if entry not in chosen:
                chosen.append(entry)
        return chosen

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def shuffled(self, entries: Sequence[T]) -> list[T]:
        return self.rng.sample(entries, len(entries))

    def fill(self, template: str, slots: Slots) -> tuple[str, dict[str, str]]:
        """`template` with its choices made, and what went into each slot, by the slot's name, in order of appearance.

        `[please|kindly|]` becomes one of the three. `{item}` becomes `slots["item"]`: a text as it is, an entry of a list, or what a function draws;
        `{item2}` becomes another one than `{item}`. Spaces before punctuation go, and "a" becomes "an" before a vowel.
        """
        chosen: dict[str, str] = {}

        def value(match: re.Match[str]) -> str:
            key, source = match[1] + match[2], slots[match[1]]
            if isinstance(source, str):
                chosen[key] = source
            while key not in chosen:
                entry = self.pick(source) if isinstance(source, Sequence) else source(self)
                if entry not in chosen.values():
                    chosen[key] = entry
            return chosen[key]

        text = SLOT.sub(value, ALTERNATIVES.sub(lambda match: self.any(match[1].split("|")), template))
        return ARTICLE.sub(r"\1n ", SPACE_BEFORE_MARK.sub(r"\1", " ".join(text.split()))), chosen

    def say(self, template: str, slots: Slots) -> str:
        """The text of `fill`."""
        return self.fill(template, slots)[0]


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Generator:
    """One built-in task.

    description: the keys of its task.json (name, family, fields, input_fields, target, metric, instruction, template, ...).
    kinds: labels or question types; rows go round them in shuffled rounds, so that each gets the same share of every part.
    row: draws one row of a kind.
    distinct_by: the fields that may not repeat, within a part or between parts (dates: the question alone, not the options shown with it).
    extras: what the task dict needs beside the description and is costly to make, like databases; called by `generate` and `describe`.
    """

    description: Mapping[str, Any]
    kinds: tuple[str, ...]
    row: Callable[[Draw, str], Row]
    distinct_by: tuple[str, ...]
    extras: Callable[[], dict[str, Any]] | None = None
