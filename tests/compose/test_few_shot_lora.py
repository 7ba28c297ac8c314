"""LoRA on the few examples: it learns them, repeats with its seed, leaves nothing behind and can be stopped."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from tests.compose.scenes import examples

from atoll.compose.few_shot_lora import FEW_SHOT_ADAPTER, few_shot_trainer, train_on_examples
from atoll.compose.losses import losses
from atoll.compose.pool import Pool
from atoll.config import TrainerConfig
from atoll.errors import Interrupted, TrainingError
from atoll.model.decoder import Decoder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made: seen to be empty afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_training_learns_the_examples_and_leaves_no_file(decoder: Decoder, temporary: Path) -> None:
    """The control is a real opponent: on what it has seen its loss falls far."""
    rows = examples(5)
    seen: list[tuple[int, int]] = []
    adapter = train_on_examples(decoder, rows, base="tiny", report=lambda headline, step, total: seen.append((step, total)))
    found = losses(decoder, Pool.of([adapter], decoder), torch.tensor([[0.0], [1.0]]), rows).mean(1)
    assert float(found[1]) < 0.9 * float(found[0])
    total = few_shot_trainer(5).max_steps
    assert seen == [(step, total) for step in range(1, (total or 0) + 1)]
    assert adapter.spec.base == "tiny"
    assert adapter.spec.rank == FEW_SHOT_ADAPTER.r
    assert list(temporary.iterdir()) == []
    assert few_shot_trainer(5).log_to == ()  # of a curve that is thrown away


def test_the_same_seed_is_the_same_adapter(decoder: Decoder) -> None:
    """Another seed starts from other factors; nothing else is drawn anywhere."""
    short = few_shot_trainer(3).model_copy(update={"max_steps": 3})
    one, same, other = (train_on_examples(decoder, examples(3), trainer=short.model_copy(update={"seed": seed})) for seed in (1, 1, 2))
    assert all(torch.equal(module.b, same.modules[site].b) for site, module in one.modules.items())
    assert not all(torch.equal(module.b, other.modules[site].b) for site, module in one.modules.items())


def test_steps_follow_from_the_number_of_examples_alone() -> None:
    """No example is held out to choose them, so nothing else may; more examples are never seen fewer times than makes sense."""
    steps = [few_shot_trainer(num).max_steps or 0 for num in (1, 5, 20, 50, 100)]
    assert steps == sorted(steps)
    assert few_shot_trainer(20, seed=3) == few_shot_trainer(20, seed=3)
    assert few_shot_trainer(20).early_stop_patience is None or few_shot_trainer(20).eval_every is None
    for num in (1, 5, 100):
        assert few_shot_trainer(num).checkpoint_every is None


def test_a_stop_is_an_interruption_and_leaves_no_file(decoder: Decoder, temporary: Path) -> None:
    """A cross-validation that is told to stop must not wait for a whole training."""
    steps: list[int] = []
    with pytest.raises(Interrupted, match="after step 2 of"):
        train_on_examples(decoder, examples(2), report=lambda headline, step, total: steps.append(step), stop_asked=lambda: len(steps) == 2)
    assert steps == [1, 2]
    assert list(temporary.iterdir()) == []


def test_training_that_diverges_says_so(decoder: Decoder, temporary: Path) -> None:
    wild = TrainerConfig(max_steps=30, learning_rate=1.0, max_grad_norm=0, checkpoint_every=None, weight_decay=0.0, schedule="constant")
    row = examples(1)[0]
    with pytest.raises(TrainingError, match="diverged"):
        train_on_examples(decoder, [row], trainer=wild.model_copy(update={"learning_rate": 1e20}))
    assert list(temporary.iterdir()) == []
