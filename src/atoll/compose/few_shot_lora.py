"""LoRA trained on the few examples themselves: what a composition must beat to be worth more than training.

There are no rows to validate on, and held-out examples are never seen here: the number of steps is a function of the number of examples alone.

Used by controls.py and workflows.
"""

from __future__ import annotations

import math
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
from atoll.train.spec import spec_over

FEW_SHOT_ADAPTER = LoraAdapterConfig(r=16)  # at all linears, as adapters of a hub usually are
_BATCH = 8
# By trials on four of Atoll's generated tasks (support_intents, date_format, unit_conversion, review_explained) over SmolLM2-135M-Instruct. At
# constant rates of 1e-4, 3e-4 and 1e-3 the loss of 20 test rows was least after about the same rate x steps (0.0035 for 5 examples, 0.006 for 20,
# 0.012 for 100) and rose behind it: unit_conversion, 5 examples, 3e-4 had 1.40 after 9 steps, 1.96 after 18, 2.96 after 24. A cosine averages half of
# its peak. These settings came below the best constant rate and step, or within 0.01 of it, in 5 of 7 trials, and 0.21 and 0.26 above it in the
# others (support_intents, 5 and 20 examples). Rank 8 was worse in 3 of 3.
_RATE, _STEPS = 5e-4, 6.0


def few_shot_trainer(num_examples: int, seed: int = 0) -> TrainerConfig:
    """How LoRA is trained on k examples: 6 √k steps (13 for 5, 27 for 20, 60 for 100) of up to 8 examples each, at 5e-4 with a cosine."""
    steps = max(1, round(_STEPS * math.sqrt(num_examples)))
    return TrainerConfig(max_steps=steps, batch_size=_BATCH, learning_rate=_RATE, warmup_fraction=0.1, checkpoint_every=None, log_to=(), seed=seed)


def train_on_examples(
    decoder: Decoder,
    rows: Sequence[EncodedRow],
    *,
    base: str = "",
    seed: int = 0,
    trainer: TrainerConfig | None = None,
    report: Report | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> Adapter:
    """A LoRA trained on some examples, encoded as for training. base: its name, for the adapter's config. trainer: few_shot_trainer's if None.

    Leaves no file behind. Raises Interrupted on Ctrl-C or once stop_asked() is true, TrainingError where training diverges.
    """
    shape = decoder.shape
    settings = trainer or few_shot_trainer(len(rows), seed)
    spec = spec_over(base, FEW_SHOT_ADAPTER, decoder)
    start = new_adapter(spec, shape.linears, shape.num_layers, torch.Generator().manual_seed(settings.seed))

    def on_step(headline: str, step: int, total: int) -> None:
        if report is not None:
            report(headline, step, total)
        if stop_asked is not None and stop_asked():
            raise Interrupted(f"training on the examples stopped after step {step} of {total}", hint="run the same command again")

    with tempfile.TemporaryDirectory(prefix="atoll-few-shot-") as folder:
        return TrainingJob(decoder, start, rows, (), settings, Path(folder), "few-shot").run(on_step).adapter
