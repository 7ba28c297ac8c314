"""model/apply.py: LoRA's update is PEFT's, in value and gradient, for one adapter and for a batch of many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model
from torch import Tensor

from atoll.model.adapter import Adapter
from atoll.model.apply import Part, Update, linear
from atoll.model.bank import LoraBank, Slot
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder, _Gated, _RmsNorm, _rotate_both
from atoll.model.kernels.thin import dropped
from atoll.model.loss import label_losses
from atoll.model.rope import rotate
from atoll.model.sites import QKV, TARGETS, module_path
from atoll.train.weights import TrainableAdapter

SPECS: dict[str, dict[str, Any]] = {
    "all linears": {},
    "q and v": {"target_modules": ("q_proj", "v_proj")},
    "k alone": {"target_modules": ("k_proj",)},
    "o and down": {"target_modules": ("o_proj", "down_proj")},
    "up alone": {"target_modules": ("up_proj",)},
    "one site by its path": {"target_modules": ("layers.1.self_attn.q_proj", "gate_proj")},
    "rank 1": {"rank": 1},
    "rank pattern": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.0.self_attn.q_proj": 1.0, "q_proj": 9.0, "down_proj": 3.5}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"o_proj": 2}},
    "one layer": {"layers_to_transform": (1,)},
    "last layer, down": {"layers_to_transform": (2,), "target_modules": ("down_proj",)},
}


def label_loss_of(decoder: Decoder, rows: Sequence[Sequence[int]], weights: Sequence[TrainableAdapter | None]) -> Tensor:
    """Σ over all rows of the loss of every token but the first."""
    starts = PackedBatch.of(rows).row_starts
    outputs = [place for start, stop in pairwise(starts) for place in range(start, stop - 1)]
    batch = PackedBatch.of(rows, outputs=outputs)
    segments = [Segment(starts[i], starts[i + 1], weight) for i, weight in enumerate(weights) if weight is not None]
    hidden = decoder.forward(batch, AdapterBatch(tuple(segments)))
    return label_losses(hidden, decoder.head, torch.tensor([token for row in rows for token in row[1:]])).sum()


def assert_same_gradients(found: Adapter, expected: Any, rtol: float = 1e-5) -> None:
    """Each factor's gradient, to a share of its largest element. expected(site, "A" or "B") gives the reference."""
    for site, module in found.modules.items():
        for name, grad in (("A", module.a), ("B", module.b)):
            truth = expected(site, name)
            assert truth.abs().max() > 0, (site, name)
            torch.testing.assert_close(grad, truth, rtol=0, atol=rtol * float(truth.abs().max()), msg=lambda text, at=(site, name): f"{at}: {text}")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_and_gradients_are_pefts(spec: str, family: str, tmp_path: Path) -> None:
    """An adapter must mean here what it means in PEFT, through files that we write: the loss it trains on, and every factor's gradient."""
    model = tiny_model(family)
    decoder = decoder_of(model)
    adapter = random_adapter(decoder, **SPECS[spec])
    theirs = peft_model(model, adapter, tmp_path)
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    total = torch.zeros(())
    for row, logits in zip(ROWS[:3], packed_logits(decoder, ROWS[:3], [weights] * 3), strict=True):
        truth = reference(theirs, row)
        torch.testing.assert_close(logits, truth, **CLOSE)
        with torch.no_grad():  # validation's path
            torch.testing.assert_close(packed_logits(decoder, [row], [weights])[0], truth, **CLOSE)
        total = total + F.cross_entropy(truth[:-1], torch.tensor(row[1:]), reduction="sum")
    base = packed_logits(decoder, ROWS[:1])[0]
    assert (logits.shape, base.shape) == ((12, 320), (8, 320))
    assert (reference(theirs, ROWS[0]) - base).abs().max() > 1e-3, "the adapter must move something, or nothing is tested"
    total.backward()
    loss = label_loss_of(decoder, ROWS[:3], [weights] * 3)
    loss.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)

    def expected(site: Any, factor: str) -> Tensor:
        module = theirs.get_submodule("base_model.model." + module_path(site))
        return getattr(module, f"lora_{factor}")["default"].weight.grad

    assert_same_gradients(weights.adapter(weights.grads), expected)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter]:
    """Ranks 4, 8, 16 and 12 (padded to 16), with different targets and layers."""
    return [
        random_adapter(decoder, 4, seed=1, target_modules=("q_proj", "v_proj")),
        random_adapter(decoder, 8, seed=2),
        random_adapter(decoder, 16, seed=3, layers_to_transform=(1,)),
        random_adapter(decoder, 12, seed=4, target_modules=("k_proj", "o_proj", "down_proj"), rank_pattern={"o_proj": 5}, use_rslora=True),
    ]


