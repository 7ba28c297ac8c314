"""The base's losses with common beginnings computed once: the numbers of the plain way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.adapters import decoder_of, random_adapter
from tests.compose.scenes import examples
from tests.conftest import tiny_model

from atoll.compose import base_losses as module
from atoll.compose.base_losses import base_losses
from atoll.compose.losses import losses
from atoll.compose.pool import Pool
from atoll.data.encode import EncodedRow
from atoll.errors import DataError
from atoll.model.decoder import Decoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 losses of about 6 nats


def plain(decoder: Decoder, rows: list[EncodedRow]) -> torch.Tensor:
    """The search's own losses, with every weight 0."""
    return losses(decoder, Pool.of([random_adapter(decoder, 2)], decoder), torch.zeros(1, 1), rows)[0]


def beginning_with(tokens: list[int], rows: list[EncodedRow]) -> list[EncodedRow]:
    return [replace(row, token_ids=tokens + row.token_ids, num_prompt=len(tokens) + row.num_prompt) for row in rows]


def test_losses_are_those_of_the_search_at_weight_zero(decoder: Decoder) -> None:
    """The base stands in one table with compositions, so it must be measured alike, prompts as labels too."""
    rows = examples(5)
    torch.testing.assert_close(base_losses(decoder, rows), plain(decoder, rows), **CLOSE)
    taught = [replace(row, train_on_prompt=True) for row in rows]
    torch.testing.assert_close(base_losses(decoder, taught), plain(decoder, taught), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_common_beginning_is_computed_once_and_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of shots, one of them no whole number of pages, in any order, in several portions; and a row that shares nothing."""
    decoder = decoder_of(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randint(5, 300, (size,), generator=generator).tolist() for size in (150, 200))
    rows = [*beginning_with(one, examples(3)), *beginning_with(other, examples(3, seed=1)), examples(1, seed=2)[0]]
    rows = [rows[place] for place in (5, 0, 6, 3, 1, 4, 2)]
    expected = plain(decoder, rows)
    tokens: list[int] = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, batch, *a, **k: (tokens.append(batch.num_tokens), forward(self, batch, *a, **k))[1])
    monkeypatch.setattr(module, "FORWARD_TOKENS", 400)
    monkeypatch.setattr(module, "_PREFILL_TOKENS", 64)
    torch.testing.assert_close(base_losses(decoder, rows), expected, **CLOSE)
    assert sum(tokens) < 150 + 200 + 7 * 50 < sum(len(row.token_ids) for row in rows)


def test_a_row_whose_prompt_is_all_common_still_has_a_token_to_predict_from() -> None:
    """The same prompt with several answers: the last prompt token is what the first label is read from, so it is never in the common part."""
    decoder = decoder_of(tiny_model("llama"))
    prompt = list(range(10, 10 + 4 * 32))
    rows = [EncodedRow([*prompt, *answer], len(prompt), "few.jsonl:1") for answer in ([7], [8, 9], [7])]
    found = base_losses(decoder, rows)
    torch.testing.assert_close(found, plain(decoder, rows), **CLOSE)
    assert found[0] == pytest.approx(float(found[2]), abs=1e-5)


def test_a_rope_that_depends_on_the_length_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the same beginning has other keys in rows of other lengths."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    decoder = decoder_of(tiny_model("llama", rope_scaling=scaling, max_position_embeddings=96))
    assert decoder.rotary.by_length
    monkeypatch.setattr(Decoder, "new_cache", lambda self, num: pytest.fail("a beginning was shared"))
    rows = beginning_with(list(range(5, 85)), examples(2, prompt=3, answer=2))
    found = base_losses(decoder, rows)
    torch.testing.assert_close(found, plain(decoder, rows), **CLOSE)


def test_rows_without_a_loss_are_refused(decoder: Decoder) -> None:
    with pytest.raises(DataError, match="no label token"):
        base_losses(decoder, [EncodedRow([5, 6], 2, "few.jsonl:1")])
