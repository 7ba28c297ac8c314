"""Train one adapter over a frozen base: LoRA, ReFT or both.

The state of a job is a step count and three vectors; everything else (row order, dropout, learning rate) is a function of the config and the step. So
a run that is killed and resumed from its last checkpoint takes the same steps again and ends with the same weights, bit for bit on a CPU in float32.

The loss is the mean over the label tokens of the whole effective batch, however it is cut into micro-batches. Used by workflows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.config import TrainerConfig
from atoll.data.batches import epoch_batches, micro_batches
from atoll.data.encode import EncodedRow
from atoll.errors import Interrupted, TrainingError
from atoll.model.adapter import Adapter
from atoll.model.decoder import Decoder
from atoll.model.loss import label_loss
from atoll.model.memory import keep_freed_memory, release_memory
from atoll.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from atoll.train.entering import EnteringStates
from atoll.train.interrupt import interruptible
from atoll.train.log import RunLog
from atoll.train.rows import adapter_batch, label_batch
from atoll.train.schedule import learning_rate
from atoll.train.spec import nothing_taught
from atoll.train.weights import TrainableAdapter

MIB = 1 << 20
Report = Callable[[str, int, int], None]  # (what is going on, steps done, steps in all)


@dataclass(frozen=True)
class TrainResult:
    """The adapter of the best step (of the last, without validation rows) and how it came about."""

    adapter: Adapter
    progress: Progress
    total_steps: int


def total_steps(num_rows: int, config: TrainerConfig) -> int:
    """Optimizer steps of a job: max_steps, or else as many as `epochs` over the rows take in batches of batch_size."""
    return config.max_steps or max(1, math.ceil(config.epochs * math.ceil(num_rows / config.batch_size)))


def entering_states(decoder: Decoder, first_layer: int, num_rows: int, config: TrainerConfig) -> EnteringStates | None:
    """Where a job that changes nothing below block first_layer keeps what enters there; None where rows are seen once and keeping pays nothing."""
    if not first_layer or total_steps(num_rows, config) <= math.ceil(num_rows / config.batch_size):
        return None
    return EnteringStates(decoder, first_layer, config.reuse_mib * MIB)


class TrainingJob:
    """One adapter's training: make it, then `run`. `folder` receives checkpoint.safetensors, log.jsonl and tensorboard/."""

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter,
        train_rows: Sequence[EncodedRow],
        validation_rows: Sequence[EncodedRow],
        config: TrainerConfig,
        folder: Path,
        job_digest: str,
    ) -> None:
        if not train_rows:
            raise TrainingError("there are no training rows", hint="check the data file and its split column")
        if (refused := nothing_taught(train_rows, adapter.spec, decoder.shape.num_layers)) is not None:
            raise refused
        self._decoder, self._config, self._folder, self._digest = decoder, config, folder, job_digest
        self._train, self._validation = list(train_rows), list(validation_rows)
        self._lengths = [len(row.token_ids) for row in self._train]
        self.weights = TrainableAdapter(adapter, decoder.shape.linears, decoder.device)
        self._optimizer = torch.optim.AdamW(
            self.weights.parameter_groups(config), lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
        self.total_steps = total_steps(len(self._train), config)
        self._steps_an_epoch = math.ceil(len(self._train) / config.batch_size)
        self._entering = entering_states(decoder, self.weights.first_layer, len(self._train), config)
        self._eval_every = config.eval_every or self._steps_an_epoch
        self._best: Tensor | None = None
        self._progress = Progress()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run(self, report: Report | None = None) -> TrainResult:
        """Train from the last checkpoint, or from the start. Ctrl-C ends the step at hand, writes a checkpoint and raises Interrupted.

        Raises TrainingError when a loss is not finite, StorageError when a checkpoint cannot be written.
        """
        keep_freed_memory()
        try:
            return self._run(report)
        finally:
            release_memory()

    def _run(self, report: Report | None) -> TrainResult:
        self._folder.mkdir(parents=True, exist_ok=True)
        restored = load_checkpoint(self._folder, self._digest, self.weights.values, self._optimizer)
        if restored is not None:
            self._progress, self._best = restored
        progress, config = self._progress, self._config
        with RunLog(self._folder, progress.step) as log, interruptible() as stop_asked:
            while progress.step < self.total_steps and not progress.stopped_early:
                self._one_step(log)
                last = progress.step == self.total_steps
                if self._validation and (last or progress.step % self._eval_every == 0):
                    self._validate(log)
                if last or progress.stopped_early or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                    self._checkpoint()
                if report is not None:
                    report(self._headline(), progress.step, self.total_steps)
                if stop_asked():
                    self._checkpoint()
                    raise Interrupted(
                        f"training stopped after step {progress.step} of {self.total_steps}", hint="run the same command again to go on from there"
                    )
        return TrainResult(self.weights.adapter(self._best), progress, self.total_steps)

    def _headline(self) -> str:
        progress = self._progress
        best = "" if progress.best_loss is None else f", validation {progress.best_loss:.3f}"
        return f"loss {progress.train_loss:.3f}{best}"

    def _checkpoint(self) -> None:
        save_checkpoint(self._folder, self._digest, self._progress, self.weights.values, self._optimizer, self._best)

    def _rows_of_step(self, step: int) -> list[int]:
        epoch, place = divmod(step, self._steps_an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self._lengths, self._config.batch_size, self._config.seed, epoch))
        return self._epoch[1][place]

    def _one_step(self, log: RunLog) -> None:
        """One optimizer step: the gradient of the mean label loss of the effective batch, clipped, then AdamW."""
        progress, config, started = self._progress, self._config, time.perf_counter()
        indices = self._rows_of_step(progress.step)
        labels = sum(self._train[index].num_labels for index in indices)
        self.weights.grads.zero_()
        total, tokens = 0.0, 0
        for place, micro in enumerate(micro_batches(indices, self._lengths, config.micro_batch_tokens)):
            self.weights.dropout_seed = (config.seed * 1_000_003 + progress.step) * 1024 + place
            loss, num_tokens = self._loss([self._train[index] for index in micro])
            if loss.requires_grad:  # not where none of the micro-batch's prompts has a token that is edited
                (loss / labels).backward()
            total, tokens = total + float(loss.detach()), tokens + num_tokens
        self.weights.dropout_seed = None
        loss_mean = total / labels
        norm = float(torch.linalg.vector_norm(self.weights.grads))
        if not (math.isfinite(loss_mean) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss at step {progress.step + 1} is {loss_mean} with a gradient norm of {norm}: training diverged",
                hint=f"lower trainer.learning_rate (now {config.learning_rate}); the last checkpoint is kept",
            )
        if config.max_grad_norm and norm > config.max_grad_norm:
            self.weights.grads.mul_(config.max_grad_norm / norm)
        rate = learning_rate(progress.step, self.total_steps, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self.weights.retract()
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens, progress.label_tokens = progress.tokens + tokens, progress.label_tokens + labels
        progress.seconds, progress.train_loss = progress.seconds + seconds, loss_mean
        if progress.step % config.logging_every == 0:
            log.write(progress.step, loss=loss_mean, learning_rate=rate, grad_norm=norm, tokens_per_s=tokens / seconds)

    def _loss(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, int]:
        """(summed label loss in nats, packed tokens) of some rows under the current weights."""
        packed = label_batch(rows, self._decoder.device)
        adapters = adapter_batch(packed, [self.weights] * len(rows))
        entering = self._entering.of(rows) if self._entering is not None else None
        hidden = self._decoder.forward(packed.batch, adapters, entering=entering)
        return label_loss(hidden, self._decoder.head, packed.labels), packed.batch.num_tokens

    def _validate(self, log: RunLog) -> None:
        """Mean validation loss a label token; keep the values of the best, stop after `early_stop_patience` evaluations without one."""
        progress, config, started = self._progress, self._config, time.perf_counter()
        lengths = [len(row.token_ids) for row in self._validation]
        total, labels = 0.0, 0
        with torch.no_grad():
            for micro in micro_batches(range(len(lengths)), lengths, config.micro_batch_tokens):
                rows = [self._validation[index] for index in micro]
                total += float(self._loss(rows)[0])
                labels += sum(row.num_labels for row in rows)
        loss = total / labels
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss after step {progress.step} is {loss}: training diverged",
                hint=f"lower trainer.learning_rate (now {config.learning_rate}); the last checkpoint is kept",
            )
        progress.evaluations.append((progress.step, loss))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            self._best = self.weights.values.detach().clone()
        else:
            progress.stale += 1
            progress.stopped_early = config.early_stop_patience is not None and progress.stale >= config.early_stop_patience
        progress.seconds += time.perf_counter() - started
        log.write(progress.step, validation_loss=loss)
