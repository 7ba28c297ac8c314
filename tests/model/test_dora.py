"""model/dora.py: DoRA adapters are PEFT's in their files, their logits and their gradients, and are served with lengths made at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters import CLOSE, ROWS, decoder_of, new_peft_model, packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model

from atoll.compose.pool import Pool
from atoll.errors import AdapterFormatError, RequestRefused, UnsupportedAdapter
from atoll.model import composed
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import WEIGHTS_FILE, read_adapter, write_adapter
from atoll.model.bank import LoraBank
from atoll.model.decoder import Decoder
from atoll.model.dora import NormsOfJob, gains, row_norms
from atoll.model.sites import Site, magnitude_key
from atoll.serving.merging import MergeSpec, merge
from atoll.train.weights import TrainableAdapter

FAMILIES = ["llama", "qwen2"]  # without and with biases, which DoRA leaves alone


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dora(decoder: Decoder, rank: int = 4, seed: int = 1, **spec: Any) -> Adapter:
    return random_adapter(decoder, rank, seed, use_dora=True, **spec)


def test_what_peft_writes_we_read_and_it_answers_as_there(family: str, tmp_path: Path) -> None:
    """Adapters of the world: the magnitudes bit by bit, and the logits of a resident adapter, whose lengths were made once."""
    theirs = new_peft_model(tiny_model(family), r=4, use_dora=True, target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(tmp_path)
    ours, stored = read_adapter(tmp_path), load_file(tmp_path / WEIGHTS_FILE)
    assert ours.spec.use_dora
    for site, module in ours.modules.items():
        assert module.magnitude is not None
        assert torch.equal(module.magnitude, stored[magnitude_key(site)])
    decoder = decoder_of(tiny_model(family))
    slot = decoder.new_bank().load(ours)
    with torch.no_grad():
        for row, logits in zip(ROWS, packed_logits(decoder, ROWS, [slot] * len(ROWS)), strict=True):
            torch.testing.assert_close(logits, reference(theirs, row), **CLOSE)


def test_logits_and_gradients_of_a_job_are_pefts(family: str, tmp_path: Path) -> None:
    """The length counts as a constant in the gradient, of B and A as of what lies below; a bias is not scaled."""
    model = tiny_model(family)
    decoder = decoder_of(model)
    adapter = dora(decoder, target_modules=("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"))
    weights = TrainableAdapter(adapter, decoder.shape.linears, weight=decoder.weight)
    logits = packed_logits(decoder, ROWS, [weights] * len(ROWS))
    theirs = peft_model(model, adapter, tmp_path)
    expected = [reference(theirs, row) for row in ROWS]
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), **CLOSE)
    torch.cat(logits).square().mean().backward()
    torch.cat(expected).square().mean().backward()
    own = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own[name.replace(".default", "").removesuffix(".weight")] = parameter.grad
    grads = weights.adapter(weights.grads)  # the gradients, in the adapter's own shape
    assert grads.modules
    for site, module in grads.modules.items():
        path = magnitude_key(site).removesuffix(".lora_magnitude_vector")
        for suffix, tensor in ((".lora_A", module.a), (".lora_B", module.b), (".lora_magnitude_vector", module.magnitude)):
            torch.testing.assert_close(tensor, own[path + suffix], rtol=1e-4, atol=2e-6)


def test_what_we_write_is_what_we_read(tmp_path: Path) -> None:
    """Bit-exact, in PEFT's names, and with a ReFT-less config of PEFT's."""
    adapter = dora(decoder_of(tiny_model("llama")))
    write_adapter(tmp_path, adapter)
    back = read_adapter(tmp_path)
    assert back.spec == adapter.spec
    for site, module in adapter.modules.items():
        assert all(torch.equal(one, other) for one, other in zip(module.tensors, back.modules[site].tensors, strict=True))
    assert back.num_parameters == adapter.num_parameters == replace(adapter).num_parameters


def test_rows_of_dora_adapters_may_stand_beside_others(tmp_path: Path) -> None:
    """Each row of a mixed batch gets its own adapter's answer; gathered decode rows cannot scale, so the bank says which may be gathered."""
    decoder = decoder_of(tiny_model("llama"))
    bank = decoder.new_bank()
    slots = [bank.load(adapter) for adapter in (dora(decoder), random_adapter(decoder, 8), dora(decoder, 12, 3))]
    assert [slot.gathers for slot in slots] == [False, True, False]
    given = [slots[0], None, slots[1], slots[2]]
    with torch.no_grad():
        together = packed_logits(decoder, ROWS, given)
        for row, slot, logits in zip(ROWS, given, together, strict=True):
            torch.testing.assert_close(logits, packed_logits(decoder, [row], [slot])[0], **CLOSE)


