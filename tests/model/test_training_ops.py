"""model/kernels/training.py: the compiled operations of a training step give what plain torch gives, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.adapters import decoder_of, random_adapter, random_reft
from tests.conftest import tiny_model
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.adapter import Adapter
from atoll.model.decoder import Decoder
from atoll.model.kernels import build
from atoll.model.kernels.training import training_ops
from atoll.model.loss import label_losses
from atoll.model.positions import Positions
from atoll.train.rows import RowGroup, adapter_batch, pack_groups
from atoll.train.weights import TrainableAdapter

pytestmark = [
    pytest.mark.usefixtures("built_kernels"),
    pytest.mark.skipif(not build.usable_targets() or build.compiler_path() is None, reason="no compiler, or a processor without AVX2 or NEON"),
]

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"hidden_size": 80, "intermediate_size": 72, "num_attention_heads": 5, "num_key_value_heads": 1}),  # no multiples of 16, one key head
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("qwen3", {}),  # norms on heads: attention stays plain
]
BEGINNING = list(range(10, 40))


def group(*tails: int) -> RowGroup:
    rows = [EncodedRow([*BEGINNING, *range(41 + i, 41 + i + tail), 7, 2], len(BEGINNING) + tail, "row") for i, tail in enumerate(tails)]
    return RowGroup(rows, len(BEGINNING))


GROUPS = [group(3, 8, 21, 1), RowGroup(group(5, 40).rows), group(2, 2)]


@functools.cache
def decoders(family: str, changes: tuple[tuple[str, Any], ...]) -> tuple[Decoder, Decoder]:
    model = tiny_model(family, **dict(changes))
    return decoder_of(model), decoder_of(model, torch.bfloat16)


def gradients(decoder: Decoder, adapters: list[Adapter]) -> tuple[float, Tensor]:
    jobs = [TrainableAdapter(adapter, decoder.shape.linears) for adapter in adapters]
    packed = pack_groups(GROUPS, "cpu")
    loss = label_losses(decoder.forward(packed.batch, adapter_batch(packed, jobs)), decoder.head, packed.labels).sum()
    loss.backward()
    return float(loss.detach()), torch.cat([job.grads for job in jobs])


@pytest.mark.parametrize("edits", [False, True], ids=["lora", "with reft"])
@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=str)
def test_gradients_are_as_close_to_float32_as_plain_torchs(
    family: str, changes: dict[str, Any], edits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three jobs, shared beginnings, padding, two groups of other lengths, a window, biases: every gradient of a real step."""
    exact, rounded = decoders(family, tuple(changes.items()))
    adapters = [random_adapter(exact, 4, seed=1), random_adapter(exact, 2, seed=2), random_adapter(exact, 4, seed=3)]
    if edits:
        adapters[1] = random_reft(exact, seed=2, lora=2, rank=2, positions=Positions(first=3, last=1))
    truth_loss, truth = gradients(exact, adapters)
    found = {}
    for kernel in ("plain", "auto"):
        monkeypatch.setenv("ATOLL_KERNEL", kernel)
        assert (training_ops(rounded.embedding) is None) == (kernel == "plain")
        loss, grads = gradients(rounded, adapters)
        assert loss == pytest.approx(truth_loss, rel=2e-2)
        found[kernel] = float((grads - truth).norm() / truth.norm())
    assert found["auto"] <= 1.3 * found["plain"] + 1e-3, found


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are shared out whole."""
    ops = training_ops(torch.empty(0, dtype=torch.bfloat16))
    assert ops is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 80, generator=generator)
    y = torch.randn(37, 80, generator=generator).bfloat16()
    weight = torch.randn(80, generator=generator)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaf = x.clone().requires_grad_()
        total, normed = ops.add_norm(leaf, y, weight, 1e-5)
        (normed.float().sum() + total.square().sum()).backward()
        assert leaf.grad is not None
        found.append(torch.cat([total.detach(), normed.detach().float(), leaf.grad]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("used", ["norm", "sum"])
def test_a_norm_whose_sum_or_self_nobody_uses_still_has_gradients(used: str) -> None:
    """The last block's sum, and a norm behind which nothing is trained."""
    ops = training_ops(torch.empty(0, dtype=torch.bfloat16))
    assert ops is not None
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.zeros(5, 32, dtype=torch.bfloat16).requires_grad_()
    total, normed = ops.add_norm(x, y, torch.ones(32), 1e-5)
    (normed.float() if used == "norm" else total).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    out = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-5) if used == "norm" else expected
    out.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, expected.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y.grad.float(), expected.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("vocabulary", [5, 64, 1003])
def test_losses_and_their_gradients_are_plain_torchs(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary that fills no vectors, with logits so far apart that all but one weight vanish, and in several chunks."""
    monkeypatch.setattr("atoll.model.loss._MOST", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 32, generator=generator).bfloat16()
    hidden[3] *= 40
    head = torch.randn(vocabulary, 32, generator=generator).bfloat16()
    labels = torch.randint(vocabulary, (20,), generator=generator)
    found = {}
    for kernel in ("plain", "auto"):
        monkeypatch.setenv("ATOLL_KERNEL", kernel)
        leaf = hidden.clone().requires_grad_()
        losses = label_losses(leaf, head, labels)
        losses.sum().backward()
        assert leaf.grad is not None
        found[kernel] = losses.detach(), leaf.grad.float()
        assert torch.equal(label_losses(hidden, head, labels), losses), "the loss without gradients"
    torch.testing.assert_close(found["auto"], found["plain"], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(found["auto"][0], found["plain"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-100, 40])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    """Compiled code would read, and write, beyond the logits."""
    with pytest.raises(IndexError, match="no token"):
        label_losses(torch.zeros(2, 32, dtype=torch.bfloat16), torch.ones(40, 32, dtype=torch.bfloat16), torch.tensor([1, label]))


def test_a_logit_that_is_no_number_is_told() -> None:
    """Divergence is seen by the loss."""
    hidden = torch.full((2, 32), float("nan"), dtype=torch.bfloat16)
    assert label_losses(hidden, torch.ones(40, 32, dtype=torch.bfloat16), torch.tensor([0, 39])).isnan().all()


def test_float32_and_other_devices_stay_with_plain_torch() -> None:
    """The exact versions that every proof of numerics rests on."""
    assert training_ops(torch.empty(0)) is None
    assert training_ops(torch.empty(0, dtype=torch.bfloat16, device="meta")) is None
