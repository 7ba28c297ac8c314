"""Does an adapter belong to this base? Three answers, from fingerprints and shapes; never from names.

A declared base name proves nothing: fine-tunes and copies carry the names of their originals. Equal fingerprints prove equality; equal shapes only
that the arithmetic works; anything else is refused with the first differing tensor.

Used by workflows, compose and the server before an adapter is loaded on a base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atoll.model.adapter_files import HEAD_TENSORS
from atoll.model.families import FIRST_LINEARS

Shapes = Mapping[str, Sequence[int]]

_EDIT = re.compile(r"reft\.\d+\.layers\.(\d{1,6})\.\w+\.\w+\.([rwbc])")  # a tensor of a ReFT edit, see model/adapter_files.py

_MAGNITUDE = ".lora_magnitude_vector"  # DoRA's [d_out]

# (name in a manifest's base record and in a base's fingerprint, what a user calls it); the weights' hash has two names
_PARTS = (
    (("config_hash",), "config"),
    (("weights_fingerprint", "weights"), "weights"),
    (("tokenizer_hash",), "tokenizer"),
    (("chat_template_hash",), "chat template"),
)


@dataclass(frozen=True)
class Verdict:
    """exact: use it. compatible: shapes fit but the base is another one, so the user must say so. refused: it cannot work."""

    kind: Literal["exact", "compatible", "refused"]
    reason: str
    tensor: str | None = None  # the first tensor that does not fit; None unless shapes are why it was refused
    quantization: str | None = None  # how its base was rounded; None unless that is why it was refused
    differing: tuple[str, ...] = ()  # what of the base is known to be another: "config", "weights", "tokenizer", "chat template"

    @property
    def usable(self) -> bool:
        return self.kind != "refused"

    @property
    def is_of_other_weights(self) -> bool:
        """Whether the base is known to have other weights than the adapter was made for, though the shapes fit."""
        return "weights" in self.differing

    def hint(self, otherwise: str, *, can_ignore: bool = True) -> str:
        """What to do about a refusal, on a command line; `otherwise`, unless the rounding of the base is why. can_ignore: by an option."""
        if self.quantization is None:
            return otherwise
        ignore = "; --ignore-quantization uses the adapter all the same" if can_ignore else ""
        return f"round the base alike with --quantization {self.quantization}{ignore}"


def verdict(
    manifest_base: Mapping[str, Any] | None,
    adapter_shapes: Shapes,
    base_fingerprint: Mapping[str, Any],
    base_shapes: Shapes,
    *,
    ignore_quantization: bool = False,
) -> Verdict:
    """Compare an adapter with a base.

    manifest_base: the `base` record of the adapter's manifest (name, config_hash, weights_fingerprint, tokenizer_hash, chat_template_hash, perhaps
    vocab_size), or None. adapter_shapes: tensor key of adapter_model.safetensors -> shape. base_fingerprint: the same four hashes of the base at hand
    (`weights` or `weights_fingerprint`), and "quantization" where it is rounded, as in an adapter's record: one that was trained on a rounded base is
    refused by any other, unless ignore_quantization says that this is meant. base_shapes: parameter name -> shape, linears as [d_out, d_in]
    ("model.layers.0.self_attn.q_proj.weight").
    """
    recorded = manifest_base or {}
    named = f" (made for {recorded['name']!r})" if recorded.get("name") else ""
    for key, shape in adapter_shapes.items():
        problem = _misfit(key, tuple(shape), base_shapes)
        if problem:
            return Verdict("refused", f"{problem}{named}", tensor=key)
    vocabulary, has = recorded.get("vocab_size"), _vocab_size(base_fingerprint, base_shapes)
    if vocabulary is not None and has is not None and vocabulary != has:
        return Verdict("refused", f"the adapter's tokenizer has {vocabulary} tokens, the base's has {has}{named}")
    rounded, has_rounded = (str(found.get("quantization") or "") for found in (recorded, base_fingerprint))
    differs = f"was trained on the base {_rounding(rounded)}, but this is the base {_rounding(has_rounded)}{named}" if rounded != has_rounded else ""
    if differs and rounded and not ignore_quantization:
        return Verdict("refused", f"the adapter {differs}", quantization=rounded)
    unknown = [label for keys, label in _PARTS if _first(recorded, keys) is None or _first(base_fingerprint, keys) is None]
    differing = [label for keys, label in _PARTS if label not in unknown and _first(recorded, keys) != _first(base_fingerprint, keys)]
    # a base without a chat template has no hash for it: both None is equality, not ignorance
    template = _PARTS[3][0]
    if "chat template" in unknown and not recorded.keys().isdisjoint(template) and _first(recorded, template) == _first(base_fingerprint, template):
        unknown.remove("chat template")
    if differing:
        reason = f"every tensor fits, but the base has another {_listed(differing)} than the adapter was made for{named}"
        return Verdict("compatible", reason, differing=tuple(differing))
    if differs and len(unknown) < len(_PARTS):  # where nothing is known of the base, nothing is known of its rounding
        return Verdict("compatible", f"every tensor fits, but the adapter {differs}")
    if unknown:
        return Verdict("compatible", f"every tensor fits, but the adapter has no record of its base's {_listed(unknown)}{named}")
    return Verdict("exact", "config, weights, tokenizer and chat template are those the adapter was made for")


def _misfit(key: str, shape: tuple[int, ...], base_shapes: Shapes) -> str:
    """Why one adapter tensor does not fit the base, or ''.

    PEFT's keys: base_model.model.<module>.lora_A.weight [r, d_in], lora_B [d_out, r]. An edit's: reft.<part>.layers.<layer>.<component>.<side>. with
    r or w [r, D], b or c [r]. DoRA's magnitude is [d_out].
    """
    edit = _EDIT.fullmatch(key)
    if edit is not None:
        return _edit_misfit(key, shape, int(edit[1]), edit[2], base_shapes)
    path = key.removeprefix("base_model.model.")
    for suffix, axis, from_base in (
        (".lora_A.weight", 1, 1),
        (".lora_B.weight", 0, 0),
        (".lora_embedding_A", 1, 0),  # an embedding is [V, D]: A [r, V], B [D, r]
        (".lora_embedding_B", 0, 1),
    ):
        if not path.endswith(suffix):
            continue
        module = path.removesuffix(suffix)
        base = base_shapes.get(module + ".weight")
        if base is None:
            return f"tensor {key}: the base has no module {module}"
        if len(shape) != 2 or len(base) != 2:
            return f"tensor {key}: shape {list(shape)} on a base weight of shape {list(base)}; both must have two axes"
        if shape[axis] != base[from_base]:
            width = "d_in" if suffix == ".lora_A.weight" else "d_out" if suffix == ".lora_B.weight" else "width"
            return f"tensor {key}: {width} is {shape[axis]}, the base's {module} has {base[from_base]}"
        return ""
    if path in HEAD_TENSORS:
        return ""  # a classifier of the adapter's own
    if path.endswith(_MAGNITUDE):
        base = base_shapes.get(path.removesuffix(_MAGNITUDE) + ".weight")
        if base is None:
            return f"tensor {key}: the base has no module {path.removesuffix(_MAGNITUDE)}"
        return "" if tuple(shape) == tuple(base[:1]) else f"tensor {key}: shape {list(shape)}, the base's linear has {base[0]} outputs"
    base = base_shapes.get(path)
    if base is None:
        return f"tensor {key}: the base has no parameter {path}"
    return "" if tuple(base) == shape else f"tensor {key}: shape {list(shape)}, the base has {list(base)}"


def _edit_misfit(key: str, shape: tuple[int, ...], layer: int, tensor: str, base_shapes: Shapes) -> str:
    """Why one tensor of an edit does not fit: it needs the layer, and the base's hidden size where it has one."""
    query = next((base_shapes[name] for path in FIRST_LINEARS if (name := f"{path.replace('*', str(layer))}.weight") in base_shapes), None)
    if query is None:
        return f"tensor {key}: the base has no layer {layer}"
    if tensor in "rw" and (len(shape) != 2 or shape[1] != query[1]):
        return f"tensor {key}: shape {list(shape)} on hidden states of width {query[1]}"
    return "" if len(shape) == (2 if tensor in "rw" else 1) else f"tensor {key}: shape {list(shape)}, expected one axis"


def _rounding(name: str) -> str:
    return f"rounded to {name:.20}" if name else "as it is"


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _vocab_size(fingerprint: Mapping[str, Any], shapes: Shapes) -> int | None:
    """Rows of the embedding, unless the fingerprint says it; None when neither is known."""
    if fingerprint.get("vocab_size") is not None:
        return int(fingerprint["vocab_size"])
    return next((int(shape[0]) for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