@pytest.fixture
def slots(decoder: Decoder, adapters: list[Adapter]) -> list[Slot | None]:
    """The base and the four adapters, resident."""
    bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
    return [None, *(bank.load(adapter) for adapter in adapters)]


MIXED_ROWS = [[5, 6, 7, 8, 9, 10], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36], [40, 41, 42, 43], [50, 51, 52, 53, 54]]


@torch.no_grad()
def test_a_mixed_batch_gives_each_row_its_answer_alone(decoder: Decoder, adapters: list[Adapter], slots: list[Slot | None], tmp_path: Path) -> None:
    """Batching is an optimisation: rows with other adapters beside them must not move a logit by more than rounding."""
    together = packed_logits(decoder, MIXED_ROWS, slots)
    for index, (row, slot, mixed) in enumerate(zip(MIXED_ROWS, slots, together, strict=True)):
        torch.testing.assert_close(mixed, packed_logits(decoder, [row], [slot])[0], **CLOSE)
        model = tiny_model("llama")
        judge = model if slot is None else peft_model(model, adapters[index - 1], tmp_path / str(index), trainable=False)
        torch.testing.assert_close(mixed, reference(judge, row), **CLOSE)


@torch.no_grad()
def test_a_mixed_decode_step_gives_each_row_its_answer_alone(decoder: Decoder, slots: list[Slot | None]) -> None:
    """Decode takes another path (one batched product a site and bucket); it must agree with the plain one, also for base rows and shuffled rows."""
    bank = next(slot.bank for slot in slots if slot is not None)
    order = [3, 0, 4, 1, 2]
    cache = decoder.new_cache(num_pages=8)
    places = [[6], [0], [3], [1], [7]]
    batch = PackedBatch.of([MIXED_ROWS[i][:-1] for i in order], pages=places)
    starts = batch.row_starts
    segments = tuple(Segment(starts[n], starts[n + 1], slots[i]) for n, i in enumerate(order) if slots[i] is not None)
    decoder.forward(batch, AdapterBatch(segments), cache)
    step = PackedBatch.of([MIXED_ROWS[i][-1:] for i in order], context=[len(MIXED_ROWS[i]) - 1 for i in order], pages=places)
    with_adapter = [(token, slots[i]) for token, i in enumerate(order) if slots[i] is not None]
    rows = bank.rows([token for token, _ in with_adapter], [slot for _, slot in with_adapter])
    assert len(rows.buckets) == 2, "ranks 4 and 8 share a bucket, 12 and 16 another"
    logits = decoder.logits(decoder.forward(step, AdapterBatch(bank_rows=rows), cache))
    for token, i in enumerate(order):
        torch.testing.assert_close(logits[token], packed_logits(decoder, [MIXED_ROWS[i]], [slots[i]])[0][-1], **CLOSE)


@torch.no_grad()
def test_a_base_row_does_not_move_a_bit_whoever_sits_beside_it(decoder: Decoder, slots: list[Slot | None]) -> None:
    """A user of the plain base must get the plain base, bit for bit, whatever adapters his neighbours use."""
    rows = MIXED_ROWS[:3]
    plain = packed_logits(decoder, rows, [None, None, None])[0]
    for beside in ([None, slots[1], slots[2]], [None, slots[3], slots[4]], [None, slots[2], None]):
        assert torch.equal(packed_logits(decoder, rows, beside)[0], plain)


