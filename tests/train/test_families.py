"""Training over bases of other families: many jobs at once, and LoRA's relatives, as over Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, packed_logits, peft_model, random_adapter, reference
from tests.families import encoder_model, family_model
from tests.tiny_t5 import tiny_t5
from tests.train.jobs import log_lines, toy_config, toy_job, toy_rows

from atoll.config_quantization import QuantizationConfig
from atoll.data.encode import EncodedRow
from atoll.model.adapter import AdapterSpec
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.decoder import Decoder
from atoll.model.encoder import EncoderClassifier
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.seq2seq import Seq2SeqDecoder
from atoll.model.sites import module_name
from atoll.train.job import TrainingJob, TrainResult
from atoll.train.loop import train_jobs
from atoll.train.start import start_adapter
from atoll.train.weights import TrainableAdapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # PEFT says so of every Conv1D

REFT = (ReftSpec(rank=2, positions=Positions(first=1, last=1)),)


def base_of(family: str, quantization: QuantizationConfig | None = None) -> Decoder:
    if family == "t5":
        return Seq2SeqDecoder(tiny_t5(), quantization)
    if family in ("bert", "roberta"):
        return EncoderClassifier(encoder_model(family), quantization)
    return GenericDecoder(family_model(family), quantization)


def spec_of(decoder: Decoder, **changes: Any) -> AdapterSpec:
    """LoRA of rank 4 on all linears."""
    names = tuple(dict.fromkeys(map(module_name, decoder.shape.linears)))
    own = {"target_modules": names, "fan_in_fan_out": decoder.shape.fan_in_fan_out, "task_type": decoder.task_type}
    return AdapterSpec("tiny", 4, 8.0, **{**own, **changes})


def rows_of(decoder: Decoder, num_rows: int = 24, shift: int = 30) -> list[EncodedRow]:
    """The toy rows; for a classifier, one number of three behind each prompt."""
    rows = toy_rows(num_rows, shift)
    if not decoder.classifies:
        return rows
    return [EncodedRow([*row.token_ids[: row.num_prompt], (place + shift) % 3], row.num_prompt, row.where) for place, row in enumerate(rows)]


def makers(decoder: Decoder, folder: Path) -> list[Callable[[], TrainingJob]]:
    """Jobs that differ in kind, data, batches, dropout, noise and seed, all short enough to share forwards."""
    classes = 3 if decoder.classifies else 0

    def make(name: str, shift: int = 30, changes: dict[str, Any] | None = None, **config: Any) -> Callable[[], TrainingJob]:
        def made() -> TrainingJob:
            start = start_adapter(spec_of(decoder, **(changes or {})), decoder, config.get("seed", 0), num_classes=classes).adapter
            return toy_job(folder / name, decoder=decoder, adapter=start, rows=rows_of(decoder, 18, shift), **config)

        return made

    return [
        make("a", validation=rows_of(decoder, 6), max_steps=4, eval_every=2),
        make("b", changes={"dropout": 0.3}, max_steps=3, seed=5),
        make("c", 60, {"reft": REFT}, max_steps=5, batch_size=4),
        make("d", changes={"use_dora": True}, max_steps=3),
        make("e", neftune_noise_alpha=5.0, max_steps=2),
    ]


def run(jobs: list[Callable[[], TrainingJob]], at_once: int) -> dict[int, TrainResult | Exception]:
    found: dict[int, TrainResult | Exception] = {}
    train_jobs(jobs, found.__setitem__, at_once=at_once)
    return found


def tensors_of(outcome: TrainResult | Exception) -> torch.Tensor:
    assert isinstance(outcome, TrainResult), outcome
    adapter = outcome.adapter
    tensors = [t for _, module in sorted(adapter.modules.items(), key=str) for t in module.tensors]
    tensors += [t for _, edit in sorted(adapter.edits.items(), key=str) for t in edit.tensors.values()]
    return torch.cat([tensor.flatten() for tensor in (*tensors, *adapter.head.values())])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert", "t5"])
def test_jobs_at_once_end_as_each_would_alone(family: str, tmp_path: Path) -> None:
    """Rows of other adapters, kinds and classes stand in the same forward of transformers' blocks."""
    decoder = base_of(family)
    alone, together = run(makers(decoder, tmp_path / "alone"), 1), run(makers(decoder, tmp_path / "together"), 5)
    for index, name in enumerate("abcde"):
        ours, truth = tensors_of(together[index]), tensors_of(alone[index])
        assert float((ours - truth).norm() / truth.norm()) < 1e-4
        assert float((ours - truth).abs().max()) < 1e-3  # AdamW amplifies rounding where a gradient is next to zero
        for line, expected in zip(log_lines(tmp_path / "together" / name), log_lines(tmp_path / "alone" / name), strict=True):
            assert line == pytest.approx(expected, rel=1e-3)


