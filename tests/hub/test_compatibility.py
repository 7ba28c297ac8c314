"""Base compatibility: fingerprints prove, shapes decide, names say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.hub import verdict

from .conftest import BASE, KEY, D

ADAPTER = {KEY.format(layer=0, factor="A"): (2, D), KEY.format(layer=0, factor="B"): (D, 2)}
SHAPES = {"model.embed_tokens.weight": (100, D), "model.layers.0.self_attn.q_proj.weight": (D, D)}
FINGERPRINT = {"config_hash": "c" * 64, "weights": "d" * 64, "tokenizer_hash": "e" * 64, "chat_template_hash": "f" * 64}


def test_equal_fingerprints_are_exact_whatever_the_name():
    """Names of bases are copied and moved; the hashes are what the adapter was trained on."""
    assert verdict({**BASE, "name": "renamed"}, ADAPTER, FINGERPRINT, SHAPES).kind == "exact"


@pytest.mark.parametrize(
    "part, word", [("weights", "weights"), ("tokenizer_hash", "tokenizer"), ("chat_template_hash", "chat template"), ("config_hash", "config")]
)
def test_another_hash_with_equal_shapes_is_only_compatible_and_says_which(part: str, word: str):
    """The arithmetic works, the answers may not: the user must decide knowingly."""
    found = verdict(BASE, ADAPTER, {**FINGERPRINT, part: "0" * 64}, SHAPES)
    assert found.kind == "compatible" and word in found.reason and found.usable


@pytest.mark.parametrize("recorded", [None, {}, {"name": "toy/base"}])
def test_a_strangers_adapter_without_hashes_is_compatible_at_best(recorded: dict[str, Any] | None):
    """A declared name proves nothing."""
    found = verdict(recorded, ADAPTER, FINGERPRINT, SHAPES)
    assert found.kind == "compatible" and "no record" in found.reason


def test_an_adapter_of_a_rounded_base_is_refused_elsewhere_unless_that_is_meant():
    """Trained on NF4 and served on the weights as they are is a silent mismatch; the sentence names both, and the way out."""
    trained, nf4 = {**BASE, "quantization": "nf4"}, {**FINGERPRINT, "quantization": "nf4"}
    assert verdict(trained, ADAPTER, nf4, SHAPES).kind == "exact"
    for base, said in ((FINGERPRINT, "the base as it is"), ({**FINGERPRINT, "quantization": "fp4"}, "the base rounded to fp4")):
        found = verdict(trained, ADAPTER, base, SHAPES)
        assert (found.kind, found.quantization) == ("refused", "nf4") and f"rounded to nf4, but this is {said}" in found.reason
        assert "--quantization nf4" in found.hint("another") and "--ignore-quantization" in found.hint("another")
        allowed = verdict(trained, ADAPTER, base, SHAPES, ignore_quantization=True)
        assert allowed.kind == "compatible" and "rounded to nf4" in allowed.reason


def test_an_adapter_of_the_plain_base_may_run_on_a_rounded_one_with_a_word():
    """People serve plain adapters on a rounded base to save memory; they are told."""
    found = verdict(BASE, ADAPTER, {**FINGERPRINT, "quantization": "nf4"}, SHAPES)
    assert found.kind == "compatible" and "trained on the base as it is, but this is the base rounded to nf4" in found.reason
    assert "no record" in verdict({}, ADAPTER, {**FINGERPRINT, "quantization": "nf4"}, SHAPES).reason


def test_two_bases_without_a_chat_template_agree_about_it():
    """None on both sides is a fact known, not a fact missing."""
    none = {"chat_template_hash": None}
    assert verdict({**BASE, **none}, ADAPTER, {**FINGERPRINT, **none}, SHAPES).kind == "exact"


@pytest.mark.parametrize(
    "adapter, tensor, words",
    [
        ({KEY.format(layer=0, factor="A"): (2, 9)}, KEY.format(layer=0, factor="A"), "d_in is 9"),
        ({KEY.format(layer=0, factor="B"): (9, 2)}, KEY.format(layer=0, factor="B"), "d_out is 9"),
        ({KEY.format(layer=7, factor="A"): (2, D)}, KEY.format(layer=7, factor="A"), "no module"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 99)}, "base_model.model.model.embed_tokens.lora_embedding_A", "100"),
        ({"base_model.model.model.embed_tokens.weight": (101, D)}, "base_model.model.model.embed_tokens.weight", "[101, 8]"),
        ({"surprise": (1,)}, "surprise", "no parameter"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(adapter: dict[str, tuple[int, ...]], tensor: str, words: str):
    """Equal hashes don't save an adapter whose tensors don't fit: applying it would crash or be silently wrong."""
    found = verdict(BASE, {**adapter, **{key: shape for key, shape in ADAPTER.items() if key not in adapter}}, FINGERPRINT, SHAPES)
    assert found.kind == "refused" and found.tensor == tensor and words in found.reason and not found.usable


EDIT = "reft.0.layers.{layer}.block_output.both.{tensor}"


def test_an_edit_fits_a_base_with_its_layer_and_width():
    """A ReFT adapter has no linears to compare: the layers it edits and the width of their states are what must be there."""
    edit = {EDIT.format(layer=0, tensor="r"): (2, D), EDIT.format(layer=0, tensor="w"): (2, D), EDIT.format(layer=0, tensor="b"): (2,)}
    assert verdict(BASE, edit, FINGERPRINT, SHAPES).kind == "exact"
    assert verdict(BASE, {**ADAPTER, **edit}, FINGERPRINT, SHAPES).kind == "exact"


@pytest.mark.parametrize(
    "layer, tensor, shape, words",
    [
        (1, "r", (2, D), "no layer 1"),
        (0, "r", (2, D + 1), f"width {D}"),
        (0, "w", (D,), f"width {D}"),
        (0, "b", (2, D), "one axis"),
        (10**7, "b", (2,), "no parameter"),
    ],
)
def test_an_edit_that_does_not_fit_names_its_tensor(layer: int, tensor: str, shape: tuple[int, ...], words: str):
    """An edit of a state of another width crashes in the middle of a batch."""
    key = EDIT.format(layer=layer, tensor=tensor)
    found = verdict(BASE, {**ADAPTER, key: shape}, FINGERPRINT, SHAPES)
    assert found.kind == "refused" and found.tensor == key and words in found.reason


def test_another_number_of_tokens_is_refused():
    """Ids would mean other words."""
    assert "101 tokens" in verdict({**BASE, "vocab_size": 101}, ADAPTER, FINGERPRINT, SHAPES).reason
