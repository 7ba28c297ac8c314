"""Next-token loss at label positions only, without ever holding all logits.

The head is frozen, so the gradient with respect to the hidden states can be made in the forward, chunk by chunk, while the chunk's logits are at
hand: with a vocabulary of 49,152, four thousand tokens of float32 logits would be 805 MB written, read, and written again.

Used by train and compose, through the decoders. Single losses are returned, no means: the caller sums and divides by the label tokens of the whole
effective batch, or of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atoll.model.kernels.training import training_ops

LOGIT_BYTES = 16 << 20  # bytes of one copy of a chunk's logits: to stay in the cache, and within what glibc keeps (memory.py)
_LEAST, _MOST = 32, 256  # label tokens of a chunk


def label_losses(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """-log softmax(hidden headᵀ)[label] of each label, in nats, [N] float32; differentiable in hidden only.

    hidden [N, D] normed states that predict the labels, head [V, D] frozen, labels [N] int64. softcap: logits z are softcap * tanh(z / softcap).
    """
    out: Tensor = _LabelLoss.apply(hidden, head, labels, softcap)
    return out


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ops = training_ops(hidden) if softcap is None else None
        chunk = _MOST if hidden.is_cuda else min(_MOST, max(_LEAST, LOGIT_BYTES // (len(head) * (4 if ops is None else 2))))
        for start in range(0, hidden.shape[0], chunk):
            here = slice(start, start + chunk)
            logits, target = hidden[here] @ head.T, labels[here].contiguous()
            if ops is not None:
                ops.label_losses(logits, target, losses[here], gradient=grad is not None)
            else:
                logits = _plain(logits, target, losses[here], softcap, gradient=grad is not None)
            if grad is not None:
                torch.mm(logits, head, out=grad[here])
        ctx.grad = grad
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.grad * grads[0].to(ctx.grad.dtype).unsqueeze(1) if ctx.grad is not None else None), None, None, None


def _plain(logits: Tensor, labels: Tensor, losses: Tensor, softcap: float | None, *, gradient: bool) -> Tensor:
    """TrainingOps.label_losses in plain torch, with a softcap; returns the gradient at the logits, if it is asked for."""
    dtype, logits, target = logits.dtype, logits.float(), labels.unsqueeze(1)
    capped = None
    if softcap is not None:
        capped = logits.div_(softcap).tanh_()
        logits = capped * softcap
    log_probs = torch.log_softmax(logits, -1)
    torch.neg(log_probs.gather(1, target).squeeze(1), out=losses)
    if not gradient:
        return logits
    wrong = log_probs.exp_()  # softmax - one-hot is the gradient at the logits
    wrong.scatter_add_(1, target, wrong.new_full((len(labels), 1), -1.0))
    if capped is not None:
        wrong.mul_(1 - capped.square_())
    return wrong.to(dtype)
