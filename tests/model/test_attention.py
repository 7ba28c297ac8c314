"""model/attention.py: rows see their own past only, by every path: block, stored weights, cache."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import CLOSE, decoder_of, packed_logits, reference
from tests.conftest import tiny_model
from torch import Tensor

from atoll.model import fresh_attention
from atoll.model.attention import Attention
from atoll.model.batch import PackedBatch
from atoll.model.kv_cache import PAGE_TOKENS, KvCache

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


def test_long_rows_take_the_memory_efficient_kernel_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a length the weights are not stored; both sides of that line must train alike."""
    grads = []
    for limit in (512, 4):
        monkeypatch.setattr(fresh_attention, "_STORED_SCORES_LIMIT", limit)
        for window in (None, 3):
            leaves = [t.requires_grad_() for t in draw(15)]
            out = Attention(PackedBatch.of([[5] * n for n in (5, 1, 9)]), None)(0, *leaves, window)
            (out * torch.arange(1, HEADS * SIZE + 1)).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
    for stored, efficient in [*zip(grads[0], grads[2], strict=True), *zip(grads[1], grads[3], strict=True)]:
        torch.testing.assert_close(stored, efficient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 3, 40])
@torch.no_grad()
def test_decode_rows_short_rows_and_long_rows_share_one_call(window: int | None) -> None:
    """A continuous batch holds rows that decode beside chunks of any length, on scattered pages; each must follow the formula."""
    lengths = (70, 40, 61, 3)
    q, k, v = draw(sum(lengths))
    truth = by_formula(q, k, v, lengths, window).split(lengths)
    pieces = [t.split(lengths) for t in (q, k, v)]
    cache = KvCache(1, 9, KV_HEADS, SIZE, torch.float32)
    cache.keys[:, 8] = cache.values[:, 8] = torch.nan  # a page that nobody names
    done, pages = [0, 0, 0, 0], [[7, 0, 3], [2, 6], [1, 5], [4]]
    for step in [(40, 1, 20, 0), (28, 36, 20, 1), (1, 1, 5, 1), (1, 2, 16, 1)]:
        rows = [row for row in range(4) if step[row]]
        batch = PackedBatch.of([[5] * step[row] for row in rows], context=[done[row] for row in rows], pages=[pages[row] for row in rows])
        new = [torch.cat([piece[row][done[row] : done[row] + step[row]] for row in rows]) for piece in pieces]
        out = Attention(batch, cache)(0, *new, window).split(batch.lengths)
        for row, found in zip(rows, out, strict=True):
            torch.testing.assert_close(found, truth[row][done[row] : done[row] + step[row]], rtol=0, atol=1e-5)
            done[row] += step[row]
    assert done == list(lengths)


@torch.no_grad()
def test_what_an_earlier_owner_left_in_a_page_is_never_seen() -> None:
    """Pages are reused without being cleared; a look past one's own length would show another user's text."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    cache = decoder.new_cache(num_pages=2)
    decoder.forward(PackedBatch.of([[9, 8, 7, 6, 5, 4, 3] * 2, [30, 31]], pages=[[0], [1]]), cache=cache)
    decoder.forward(PackedBatch.of([[20, 21], [32, 33, 34, 35]], context=[0, 2], pages=[[0], [1]]), cache=cache)
    hidden = decoder.forward(PackedBatch.of([[22], [36]], context=[2, 6], pages=[[0], [1]]), cache=cache)
    logits = decoder.logits(hidden)
    torch.testing.assert_close(logits[0], reference(model, [20, 21, 22])[-1], **CLOSE)
    torch.testing.assert_close(logits[1], reference(model, [30, 31, 32, 33, 34, 35, 36])[-1], **CLOSE)


@torch.no_grad()
def test_nan_in_one_rows_pages_stays_in_that_row() -> None:
    """Rows of one call are padded to each other; were the padding another row's page, a damaged adapter would take its neighbours along."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    cache = decoder.new_cache(num_pages=5)
    decoder.forward(PackedBatch.of([[9, 8, 7, 6] * 10, [20, 21]], pages=[[0, 1], [2]]), cache=cache)
    cache.keys[:, :2] = cache.values[:, :2] = torch.nan
    hidden = decoder.forward(PackedBatch.of([[5], [22], [6, 7], [8]], context=[40, 2, 0, 0], pages=[[0, 1], [2], [3], [4]]), cache=cache)
    logits = decoder.logits(hidden)
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], reference(model, [20, 21, 22])[-1], **CLOSE)


@torch.no_grad()
def test_rows_share_the_pages_of_a_common_beginning() -> None:
    """Prefix reuse and forks: two rows read the same full page and write behind it, each into a page of its own."""
    model = tiny_model("llama")
    decoder = decoder_of(model)
    prompt = [5 + (7 * i) % 300 for i in range(PAGE_TOKENS)]
    cache = decoder.new_cache(num_pages=3)
    decoder.forward(PackedBatch.of([prompt], pages=[[1]]), cache=cache)
    tails = [[20, 21, 22], [30]]
    batch = PackedBatch.of(tails, context=[PAGE_TOKENS] * 2, pages=[[1, 0], [1, 2]])
    for tail, logits in zip(tails, decoder.logits(decoder.forward(batch, cache=cache)).split(batch.lengths), strict=True):
        torch.testing.assert_close(logits, reference(model, prompt + tail)[PAGE_TOKENS:], **CLOSE)


def test_a_row_without_enough_pages_is_our_own_mistake() -> None:
    """Its tokens would be stored over somebody else's."""
    with pytest.raises(AssertionError, match="more tokens than its pages"):
        Attention(PackedBatch.of([[5] * 33], pages=[[0]]), KvCache(1, 2, KV_HEADS, SIZE, torch.float32))


def test_a_long_packed_batch_with_gradients_equals_transformers() -> None:
    """Rows longer than the stored-weights limit, end to end: same logits with gradients on."""
    model = tiny_model("llama", max_position_embeddings=1024)
    decoder = decoder_of(model)
    row = [5 + i % 300 for i in range(600)]
    torch.testing.assert_close(packed_logits(decoder, [row, [7, 8]])[0], reference(model, row).detach(), **CLOSE)
