"""model/positions.py: the one answer to the question which prompt tokens are edited."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.errors import AdapterFormatError
from atoll.model.positions import Positions


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("f7+l7", Positions(first=7, last=7)),
        ("f3", Positions(first=3)),
        ("l1", Positions(last=1)),
        ("f11+l2", Positions(first=11, last=2)),
        ("all_prompt", Positions(all_prompt=True)),
        ([0, 2, -1], Positions(listed=(0, 2, -1))),
    ],
)
def test_what_is_written_is_read_and_written_again(text: str | list[int], positions: Positions) -> None:
    """Files, YAML and PyReFT's `position` say it in these forms; a form that came back changed would edit other tokens."""
    assert Positions.parse(text) == positions
    assert positions.to_json() == text
    assert str(positions) == str(text)


def test_the_order_and_a_zero_do_not_matter() -> None:
    """`l2+f1` can only mean one thing."""
    assert Positions.parse("l2+f1") == Positions.parse("f1+l2")
    assert Positions.parse("f0+l2") == Positions.parse("l2")


@pytest.mark.parametrize("text", ["", "f", "l-1", "f1+f2", "f1+l2+l3", "f0", "7", "f7 + l7", "F7", "f٣", "f100000", "all", "f1+", "x3"])
def test_what_cannot_be_read_is_refused_with_the_forms(text: str) -> None:
    """No guess: editing no token, or others, would train and serve without a complaint."""
    with pytest.raises(AdapterFormatError, match="positions") as refused:
        Positions.parse(text)
    assert "f7+l7" in refused.value.hint
    assert "all_prompt" in refused.value.hint


@pytest.mark.parametrize("places", [[], [0, 0], [1.5], ["1"], [True], [None], [10**6], list(range(2000))])
def test_a_list_of_other_things_is_refused(places: Any) -> None:
    """Lists come from strangers' files; every request of the adapter resolves them."""
    with pytest.raises(AdapterFormatError, match="positions"):
        Positions.parse(places)


@pytest.mark.parametrize("fields", [{}, {"first": 1, "all_prompt": True}, {"listed": (1,), "last": 2}, {"first": -1, "last": 3}])
def test_positions_are_of_one_form(fields: dict[str, Any]) -> None:
    """Of two forms at once, one would be ignored in silence; of none, nothing would be edited."""
    with pytest.raises(AdapterFormatError, match="not one of the forms"):
        Positions(**fields)


def test_sides_never_overlap_and_are_cut_as_the_paper_cuts_them() -> None:
    """At most floor(n / 2) first and ceil(n / 2) last tokens: a token edited twice would depend on the order of the two."""
    for n in range(20):
        for first in range(9):
            for last in range(9):
                if first + last == 0:
                    continue
                prefix, suffix = Positions(first, last).resolve(n)
                assert list(prefix) == list(range(min(first, n // 2)))
                assert list(suffix) == list(range(n - min(last, (n + 1) // 2), n))
                assert not set(prefix) & set(suffix)


def test_the_last_token_is_the_last_token() -> None:
    """PyReFT's datasets edit the one before it: the last prompt token is the one that predicts the first of the answer."""
    assert list(Positions.parse("l1").resolve(9)[1]) == [8]
    assert list(Positions.parse("l1").resolve(1)[1]) == [0], "a prompt of one token has a last one too"


@pytest.mark.parametrize(
    ("places", "n", "found"),
    [([0, -1], 5, [0, 4]), ([-1, 0], 5, [0, 4]), ([0, -1], 1, [0]), ([3, 9, -9], 5, [3]), ([-1, 4], 5, [4]), ([2], 0, [])],
    ids=["ends", "unsorted", "one token", "not there", "the same twice", "no prompt"],
)
def test_listed_places_are_found_once_or_not_at_all(places: list[int], n: int, found: list[int]) -> None:
    """Negative places count from the end; two names of one token are one edit, and a place beyond the prompt is none."""
    prefix, suffix = Positions.parse(places).resolve(n)
    assert list(prefix) == found
    assert not suffix


def test_all_of_the_prompt_is_one_side() -> None:
    """An untied adapter has nothing to tell apart there."""
    prefix, suffix = Positions.parse("all_prompt").resolve(6)
    assert list(prefix) == list(range(6))
    assert not suffix
    assert not Positions.parse("all_prompt").has_sides
    assert not Positions.parse("f3").has_sides
    assert Positions.parse("f3+l1").has_sides
