"""model/attention.py: rows see their own past only, by every path: block, stored weights, cache."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import CLOSE, decoder_of, packed_logits, reference
from tests.conftest import tiny_model
from torch import Tensor

from atoll.model import attention as attention_module
from atoll.model.attention import Attention, _BlockAttention, _mask
from atoll.model.batch import PackedBatch
from atoll.model.kv_cache import KvCache

HEADS, KV_HEADS, SIZE = 6, 2, 8


def draw(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, heads, SIZE, generator=generator, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def by_formula(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v, token by token and head by head."""
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for place in range(length):
            first = 0 if window is None else max(0, place + 1 - window)
            seen = slice(start + first, start + place + 1)
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                weights = torch.softmax(k[seen, shared] @ q[start + place, head] / SIZE**0.5, 0)
                out[start + place, head] = weights @ v[seen, shared]
        start += length
    return out.flatten(1)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [(7,), (4, 4, 4), (5, 1, 9)], ids=["one row", "equal rows", "ragged rows"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_fresh_rows_follow_the_formula(lengths: tuple[int, ...], window: int | None, grad: bool) -> None:
    """Training and evaluation come here; a token that saw its future or its neighbour's row would make every loss a lie."""
    q, k, v = draw(sum(lengths))
    batch = PackedBatch.of([[5] * length for length in lengths])
    out = Attention(batch, None)(0, q.requires_grad_(grad), k, v, window)
    torch.testing.assert_close(out, by_formula(q, k, v, lengths, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_autograds_own(window: int | None) -> None:
    """The backward of the stored-weights path is written by hand; autograd of the plain formula is the judge."""
    lengths = (5, 1, 9)
    grads = []
    for run in (
        lambda q, k, v: Attention(PackedBatch.of([[5] * n for n in lengths]), None)(0, q, k, v, window),
        lambda q, k, v: by_formula(q, k, v, lengths, window),
    ):
        leaves = [t.requires_grad_() for t in draw(sum(lengths), dtype=torch.float64)]
        (run(*leaves) * torch.arange(1, HEADS * SIZE + 1)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_block_attention_passes_gradcheck() -> None:
    """Finite differences, so that the formula itself is no shared mistake."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 4, 3, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    mask = _mask(0, (4,), 3, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda q, k, v: _BlockAttention.apply(q, k, v, mask), (q, k, v))


def test_long_rows_take_the_memory_efficient_kernel_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a length the weights are not stored; both sides of that line must train alike."""
    grads = []
    for limit in (512, 4):
        monkeypatch.setattr(attention_module, "_STORED_SCORES_LIMIT", limit)
        for window in (None, 3):
            leaves = [t.requires_grad_() for t in draw(15)]
            out = Attention(PackedBatch.of([[5] * n for n in (5, 1, 9)]), None)(0, *leaves, window)
            (out * torch.arange(1, HEADS * SIZE + 1)).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
    for stored, efficient in [*zip(grads[0], grads[2], strict=True), *zip(grads[1], grads[3], strict=True)]:
        torch.testing.assert_close(stored, efficient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_decode_rows_and_prefill_rows_share_one_call(window: int | None) -> None:
    """A continuous batch holds rows that decode beside rows that prefill, on scattered cache rows; each must follow the formula."""
    lengths = (7, 4, 6)
    q, k, v = draw(sum(lengths))
    truth = by_formula(q, k, v, lengths, window).split(lengths)
    pieces = [t.split(lengths) for t in (q, k, v)]
    cache = KvCache(1, 6, 16, KV_HEADS, SIZE, torch.float32)
    done, places = [0, 0, 0], [5, 1, 3]
    for step in [(6, 0, 2), (1, 4, 3), (0, 0, 1)]:
        rows = [row for row in range(3) if step[row]]
        batch = PackedBatch.of([[5] * step[row] for row in rows], context=[done[row] for row in rows], kv_rows=[places[row] for row in rows])
        new = [torch.cat([piece[row][done[row] : done[row] + step[row]] for row in rows]) for piece in pieces]
        out = Attention(batch, cache)(0, *new, window).split(batch.lengths)
        for row, found in zip(rows, out, strict=True):
            torch.testing.assert_close(found, truth[row][done[row] : done[row] + step[row]], rtol=0, atol=1e-5)
            done[row] += step[row]
    assert done == list(lengths)


@torch.no_grad()
def test_what_an_earlier_owner_left_in_a_cache_row_is_never_seen() -> None:
    """Rows are reused without being cleared; a look past one's own length would show another user's text."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    cache = decoder.new_cache(num_rows=2, row_tokens=16)
    decoder.forward(PackedBatch.of([[9, 8, 7, 6, 5, 4, 3] * 2, [30, 31]], kv_rows=[0, 1]), cache=cache)
    decoder.forward(PackedBatch.of([[20, 21], [32, 33, 34, 35]], context=[0, 2], kv_rows=[0, 1]), cache=cache)
    hidden = decoder.forward(PackedBatch.of([[22], [36]], context=[2, 6], kv_rows=[0, 1]), cache=cache)
    logits = decoder.logits(hidden)
    torch.testing.assert_close(logits[0], reference(model, [20, 21, 22])[-1], **CLOSE)
    torch.testing.assert_close(logits[1], reference(model, [30, 31, 32, 33, 34, 35, 36])[-1], **CLOSE)


@torch.no_grad()
def test_idle_rows_between_running_ones_cost_an_answer_nothing() -> None:
    """Decode reads the cache from row 0 to the highest running row in place, idle rows included; what those hold must stay outside."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    cache = decoder.new_cache(num_rows=9, row_tokens=16)
    decoder.forward(PackedBatch.of([[9, 8, 7, 6], [20, 21]], kv_rows=[0, 8]), cache=cache)
    logits = decoder.logits(decoder.forward(PackedBatch.of([[22]], context=[2], kv_rows=[8]), cache=cache))
    torch.testing.assert_close(logits[0], reference(model, [20, 21, 22])[-1], **CLOSE)


def test_a_long_packed_batch_with_gradients_equals_transformers() -> None:
    """Rows longer than the stored-weights limit, end to end: same logits with gradients on."""
    model = tiny_model("llama", max_position_embeddings=1024)
    decoder = decoder_of(model)
    row = [5 + i % 300 for i in range(600)]
    torch.testing.assert_close(packed_logits(decoder, [row, [7, 8]])[0], reference(model, row).detach(), **CLOSE)
