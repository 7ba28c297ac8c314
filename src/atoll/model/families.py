"""Families of decoders that run by transformers' own blocks, and what their linears are called.

A family is a row of one table: where its blocks stand, and which linears a block has. A linear is named as everywhere: by its short name where it
stands where Llama's does ("q_proj"), else by its path with a star for the block's number ("transformer.h.*.attn.c_attn"), so that a site says by
itself what PEFT calls it.

Used by sites.py and generic_decoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_LLAMA = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """blocks: the path of the list of blocks; linears: paths in a block, in the order of a forward; attention, mlp: those two modules in a block.

    mlp_output: the module that the MLP's output leaves, where it is another. transposed: the linears' weights are stored as [d_in, d_out].
    decoder_blocks, decoder_linears: the same of a second stack, which writes what the first has read.
    names: what target_modules call each linear, where the last part of its path would name others too. kind: what the model reads and writes.
    """

    blocks: str = "model.layers"
    linears: tuple[str, ...] = _LLAMA
    attention: str = "self_attn"
    mlp: str = "mlp"
    mlp_output: str | None = None
    transposed: bool = False
    names: tuple[str, ...] = ()
    kind: Literal["decoder", "encoder", "seq2seq"] = "decoder"
    decoder_blocks: str = ""
    decoder_linears: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of a block's linears in the model, with a star for the block's number."""
        own = tuple(f"{self.blocks}.*.{linear}" for linear in self.linears)
        return own + tuple(f"{self.decoder_blocks}.*.{linear}" for linear in self.decoder_linears)


_FEED_FORWARD = ("mlp.c_fc", "mlp.c_proj")


def _bert_like(name: str) -> Family:
    dense = ("attention.output.dense", "intermediate.dense", "output.dense")
    return Family(
        f"{name}.encoder.layer",
        (*(f"attention.self.{linear}" for linear in ("query", "key", "value")), *dense),
        attention="attention",
        mlp="intermediate",
        mlp_output="output",
        names=("query", "key", "value", *dense),  # "dense" alone would name the pooler's and the classifier's too
        kind="encoder",
    )


def _t5_attention(layer: int, name: str) -> tuple[str, ...]:
    return tuple(f"layer.{layer}.{name}.{linear}" for linear in "qkvo")


def _t5_mlp(layer: int) -> tuple[str, ...]:
    return tuple(f"layer.{layer}.DenseReluDense.{linear}" for linear in ("wi", "wi_0", "wi_1", "wo"))  # a model has wi, or wi_0 and wi_1


GENERIC: dict[str, Family] = {  # by transformers' model type
    "gpt2": Family("transformer.h", ("attn.c_attn", "attn.c_proj", *_FEED_FORWARD), "attn", transposed=True),
    "gpt_neox": Family("gpt_neox.layers", ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), "attention"),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "phi3": Family(linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "starcoder2": Family(linears=(*_LLAMA[:4], *_FEED_FORWARD)),
    "smollm3": Family(),
    "bert": _bert_like("bert"),
    "roberta": _bert_like("roberta"),
    "t5": Family(
        "encoder.block",
        (*_t5_attention(0, "SelfAttention"), *_t5_mlp(1)),
        kind="seq2seq",
        decoder_blocks="decoder.block",
        decoder_linears=(*_t5_attention(0, "SelfAttention"), *_t5_attention(1, "EncDecAttention"), *_t5_mlp(2)),
    ),
}
_TWO_LAYERS = tuple(f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias"))
HEADS = {"bert": ("classifier.weight", "classifier.bias"), "roberta": _TWO_LAYERS}  # an encoder's classifier: its tensors by their names in the model
ENCODERS = tuple(name for name, family in GENERIC.items() if family.kind == "encoder")
SEQ2SEQ = tuple(name for name, family in GENERIC.items() if family.kind == "seq2seq")
FIRST_LINEARS = tuple(dict.fromkeys((f"model.layers.*.{_LLAMA[0]}", *(family.paths[0] for family in GENERIC.values()))))  # they read [.., D]


def as_in_model(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, ...]]:
    """Stored tensors' shapes by the names that they have in the language model, linears as [d_out, d_in].

    Files of some families leave out the first part of the names ("h.0.attn.c_attn.weight"), and some store linears transposed.
    """
    family = GENERIC.get(model_type)
    if family is None:
        return dict(shapes)
    outer, _, inner = family.blocks.partition(".")
    linears = tuple(f".{linear}.weight" for linear in family.linears)
    named = {}
    for name, shape in shapes.items():
        path = f"{outer}.{name}" if name.startswith(f"{inner}.") else name
        named[path] = shape[::-1] if family.transposed and path.startswith(f"{family.blocks}.") and path.endswith(linears) else shape
    return named
