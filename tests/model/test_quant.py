"""model/quant.py: a base's linears in 4 and 8 bits have bitsandbytes' numbers, whole or as blocks, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model, write_tiny_base

from atoll.config_quantization import NAMES, QuantizationConfig
from atoll.errors import ConfigError
from atoll.model.base import load_base
from atoll.model.decoder import Decoder
from atoll.model.kernels.decoder import compiled
from atoll.model.quant import QuantizedWeight, fused, require_bitsandbytes
from atoll.model.sites import Site
from atoll.train.weights import TrainableAdapter

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")

WIDE = {"hidden_size": 128, "intermediate_size": 192}  # rows that are whole blocks of 64


def decoders(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Decoder, Decoder]:
    """The same base rounded to `name`, held whole and as blocks."""
    model = tiny_model("llama", **changes)
    made = [
        Decoder.from_state_dict(model.config, model.state_dict(), dtype, quantization=QuantizationConfig.named(name, blocks=blocks))
        for blocks in (False, True)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_rounded_weight_is_the_one_that_bitsandbytes_makes(name: str, dtype: torch.dtype) -> None:
    """Adapters that were trained with QLoRA elsewhere were trained on these very numbers, each linear rounded by itself."""
    functions = bitsandbytes.functional
    weights = [torch.randn(96, 128).to(dtype), torch.randn(32, 128).to(dtype)]
    config = QuantizationConfig.named(name, blocks=True)
    held = fused(weights, config)
    assert isinstance(held, QuantizedWeight)
    expected = []
    for weight in weights:
        if config.bits == 8:
            codes, scales, _ = functions.int8_vectorwise_quant(weight.half())
            expected.append(functions.int8_vectorwise_dequant(codes, scales).to(dtype))
        else:
            codes, state = functions.quantize_4bit(weight, quant_type=config.quant_type, compress_statistics=config.double_quant)
            expected.append(functions.dequantize_4bit(codes, state))
    assert torch.equal(held.dense(), torch.cat(expected))
    assert torch.equal(fused(weights, QuantizationConfig.named(name)), torch.cat(expected))
    assert not torch.equal(held.dense(), torch.cat(weights))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_compute_what_whole_weights_compute_bit_for_bit(name: str) -> None:
    """`resident` is about memory alone: logits, and every gradient of an adapter, are the same numbers."""
    whole, blocks = decoders(name, **WIDE)
    assert blocks.holds_blocks and not whole.holds_blocks
    adapter = random_adapter(whole)
    grads = []
    for decoder in (whole, blocks):
        weights = TrainableAdapter(adapter, decoder.shape.linears)
        logits = packed_logits(decoder, ROWS, [weights] * len(ROWS))
        torch.cat([found.square() for found in logits]).mean().backward()
        grads.append((torch.cat([found.detach() for found in logits]), weights.grads.clone()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert float(grads[0][1].abs().max()) > 0


def test_embedding_norms_and_head_stay_as_they_are() -> None:
    """What QLoRA leaves alone is left alone here."""
    model = tiny_model("qwen2")
    decoder = Decoder.from_state_dict(model.config, model.state_dict(), torch.float32, quantization=QuantizationConfig())
    assert torch.equal(decoder.embedding, model.model.embed_tokens.weight)
    assert torch.equal(decoder.head, model.lm_head.weight)
    assert torch.equal(decoder.layers[0].input_norm, model.model.layers[0].input_layernorm.weight)
    assert not torch.equal(decoder.weight(Site(1, "k_proj")), model.model.layers[1].self_attn.k_proj.weight)


def test_four_bits_take_an_eighth_of_float32_and_some_for_the_scales() -> None:
    """The saving is what the option is for: codes of half a byte, and 127 bytes in a thousand of that for scales (double quantised: 32)."""
    bytes_of = {name: decoders(name, hidden_size=256, intermediate_size=512)[1].linear_bytes for name in ("nf4", "nf4-single", "int8")}
    plain = decoders("nf4", hidden_size=256, intermediate_size=512)[0].linear_bytes
    assert plain / 8.0 < bytes_of["nf4"] < plain / 7.6
    assert plain / 7.2 < bytes_of["nf4-single"] < plain / 7.0
    assert plain / 4.0 < bytes_of["int8"] < plain / 3.9


def test_the_compiled_forward_does_not_copy_a_base_that_is_held_as_blocks() -> None:
    """It packs the whole base a second time: more memory than was to be saved."""
    assert compiled(decoders("nf4", torch.bfloat16)[1]) is None


def test_logits_are_those_of_transformers_with_bitsandbytes_and_peft(tmp_path: Path) -> None:
    """The reference that people trained their QLoRA adapters with, on a CPU in float32: the base alone, and under an adapter."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = write_tiny_base(tmp_path / "base", **WIDE)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, device_map="cpu")
    model.train()  # in evaluation a processor with bfloat16 products gets a kernel that rounds activations; there is no dropout to turn off
    base = load_base(str(folder), dtype="float32", quantization=QuantizationConfig())
    adapter = random_adapter(base.decoder)
    with torch.no_grad():
        for found, row in zip(packed_logits(base.decoder, ROWS), ROWS, strict=True):
            torch.testing.assert_close(found, reference(model, row), **CLOSE)
        peft = peft_model(model, adapter, tmp_path / "adapter").train()
        slot = TrainableAdapter(adapter, base.decoder.shape.linears)
        for found, row in zip(packed_logits(base.decoder, ROWS, [slot] * len(ROWS)), ROWS, strict=True):
            torch.testing.assert_close(found, reference(peft, row), **CLOSE)


def test_a_rounded_base_has_an_identity_of_its_own(tiny_base_dir: Path) -> None:
    """Scores, caches and adapters are found by the fingerprint: those of the plain base must not be found for the rounded one."""
    bases = {name: load_base(str(tiny_base_dir), dtype="float32", quantization=QuantizationConfig.named(name)) for name in ("nf4", "fp4", "int8")}
    plain = load_base(str(tiny_base_dir), dtype="float32")
    assert len({base.fingerprint.digest for base in (*bases.values(), plain)}) == 4
    assert bases["nf4"].describe()["quantization"] == "nf4"
    assert "quantization" not in plain.describe()
    assert type(plain.fingerprint).from_json(bases["fp4"].fingerprint.to_json()) == bases["fp4"].fingerprint
    assert bases["nf4"].title.endswith("(nf4)")
    blocks = load_base(str(tiny_base_dir), dtype="float32", quantization=QuantizationConfig.named("nf4", blocks=True))
    assert blocks.fingerprint == bases["nf4"].fingerprint


def test_without_the_package_a_rounded_base_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch, tiny_base_dir: Path) -> None:
    """A sentence and the extra's name, not a traceback out of an import."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes") as refused:
        require_bitsandbytes()
    assert "atoll[quant]" in refused.value.hint
