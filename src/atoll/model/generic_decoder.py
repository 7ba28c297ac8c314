"""Decoders of other families than Llama's: transformers' own blocks under the contract of the native decoder.

The one idea: nothing of Atoll depends on how a block computes, only on packed rows in and hidden states out. So transformers' model runs on one long
row of T packed tokens, and three things are put under it. Its attention is ours (rows apart, pages of a KV cache, shared beginnings), given by name
through transformers' own register; its linears are ours (apply.linear: every segment's update, decode rows of a bank, dropout, gradients); and edits
happen on the way in and out of its blocks. Training, the engine, composing and evaluation then run as on the native decoder.

Which families: families.py. Used by base.py.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.config_quantization import QuantizationConfig
from atoll.errors import BaseFormatError
from atoll.model.apply import linear
from atoll.model.apply_edits import apply_edits
from atoll.model.attention import Attention
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.decoder_shape import DecoderShape
from atoll.model.families import ENCODERS, GENERIC, SEQ2SEQ, Family
from atoll.model.kernels.training import TrainingOps, training_ops
from atoll.model.kv_cache import KvCache
from atoll.model.pretrained import loaded
from atoll.model.quant import QuantizedWeight, Weight, dense, fused
from atoll.model.reft import ATTENTION_INPUT, ATTENTION_OUTPUT, BLOCK_INPUT, BLOCK_OUTPUT, MLP_INPUT, MLP_OUTPUT
from atoll.model.sites import Site, family_targets, module_path

_ATTENTION = "atoll_packed"  # what our attention is called in transformers' register
_OF_CLASSIFIERS = ("classifier.", "bert.pooler.")  # tensors that an encoder's files need not have: an adapter's own, and what only classifiers read
_BY_LENGTH = ("dynamic", "longrope")  # kinds of rope that turn a token by the length of its row


@dataclass(frozen=True)
class GenericShape(DecoderShape):
    """The sizes of a generic base. linears_of_block maps each target to its (d_out, d_in)."""

    linears_of_block: Mapping[str, tuple[int, int]]
    family: Family

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return dict(self.linears_of_block)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple((target,) for target in self.linears_of_block)

    @property
    def fan_in_fan_out(self) -> bool:
        return self.family.transposed


class _Rotary:
    """Positions are transformers' business here; within the trained length (see context_of) no family turns tokens by the length of their row."""

    by_length = False

    def regime(self, length: int) -> int:
        return 0


class _Now(threading.local):
    """What the forward of this thread runs with. noise [T, D] is added to the embeddings; ops are the compiled operations, with gradients."""

    attention: Attention | None = None
    adapters: AdapterBatch = BASE_ONLY
    noise: Tensor | None = None
    ops: TrainingOps | None = None


