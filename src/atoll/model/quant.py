"""A base's linears rounded to 4 or 8 bits, by bitsandbytes' own functions: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The one idea: rounding is a property of the base. Each linear is quantised by itself, as bitsandbytes' modules do it, in blocks of 64 weights (at 8
bits, by rows). What is held is either the result expanded once, which runs at full speed on every path there is, or the blocks, expanded at each use.
Both give the same numbers, since both are products with the same rounded weights.

At 8 bits the weights are rounded; activations are not, other than in LLM.int8().

Used by decoder.py, which asks for each fused weight, and by apply.py, which multiplies by it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.config_quantization import QuantizationConfig
from atoll.errors import ConfigError
from atoll.model.sharded import ShardedWeight

_BLOCK = 64  # weights that share a scale, as in QLoRA


class QuantizedWeight:
    """One fused weight [d_out, d_in] of the decoder, held quantised. Reading it (`dense`) expands it."""

    def __init__(self, members: Sequence[_Blocks | _Rows], dtype: torch.dtype) -> None:
        self._members, self.dtype = tuple(members), dtype
        self.shape = (sum(member.shape[0] for member in members), members[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: codes and scales."""
        return sum(member.nbytes for member in self._members)

    @property
    def device(self) -> torch.device:
        return self._members[0].codes.device

    def dense(self) -> Tensor:
        """The rounded weight [d_out, d_in]; perhaps in a buffer that this thread's next call overwrites."""
        if len(self._members) == 1:
            return self._members[0].expanded().to(self.dtype)
        out = _buffer(self.shape[0] * self.shape[1], self.dtype, self.device).view(self.shape)
        first = 0
        for member in self._members:
            out[first : first + member.shape[0]].copy_(member.expanded())
            first += member.shape[0]
        return out


Weight = Tensor | QuantizedWeight | ShardedWeight


def dense(weight: Weight) -> Tensor:
    """A weight as a matrix to multiply by, good until the next call in this thread."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def require_bitsandbytes() -> None:
    """Raise ConfigError where the package is not installed: to be said before anything is loaded."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("quantization needs the package bitsandbytes, which is not installed", hint='install it: pip install "atoll[quant]"')


def fused(weights: Sequence[Tensor], config: QuantizationConfig | None) -> Weight:
    """The weights [d_out, d_in] of linears that share an input as one, rounded each by itself; config None: as they are."""
    if config is None:
        return torch.cat(list(weights))
    members = [_quantised(weight, config) for weight in weights]
    whole = QuantizedWeight(members, weights[0].dtype)
    return whole if config.holds_blocks else whole.dense().clone()


@dataclass(frozen=True)
class _Blocks:
    """A linear in 4 bits: codes (two a byte), and bitsandbytes' record of the scales."""

    codes: Tensor
    state: Any
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        state = self.state
        nested = (state.state2.absmax, state.offset) if state.nested else ()
        return sum(int(tensor.nbytes) for tensor in (self.codes, state.absmax, *nested))

    def expanded(self) -> Tensor:
        found: Tensor = _functions().dequantize_4bit(self.codes, self.state)
        return found


@dataclass(frozen=True)
class _Rows:
    """A linear in 8 bits: codes [d_out, d_in], and the largest absolute value of each row, which is 127."""

    codes: Tensor
    largest: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.largest.nbytes)

    def expanded(self) -> Tensor:
        found: Tensor = _functions().int8_vectorwise_dequant(self.codes, self.largest)
        return found


def _quantised(weight: Tensor, config: QuantizationConfig) -> _Blocks | _Rows:
    functions, weight = _functions(), weight.contiguous()
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    if config.bits == 8:
        codes, largest, _ = functions.int8_vectorwise_quant(weight.half())  # bitsandbytes rounds to float16 first, whatever the base is in
        return _Rows(codes, largest, shape)
    codes, state = functions.quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=config.double_quant, quant_type=config.quant_type)
    return _Blocks(codes, state, shape)


@functools.cache
def _functions() -> Any:
    # It says on stderr that a kernel for inference could not be fetched, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


class _Buffers(threading.local):
    """Each thread's memory for expanded weights: one is alive at a time."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_buffers = _Buffers()


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    found = _buffers.by_kind.get((dtype, device))
    if found is None or found.numel() < size:
        found = _buffers.by_kind[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return found[:size]
