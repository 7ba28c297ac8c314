"""What a training step does between its matrix products, compiled: norms with the addition before them, gates, attention around its products, losses.

Each is one pass over memory (a loss two, in the cache) where plain torch takes about five; together they are a third of a step. The formulas are
those of model/decoder.py, model/fresh_attention.py and model/loss.py, and bfloat16 rounds at the same places, but for the weights of attention, which
are rounded once. Optional: without a compiler, in another dtype, or on another device the plain versions run.

Used by decoder.py, generic_decoder.py, apply.py, loss.py and thin.py. tests/model/test_training_ops.py holds both versions equal.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.model.fresh_attention import Block, FreshAttention
from atoll.model.kernels.build import load_library, usable_targets

_SOURCE, _INTERFACE = "training.cpp", 3
_log = logging.getLogger(__name__)


class _Layout(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("before", ctypes.c_int32),
        ("shared", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("size", ctypes.c_int32),
    ]


def training_ops(like: Tensor) -> TrainingOps | None:
    """The compiled operations for tensors of this kind; None where plain torch has to do."""
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return None
    return _loaded(tuple(target.name for target in usable_targets()))


@functools.cache
def _loaded(names: tuple[str, ...]) -> TrainingOps | None:
    for target in usable_targets():
        library = load_library(target, _SOURCE)
        if library is not None and library.atoll_training_interface() == _INTERFACE:
            return TrainingOps(library)
    return None


class ThinNumbers(Protocol):
    """What thin.h's ThinCall reads."""

    numbers: array[int]
    scalings: array[float]


class TrainingOps:
    """The library's operations on tensors, differentiable. bfloat16 on the CPU, contiguous or made so."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(x + y, its RMS norm times weight): float32 [T, D] and bfloat16 [T, D]. x [T, D] float32; y [T, D] bfloat16 or None for zeros."""
        found: tuple[Tensor, Tensor] = _AddNorm.apply(self.library, x, y, weight, eps)
        return found

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, the two halves of gate_up [T, 2 I]; returns [T, I]."""
        out: Tensor = _Gated.apply(self.library, gate_up)
        return out

    def attend(self, attention: FreshAttention, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, window: int | None) -> Tensor:
        """Rotate queries and keys and attend: qkv [T, (H + 2 num_kv_heads) K], cos and sin [T, K / 2] float32; returns [T, H K]."""
        out: Tensor = _Attend.apply(self.library, qkv, cos, sin, attention.blocks, heads, kv_heads, window)
        return out

    def label_losses(self, logits: Tensor, labels: Tensor, losses: Tensor, *, gradient: bool) -> None:
        """Fill losses [N] float32 with -log softmax(logits)[label]. With gradient, logits [N, V] become softmax - one-hot, the gradient at them."""
        count, vocabulary = logits.shape
        assert labels.dtype == torch.int64
        if int(labels.min()) < 0 or int(labels.max()) >= vocabulary:  # compiled code would write beyond the logits
            raise IndexError(f"a label is no token of the vocabulary of {vocabulary}")
        self.library.atoll_label_loss(_at(logits), _at(labels), _at(losses), ctypes.c_long(count), vocabulary, int(gradient), torch.get_num_threads())

    def thin(self, call: ThinNumbers, y: Tensor) -> None:
        """Add the updates of kernels/thin.py's call to y [T, d_out]."""
        self._thin(self.library.atoll_thin, call, y)

    def thin_backward(self, call: ThinNumbers, dy: Tensor) -> None:
        """From dy [T, d_out], fill and add to the gradients that the call names."""
        self._thin(self.library.atoll_thin_backward, call, dy)

    def _thin(self, function: Any, call: ThinNumbers, y: Tensor) -> None:
        numbers, scalings = (ctypes.c_void_p(found.buffer_info()[0]) for found in (call.numbers, call.scalings))
        if function(numbers, scalings, _at(y), torch.get_num_threads()):
            raise MemoryError("no memory for the thin products of a linear")


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), None if y is None else y.contiguous()
        tokens, d = x.shape
        total = torch.empty_like(x) if y is not None else x
        normed, inverse = torch.empty(tokens, d, dtype=torch.bfloat16), torch.empty(tokens)
        library.atoll_norm(
            _at(x), _at(y), _at(weight), ctypes.c_float(eps), _at(total), _at(normed), _at(inverse), ctypes.c_long(tokens), d, torch.get_num_threads()
        )
        ctx.save_for_backward(total, weight, inverse)
        ctx.library, ctx.adds = library, y is not None
        ctx.set_materialize_grads(False)
        return (total if y is not None else x.view_as(x)), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        dtotal, dnormed = (None if grad is None else grad.contiguous() for grad in grads)
        if dnormed is None:  # the norm was not used
            return None, dtotal, None if dtotal is None or not ctx.adds else dtotal.to(torch.bfloat16), None, None
        tokens, d = total.shape
        dx = torch.empty_like(total)
        dy = torch.empty(tokens, d, dtype=torch.bfloat16) if ctx.adds else None
        pointers = [_at(t) for t in (dnormed, dtotal, total, weight, inverse, dx, dy)]
        ctx.library.atoll_norm_backward(*pointers, ctypes.c_long(tokens), d, torch.get_num_threads())
        return None, dx, dy, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, inner)
        library.atoll_gated(_at(gate_up), _at(out), ctypes.c_long(tokens), inner, torch.get_num_threads())
        ctx.save_for_backward(gate_up)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        grad, out = grads[0].contiguous(), torch.empty_like(gate_up)
        ctx.library.atoll_gated_backward(
            _at(gate_up), _at(grad), _at(out), ctypes.c_long(len(gate_up)), gate_up.shape[1] // 2, torch.get_num_threads()
        )
        return None, out


