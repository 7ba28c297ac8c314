"""What every kind of adapter must do, whatever it is made of: save and load, train, batch, evict and reload.

A new kind adds one entry to KINDS and nothing else here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model

from atoll.config import TrainerConfig
from atoll.data.encode import EncodedRow
from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.train.job import TrainingJob


@dataclass(frozen=True)
class Kind:
    """How the suite makes an adapter of a kind: one that moves logits, a fresh one to train, and the place it is resident in."""

    moved: Callable[[Decoder, int], Adapter]
    fresh: Callable[[Decoder], Adapter]
    bank: Callable[[Decoder], Any]
    learning_rate: float = TrainerConfig().learning_rate


PART = ReftSpec(rank=8, positions=Positions(2, 1))


def _fresh(decoder: Decoder, spec: AdapterSpec) -> Adapter:
    return new_adapter(spec, decoder.shape.linears, decoder.shape.num_layers, torch.Generator().manual_seed(0))


KINDS: dict[str, Kind] = {
    "lora": Kind(
        moved=lambda decoder, seed: random_adapter(decoder, 4 + 4 * seed, seed=seed),
        fresh=lambda decoder: _fresh(decoder, AdapterSpec("tiny", 8, 16.0)),
        bank=Decoder.new_bank,
    ),
    "reft": Kind(
        moved=lambda decoder, seed: random_reft(decoder, seed, rank=1 + seed, tied=seed % 2 == 0),
        fresh=lambda decoder: _fresh(decoder, AdapterSpec.reft_only("tiny", [PART])),
        bank=Decoder.new_bank,
        learning_rate=2e-2,
    ),
    "lora+reft": Kind(
        moved=lambda decoder, seed: random_reft(decoder, seed, lora=4 * seed, rank=2),
        fresh=lambda decoder: _fresh(decoder, AdapterSpec("tiny", 4, 8.0, reft=(PART,))),
        bank=Decoder.new_bank,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@torch.no_grad()
def answer(decoder: Decoder, weights: Any) -> torch.Tensor:
    return packed_logits(decoder, ROWS[:1], [weights])[0]


def same(one: Adapter, other: Adapter) -> bool:
    def tensors(adapter: Adapter) -> dict[Any, torch.Tensor]:
        lora = {(site, name): getattr(module, name) for site, module in adapter.modules.items() for name in "ab"}
        return lora | {(site, name): tensor for site, found in adapter.edits.items() for name, tensor in found.tensors.items()}

    mine, its = tensors(one), tensors(other)
    scalings = [{site: module.scaling for site, module in adapter.modules.items()} for adapter in (one, other)]
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine) and scalings[0] == scalings[1]


def test_files_give_back_the_same_adapter(kind: Kind, decoder: Decoder, tmp_path: Path) -> None:
    """What is published is what was trained: spec, factors and manifest, bit for bit."""
    adapter = kind.moved(decoder, 1)
    adapter = replace(adapter, manifest={"format": 1, "kind": adapter.spec.kind, "prompt": None})
    write_adapter(tmp_path / "one", adapter)
    back = read_adapter(tmp_path / "one")
    assert back.spec == adapter.spec
    assert back.manifest == adapter.manifest
    assert same(back, adapter)
    write_adapter(tmp_path / "two", back)
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), f"{file.name} is not canonical"


def test_training_lowers_the_loss_and_moves_only_the_adapter(kind: Kind, decoder: Decoder, tmp_path: Path) -> None:
    """Every kind learns through the same loop, from a start that equals the base."""
    fresh = kind.fresh(decoder)
    rows = [EncodedRow([10 + i % 7, 20, 30 + i % 7, 2], 2, f"toy:{i}") for i in range(32)]
    job = TrainingJob(decoder, fresh, rows, rows[:8], TrainerConfig(epochs=4, dtype="float32", learning_rate=kind.learning_rate), tmp_path, "job")
    base = answer(decoder, None)
    assert torch.equal(answer(decoder, job.weights), base), "a fresh adapter is the base"
    result = job.run()
    losses = [loss for _, loss in result.progress.evaluations]
    assert losses[-1] < losses[0] - 0.2
    assert torch.equal(answer(decoder, None), base)
    bank = kind.bank(decoder)
    torch.testing.assert_close(answer(decoder, bank.load(result.adapter)), answer(decoder, job.weights), **CLOSE)


def test_rows_of_several_adapters_share_a_batch(kind: Kind, decoder: Decoder) -> None:
    """Together as alone."""
    bank = kind.bank(decoder)
    slots = [None, *(bank.load(kind.moved(decoder, seed)) for seed in (1, 2, 3))]
    with torch.no_grad():
        together = packed_logits(decoder, ROWS, slots)
        for row, slot, mixed in zip(ROWS, slots, together, strict=True):
            torch.testing.assert_close(mixed, packed_logits(decoder, [row], [slot])[0], **CLOSE)


def test_an_evicted_adapter_comes_back_the_same(kind: Kind, decoder: Decoder) -> None:
    """Its place went to others in between; the answer must be the same bits as before."""
    bank = kind.bank(decoder)
    adapter = kind.moved(decoder, 1)
    slot = bank.load(adapter)
    before = answer(decoder, slot)
    assert not torch.equal(before, answer(decoder, None))
    bank.unload(slot)
    others = [bank.load(kind.moved(decoder, seed)) for seed in (2, 3, 1, 2)]
    for other in others[:2]:
        bank.unload(other)
    assert torch.equal(answer(decoder, bank.load(adapter)), before)
