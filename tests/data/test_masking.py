"""data/masking.py: which tokens are hidden, and how."""

from __future__ import annotations

from collections import Counter

import pytest

from atoll.data.encode import EncodedRow
from atoll.data.masking import MaskedRow, Masking
from atoll.errors import ConfigError, DataError

MASK, VOCABULARY = 4, 1000
MASKING = Masking(0.15, MASK, VOCABULARY, frozenset({1, 2}), seed=0)
ROW = EncodedRow([1, *range(100, 300), 2], 202, "a:1")


def test_tokens_are_hidden_in_the_papers_shares() -> None:
    """15 in a hundred; of these 8 in 10 become the mask, 1 another token, 1 stays; never a special one."""
    kinds, count = Counter[str](), 0
    for step in range(200):
        shown = MASKING.hide(ROW, str(step))
        assert [token for place, token in enumerate(shown.token_ids) if place not in shown.places] == [
            token for place, token in enumerate(ROW.token_ids) if place not in shown.places
        ]
        assert shown.hidden == tuple(ROW.token_ids[place] for place in shown.places)
        assert not {0, 201} & set(shown.places)
        count += shown.num_labels
        for place, token in zip(shown.places, shown.hidden, strict=True):
            now = shown.token_ids[place]
            kinds["mask" if now == MASK else "same" if now == token else "other"] += 1
    assert count == pytest.approx(0.15 * 200 * 200, rel=0.05)
    assert kinds["mask"] / count == pytest.approx(0.8, abs=0.03)
    assert kinds["other"] / count == pytest.approx(0.1, abs=0.02)


def test_a_draw_is_the_same_again_and_another_in_every_step() -> None:
    """A resumed run sees what it would have seen."""
    assert MASKING.hide(ROW, "3 7") == MASKING.hide(ROW, "3 7")
    assert MASKING.hide(ROW, "3 7").places != MASKING.hide(ROW, "4 7").places


def test_a_short_row_hides_one_token() -> None:
    """A row without a label would teach nothing, and a step of such rows has no mean."""
    shown = [MASKING.hide(EncodedRow([1, 50, 51, 2], 4, "b:1"), str(step)) for step in range(30)]
    assert all(isinstance(row, MaskedRow) and row.num_labels >= 1 for row in shown)


def test_a_row_of_special_tokens_alone_is_refused() -> None:
    """It would have no label, and a step of such rows no mean."""
    MASKING.check(EncodedRow([1, 50, 2], 3, "b:1"))
    with pytest.raises(DataError, match="b:2: the text has no token"):
        MASKING.check(EncodedRow([1, 2], 2, "b:2"))


def test_all_tokens_of_a_text_are_read() -> None:
    """Of a completion the last is predicted only."""
    assert MASKING.hide(ROW, "1").num_inputs == len(ROW.token_ids) == ROW.num_inputs + 1


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    """There would be nothing to put in a token's place."""

    class Plain:
        mask_token_id = None

    with pytest.raises(ConfigError, match="mask"):
        Masking.of(Plain(), 0.15, 0)
