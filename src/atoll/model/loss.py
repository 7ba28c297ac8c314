"""Next-token loss at label positions only, without ever holding all logits.

The head is frozen, so the gradient with respect to the hidden states can be made in the forward, chunk by chunk, while the chunk's logits are at
hand: with a vocabulary of 49,152, four thousand tokens of float32 logits would be 805 MB written, read, and written again.

Used by train and compose. The sum (not the mean) is returned: the caller divides by the label tokens of the whole effective batch, or of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 256  # label tokens whose logits exist at a time: 256 x 49,152 float32 are 50 MB


def label_loss(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Σ -log softmax(hidden headᵀ)[label], in nats, float32 scalar; differentiable in hidden only.

    hidden [N, D] normed states that predict the labels, head [V, D] frozen, labels [N] int64. softcap: logits z are softcap * tanh(z / softcap).
    """
    return label_losses(hidden, head, labels, softcap).sum()


def label_losses(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """-log softmax(hidden headᵀ)[label] of each label, in nats, [N] float32; differentiable in hidden only. Arguments as of label_loss."""
    out: Tensor = _LabelLoss.apply(hidden, head, labels, softcap)
    return out


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        want_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if want_grad else None
        for start in range(0, hidden.shape[0], _CHUNK):
            part, target = hidden[start : start + _CHUNK], labels[start : start + _CHUNK].unsqueeze(1)
            logits = (part @ head.T).float()
            capped = None
            if softcap is not None:
                capped = logits.div_(softcap).tanh_()
                logits = capped * softcap
            log_probs = torch.log_softmax(logits, -1)
            torch.neg(log_probs.gather(1, target).squeeze(1), out=losses[start : start + _CHUNK])
            if grad is not None:
                wrong = log_probs.exp_()  # softmax - one-hot is the gradient at the logits
                wrong.scatter_add_(1, target, wrong.new_full((target.shape[0], 1), -1.0))
                if capped is not None:
                    wrong.mul_(1 - capped.square_())
                grad[start : start + _CHUNK] = wrong.to(hidden.dtype) @ head
        ctx.grad = grad
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.grad * grads[0].to(ctx.grad.dtype).unsqueeze(1) if ctx.grad is not None else None), None, None, None