@torch.no_grad()
def test_a_base_row_of_a_decode_step_does_not_move_a_bit(decoder: Decoder, slots: list[Slot | None]) -> None:
    """The same for decode, where rows share batched products."""
    bank = next(slot.bank for slot in slots if slot is not None)
    found = []
    for beside in ([], [1, 2], [3, 4]):
        cache = decoder.new_cache(num_pages=3)
        decoder.forward(PackedBatch.of([row[:2] for row in MIXED_ROWS[:3]], pages=[[0], [1], [2]]), cache=cache)
        step = PackedBatch.of([[row[2]] for row in MIXED_ROWS[:3]], context=[2] * 3, pages=[[0], [1], [2]])
        rows = bank.rows([1, 2], [slots[i] for i in beside]) if beside else None
        found.append(decoder.forward(step, AdapterBatch(bank_rows=rows), cache))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_gradients_of_several_adapters_in_one_batch_are_each_its_own(decoder: Decoder, adapters: list[Adapter]) -> None:
    """Many jobs can train in one pass; a gradient that leaked over a segment's bound would mix two customers' data."""
    together = [TrainableAdapter(adapter, decoder.shape.linears) for adapter in adapters]
    label_loss_of(decoder, MIXED_ROWS, [None, *together]).backward()
    for adapter, row, weights in zip(adapters, MIXED_ROWS[1:], together, strict=True):
        alone = TrainableAdapter(adapter, decoder.shape.linears)
        label_loss_of(decoder, [row], [alone]).backward()
        truth = alone.adapter(alone.grads).modules
        assert_same_gradients(weights.adapter(weights.grads), lambda site, f, truth=truth: truth[site].a if f == "A" else truth[site].b)


def test_one_adapter_on_two_segments_adds_its_gradients(decoder: Decoder, adapters: list[Adapter]) -> None:
    """A batch may hold an adapter's rows apart from one another; the second segment must add to the first, not replace it."""
    apart, whole = (TrainableAdapter(adapters[1], decoder.shape.linears) for _ in range(2))
    label_loss_of(decoder, [MIXED_ROWS[0], MIXED_ROWS[1], MIXED_ROWS[2]], [apart, None, apart]).backward()
    label_loss_of(decoder, [MIXED_ROWS[0], MIXED_ROWS[2]], [whole, whole]).backward()
    torch.testing.assert_close(apart.grads, whole.grads, rtol=0, atol=1e-5 * float(whole.grads.abs().max()))


def fused_update(num_in: int, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Update:
    """Two members of ranks 2 and 3 on columns 0 to 4 and 6 to 9 of ten."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return Update(draw(5, num_in), (Part(0, 2, 0, 4, draw(2, 4), 0.5), Part(2, 5, 6, 9, draw(3, 3), 2.0)), dropout, 11)


class Fixed:
    """AdapterWeights that give one update everywhere."""

    def __init__(self, update: Update) -> None:
        self.only = update

    def update(self, layer: int, group: int) -> Update:
        return self.only


def run_linear(x: Tensor, weight: Tensor, bias: Tensor, *updates: Update) -> Tensor:
    """`linear` with the first update on tokens 1 to 4 and the second on 4 to 7 of 8."""
    segments = tuple(Segment(1 + 3 * i, 4 + 3 * i, Fixed(update)) for i, update in enumerate(updates))
    return linear(x, weight, bias, 0, QKV, AdapterBatch(segments))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_by_hand_passes_gradcheck(dropout: float) -> None:
    """Finite differences in float64 over two segments: x, every A, every B; with dropout the mask must be the same one in both directions."""
    generator = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (10, 6), (10,)))
    first, second = fused_update(6, dropout, 1), fused_update(6, dropout, 2)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        rebuilt = []
        for update, (a, *bs) in ((first, factors[:3]), (second, factors[3:])):
            rebuilt.append(update._replace(a=a, parts=tuple(part._replace(b=b) for part, b in zip(update.parts, bs, strict=True))))
        return run_linear(x, weight, bias, *rebuilt)

    factors = [t for update in (first, second) for t in (update.a, *(part.b for part in update.parts))]
    # the product behind a B's gradient is rounded to float32, hence the tolerance
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *factors), atol=1e-5, rtol=1e-4)


def test_gradients_of_the_linear_are_autograds() -> None:
    """The same against autograd of the formula; and the frozen weight gets none."""
    generator = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((8, 6), (10, 6), (10,)))
    x.requires_grad_()
    update = fused_update(6, dtype=torch.float32)
    leaves = [x, update.a, *(part.b for part in update.parts)]

    def by_formula() -> Tensor:
        y = F.linear(x, weight, bias)
        delta = torch.zeros(8, 10)
        for part in update.parts:
            a = update.a[part.rank_start : part.rank_stop]
            delta = delta + F.pad(part.scaling * (x[1:4] @ a.T) @ part.b, (part.out_start, 10 - part.out_stop, 1, 4))
        return y + delta

    grads = []
    for y in (run_linear(x, weight, bias, update), by_formula()):
        grads.append((y.detach(), *torch.autograd.grad((y * torch.arange(1.0, 81).view(8, 10)).sum(), leaves)))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-3)
    assert not weight.requires_grad


def test_factors_of_a_frozen_base_need_no_gradient_of_the_first_input() -> None:
    """The first block's input has no gradient; the backward must not make one, and must not fail for want of it."""
    x, weight = torch.randn(8, 6), torch.randn(10, 6)
    update = fused_update(6, dtype=torch.float32)
    run_linear(x, weight, torch.zeros(10), update).sum().backward()
    assert x.grad is None
    assert update.a.grad is not None


def test_a_dropout_mask_follows_from_its_seed() -> None:
    """A resumed run must draw the mask of the killed one, the backward that of its forward, and another step another mask."""
    ones = torch.ones(400, 50)
    mask = dropped(ones, 0.25, 5)
    assert torch.equal(mask, dropped(ones, 0.25, 5))
    assert not torch.equal(mask, dropped(ones, 0.25, 6))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(mask.mean()) - 1) < 0.02, "the expectation must stay"
    assert dropped(ones, 0.0, 5) is ones


