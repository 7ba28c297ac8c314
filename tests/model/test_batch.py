"""model/batch.py: rows' tokens end to end, with the places that the forward needs."""

from __future__ import annotations

import pytest

from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch


def test_rows_stand_end_to_end_with_their_own_positions() -> None:
    """Positions that ran on over the row bounds would rotate the second row as if it continued the first."""
    batch = PackedBatch.of([[5, 6, 7], [8], [9, 10]])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.row_starts == (0, 3, 4, 6)
    assert batch.lengths == (3, 1, 2)
    assert batch.row_of_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert (batch.num_rows, batch.num_tokens) == (3, 6)
    assert batch.pages is None


def test_positions_go_on_from_what_the_cache_holds() -> None:
    """A decode token at position 0 would be rotated as a beginning of text."""
    batch = PackedBatch.of([[5], [6, 7]], context=[11, 4], pages=[[2], [0, 1]])
    assert batch.positions.tolist() == [11, 4, 5]
    assert batch.pages == ((2,), (0, 1))


@pytest.mark.parametrize(("outputs", "index"), [("all", None), ("last", [2, 3, 5]), ([0, 4], [0, 4]), ([], [])])
def test_outputs_are_places_in_the_packed_tokens(outputs: object, index: list[int] | None) -> None:
    """These choose which states become logits."""
    found = PackedBatch.of([[5, 6, 7], [8], [9, 10]], outputs=outputs).output_index  # type: ignore[arg-type]
    assert (None if found is None else found.tolist()) == index


def test_context_must_name_every_row() -> None:
    """A caller's miscount would shift every later row's positions; it must not pass quietly."""
    with pytest.raises(ValueError, match="zip"):
        PackedBatch.of([[5], [6]], context=[3])


def test_one_adapter_for_all_tokens() -> None:
    """What training passes; the base alone is the empty batch."""
    weights = object()
    batch = AdapterBatch.single(weights, 6)  # type: ignore[arg-type]
    assert [(s.start, s.stop, s.weights) for s in batch.segments] == [(0, 6, weights)]
    assert BASE_ONLY.segments == ()
    assert BASE_ONLY.bank_rows is None
