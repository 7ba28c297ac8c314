"""How alike two texts are in words: TF-IDF vectors over words and character n-grams, and the cosine between them.

Words say what a task is about; n-grams of characters (within words) still match where forms differ ("classify", "classification", "clasify"). What
stands in most texts counts for little, so boilerplate of cards does no harm.

Used by retrieval.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
_NGRAMS = (3, 4, 5)
_CHARACTERS = 20_000  # of a text that are read: the beginning of a card says what it is


def similarity(description: str, texts: Sequence[str]) -> list[float]:
    """For each text the mean of two cosines with the description, of words and of character n-grams, from 0 (nothing shared) to 1.

    A term's value in a text is (1 + ln count) ln((1 + n) / number of texts with it), n texts in all, the description among them. Case does not count;
    an empty text is like nothing.
    """
    every = [description, *texts]
    found = [_cosines([terms(text[:_CHARACTERS].casefold()) for text in every]) for terms in (_words, _ngrams)]
    return [(words + ngrams) / 2 for words, ngrams in zip(*found, strict=True)]


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text))


def _ngrams(text: str) -> Counter[str]:
    padded = [f" {word} " for word in _WORD.findall(text)]
    return Counter(word[start : start + size] for word in padded for size in _NGRAMS for start in range(len(word) - size + 1))


def _cosines(counts: Sequence[Counter[str]]) -> list[float]:
    """The cosine of the first vector with each of the others."""
    documents = Counter(term for found in counts for term in found)
    rarity = {term: math.log((1 + len(counts)) / number) for term, number in documents.items()}
    vectors = [{term: (1 + math.log(count)) * rarity[term] for term, count in found.items()} for found in counts]
    lengths = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
    first, rest = vectors[0], vectors[1:]
    dots = [sum(value * vector.get(term, 0.0) for term, value in first.items()) for vector in rest]
    return [min(1.0, dot / (lengths[0] * length)) if dot > 0 else 0.0 for dot, length in zip(dots, lengths[1:], strict=True)]