class _Attend(torch.autograd.Function):
    """Of every block: q, k, v in place [n * num_kv_heads, …, K], scores by a batched product, softmax in place, and the product with the values."""

    @staticmethod
    def forward(
        ctx: Any,
        library: ctypes.CDLL,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        blocks: list[Block],
        heads: int,
        kv_heads: int,
        window: int | None,
    ) -> Tensor:
        qkv, threads = qkv.contiguous(), torch.get_num_threads()
        size = qkv.shape[1] // (heads + 2 * kv_heads)
        out = qkv.new_empty(qkv.shape[0], heads * size)
        saved: list[Tensor] = []
        for block in blocks:
            layout = ctypes.byref(_layout(block, heads, kv_heads, size))
            batch, keys = block.num_rows * kv_heads, block.before + block.length
            make = qkv.new_empty if block.is_dense else qkv.new_zeros
            q = make(batch, heads // kv_heads * block.length, size)
            k, v = make(batch, keys, size), make(batch, keys, size)
            library.atoll_spread(layout, _at(qkv), _at(cos), _at(sin), _at(q), _at(k), _at(v), threads)
            weights = torch.bmm(q, k.mT)
            library.atoll_softmax(
                _at(weights), ctypes.c_long(batch * q.shape[1]), block.length, keys, window or 0, ctypes.c_float(size**-0.5), threads
            )
            attended = torch.bmm(weights, v)
            library.atoll_gather(layout, _at(out), _at(attended), 0, threads)
            saved += [q, k, v, weights]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.library, ctx.blocks, ctx.heads, ctx.kv_heads, ctx.num_tokens = library, blocks, heads, kv_heads, qkv.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        library, heads, kv_heads, threads = ctx.library, ctx.heads, ctx.kv_heads, torch.get_num_threads()
        cos, sin, *saved = ctx.saved_tensors
        dout, size = grads[0].contiguous(), 2 * cos.shape[1]
        dqkv = dout.new_empty(ctx.num_tokens, (heads + 2 * kv_heads) * size)
        beginnings = []
        for number, block in enumerate(ctx.blocks):
            q, k, v, weights = saved[4 * number : 4 * number + 4]
            layout = _layout(block, heads, kv_heads, size)
            dblock = torch.empty_like(q) if block.is_dense else torch.zeros_like(q)
            library.atoll_gather(ctypes.byref(layout), _at(dout), _at(dblock), 1, threads)
            dv, dscores = torch.bmm(weights.mT, dblock), torch.bmm(dblock, v.mT)
            rows = ctypes.c_long(q.shape[0] * q.shape[1])
            library.atoll_softmax_backward(_at(weights), _at(dscores), rows, k.shape[1], ctypes.c_float(size**-0.5), threads)
            dq, dk = torch.bmm(dscores, k), torch.bmm(dscores.mT, q)
            library.atoll_spread_backward(ctypes.byref(layout), _at(dq), _at(dk), _at(dv), _at(cos), _at(sin), _at(dqkv), threads)
            if block.before:
                beginnings.append((layout, dk, dv))
        for layout, dk, dv in beginnings:  # a beginning is a row of some block too, whose own gradients come first
            library.atoll_spread_shared_backward(ctypes.byref(layout), _at(dk), _at(dv), _at(cos), _at(sin), _at(dqkv), threads)
        return None, dqkv, None, None, None, None, None, None


def _layout(block: Block, heads: int, kv_heads: int, size: int) -> _Layout:
    """How the library is told where a block's tokens stand; the block must outlive it."""
    return _Layout(
        block.tokens.data_ptr(),
        block.back.data_ptr(),
        len(block.tokens),
        block.num_rows,
        block.length,
        block.before,
        block.shared.start,
        heads,
        kv_heads,
        size,
    )


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