def test_a_trained_adapter_sees_dropout_only_with_a_seed(decoder: Decoder) -> None:
    """Validation runs without a seed; a score measured under dropout would be worse than what users get."""
    adapter = random_adapter(decoder, dropout=0.5)
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    plain = packed_logits(decoder, ROWS[:1], [weights])[0]
    bare = TrainableAdapter(random_adapter(decoder), decoder.shape.linears)
    assert torch.equal(plain, packed_logits(decoder, ROWS[:1], [bare])[0])
    weights.dropout_seed = 3
    assert not torch.equal(plain, packed_logits(decoder, ROWS[:1], [weights])[0])


def test_bfloat16_masters_stay_float32(decoder: Decoder) -> None:
    """The optimizer's small steps vanish in bfloat16; factors are rounded on the way in, and their gradients leave in the masters' dtype."""
    half = decoder_of(tiny_model("llama"), torch.bfloat16)
    adapter = random_adapter(half)
    weights, exact = TrainableAdapter(adapter, half.shape.linears), TrainableAdapter(adapter, half.shape.linears)
    label_loss_of(half, ROWS[:3], [weights] * 3).backward()
    label_loss_of(decoder, ROWS[:3], [exact] * 3).backward()
    assert weights.grads.dtype == torch.float32
    assert float(F.cosine_similarity(weights.grads, exact.grads, dim=0)) > 0.999


# The decoder's own small backward passes, written by hand for the same reason.


def test_rms_norm_has_autograds_gradient() -> None:
    """It computes in float32 whatever comes in, so autograd of the plain formula is the judge."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, scale = torch.linspace(0.5, 1.5, 16), torch.linspace(-1, 2, 80).view(5, 16)
    ours = torch.autograd.grad((_RmsNorm.apply(x, weight, 1e-3, torch.float32) * scale).sum(), x)[0]
    formula = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(_RmsNorm.apply(x, weight, 1e-3, torch.float32), formula)
    torch.testing.assert_close(ours, torch.autograd.grad((formula * scale).sum(), x)[0], rtol=1e-5, atol=1e-6)


def test_a_rotation_has_its_transpose_as_gradient() -> None:
    """<R x, y> = <x, Rᵀ y>, and autograd of the formula agrees."""
    generator = torch.Generator().manual_seed(0)
    x, y, angle = torch.randn(5, 3, 8, generator=generator).requires_grad_(), torch.randn(5, 3, 8, generator=generator), torch.randn(5, 4)
    cos, sin = angle.cos(), angle.sin()
    found = torch.autograd.grad((_rotate_both(x, cos, sin) * y).sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad((rotate(x, cos, sin) * y).sum(), x)[0])
    torch.testing.assert_close((found * x).sum(), (rotate(x, cos, sin) * y).sum())


def test_the_gated_product_passes_gradcheck() -> None:
    """silu(gate) * up, finite differences in float64."""
    gate_up = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(_Gated.apply, (gate_up,))


def test_every_target_has_a_test_of_its_gradient() -> None:
    """Guards SPECS: the full adapter covers all seven linears."""
    assert {site.target for site in random_adapter(decoder_of(tiny_model("llama"))).modules} == set(TARGETS)
