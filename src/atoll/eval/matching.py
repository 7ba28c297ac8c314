"""When two answers are the same: as text, as a number, as SQL, as JSON.

Each comparison normalises both sides by one function and asks for equality. Nothing looks for a substring, so "10" is not "1" and "unknown" is
not "no". A reader returns None for "no usable answer", which the metrics count as a failure.

Used by eval.row_metrics and eval.corpus_metrics.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from fractions import Fraction
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_MARKER = "####"
# A number: sign, currency, digits with or without thousands commas, decimals, an exponent of at most two digits, then maybe "/ digits" as a fraction.
# It starts at a boundary (the 5 of "A5" is a name, the 5 of "10-5" is no -5), and may be followed by a unit ("5kg", "50%").
_NUMBER = re.compile(
    r"""(?<![\w./])(?P<sign>(?<!\))[-+−])?(?:[$€£](?P<minus>-)?)?
        (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)|\d+|(?=\.\d))(?P<decimals>\.\d+)?
        (?:[eE](?P<exponent>[+-]?\d{1,2})(?!\w))?
        (?:\s?/\s?(?P<denominator>\d+)(?![\d/]))?""",
    re.VERBOSE,
)
_MOST_DIGITS = 300  # longer runs are a model repeating itself, not a number


def normalise_label(text: str) -> str:
    """Case-folded, inner spaces made single, outer spaces and one or more closing full stops removed."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def normalise_words(text: str) -> list[str]:
    """SQuAD's words: lower case, no punctuation, no articles, split at spaces."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def find_numbers(text: str) -> list[Fraction]:
    """Every number in `text`, in order, exact.

    "$1,234.50" is 1234.5, "-3" is -3, "3/4" is 3/4, ".5" is 1/2, "1e3" is 1000, "50%" is 50 (the sign carries no value), "12." is 12. Digits glued
    to a letter before them ("A4", "x2") are names. A zero denominator and runs of more than 300 digits are skipped.
    """
    numbers = []
    for match in _NUMBER.finditer(text):
        digits, decimals = match["digits"].replace(",", ""), match["decimals"] or ""
        if len(match[0]) > _MOST_DIGITS or not digits + decimals:
            continue
        value = Fraction(f"{digits or '0'}{decimals}") * Fraction(10) ** int(match["exponent"] or 0)
        if match["denominator"] is not None:
            if int(match["denominator"]) == 0:
                continue
            value /= int(match["denominator"])
        negative = (match["sign"] in ("-", "−")) != (match["minus"] is not None)
        numbers.append(-value if negative else value)
    return numbers


def read_number(text: str) -> Fraction | None:
    """The last number of `text`: the answer itself when it stands alone, the result when there is reasoning before it. None without a number."""
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def read_first_number(text: str) -> float | None:
    """The first number of `text` as a float: how a score is read ("3.5 out of 5" is 3.5). None without a number, or with one past 1e15."""
    numbers = find_numbers(text)
    return float(numbers[0]) if numbers and abs(numbers[0]) <= 1e15 else None


def read_marked_number(text: str) -> Fraction | None:
    """The number after the first "####" (on its line); without a marker the last number of the text. None if there is none there.

    The first marker, as in GSM8K's own scorer: what a model writes after its answer is not its answer.
    """
    _, marker, after = text.partition(_MARKER)
    if not marker:
        return read_number(text)
    numbers = find_numbers(after.strip(" \t").partition("\n")[0])
    return numbers[0] if numbers else None


def answer_is_marked_and_whole(text: str) -> bool:
    """Whether a text that was cut off still holds its whole "#### number" line, i.e. something follows that line."""
    _, marker, after = text.partition(_MARKER)
    return bool(marker) and "\n" in after.strip(" \t") and read_marked_number(text) is not None


def unfence(text: str) -> str:
    """The inside of the first Markdown code fence, or `text` itself without one; outer spaces removed."""
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip()


def read_json(text: str) -> tuple[Any] | None:
    """The JSON value that `text` is, in a tuple of one (since the value may be null), or None.

    A Markdown code fence around it is taken off. Strict otherwise: text beside it, a repeated key, NaN or nesting too deep to parse is no value.
    """
    try:
        return (json.loads(unfence(text), object_pairs_hook=_unique_keys, parse_constant=_no_constant),)
    except (ValueError, RecursionError):
        return None


def same_json(first: Any, second: Any) -> bool:
    """Equality of parsed JSON: key order does not matter, list order does, 1 equals 1.0, and true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_json(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(same_json(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def read_spans(text: str) -> Counter[tuple[str, str]] | None:
    """The multiset of (type, text) pairs that an answer lists, or None if it has neither of the two forms.

    `type: text | type: text`, with the single word `none` for no pairs; a text may hold ": " but not " | ". Or a JSON object of type to a text, a
    list of texts, or null. Types are compared without case, texts exactly, both with single spaces.
    """
    text = unfence(text)
    if text.startswith("{"):
        return _spans_of_json(text)
    if normalise_label(text) == "none":
        return Counter()
    pairs = []
    for piece in re.split(r"\s\|\s", text):
        kind, colon, span = piece.partition(":")
        if not (colon and kind.strip() and span.strip()):
            return None
        pairs.append(_pair(kind, span))
    return Counter(pairs)


def _spans_of_json(text: str) -> Counter[tuple[str, str]] | None:
    value = read_json(text)
    if value is None or not isinstance(value[0], dict):
        return None
    pairs = []
    for kind, texts in value[0].items():
        for span in texts if isinstance(texts, list) else [] if texts is None else [texts]:
            if isinstance(span, int | float) and not isinstance(span, bool):
                span = json.dumps(span)
            if not isinstance(span, str):
                return None
            pairs.append(_pair(kind, span))
    return Counter(pairs)


def _pair(kind: str, span: str) -> tuple[str, str]:
    return " ".join(kind.casefold().split()), " ".join(span.split())


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
