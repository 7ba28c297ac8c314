"""model/apply.py: blocks of tokens that weight the same stacked factors differently, and blocks with merged weights of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.apply import Part, Update, linear
from atoll.model.batch import AdapterBatch, Segment
from atoll.model.loss import label_losses

P, EACH, D_IN, RANKS, D_OUT = 3, 4, 10, (5, 3), (7, 6)


class Fixed:
    """AdapterWeights with one Update everywhere."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def update(self, layer: int, group: int) -> Update:
        return self._update


class Blocks:
    """BlockWeights with given weights at group 0 alone."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def merged(self, layer: int, group: int, weight: Tensor) -> Tensor | None:
        return self._weights if group == 0 else None


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x and W of a fused linear with two members, the factors of both, and a mix for each of P blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (P * EACH, D_IN),
        "w": (sum(D_OUT), D_IN),
        "bias": (sum(D_OUT),),
        "a": (sum(RANKS), D_IN),
        "b0": (RANKS[0], D_OUT[0]),
        "b1": (RANKS[1], D_OUT[1]),
        "mix": (P, sum(RANKS)),
    }
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def update_of(t: dict[str, Tensor], **changes: object) -> Update:
    parts = (Part(0, RANKS[0], 0, D_OUT[0], t["b0"], 0.5), Part(RANKS[0], sum(RANKS), D_OUT[0], sum(D_OUT), t["b1"], 2.0))
    return Update(t["a"], parts, mix=t["mix"])._replace(**changes)


def by_definition(t: dict[str, Tensor]) -> Tensor:
    """Block after block, with plain operations that autograd knows."""
    rows = []
    for p in range(P):
        x = t["x"][p * EACH : (p + 1) * EACH]
        z = (x @ t["a"].T) * t["mix"][p]
        rows.append(x @ t["w"].T + t["bias"] + torch.cat([0.5 * z[:, : RANKS[0]] @ t["b0"], 2.0 * z[:, RANKS[0] :] @ t["b1"]], 1))
    return torch.cat(rows)


def test_a_mix_is_a_factor_on_z_with_and_without_gradients() -> None:
    """Searching (without gradients) and stepping (with) must score the same candidate."""
    t = tensors()
    adapters = AdapterBatch.single(Fixed(update_of(t)), P * EACH)
    truth = by_definition(t)
    torch.testing.assert_close(linear(t["x"], t["w"], t["bias"], 0, 0, adapters), truth)
    t["mix"].requires_grad_()
    torch.testing.assert_close(linear(t["x"], t["w"], t["bias"], 0, 0, AdapterBatch.single(Fixed(update_of(t)), P * EACH)), truth)


@pytest.mark.parametrize("trained", [("mix",), ("mix", "x"), ("x",), ("x", "a", "b0", "b1", "mix")])
def test_gradients_are_autograds(trained: tuple[str, ...]) -> None:
    """Gradients of the mix are what a search steps along; factors that are not trained must cost nothing and get none."""
    t = tensors()
    for name in trained:
        t[name].requires_grad_()
    weight = torch.randn(P * EACH, sum(D_OUT), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((by_definition(t) * weight).sum(), [t[name] for name in trained])
    found = linear(t["x"], t["w"], t["bias"], 0, 0, AdapterBatch.single(Fixed(update_of(t)), P * EACH))
    (found * weight).sum().backward()
    for name, gradient in zip(trained, expected, strict=True):
        # sums over a block's tokens are float32, whatever the compute dtype
        torch.testing.assert_close(t[name].grad, gradient, rtol=1e-6, atol=1e-5 if name == "mix" else 1e-9, msg=name)
    assert all(tensor.grad is None for name, tensor in t.items() if name not in trained)


def test_gradients_with_dropout_are_those_of_the_same_mask() -> None:
    """Nobody trains composition weights with dropout today; a mix that forgot the mask would be wrong silently."""
    t = tensors()
    t["mix"].requires_grad_()
    update = update_of(t, dropout=0.5, dropout_seed=3)
    out = linear(t["x"], t["w"], None, 0, 0, AdapterBatch.single(Fixed(update), P * EACH))
    out.sum().backward()
    step = torch.zeros_like(t["mix"])
    step[1, 2] = 1e-3
    with torch.enable_grad():
        moved = linear(t["x"], t["w"], None, 0, 0, AdapterBatch.single(Fixed(update._replace(mix=t["mix"] + step)), P * EACH))
    assert t["mix"].grad is not None
    torch.testing.assert_close((moved.sum() - out.sum()) / 1e-3, t["mix"].grad[1, 2], rtol=1e-4, atol=1e-4)


def test_a_mix_stays_in_its_segment() -> None:
    """Two segments with mixes of different numbers of blocks, and base tokens between them."""
    t = tensors()
    first, second = update_of(t, mix=t["mix"][:2]), update_of(t, mix=t["mix"][2:])
    segments = (Segment(0, 4, Fixed(first)), Segment(6, 9, Fixed(second)))
    found = linear(t["x"], t["w"], None, 0, 0, AdapterBatch(segments))
    for start, stop, mix in ((0, 2, t["mix"][0]), (2, 4, t["mix"][1]), (6, 9, t["mix"][2])):
        alone = linear(t["x"][start:stop], t["w"], None, 0, 0, AdapterBatch.single(Fixed(update_of(t, mix=mix[None])), stop - start))
        torch.testing.assert_close(found[start:stop], alone)
    for start, stop in ((4, 6), (9, 12)):
        torch.testing.assert_close(found[start:stop], F.linear(t["x"][start:stop], t["w"]))


def test_a_mix_of_ones_is_no_mix_and_of_zeros_is_the_base_to_the_bit() -> None:
    """In the compute dtype too: a candidate of weight 1 is its adapter, one of weight 0 leaves every bit of the base."""
    for dtype in (torch.float32, torch.bfloat16):
        t = tensors(dtype)
        ones, zeros, plain = (update_of(t, mix=mix) for mix in (torch.ones(P, sum(RANKS)), torch.zeros(P, sum(RANKS)), None))
        out = [linear(t["x"], t["w"], None, 0, 0, AdapterBatch.single(Fixed(update), P * EACH)) for update in (ones, zeros, plain)]
        assert torch.equal(out[0], out[2])
        assert torch.equal(out[1], F.linear(t["x"], t["w"]))


def test_blocks_may_have_weights_of_their_own() -> None:
    """Merged weights replace the base's, bias and all other groups stay."""
    t = tensors()
    weights = torch.stack([t["w"] * (p + 1) for p in range(P)])
    for bias in (t["bias"], None):
        found = linear(t["x"], t["w"], bias, 0, 0, AdapterBatch(blocks=Blocks(weights)))
        expected = torch.cat([F.linear(t["x"][p * EACH : (p + 1) * EACH], weights[p], bias) for p in range(P)])
        torch.testing.assert_close(found, expected)
        assert torch.equal(linear(t["x"], t["w"], bias, 0, 1, AdapterBatch(blocks=Blocks(weights))), F.linear(t["x"], t["w"], bias))


def test_losses_of_labels_may_be_weighted() -> None:
    """A search needs each row's loss, with a gradient that weights the rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(600, 8, generator=generator).requires_grad_(), torch.randn(50, 8, generator=generator)
    labels, counts = torch.randint(0, 50, (600,), generator=generator), torch.rand(600, generator=generator)
    each = label_losses(hidden, head, labels)
    truth = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    torch.testing.assert_close(each, truth)
    found = torch.autograd.grad((each * counts).sum(), hidden)
    torch.testing.assert_close(found, torch.autograd.grad((truth * counts).sum(), hidden))
