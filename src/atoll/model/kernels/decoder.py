"""What the engine holds instead of a Decoder when the compiled forward can run: the same calls, the same numbers to bfloat16 rounding.

Weights are packed once into the library's layout (a second copy of the base; several engines over one base share it). A forward is one call that
releases the interpreter's lock. Its results depend on nothing but the row itself: batching, chunking, prefix reuse and preemption change no bit.

Used by the engine. Not for training: there are no gradients here.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atoll.errors import EngineError
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.kernels.bank import CompiledBank, CompiledEdits, CompiledSlot
from atoll.model.kernels.build import Target, compiler_path, load_library, usable_targets
from atoll.model.kv_cache import PAGE_TOKENS
from atoll.model.quant import dense
from atoll.model.sites import Site

_MOST_HEAD_SIZE = 1024  # the library's buffer for one head

_SOURCE, _INTERFACE = "library.cpp", 5  # atoll_interface() of the sources beside this file
_log = logging.getLogger(__name__)


class _Batch(ctypes.Structure):
    """Batch of forward.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_rows", "num_tokens", "num_outputs", "max_pages", "num_edits")),
        *(
            (name, ctypes.c_void_p)
            for name in ("token_ids", "row_starts", "context", "pages", "cos", "sin", "outputs", "adapters", "edits", "cache", "hidden")
        ),
    )