def moved(decoder: Decoder, **changes: Any) -> Any:
    adapter = random_adapter(decoder, 4, **{"target_modules": spec_of(decoder).target_modules, **changes})
    return replace(adapter, spec=replace(adapter.spec, fan_in_fan_out=decoder.shape.fan_in_fan_out))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text"])
def test_dora_over_another_family_is_pefts(family: str, tmp_path: Path) -> None:
    """Row lengths are those of the weight as it is multiplied, however the family stores it."""
    decoder = base_of(family)
    adapter = moved(decoder, use_dora=True)
    theirs = peft_model(family_model(family), adapter, tmp_path / "adapter")
    slot = decoder.new_bank().load(read_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        for row, found in zip(ROWS, packed_logits(decoder, ROWS, [slot] * len(ROWS)), strict=True):
            torch.testing.assert_close(found, reference(theirs, row), **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_a_start_in_the_base_is_saved_for_the_unchanged_base(family: str, tmp_path: Path) -> None:
    """PiSSA's start changes nothing before training, and what is saved does on the base what was trained beside the start."""
    decoder = base_of(family)
    start = start_adapter(spec_of(decoder), decoder, 0, "pissa")
    settings = toy_config(max_steps=3)
    job = TrainingJob(decoder, start.adapter, toy_rows(), (), settings, tmp_path, "job", removed=start.removed, b_ratio=4.0)
    bare = packed_logits(decoder, ROWS)
    for found, row in zip(packed_logits(decoder, ROWS, [job.weights] * len(ROWS)), bare, strict=True):
        torch.testing.assert_close(found.detach(), row, rtol=0, atol=5e-5)
    write_adapter(tmp_path / "saved", job.run().adapter)
    slot = decoder.new_bank().load(read_adapter(tmp_path / "saved"))
    with torch.no_grad():
        trained, saved = (packed_logits(decoder, ROWS, [adapter] * len(ROWS)) for adapter in (job.weights, slot))
    for one, other, before in zip(trained, saved, bare, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)
        assert not torch.allclose(other, before, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_rounded_base_computes_the_same_held_whole_and_as_blocks(family: str, tmp_path: Path) -> None:
    """Every linear of a block is rounded as it is multiplied; losses and gradients of a job are the same numbers either way."""
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    found = []
    for blocks in (False, True):
        decoder = base_of(family, QuantizationConfig.named("nf4", blocks=blocks))
        assert decoder.holds_blocks == blocks
        start = start_adapter(spec_of(decoder), decoder, 0, num_classes=3 if decoder.classifies else 0).adapter
        job = toy_job(tmp_path / str(blocks), decoder=decoder, adapter=start, rows=rows_of(decoder), max_steps=2)
        found.append((tensors_of(job.run() and job.result()), decoder.linear_bytes))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] < found[0][1] / 5
    plain = base_of(family)
    site = next(iter(TrainableAdapter(start, plain.shape.linears, groups=plain.shape.groups).adapter().modules))
    assert not torch.equal(plain.weight(site), decoder.weight(site))