def test_a_jobs_lengths_are_those_of_the_sum(family: str) -> None:
    """They are made without the sum; 0 of them must stay away from dividing by nothing."""
    weight, a, b = torch.randn(24, 16), torch.randn(3, 16), torch.randn(24, 3)
    torch.testing.assert_close(NormsOfJob(weight).of(weight, a, b.T, 0.7), row_norms(weight, a, b, 0.7))
    assert bool((NormsOfJob(torch.zeros(4, 8)).of(torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(2, 4), 1.0) > 0).all())
    decoder = decoder_of(tiny_model("llama"))
    found = gains(dora(decoder), lambda site: torch.zeros_like(decoder.weight(site)))
    assert all(bool(gain.isfinite().all()) for gain in found.values())


def test_memory_of_a_resident_adapter_counts_its_scales() -> None:
    """Limits on bytes are kept only if all bytes are counted."""
    decoder = decoder_of(tiny_model("llama"))
    adapter = dora(decoder)
    plain = Adapter(replace(adapter.spec, use_dora=False), {site: replace(m, magnitude=None) for site, m in adapter.modules.items()})
    widths = sum(decoder.shape.linears[site.target][0] for site in adapter.modules)
    assert decoder.new_bank().slot_bytes(adapter) - decoder.new_bank().slot_bytes(plain) == 4 * widths
    assert adapter.num_parameters - plain.num_parameters == widths


KEY = magnitude_key(Site(1, "q_proj"))
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(KEY), f"lacks {KEY}"),
    "short": (lambda tensors: tensors.update({KEY: torch.ones(3)}), "has shape (3,)"),
    "matrix": (lambda tensors: tensors.update({KEY: torch.ones(64, 1)}), "has shape (64, 1)"),
    "nan": (lambda tensors: tensors[KEY].fill_(float("nan")), "not finite"),
    "left over": (lambda tensors: tensors.update({magnitude_key(Site(1, "k_proj")): torch.ones(32)}), "which belongs to no factors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_whose_magnitudes_are_wrong_is_refused(damage: str, tmp_path: Path) -> None:
    """Every linear has one, as long as the linear is wide, all finite; nothing is left over."""
    write_adapter(tmp_path, dora(decoder_of(tiny_model("llama")), target_modules=("q_proj",)))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    spoil, said = DAMAGES[damage]
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(AdapterFormatError) as refused:
        read_adapter(tmp_path)
    assert said in refused.value.message


def test_magnitudes_without_the_option_are_refused(tmp_path: Path) -> None:
    """Applying the factors alone would be another adapter."""
    config = tmp_path / "adapter_config.json"
    write_adapter(tmp_path, dora(decoder_of(tiny_model("llama"))))
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterFormatError, match="does not say use_dora"):
        read_adapter(tmp_path)


def test_what_adds_updates_up_refuses_dora_by_name() -> None:
    """W' is no sum with an update: merged by factors it would be another adapter, silently."""
    decoder = decoder_of(tiny_model("llama"))
    parents = [random_adapter(decoder, 4), dora(decoder)]
    with pytest.raises(RequestRefused, match="'b', which is DoRA's"):
        merge(MergeSpec(("a", "b"), (1.0, 1.0)), parents)
    for method in (composed.cat, composed.product):
        with pytest.raises(RequestRefused, match="adapter 2, which is DoRA's"):
            method(parents, [1.0, 1.0])
    with pytest.raises(RequestRefused, match="DoRA"):
        composed.compress(parents[1], 2)
    with pytest.raises(UnsupportedAdapter, match="adapter 2' is a DoRA adapter"):
        Pool.of(parents, decoder)


def test_a_bank_without_weights_is_our_own_mistake() -> None:
    """Only the decoder's own banks know the base."""
    decoder = decoder_of(tiny_model("llama"))
    with pytest.raises(AssertionError, match="knows no weights"):
        LoraBank(decoder.shape.linears, 3, torch.float32).load(dora(decoder))
