"""The native forward of the Llama family: Llama, Mistral, Qwen2, Qwen3 and all that share their blocks (SmolLM2 among them).

One function runs training, prefill, decode and scoring, because all of them are packed batches. Linears are fused where they share an input (q k v;
gate up), the residual stream stays float32 and only the inputs of products are rounded to the compute dtype, and nothing frozen ever asks for a
gradient.

Used by train (gradients, no cache) and by the engine's runner (cache, no gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.config_quantization import QuantizationConfig
from atoll.errors import BaseFormatError
from atoll.model.apply import linear
from atoll.model.apply_edits import apply_edits
from atoll.model.attention import Attention
from atoll.model.bank import LoraBank
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.decoder_shape import DecoderShape
from atoll.model.kernels.training import TrainingOps, training_ops
from atoll.model.kv_cache import KvCache
from atoll.model.loss import label_losses
from atoll.model.quant import QuantizedWeight, Weight, dense, fused
from atoll.model.reft import ATTENTION_INPUT, ATTENTION_OUTPUT, BLOCK_INPUT, BLOCK_OUTPUT, MLP_INPUT, MLP_OUTPUT
from atoll.model.rope import RotaryTable, rotate
from atoll.model.sharded import ShardedBlocks, Share
from atoll.model.sites import DOWN, GATE_UP, GROUPS, OUT, QKV, Site, module_path


@dataclass(frozen=True)
class _Layer:
    """One block's frozen tensors. norms are float32, weights [d_out, d_in] in the compute dtype or quantised; q_norm and k_norm are Qwen3's, [K]."""

    input_norm: Tensor
    post_norm: Tensor
    weights: tuple[Weight, Weight, Weight, Weight]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    q_norm: Tensor | None
    k_norm: Tensor | None


class Decoder:
    """A frozen base ready to run. Make it with `from_state_dict`; it owns its tensors and shares them with nobody who writes.

    can_enter: whether a forward may start above the first block. whole_prompts: a prompt's states depend on all of it, so it is computed at once and
    shares nothing with others. classifies: a row's states are log-odds of its adapter's classes, and nothing is written. task_type: PEFT's word for
    what the base does. softcap: the head's logits z become softcap * tanh(z / softcap), where it is given. shards: its blocks, where this process
    holds a part of each; then every forward is in a `walk`, of which all processes have as many.
    """

    can_enter = True
    whole_prompts = False
    classifies = False
    task_type = "CAUSAL_LM"
    softcap: float | None = None
    shards: ShardedBlocks | None = None

    def __init__(
        self, shape: DecoderShape, embedding: Tensor, layers: tuple[_Layer, ...], final_norm: Tensor, head: Tensor, rotary: RotaryTable
    ) -> None:
        self.shape, self.embedding, self.layers, self.final_norm, self.head, self.rotary = shape, embedding, layers, final_norm, head, rotary

    @classmethod
    def from_state_dict(
        cls,
        config: Any,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantization: QuantizationConfig | None = None,
        share: Share | None = None,
    ) -> Decoder:
        """Build from transformers' names ("model.layers.0.self_attn.q_proj.weight", …); quantization rounds the blocks' linears.

        share: hold only this process's part of them, as they are read. They cannot be held quantised then.

        Raises BaseFormatError naming the first tensor that is missing, left over or of another shape than the config says.
        """
        shape = DecoderShape.of(config)
        reader = _Reader(tensors, dtype, device)
        shards = None if share is None else ShardedBlocks(share)
        layers = tuple(_read_layer(reader, shape, index, config, quantization, shards) for index in range(shape.num_layers))
        embedding = reader.take("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
        final_norm = reader.take("model.norm.weight", (shape.hidden,)).float()
        head = embedding
        if not config.tie_word_embeddings or reader.has("lm_head.weight"):
            own = reader.take("lm_head.weight", (shape.vocabulary, shape.hidden))
            # a head of its own in the files wins over "tied" in the config, as in transformers
            head = embedding if torch.equal(own, embedding) else own
        reader.refuse_leftovers()
        decoder = cls(shape, embedding, layers, final_norm, head, RotaryTable(config, device))
        if shards is not None:
            decoder.shards, decoder.can_enter = shards, False
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def holds_blocks(self) -> bool:
        """Whether its linears are held quantised, so that each use expands them."""
        return any(isinstance(weight, QuantizedWeight) for layer in self.layers for weight in layer.weights)

    @property
    def linear_bytes(self) -> int:
        """Bytes of the blocks' linears as they are held."""
        return sum(weight.nbytes for layer in self.layers for weight in layer.weights)

    def weight(self, site: Site) -> Tensor:
        """The frozen weight [d_out, d_in] of one linear; where it is held quantised, good until the next use of any."""
        group = next(index for index, targets in enumerate(GROUPS) if site.target in targets)
        first = sum(self.shape.linears[target][0] for target in GROUPS[group][: GROUPS[group].index(site.target)])
        return dense(self.layers[site.layer].weights[group])[first : first + self.shape.linears[site.target][0]]

    def new_cache(self, num_pages: int) -> KvCache:
        """A KV cache of this base's shape in its dtype."""
        shape = self.shape
        return KvCache(shape.num_layers, num_pages, shape.num_kv_heads, shape.head_size, self.dtype, self.device)

    def new_bank(self) -> LoraBank:
        """An empty bank for adapters of this base, in its dtype."""
        shape = self.shape
        return LoraBank(shape.linears, shape.num_layers, self.dtype, self.device, shape.groups, self.weight)

    def forward(
        self,
        batch: PackedBatch,
        adapters: AdapterBatch = BASE_ONLY,
        cache: KvCache | None = None,
        *,
        entering: tuple[int, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The final normed hidden states [N, D] of the tokens in batch.output_index (all T tokens if None), in the compute dtype.

        cache is needed exactly when the batch names pages. Differentiable in the adapters' tensors when gradients are enabled and there is no
        cache. entering: (layer, what `residual_before` gave for this batch and layer), to start there. noise
        [T, D] float32 is added to the embeddings.
        """
        first, residual = entering if entering is not None else (0, F.embedding(batch.token_ids, self.embedding).float())
        if noise is not None:
            assert entering is None, "noise is added below the first block"
            residual = residual + noise
        if entering is not None and adapters.edits:
            residual = residual.clone()  # edits write into it
        residual = self._blocks(range(first, self.shape.num_layers), residual, batch, adapters, cache)
        if batch.output_index is not None:
            residual = residual.index_select(0, batch.output_index)
        return rms_norm(residual, self.final_norm, self.shape.norm_eps, self.dtype)

    def residual_before(self, layer: int, batch: PackedBatch) -> Tensor:
        """The base's residual stream [T, D] float32 as it enters block `layer`: the same for every adapter that changes no block below."""
        with torch.no_grad():
            return self._blocks(range(layer), F.embedding(batch.token_ids, self.embedding).float(), batch, BASE_ONLY, None)

    def _blocks(self, layers: range, residual: Tensor, batch: PackedBatch, adapters: AdapterBatch, cache: KvCache | None) -> Tensor:
        cos, sin = self.rotary.cos_sin(batch)
        attention = Attention(batch, cache)
        ops = training_ops(self.embedding) if torch.is_grad_enabled() and cache is None else None
        edits = adapters.edits
        out: Tensor | None = None  # what the block before adds to the residual stream, where nothing has to see the sum before the norm does
        for index in layers:
            layer = self.layers[index]
            if edits:
                residual = apply_edits(residual, index, BLOCK_INPUT, edits)
            residual, hidden = self._add_norm(residual, out, layer.input_norm, ops)
            if edits:
                hidden = apply_edits(hidden, index, ATTENTION_INPUT, edits)
            attended = self._attend(index, layer, hidden, cos, sin, attention, adapters, ops)
            if edits:
                attended = apply_edits(attended, index, ATTENTION_OUTPUT, edits)
            residual, hidden = self._add_norm(residual, attended, layer.post_norm, ops)
            if edits:
                hidden = apply_edits(hidden, index, MLP_INPUT, edits)
            gate_up = linear(hidden, layer.weights[GATE_UP], layer.biases[GATE_UP], index, GATE_UP, adapters, ops)
            gated = ops.gated(gate_up) if ops is not None else _gated(gate_up)
            out = linear(gated, layer.weights[DOWN], layer.biases[DOWN], index, DOWN, adapters, ops)
            if edits:
                out = apply_edits(out, index, MLP_OUTPUT, edits)
                residual, out = apply_edits(residual + out, index, BLOCK_OUTPUT, edits), None
        return residual if out is None else residual + out

    def _add_norm(self, residual: Tensor, out: Tensor | None, weight: Tensor, ops: TrainingOps | None) -> tuple[Tensor, Tensor]:
        """The residual stream [T, D] float32 with a block's output [T, D] added, and its norm in the compute dtype."""
        if ops is not None:
            return ops.add_norm(residual, out, weight, self.shape.norm_eps)
        if out is not None:
            residual = residual + out
        return residual, rms_norm(residual, weight, self.shape.norm_eps, self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] hidden states to [N, V] float32 logits."""
        return F.linear(hidden, self.head).float()

    def label_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """-log softmax(logits)[label], in nats, [N] float32 for hidden states [N, D] and labels [N] int64; differentiable in hidden."""
        return label_losses(hidden, self.head, labels, self.softcap)

    def masked_lm(self) -> Decoder:
        """The same blocks as a model that tells hidden tokens. Raises BaseFormatError where the base has no head for that."""
        raise BaseFormatError("the base writes text, and hides no tokens", hint="choose BERT or RoBERTa, or leave trainer.mlm_probability out")

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a classifier head by their names in the model; none where the base writes text.

        Raises BaseFormatError for an encoder whose files lack what its classifiers read.
        """
        return {}

    def new_head(self, num_classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh classifier head in float32: weights normal with the deviation that the base began with, biases zero."""
        return {}

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit [N] float32 and its token [N] int64 for each of [N, D] hidden states: all that greedy decoding asks for."""
        values, ids = self.logits(hidden).max(-1)
        return values, ids

    def _attend(
        self,
        index: int,
        layer: _Layer,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        adapters: AdapterBatch,
        ops: TrainingOps | None,
    ) -> Tensor:
        shape, window = self.shape, self.shape.windows[index]
        heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
        fused = linear(hidden, layer.weights[QKV], layer.biases[QKV], index, QKV, adapters, ops)
        if ops is not None and layer.q_norm is None and attention.fresh is not None and attention.fresh.stores_scores:
            out = ops.attend(attention.fresh, fused, cos, sin, heads, kv_heads, window)
            return linear(out, layer.weights[OUT], layer.biases[OUT], index, OUT, adapters, ops)
        qkv = fused.view(-1, heads + 2 * kv_heads, size)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rotate(rms_norm(qkv[:, :heads].float(), layer.q_norm, shape.norm_eps, qkv.dtype), cos, sin)
            k = rotate(rms_norm(qkv[:, heads : heads + kv_heads].float(), layer.k_norm, shape.norm_eps, qkv.dtype), cos, sin)
        else:
            q, k = _rotate_both(qkv[:, : heads + kv_heads], cos, sin).split((heads, kv_heads), 1)
        out = attention(index, q, k, qkv[:, heads + kv_heads :], window)
        return linear(out, layer.weights[OUT], layer.biases[OUT], index, OUT, adapters, ops)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in float32, rounded to dtype (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _RmsNorm.apply(x, weight, eps, dtype)
        return out
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)


def _rotate_both(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Rotate.apply(x, cos, sin)
        return out
    return rotate(x, cos, sin)


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two halves of the last dimension."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _Gated.apply(gate_up)
        return out
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _RmsNorm(torch.autograd.Function):
    """d/dx of rms_norm: (g - n mean(g n)) / rms with n = x / rms and g = dy * weight. Keeps n in the output's dtype, not three float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        scaled = torch.mul(grads[0], weight)  # float32: the product of a narrower and a float32 tensor
        mean = (scaled * x).sum(-1, keepdim=True).mul_(inverse.square().div_(x.shape[-1]))  # mean(g n) / rms
        return scaled.addcmul_(x, mean, value=-1).mul_(inverse), None, None, None


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


class _Gated(torch.autograd.Function):
    """silu(g) u with d/dg = u s (1 + g (1 - s)), s = sigmoid(g). Keeps only the fused input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(grads[0], F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return (out,)


class _Reader:
    """Takes named tensors out of a state dict, converted and checked, and knows what nobody took."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._tensors:
            raise BaseFormatError(f"the base's weights lack {name!r}", hint="the files are incomplete; fetch the base again")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise BaseFormatError(f"the base's {name!r} has shape {tuple(tensor.shape)}, but its config says {shape}")
        self._taken.add(name)
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()

    def refuse_leftovers(self) -> None:
        """A tensor that the forward does not use would be a part of the model silently left out."""
        for name in self._tensors:
            if name not in self._taken and not name.endswith("rotary_emb.inv_freq"):
                raise BaseFormatError(
                    f"the base has a tensor {name!r} that the native forward does not use", hint="it is a variant of the family; choose another base"
                )


def _read_layer(
    reader: _Reader, shape: DecoderShape, index: int, config: Any, quantization: QuantizationConfig | None, shards: ShardedBlocks | None
) -> _Layer:
    prefix = f"model.layers.{index}."

    def read(targets: tuple[str, ...]) -> tuple[Weight, Tensor | None]:
        weights = [reader.take(f"{module_path(Site(index, t))}.weight", shape.linears[t]) for t in targets]
        names = [f"{module_path(Site(index, t))}.bias" for t in targets]
        biases = [reader.take(name, (shape.linears[t][0],)) for name, t in zip(names, targets, strict=True) if reader.has(name)]
        if biases and len(biases) != len(targets):
            raise BaseFormatError(f"the base has a bias on some but not all of {', '.join(targets)} in layer {index}")
        return fused(weights, quantization), torch.cat(biases) if biases else None

    groups = [read(targets) for targets in GROUPS]
    weights = tuple(weight for weight, _ in groups) if shards is None else shards.add([weight for weight, _ in groups if isinstance(weight, Tensor)])
    has_head_norm = config.model_type == "qwen3"
    return _Layer(
        input_norm=reader.take(f"{prefix}input_layernorm.weight", (shape.hidden,)).float(),
        post_norm=reader.take(f"{prefix}post_attention_layernorm.weight", (shape.hidden,)).float(),
        weights=(weights[0], weights[1], weights[2], weights[3]),
        biases=(groups[0][1], groups[1][1], groups[2][1], groups[3][1]),
        q_norm=reader.take(f"{prefix}self_attn.q_norm.weight", (shape.head_size,)).float() if has_head_norm else None,
        k_norm=reader.take(f"{prefix}self_attn.k_norm.weight", (shape.head_size,)).float() if has_head_norm else None,
    )