class _EditedTokens(ctypes.Structure):
    """EditedTokens of edits.h."""

    _fields_ = (("edits", ctypes.c_void_p), ("tokens", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Draw(ctypes.Structure):
    """Draw of sampling.h."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("random", ctypes.c_double),
    )


class CompiledCache:
    """Pages of keys and values in the library's layout: [num_pages, bytes of a page], untouched pages cost nothing."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.num_pages, self.token_bytes = num_pages, page_bytes // PAGE_TOKENS
        memory = mmap.mmap(-1, num_pages * page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # a first touch clears 2 MB at once, not 4 KB five hundred times
        self.memory = torch.frombuffer(memory, dtype=torch.int16).view(num_pages, page_bytes // 2)

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source`."""
        self.memory[target].copy_(self.memory[source])

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Forget what a failed row wrote: another row's masked attention would still multiply a NaN by zero."""
        for page in pages:
            self.memory[page].zero_()


class CompiledDecoder:
    """A Decoder whose forward is compiled. Make it with `compiled`."""

    def __init__(self, decoder: Decoder, library: Any, target: Target) -> None:
        self.shape, self.rotary, self.kernel = decoder.shape, decoder.rotary, target.name
        self.embedding, self.dtype, self.device = decoder.embedding, decoder.dtype, decoder.device
        self._library = library
        self._decoder = weakref.ref(decoder)  # it holds this object, and lives as long as its base does
        self._table: tuple[Any, Any] = ((), ())  # cos and sin [positions, K/2], grown as far as they are asked for
        self._model: int = _packed_model(library, decoder)
        free = weakref.finalize(self, library.atoll_model_free, ctypes.c_void_p(self._model))
        free.atexit = False  # a thread may still be in a forward when the process ends

    def new_cache(self, num_pages: int) -> CompiledCache:
        """Room for num_pages pages of PAGE_TOKENS tokens."""
        return CompiledCache(num_pages, int(self._library.atoll_page_size(ctypes.c_void_p(self._model))))

    def new_bank(self) -> CompiledBank:
        """An empty bank for adapters of this base."""
        return CompiledBank(self._library, self._model, self.shape.linears, self.shape.num_layers, self, self._weight)

    def _weight(self, site: Site) -> Tensor:
        decoder = self._decoder()
        assert decoder is not None, "the base is gone"
        return decoder.weight(site)

    def forward(self, batch: PackedBatch, adapters: AdapterBatch = BASE_ONLY, cache: CompiledCache | None = None) -> Tensor:
        """The final normed hidden states [N, D] bfloat16 of the wanted tokens: see Decoder.forward. Needs a cache and its pages."""
        assert cache is not None and batch.pages is not None, "the compiled forward serves, it does not train"
        assert all(batch.lengths), "every row has new tokens"
        cos, sin = self._angles(batch)
        tokens = batch.token_ids.to(torch.int32)
        outputs = torch.arange(batch.num_tokens, dtype=torch.int32) if batch.output_index is None else batch.output_index.to(torch.int32)
        widest = max(map(len, batch.pages))
        pages = torch.tensor([[*row, *([0] * (widest - len(row)))] for row in batch.pages], dtype=torch.int32)
        starts, context = torch.tensor(batch.row_starts, dtype=torch.int32), torch.tensor(batch.context, dtype=torch.int32)
        hidden = torch.empty(outputs.shape[0], self.shape.hidden, dtype=torch.bfloat16)
        handles, edits = _handles(batch, adapters), _edited(adapters)
        call = _Batch(
            batch.num_rows,
            batch.num_tokens,
            outputs.shape[0],
            widest,
            len(adapters.edits),
            *(t.data_ptr() for t in (tokens, starts, context, pages, cos, sin, outputs)),
            ctypes.cast(handles, ctypes.c_void_p) if handles is not None else None,
            ctypes.cast(edits, ctypes.c_void_p) if edits is not None else None,
            cache.memory.data_ptr(),
            hidden.data_ptr(),
        )
        if self._library.atoll_forward(ctypes.c_void_p(self._model), ctypes.byref(call), torch.get_num_threads()):
            raise EngineError(f"no memory for a batch of {batch.num_tokens} tokens", hint="lower max_step_tokens")
        return hidden

    def _angles(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K/2] float32 of every token, looked up where they depend on the position alone.

        Looked up, because torch computes a cosine with its own threads, which then spin beside the library's: a quarter of decode's speed.
        """
        if self.rotary.by_length:
            cos, sin = self.rotary.cos_sin(batch)
            return cos.contiguous(), sin.contiguous()
        places = batch.positions.numpy()
        if places.max() >= len(self._table[0]):
            reach = 1 << int(places.max()).bit_length()
            cos, sin = self.rotary.cos_sin(PackedBatch.of([[0] * reach]))
            self._table = (cos.numpy(), sin.numpy())
        cos, sin = (torch.from_numpy(table.take(places, axis=0)) for table in self._table)
        return cos, sin

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] hidden states to [N, V] float32 logits."""
        hidden = hidden.contiguous()
        logits = torch.empty(hidden.shape[0], self.shape.vocabulary)
        self._head(hidden, logits.data_ptr(), None, None)
        return logits

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [N] float32 and its token [N] int64 (the first of equal ones) without the logits; NaN where one is not a number."""
        hidden = hidden.contiguous()
        values, tokens = torch.empty(hidden.shape[0]), torch.empty(hidden.shape[0], dtype=torch.int32)
        self._head(hidden, None, values.data_ptr(), tokens.data_ptr())
        return values, tokens.long()

    def draw(self, logits: Tensor, draws: Sequence[tuple[float, int, float, float, float]]) -> Tensor:
        """[N] int64: a token a row of logits [N, V] float32, drawn with (temperature, top_k, top_p, min_p, random number in [0, 1)).

        The limits and the order of the lookup are those of engine/sampler.py; 0, 1 and 0 switch top_k, top_p and min_p off.
        """
        logits = logits.contiguous()
        tokens = torch.empty(logits.shape[0], dtype=torch.int32)
        asked = (_Draw * len(draws))(*(_Draw(*want) for want in draws))
        pointers = (ctypes.c_void_p(logits.data_ptr()), asked, len(draws), ctypes.c_void_p(tokens.data_ptr()))
        if self._library.atoll_draw(ctypes.c_void_p(self._model), *pointers, torch.get_num_threads()):
            raise EngineError(f"no memory to sample {len(draws)} tokens", hint="lower max_rows")
        return tokens.long()

    def _head(self, hidden: Tensor, logits: int | None, values: int | None, tokens: int | None) -> None:
        pointers = [ctypes.c_void_p(p) for p in (logits, values, tokens)]
        model, rows = ctypes.c_void_p(self._model), hidden.shape[0]
        if self._library.atoll_head(model, ctypes.c_void_p(hidden.data_ptr()), rows, *pointers, torch.get_num_threads()):
            raise EngineError(f"no memory for the logits of {rows} tokens", hint="lower max_step_tokens")


def compiled(decoder: Decoder) -> CompiledDecoder | None:
    """The compiled version of a decoder, made once and kept with it; None where plain torch has to do (another dtype or device, no compiler, …)."""
    if decoder.dtype != torch.bfloat16 or decoder.device.type != "cpu" or not decoder.layers:
        return None
    if decoder.holds_blocks:  # its own copy of the base would undo the saving
        return None
    if decoder.shape.head_size % 2 or decoder.shape.head_size > _MOST_HEAD_SIZE:
        return None
    known: dict[str, CompiledDecoder | None] = decoder.__dict__.setdefault("compiled", {})  # None: it was tried and cannot be
    targets = usable_targets()
    for target in targets:
        if target.name not in known:
            library = _usable_library(target)
            known[target.name] = CompiledDecoder(decoder, _declared(library), target) if library is not None else None
        if (found := known[target.name]) is not None:
            return found
    if targets:
        reason = "none of the libraries for this processor could be used" if compiler_path() else "no C++ compiler (g++, clang++ or c++) was found"
        _log.warning("%s: the engine runs on plain torch, which is several times slower", reason)
    return None


def _usable_library(target: Target) -> ctypes.CDLL | None:
    library = load_library(target, _SOURCE)
    if library is not None and (library.atoll_interface() != _INTERFACE or not library.atoll_usable()):
        _log.warning("the compiled forward for %s cannot be used here (the system refuses its registers)", target.name)
        return None
    return library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("atoll_model", "atoll_adapter", "atoll_edits"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("atoll_page_size", "atoll_adapter_size"):
        getattr(library, name).restype = ctypes.c_long
    return library


def _packed_model(library: Any, decoder: Decoder) -> int:
    """Hand the base's tensors to the library, which copies all but the embedding."""
    shape = decoder.shape
    sizes = (shape.hidden, shape.mlp, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_size, shape.vocabulary)
    model = library.atoll_model(
        (ctypes.c_int32 * 7)(*sizes),
        ctypes.c_float(shape.norm_eps),
        ctypes.c_void_p(decoder.embedding.data_ptr()),
        ctypes.c_void_p(decoder.head.data_ptr()),
        ctypes.c_void_p(decoder.final_norm.data_ptr()),
    )
    if not model:
        raise EngineError("no memory to pack the base for the compiled forward", hint='free some, or set kernel "plain"')
    for index, layer in enumerate(decoder.layers):
        biases = [bias.float().contiguous() if bias is not None else None for bias in layer.biases]
        failed = library.atoll_layer(
            ctypes.c_void_p(model),
            index,
            _pointers([dense(weight) for weight in layer.weights]),
            _pointers(biases),
            *(ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)),
            shape.windows[index] or 0,
        )
        if failed:
            library.atoll_model_free(ctypes.c_void_p(model))
            raise EngineError("no memory to pack the base for the compiled forward", hint='free some, or set kernel "plain"')
    return int(model)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() if t is not None else None for t in tensors))


def _handles(batch: PackedBatch, adapters: AdapterBatch) -> ctypes.Array[ctypes.c_void_p] | None:
    """Each row's adapter in the library's memory; None if all rows use the base alone."""
    assert adapters.bank_rows is None, "the compiled forward gathers no rows"
    assert adapters.blocks is None, "the compiled forward has packed the base's own weights"
    if not adapters.segments:
        return None
    handles = (ctypes.c_void_p * batch.num_rows)()
    row = 0
    for start, stop, weights in sorted(adapters.segments, key=lambda segment: segment.start):
        assert isinstance(weights, CompiledSlot)
        while batch.row_starts[row] < start:
            row += 1
        while row < batch.num_rows and batch.row_starts[row] < stop:
            handles[row] = weights.packed.handle
            row += 1
    return handles


def _edited(adapters: AdapterBatch) -> ctypes.Array[_EditedTokens] | None:
    """The tokens that ReFT edits, by the tensors that edit them; None if there are none."""
    if not adapters.edits:
        return None
    groups = (_EditedTokens * len(adapters.edits))()
    for group, (tokens, weights) in zip(groups, adapters.edits, strict=True):
        assert isinstance(weights, CompiledEdits)
        assert tokens.dtype == torch.int64 and tokens.is_contiguous() and tokens.device.type == "cpu"
        group.edits, group.tokens, group.count = weights.handle, tokens.data_ptr(), len(tokens)
    return groups