class GenericDecoder(Decoder):
    """A transformers model as a Decoder. It takes the model over: weights are frozen, linears and attention replaced.

    model: a causal language model of a family of families.GENERIC, in the dtype and on the device that it is to run in. quantization rounds the
    blocks' linears, each by itself. lacks: tensors of the model that its files did not have.
    """

    can_enter = False
    kind = "decoder"
    lacks: frozenset[str] = frozenset()

    def __init__(self, model: Any, quantization: QuantizationConfig | None = None) -> None:
        """Raises BaseFormatError for a family or an option that is not computed."""
        config = model.config
        family = GENERIC.get(config.model_type)
        if family is None or family.kind != self.kind:
            raise BaseFormatError(
                f"the base is a {config.model_type!r} model, but only {', '.join(GENERIC)} run by transformers' blocks",
                hint="choose a base of one of these families, or of Llama's",
            )
        _refuse_options(config)
        self.model = model.eval().requires_grad_(False)
        self._inner = getattr(model, model.base_model_prefix, model)
        blocks = model.get_submodule(family.blocks)
        head = self._head_of(model)
        self._now = _Now()
        shapes = {target: _shape(model.get_submodule(module_path(Site(0, target)))) for target in self._targets(config.model_type)}
        self._weights: dict[Site, Weight] = {}
        self._replace_linears(tuple(shapes), len(blocks), quantization)
        self._place_edits(blocks, family)
        model.get_input_embeddings().register_forward_hook(self._with_noise)
        # What the base class holds of its own blocks is transformers' here: no layers, no final norm.
        shape = _shape_of(config, family, shapes, len(blocks))
        super().__init__(shape, model.get_input_embeddings().weight, (), torch.empty(0), head, _Rotary())  # type: ignore[arg-type]
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self._attention_softcap = getattr(config, "attn_logit_softcapping", None)
        if self.kind != "seq2seq":
            _register_attention()
            model.set_attn_implementation(_ATTENTION)

    def forward(
        self,
        batch: PackedBatch,
        adapters: AdapterBatch = BASE_ONLY,
        cache: KvCache | None = None,
        *,
        entering: tuple[int, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """As Decoder.forward; a forward always begins at the first block."""
        assert entering is None, "a generic base does not start above its first block"
        with self._running(Attention(batch, cache, self._attention_softcap), adapters, noise):
            found = self._inner(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                packed_attention=self._now.attention,
            )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden if batch.output_index is None else hidden.index_select(0, batch.output_index)

    @property
    def holds_blocks(self) -> bool:
        return any(isinstance(weight, QuantizedWeight) for weight in self._weights.values())

    @property
    def linear_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    def weight(self, site: Site) -> Tensor:
        return dense(self._weights[site])

    def residual_before(self, layer: int, batch: PackedBatch) -> Tensor:
        raise AssertionError("a generic base does not start above its first block")

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.head).float()
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def _head_of(self, model: Any) -> Tensor:
        """[V, D], the weight of the output embeddings."""
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise BaseFormatError("the base's head has a bias, which is not computed", hint="choose another base")
        weight: Tensor = head.weight
        return weight

    @contextmanager
    def _running(self, attention: Any, adapters: AdapterBatch, noise: Tensor | None = None) -> Iterator[None]:
        self._now.attention, self._now.adapters, self._now.noise = attention, adapters, noise
        self._now.ops = training_ops(self.embedding) if torch.is_grad_enabled() else None
        try:
            yield
        finally:
            self._now.attention, self._now.adapters, self._now.noise, self._now.ops = None, BASE_ONLY, None, None

    def _with_noise(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        noise = self._now.noise
        return output if noise is None else output + noise.to(output.dtype)

    def _targets(self, model_type: str) -> list[str]:
        """The targets of its family that this model has."""
        return [target for target in family_targets(model_type) if _has(self.model, module_path(Site(0, target)))]

    def _replace_linears(self, targets: Sequence[str], num_layers: int, quantization: QuantizationConfig | None) -> None:
        for site, group in ((Site(layer, target), group) for layer in range(num_layers) for group, target in enumerate(targets)):
            module = self.model.get_submodule(module_path(site))
            own = module.weight.detach()
            whole = own if isinstance(module, nn.Linear) else own.T
            weight = self._weights[site] = whole if quantization is None else fused([whole], quantization)
            if quantization is not None:
                module.weight = None  # only the rounded one is held
            module.forward = self._linear(weight, module.bias, site.layer, group)

    def _linear(self, weight: Weight, bias: Any, layer: int, group: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return linear(x.flatten(0, -2), weight, bias, layer, group, self._now.adapters, self._now.ops).view(*x.shape[:-1], weight.shape[0])

        return forward

    def _place_edits(self, blocks: Any, family: Family) -> None:
        for layer, block in enumerate(blocks):
            for module, before, after in (
                (block, BLOCK_INPUT, BLOCK_OUTPUT),
                (block.get_submodule(family.attention), ATTENTION_INPUT, ATTENTION_OUTPUT),
                (block.get_submodule(family.mlp), MLP_INPUT, MLP_OUTPUT),
            ):
                name = _parameters(module)[0]
                module.register_forward_pre_hook(self._before(layer, before, name), with_kwargs=True)
                behind = block.get_submodule(family.mlp_output) if after == MLP_OUTPUT and family.mlp_output else module
                behind.register_forward_hook(self._after(layer, after))

    def _edited(self, hidden: Tensor, layer: int, component: int) -> Tensor:
        """hidden [1, T, D] with the edits of this place, in a tensor of its own where there are any."""
        edits = self._now.adapters.edits
        if not any(rows.weights.edit(layer, component) is not None for rows in edits):
            return hidden
        return apply_edits(hidden[0].clone(), layer, component, edits).unsqueeze(0)

    def _before(self, layer: int, component: int, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not self._now.adapters.edits:
                return None
            if args:
                return (self._edited(args[0], layer, component), *args[1:]), kwargs
            return args, {**kwargs, name: self._edited(kwargs[name], layer, component)}

        return hook

    def _after(self, layer: int, component: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self._now.adapters.edits:
                return None
            if isinstance(output, tuple):
                return (self._edited(output[0], layer, component), *output[1:])
            return self._edited(output, layer, component)

        return hook


def load_generic_decoder(
    path: Path, dtype: torch.dtype, device: torch.device | str = "cpu", quantization: QuantizationConfig | None = None
) -> GenericDecoder:
    """The decoder of a base folder, by transformers, from safetensors, without running code from the folder. Raises BaseFormatError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from atoll.model.encoder import EncoderClassifier
    from atoll.model.seq2seq import Seq2SeqDecoder

    model_type = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True).model_type
    is_encoder = model_type in ENCODERS
    ours, theirs = (
        (EncoderClassifier, AutoModelForSequenceClassification)
        if is_encoder
        else (Seq2SeqDecoder, AutoModelForSeq2SeqLM)
        if model_type in SEQ2SEQ
        else (GenericDecoder, AutoModelForCausalLM)
    )
    model, lacking = loaded(theirs, path, dtype)
    own = _OF_CLASSIFIERS if is_encoder else ()
    if first := next((name for name in lacking if not name.startswith(own)), None):
        raise BaseFormatError(f"{path}: the tensor {first} is missing or of another shape than the config says", hint="fetch the base again")
    decoder = ours(model.to(device), quantization)
    decoder.lacks = frozenset(lacking)
    return decoder


def context_of(config: Any) -> int:
    """The longest row in tokens: where angles depend on a row's length, only as long as the base was first trained for."""
    if config.model_type in SEQ2SEQ:
        return 2 * int(getattr(config, "n_positions", 512))  # as much to read as to write; angles there are none
    context = int(config.max_position_embeddings)
    if config.model_type == "roberta":
        return context - int(config.pad_token_id) - 1  # its positions begin behind that of padding
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in _BY_LENGTH:
        return context
    trained = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return min(context, int(trained)) if trained else context


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_attention: Attention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over packed rows. query [1, H, T, K], key and value [1, num_kv_heads, T, K]; returns [1, T, H, K]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    size = q.shape[-1]
    if scaling is not None and scaling != size**-0.5:
        q = q * (scaling * size**0.5)  # packed attention divides by the root of the head's size
    layer: Any = module.layer_idx
    out = packed_attention(layer, q, k, v, sliding_window)
    return out.view(1, -1, *q.shape[1:]), None


def _register_attention() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _packed_attention)


def _shape_of(config: Any, family: Family, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> GenericShape:
    heads = int(config.num_attention_heads)
    return GenericShape(
        vocabulary=int(config.vocab_size),
        hidden=int(config.hidden_size),
        mlp=max(size for shape in shapes.values() for size in shape),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads),
        norm_eps=0.0,
        context=context_of(config),
        windows=(None,) * num_layers,
        linears_of_block=dict(shapes),
        family=family,
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear; transformers' Conv1D stores its weight as [d_in, d_out]."""
    weight: Any = module.weight
    d_out, d_in = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
    return int(d_out), int(d_in)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _parameters(module: nn.Module) -> list[str]:
    """The names of a module's arguments, in order."""
    return [name for name in inspect.signature(type(module).forward).parameters if name != "self"]


def _refuse_options(config: Any) -> None:
    """Options that some base of a known family could have and that are not computed here."""
    for key, name in (("add_cross_attention", "cross-attention"), ("reorder_and_upcast_attn", "attention in float32")):
        if getattr(config, key, False):
            raise BaseFormatError(f"the base's config has {key}, and {name} is not computed", hint="choose another base")
    if getattr(config, "use_bidirectional_attention", None):
        raise BaseFormatError("the base attends in both directions (use_bidirectional_attention), so it does not write text")
