"""model/fresh_attention.py: rows that follow a shared beginning see what they would see with a copy of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atoll.model import fresh_attention
from atoll.model.batch import PackedBatch
from atoll.model.fresh_attention import FreshAttention, blocks_of

HEADS, KV_HEADS, SIZE = 6, 2, 4
BEGINNING, TAILS = 5, (3, 1, 4, 3)


def shared_batch() -> PackedBatch:
    """A beginning of 5 tokens that four rows follow, and a row beside them."""
    rows = [[7] * BEGINNING, *[[8] * tail for tail in TAILS], [9] * 6]
    return PackedBatch.of(rows, context=[0, *[BEGINNING] * len(TAILS), 0], follows=[-1, *[0] * len(TAILS), -1])


def copied_batch() -> PackedBatch:
    return PackedBatch.of([[7] * (BEGINNING + tail) for tail in TAILS] + [[9] * 6])


def as_copies(x: Tensor) -> Tensor:
    """Of packed [T, …] with the beginning once, what the rows would hold with a copy each."""
    pieces = x.split([BEGINNING, *TAILS, 6])
    return torch.cat([piece for tail in pieces[1:-1] for piece in (pieces[0], tail)] + [pieces[-1]])


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = shared_batch().num_tokens
    return [torch.randn(total, heads, SIZE, generator=generator, dtype=torch.float64).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("limit", [512, 2], ids=["stored scores", "torch's kernel"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_shared_beginning_is_as_good_as_copies(monkeypatch: pytest.MonkeyPatch, window: int | None, limit: int, grad: bool) -> None:
    """Outputs, and the gradients of the beginning: the sum over all rows that follow it."""
    monkeypatch.setattr(fresh_attention, "_STORED_SCORES_LIMIT", limit)
    weight = torch.arange(1.0, HEADS * SIZE + 1, dtype=torch.float64)
    found = []
    for batch, copies in ((shared_batch(), False), (copied_batch(), True)):
        leaves = draw()
        with torch.set_grad_enabled(grad):
            out = FreshAttention(batch)(*[as_copies(leaf) if copies else leaf for leaf in leaves], window)
            of_rows = out if copies else as_copies(out)
            if grad:
                (of_rows * weight).sin().sum().backward()
        found.append((of_rows.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    for ours, truth in zip(found[0][1], found[1][1], strict=True):
        assert not grad or torch.allclose(ours, truth, rtol=0, atol=1e-10)


def test_the_backward_passes_gradcheck() -> None:
    """Finite differences, so that the formula itself is no shared mistake; ragged rows, so that padding is there."""
    attention = FreshAttention(shared_batch())
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 4), draw())


def test_rows_of_other_lengths_get_a_block_of_their_own() -> None:
    """Several jobs' rows in one batch: a long one must not pad all the others to its length."""
    blocks = blocks_of(PackedBatch.of([[5] * length for length in (4, 40, 5, 4, 41)]))
    assert sorted((block.num_rows, block.length) for block in blocks) == [(2, 41), (3, 5)]
    assert sorted(token for block in blocks for token in block.tokens.tolist()) == list(range(94))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    """Jobs share a batch; the first token's job may have diverged, and padding must not copy it into others' rows."""
    batch = PackedBatch.of([[5] * 3, [6] * 6, [7] * 5])
    q, k, v = (torch.ones(batch.num_tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for tensor in (q, k, v):
        tensor[:3] = float("nan")
        tensor.requires_grad_()
    out = FreshAttention(batch)(q, k, v, None)
    out[3:].sum().backward()
    assert bool(out[3:].isfinite().all())
    assert all(tensor.grad is not None and bool(tensor.grad[3:].isfinite().all()) for tensor in (q, k, v))
