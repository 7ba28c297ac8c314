"""PyReFT's positions: the paper's truncation, the true last token, and padding that edits nothing."""

from __future__ import annotations

import pytest

from atoll.errors import AdapterFormatError, DataError
from atoll.model.positions import Positions
from atoll.reft.positions import NO_EDIT, get_intervention_locations, parse_positions


@pytest.mark.parametrize(("text", "counts"), [("f7+l7", (7, 7)), ("f3", (3, 0)), ("l1", (0, 1)), ("f0+l2", (0, 2))])
def test_positions_are_numbers_of_first_and_last_tokens(text: str, counts: tuple[int, int]) -> None:
    assert parse_positions(text) == counts


@pytest.mark.parametrize("text", ["7", "f7l7", "first3", "f7+f7", ""])
def test_what_cannot_be_read_is_an_error_and_not_zero_tokens(text: str) -> None:
    """PyReFT reads "7" as no positions at all: the model then trains without one edit."""
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        parse_positions(text)
    with pytest.raises(DataError, match="all_prompt"):
        parse_positions("all_prompt")


def test_tied_places_are_one_list_for_every_intervention() -> None:
    found = get_intervention_locations(last_position=20, positions="f2+l3", num_interventions=2, share_weights=True)
    assert found == [[0, 1, 17, 18, 19]] * 2


def test_untied_places_are_the_first_tokens_for_one_half_and_the_last_for_the_other() -> None:
    found = get_intervention_locations(last_position=20, first_n=2, last_n=3, num_interventions=4)
    assert found == [[0, 1, NO_EDIT]] * 2 + [[17, 18, 19]] * 2


def test_l1_is_the_last_prompt_token_however_short_the_prompt() -> None:
    """PyReFT gives [-1] for a prompt of one token, and in its data sets the token before the last."""
    for length in (1, 2, 9):
        assert get_intervention_locations(last_position=length, positions="l1", num_interventions=3) == [[length - 1]] * 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 13, 14, 40])
def test_places_are_those_of_the_shared_resolver(length: int) -> None:
    """Training by PyReFT's interface and serving must edit the same tokens: both ask Positions.resolve."""
    prefix, suffix = Positions.parse("f7+l7").resolve(length)
    tied = get_intervention_locations(last_position=length, positions="f7+l7", num_interventions=1, share_weights=True)[0]
    assert [place for place in tied if place >= 0] == [*prefix, *suffix]
    assert len(tied) == 14
    first, last = get_intervention_locations(last_position=length, positions="f7+l7", num_interventions=2)
    assert [place for place in first if place >= 0] == [*prefix]
    assert [place for place in last if place >= 0] == [*suffix]


@pytest.mark.parametrize("mode", ["first", "last"])
def test_padding_places_edit_nothing_in_either_mode(mode: str) -> None:
    """PyReFT's "last" pads with the place after the prompt: the first token of the answer is edited then."""
    found = get_intervention_locations(last_position=4, positions="f7+l7", num_interventions=1, share_weights=True, pad_mode=mode)
    assert found == [[0, 1, 2, 3, *[NO_EDIT] * 10]]
    assert all(place < 0 for place in found[0][4:])


def test_short_prompts_keep_the_shape_of_long_ones() -> None:
    """PyReFT decides by the truncated counts, so a one-token prompt changes the number of places and its batch cannot be built."""
    for length in (1, 2, 3, 30):
        found = get_intervention_locations(last_position=length, positions="f2+l3", num_interventions=4)
        assert [len(places) for places in found] == [3] * 4


def test_one_untied_intervention_gets_both_sides() -> None:
    """PyReFT gives [] for its own default arguments (f1+l1, one intervention, untied), and training then fails far away."""
    assert get_intervention_locations(last_position=9, positions="f1+l1", num_interventions=1) == [[0, 8]]


def test_untied_places_cannot_be_shared_out_among_three() -> None:
    with pytest.raises(DataError, match="even number of interventions") as caught:
        get_intervention_locations(last_position=9, positions="f1+l1", num_interventions=3)
    assert "share_weights" in caught.value.hint


def test_places_need_numbers() -> None:
    with pytest.raises(DataError, match="positions, or both"):
        get_intervention_locations(last_position=9, num_interventions=1, first_n=1)
    with pytest.raises(DataError, match="pad_mode"):
        get_intervention_locations(last_position=9, num_interventions=1, positions="l1", pad_mode="middle")
