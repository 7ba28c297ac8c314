"""The sizes of a base, read from its config: what a decoder of Llama's family is made from, and what others ask of any decoder.

Used by decoder.py and, for other families, generic_decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atoll.errors import BaseFormatError
from atoll.model.sites import FAMILIES, GROUPS


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that everything else derives from. windows holds each layer's sliding window in tokens, None for full attention."""

    vocabulary: int
    hidden: int
    mlp: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    context: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Read a transformers config. Raises BaseFormatError for a family or an option that the native forward does not compute."""
        family = str(config.model_type)
        if family not in FAMILIES:
            raise BaseFormatError(
                f"the base is a {family!r} model, but the native forward runs {', '.join(FAMILIES)}",
                hint="choose a base of one of these families, such as smollm2-135m-instruct",
            )
        if config.hidden_act != "silu":
            raise BaseFormatError(f"the base's activation is {config.hidden_act!r}, but the native forward computes 'silu' only")
        return cls(
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            context=config.max_position_embeddings,
            windows=_windows(config),
        )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears of a block that share an input and run as one product."""
        return GROUPS

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base's files hold a linear's weight as [d_in, d_out], which PEFT notes in an adapter's config."""
        return False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each of the seven linears."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.mlp, self.hidden),
            "up_proj": (self.mlp, self.hidden),
            "down_proj": (self.hidden, self.mlp),
        }


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's window: Mistral has one for all layers, Qwen2 and Qwen3 name sliding layers in layer_types."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "llama":
        window = None
    if kinds is None or config.model_type == "mistral":
        return (window,) * int(config.num_hidden_layers)
    windows: tuple[int | None, ...] = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows
