"""model/loss.py: the chunked loss is cross entropy, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atoll.model import loss as loss_module
from atoll.model.loss import label_losses


def draw(num_labels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(num_labels, 16, generator=generator), torch.randn(50, 16, generator=generator)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), torch.randint(0, 50, (num_labels,), generator=generator)


@pytest.mark.parametrize("num_labels", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("scale", [1.0, 1 / 37])
def test_it_is_cross_entropy_summed(num_labels: int, scale: float) -> None:
    """Logits are made and thrown away in chunks of 256; a label lost at a seam, or a gradient that ignores the caller's scale, trains wrongly."""
    hidden, head, labels = draw(num_labels)
    ours = label_losses(hidden, head, labels).sum()
    (ours * scale).backward()
    grad, hidden.grad = hidden.grad, None
    truth = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    (truth * scale).backward()
    torch.testing.assert_close(ours, truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, hidden.grad, rtol=1e-4, atol=1e-5)


def test_the_same_label_twice_in_a_chunk_counts_twice() -> None:
    """The gradient subtracts one at each token's own label; scattering into a shared row would lose one of them."""
    hidden, head, _ = draw(4)
    labels = torch.tensor([7, 7, 7, 1])
    label_losses(hidden, head, labels).sum().backward()
    grad, hidden.grad = hidden.grad, None
    F.cross_entropy(hidden @ head.T, labels, reduction="sum").backward()
    torch.testing.assert_close(grad, hidden.grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_states_give_a_float32_loss_and_bfloat16_gradients() -> None:
    """The sum over thousands of labels must not be made in bfloat16, which stops counting at 256."""
    hidden, head, labels = draw(600, torch.bfloat16)
    loss = label_losses(hidden, head, labels).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    truth = F.cross_entropy((hidden.detach() @ head.T).float(), labels, reduction="sum")
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-5, atol=0)


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation calls it for values only; and the chunk size is no part of the result."""
    hidden, head, labels = draw(600)
    with torch.no_grad():
        one = label_losses(hidden.detach(), head, labels).sum()
        monkeypatch.setattr(loss_module, "_MOST", 17)
        torch.testing.assert_close(label_losses(hidden.detach(), head, labels).sum(), one, rtol=1e-6, atol=0)
    assert not one.requires_grad
