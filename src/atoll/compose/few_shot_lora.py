"""LoRA trained on the few examples themselves: what a composition must beat to be worth more than training.

There are no rows to validate on, and held-out examples are never seen here: the number of steps is a function of the number of examples alone, fixed
before any of them is looked at.

Used by controls.py and workflows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from atoll.config import TrainerConfig
from atoll.config_adapter import LoraAdapterConfig
from atoll.data.encode import EncodedRow
from atoll.errors import Interrupted
from atoll.model.adapter import Adapter, new_adapter
from atoll.model.decoder import Decoder
from atoll.train.job import Report, TrainingJob
from atoll.train.spec import adapter_spec

FEW_SHOT_ADAPTER = LoraAdapterConfig(r=16)  # at all linears, as adapters of a hub usually are
_BATCH = 8
_FEWEST_STEPS, _EPOCHS = 30, 6.0


def few_shot_trainer(num_examples: int, seed: int = 0) -> TrainerConfig:
    """How LoRA is trained on so many examples."""
    steps = max(_FEWEST_STEPS, round(_EPOCHS * num_examples / _BATCH))
    return TrainerConfig(max_steps=steps, batch_size=_BATCH, learning_rate=5e-4, warmup_fraction=0.1, checkpoint_every=None, seed=seed)


def train_on_examples(
    decoder: Decoder,
    rows: Sequence[EncodedRow],
    *,
    base: str = "",
    seed: int = 0,
    trainer: TrainerConfig | None = None,
    adapter: LoraAdapterConfig = FEW_SHOT_ADAPTER,
    report: Report | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> Adapter:
    """A LoRA trained on some examples, encoded as for training. base: its name, for the adapter's config. trainer: few_shot_trainer's if None.

    Leaves no file behind. Raises Interrupted on Ctrl-C or once stop_asked() is true, TrainingError where training diverges.
    """
    shape = decoder.shape
    settings = trainer or few_shot_trainer(len(rows), seed)
    spec = adapter_spec(base, adapter, shape.num_layers, shape.hidden)
    start = new_adapter(spec, shape.linears, shape.num_layers, torch.Generator().manual_seed(settings.seed))

    def on_step(headline: str, step: int, total: int) -> None:
        if report is not None:
            report(headline, step, total)
        if stop_asked is not None and stop_asked():
            raise Interrupted(f"training on the examples stopped after step {step} of {total}", hint="run the same command again")

    with tempfile.TemporaryDirectory(prefix="atoll-few-shot-") as folder:
        return TrainingJob(decoder, start, rows, (), settings, Path(folder), "few-shot").run(on_step).adapter
