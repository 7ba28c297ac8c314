"""train/optimizer.py: each optimizer moves an adapter as its library would move the adapter's own tensors, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import Lion
from tests.train.jobs import toy_decoder, toy_job, toy_reft, toy_rows

from atoll.config import TrainConfig, TrainerConfig
from atoll.config_file import load_config
from atoll.errors import Interrupted
from atoll.model.adapter import Adapter
from atoll.train.job import TrainingJob, TrainResult
from atoll.train.loop import train, train_jobs
from atoll.train.plan import _without_defaults

KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.3},
    "sgd without momentum": {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3, "betas": (0.9, 0.99)},
}
THEIRS = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.3, momentum=0.9),
    "sgd without momentum": lambda tensors: torch.optim.SGD(tensors, lr=0.3),
    "adafactor": lambda tensors: torch.optim.Adafactor(tensors, lr=5e-3, eps=(None, 1.0)),
    "lion": lambda tensors: Lion(tensors, lr=1e-3, betas=(0.9, 0.99)),
}


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter by name."""
    found = {f"{site} {name}": tensor for site, module in sorted(adapter.modules.items()) for name, tensor in (("a", module.a), ("b", module.b))}
    return found | {f"{site} {name}": tensor for site, edit in sorted(adapter.edits.items()) for name, tensor in edit.tensors.items()}


def gradients_of(job: TrainingJob) -> dict[str, torch.Tensor]:
    """The gradients of now, cut as the adapter is."""
    return tensors_of(job.weights.adapter(job.weights.grads))


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_moves_as_the_library_moves_it(kind: str, tmp_path: Path) -> None:
    """The flat vector and fused factors are ours alone; Adafactor, which looks at matrices, must see the adapter's own."""
    job = toy_job(tmp_path, schedule="constant", warmup_fraction=0.0, max_grad_norm=0.0, **KINDS[kind])
    job.open()
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors_of(job.weights.adapter()).items()}
    optimizer = THEIRS[kind](list(theirs.values()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        job.begin_step()
        job.need_grads()
        job.weights.grads.copy_(torch.randn(job.weights.grads.shape, generator=generator))
        for name, gradient in gradients_of(job).items():
            theirs[name].grad = gradient
        job.finish_step()
        optimizer.step()
    job.close()
    for name, tensor in tensors_of(job.weights.adapter()).items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_resumes_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    """LoRA and ReFT in one adapter; a stop loses nothing of the optimizer's state."""
    decoder = toy_decoder()

    def job(name: str) -> TrainingJob:
        return toy_job(tmp_path / name, decoder=decoder, adapter=toy_reft(lora=2), max_steps=30, max_grad_norm=0.0, **KINDS[kind])

    whole = train(job("whole"))
    asked = iter([False] * 6 + [True])
    with pytest.raises(Interrupted):
        train(job("stopped"), cancelled=lambda: next(asked))
    resumed = train(job("stopped"))
    assert torch.equal(
        torch.cat([t.flatten() for t in tensors_of(whole.adapter).values()]), torch.cat([t.flatten() for t in tensors_of(resumed.adapter).values()])
    )
    first = float((tmp_path / "whole" / "log.jsonl").read_text().partition('"loss": ')[2].partition(",")[0])
    assert whole.progress.train_loss is not None and whole.progress.train_loss < 0.9 * first


def test_many_jobs_have_each_their_own(tmp_path: Path) -> None:
    """In the joined loop, beside each other; each as alone to rounding."""
    decoder, found = toy_decoder(), dict[int, TrainResult | Exception]()

    def job(folder: str, kind: str) -> TrainingJob:
        return toy_job(tmp_path / folder / kind, decoder=decoder, rows=toy_rows(12), max_steps=4, **KINDS[kind])

    kinds = [kind for kind in KINDS if kind != "lion"]  # whose sign turns rounding into steps
    train_jobs([lambda kind=kind: job("together", kind) for kind in kinds], found.__setitem__)  # type: ignore[misc]
    for index, kind in enumerate(kinds):
        alone, together = train(job("alone", kind)), found[index]
        assert isinstance(together, TrainResult)
        for name, tensor in tensors_of(alone.adapter).items():
            torch.testing.assert_close(tensors_of(together.adapter)[name], tensor, rtol=1e-3, atol=1e-4)


def test_only_what_differs_from_the_default_joins_a_jobs_identity() -> None:
    """Jobs from before there was a choice keep theirs."""
    later = ("optimizer", "momentum", "warmup_steps", "final_fraction", "cycles", "decay_fraction")
    assert not set(later) & set(_without_defaults(TrainerConfig(), later))
    assert _without_defaults(TrainerConfig(optimizer="sgd"), later)["optimizer"] == "sgd"


def test_settings_of_another_optimizer_or_schedule_are_pointed_out(tmp_path: Path) -> None:
    """A key without effect is a run that is not what its author thinks."""
    file = tmp_path / "train.yaml"
    file.write_text("base: x\ndata: rows.jsonl\ntrainer: {optimizer: sgd, betas: [0.8, 0.9], final_fraction: 0.1, cycles: 3}\n")
    loaded = load_config(file, "train")
    assert isinstance(loaded.config, TrainConfig)
    said = "\n".join(loaded.warnings)
    assert "trainer.betas has no effect: it is for optimizer adamw and lion, not sgd" in said
    assert "trainer.cycles has no effect" in said
    assert "final_fraction" not in said
    assert "trainer.learning_rate is not given" in said
    lion = TrainConfig.model_validate({"base": "x", "trainer": {"optimizer": "lion"}})
    assert lion.trainer.betas == (0.9, 0.99)
