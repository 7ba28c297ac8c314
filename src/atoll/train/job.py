"""One adapter's training over a frozen base: LoRA, ReFT or both. Its state, and the arithmetic of a step; loop.py runs the forwards.

The state of a job is a step count and three vectors; everything else (row order, dropout, learning rate) is a function of the config and the step. So
a run that is killed and resumed from its last checkpoint takes the same steps again and, alone, ends with the same weights, bit for bit on a CPU in
float32; beside other jobs (loop.py) to the rounding of products of another height.

The loss is the mean over the label tokens of the whole effective batch, however it is cut into micro-batches. Used by loop.py and plan.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.config import TrainerConfig
from atoll.data.batches import epoch_batches, micro_batches
from atoll.data.encode import EncodedRow
from atoll.data.masking import Masking
from atoll.errors import TrainingError
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder
from atoll.model.sites import Site
from atoll.train.checkpoint import Progress, read_checkpoint, save_checkpoint
from atoll.train.cost import Spent, charge
from atoll.train.entering import EnteringStates, Room
from atoll.train.log import RunLog
from atoll.train.optimizer import make_optimizer
from atoll.train.rows import RowGroup, shared_beginning
from atoll.train.schedule import learning_rate
from atoll.train.spec import nothing_taught
from atoll.train.team import ALONE, Team
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


def entering_states(decoder: Decoder, first_layer: int, num_rows: int, config: TrainerConfig, room: Room | None = None) -> EnteringStates | None:
    """Where a job that changes nothing below block first_layer keeps what enters there.

    None where rows are seen once and keeping pays nothing, and where noise gives a row other embeddings in every step.
    """
    seen_once = total_steps(num_rows, config) <= math.ceil(num_rows / config.batch_size)
    if not first_layer or not decoder.can_enter or seen_once or config.neftune_noise_alpha is not None:
        return None
    return EnteringStates(decoder, first_layer, config.reuse_mib * MIB, room)


class TrainingJob:
    """One adapter's training: make it, `open` it, and let loop.train_jobs step it. `folder` receives checkpoint.safetensors, log.jsonl, tensorboard/.

    removed: a start that is taken out of the base (train.start); b_ratio: LoRA+'s, see TrainableAdapter; masking: rows are texts, of which tokens are
    hidden. team: the processes that train it together; each has a share of every batch's rows, and the first alone uses the folder. room: shared with
    the process's other jobs (train.entering). title, settings: for loggers.

    A step is begin_step, a `need_grads` and an `add` for each of its groups, finish_step. Between two steps it may be left for as long as one likes.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter,
        train_rows: Sequence[EncodedRow],
        validation_rows: Sequence[EncodedRow],
        config: TrainerConfig,
        folder: Path,
        job_digest: str,
        *,
        removed: Mapping[Site, LoraModule] | None = None,
        b_ratio: float | None = None,
        masking: Masking | None = None,
        team: Team = ALONE,
        room: Room | None = None,
        title: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not train_rows:
            raise TrainingError("there are no training rows", hint="check the data file and its split column")
        if (refused := nothing_taught(train_rows, adapter.spec, decoder.shape.num_layers)) is not None:
            raise refused
        self.decoder, self.config, self.folder, self._digest, self.team = decoder, config, folder, job_digest, team
        self.title, self._settings = title, settings
        self._train, self._validation, self._masking = list(train_rows), list(validation_rows), masking
        self._lengths = [len(row.token_ids) for row in self._train]
        self.weights = TrainableAdapter(
            adapter, decoder.shape.linears, decoder.device, decoder.shape.groups, b_ratio=b_ratio, weight=decoder.weight, removed=removed
        )
        self._optimizer = make_optimizer(self.weights, config)
        self.weights.drop_grads()
        self.total_steps = total_steps(len(self._train), config)
        self._steps_an_epoch = math.ceil(len(self._train) / config.batch_size)
        self._entering = entering_states(decoder, self.weights.first_layer, len(self._train), config, room)
        self._eval_every = config.eval_every or self._steps_an_epoch
        self._positions = tuple(spec.positions for spec in adapter.spec.reft)
        dropout = adapter.spec.dropout or any(spec.dropout for spec in adapter.spec.reft)
        has_noise = config.neftune_noise_alpha is not None  # each row its own
        self._shares = not (has_noise or dropout or decoder.rotary.by_length or decoder.whole_prompts)
        self._best: Tensor | None = None
        self.progress = Progress()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._log: RunLog | None = None
        self._step = _Step()

    def open(self) -> None:
        """Go on from the last checkpoint, or from the start. Raises TrainingError for one of another job, StorageError."""
        found = self.team.from_first(lambda: read_checkpoint(self.folder, self._digest, self.weights.values.numel()))
        if found is not None:
            self.progress, self._best = found.restore(self.weights.values, self._optimizer)
            self.weights.changed()
        if self.team.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = RunLog(self.folder, self.progress.step, self.config.log_to, title=self.title, settings=self._settings)
        if self.team.count > 1:  # a start computed on another machine may differ in its last bits
            self.team.copy_first(self.weights.values.detach())
            self.weights.changed()

    def close(self) -> None:
        """Close the log, and forget what was kept of rows. The job's weights stay as they are."""
        if self._entering is not None:
            self._entering.forget()
        if self._log is not None:
            self._log.close(whole=self.finished)

    @property
    def enters_above(self) -> bool:
        """Whether its forwards start above the base's first block (`enter`), so that no other job's rows can stand in them."""
        return self._entering is not None

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps or self.progress.stopped_early

    @property
    def headline(self) -> str:
        progress = self.progress
        best = "" if progress.best_loss is None else f", validation {progress.best_loss:.3f}"
        return f"loss {progress.train_loss:.3f}{best}" if progress.train_loss is not None else "starting"

    def result(self) -> TrainResult:
        """The adapter of the best step, or of the last."""
        return TrainResult(self.weights.adapter(self._best), self.progress, self.total_steps)

    def checkpoint(self) -> None:
        """Write the state of now, in the first process. Raises StorageError."""
        if self.team.is_first:
            save_checkpoint(self.folder, self._digest, self.progress, self.weights.values, self._optimizer, self._best)

    def run(self, report: Report | None = None) -> TrainResult:
        """Train this job alone, see loop.train."""
        from atoll.train.loop import train

        return train(self, report)

    # ---- a step

    def begin_step(self) -> list[RowGroup]:
        """The groups of this process's share of the next step, each small enough for one forward.

        Called again, it begins the same step again.
        """
        indices = self._rows_of_step(self.progress.step)
        rows = {index: self._shown(self._train[index], f"{self.progress.step} {index}") for index in indices}
        self._step = _Step(labels=sum(row.num_labels for row in rows.values()))
        micros = micro_batches(self.team.share(indices, self._lengths), self._lengths, self.config.micro_batch_tokens)
        return [self._group([rows[index] for index in micro]) for micro in micros]

    def need_grads(self) -> None:
        """To be called before the backward of a group: gradients exist from the step's first one to finish_step."""
        if not self._step.has_grads:
            self._step.has_grads = True
            self.weights.zero_grads()

    def enter(self, group: RowGroup, place: int | None) -> tuple[int, Tensor] | None:
        """To be called before the forward of a group: sets the dropout of the step's group number `place` (None: none, for evaluation), and returns

        (layer, residual stream) where the forward may start above the base's first block, else None.
        """
        if place is not None:
            place = place * self.team.count + self.team.index
        self.weights.dropout_seed = None if place is None else (self.config.seed * 1_000_003 + self.progress.step) * 1024 + place
        return self._entering.of(group.rows, group.shared) if self._entering is not None else None

    def noise(self, num_tokens: int, row: int) -> Tensor | None:
        """NEFTune's noise [num_tokens, D] float32 for the embeddings of a group's row number `row`, after `enter`; None where there is none.

        Uniform in ± alpha / sqrt(L D), L the row's tokens (Jain et al. 2023, arXiv 2310.05914); drawn from the step's seed, so alike again.
        """
        alpha, seed, hidden = self.config.neftune_noise_alpha, self.weights.dropout_seed, self.decoder.shape.hidden
        if alpha is None or seed is None:
            return None
        length = num_tokens if self._masking is not None else num_tokens + 1  # but for hidden tokens, the row's last is predicted only
        bound = alpha / math.sqrt(length * hidden)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} noise {row}".encode()))
        return torch.empty(num_tokens, hidden).uniform_(-bound, bound, generator=generator)

    def mean(self, loss: Tensor) -> Tensor:
        """A group's part in the loss of the whole step, of which the gradient is taken; `loss` is summed over its labels."""
        return loss / self._step.labels

    def add(self, loss: float, num_tokens: int, spent: Spent) -> None:
        """Book a group: its summed loss in nats, its rows' tokens, its share of the time it took."""
        self._step.loss += loss
        self._step.tokens += num_tokens
        self._step.spent += spent

    def finish_step(self) -> None:
        """Sum over the team, clip, move, log; gradients must exist. Raises TrainingError when the loss is not finite."""
        progress, config, started, step = self.progress, self.config, Spent.now(), self._step
        self.weights.dropout_seed = None
        self.team.add_up(self.weights.grads)
        summed, tokens, of_all = self.team.sums(step.loss, step.tokens, step.spent.cpu_seconds)
        loss = summed / step.labels
        norm = float(torch.linalg.vector_norm(self.weights.grads))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"the loss at step {progress.step + 1} is {loss:.4g} with a gradient norm of {norm:.4g}")
        if config.max_grad_norm and norm > config.max_grad_norm:
            self.weights.grads.mul_(config.max_grad_norm / norm)
        rate = learning_rate(progress.step, self.total_steps, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self.weights.drop_grads()
        self.weights.retract()
        spent = Spent(step.spent.seconds, of_all) + (Spent.now() - started).of_each(self.team.count)
        progress.step += 1
        progress.tokens, progress.label_tokens = progress.tokens + int(tokens), progress.label_tokens + step.labels
        progress.train_loss = loss
        charge(progress, spent)
        if progress.step % config.logging_every == 0:
            self._write(loss=loss, learning_rate=rate, grad_norm=norm, tokens_per_s=tokens / spent.seconds)

    @property
    def validation_is_due(self) -> bool:
        """After finish_step."""
        return bool(self._validation) and (self.progress.step == self.total_steps or self.progress.step % self._eval_every == 0)

    @property
    def checkpoint_is_due(self) -> bool:
        """After finish_step and its validation."""
        every = self.config.checkpoint_every
        return self.finished or bool(every and self.progress.step % every == 0)

    def validation_groups(self) -> list[RowGroup]:
        """This process's share of the validation rows, in groups each small enough for one forward."""
        lengths = [len(row.token_ids) for row in self._validation]
        micros = micro_batches(self.team.share(range(len(lengths)), lengths), lengths, self.config.micro_batch_tokens)
        return [self._group([self._shown(self._validation[index], f"validation {index}") for index in micro]) for micro in micros]

    def validated(self, loss: float, spent: Spent) -> None:
        """Take in the validation loss a label token: keep the values of the best, stop after `early_stop_patience` measurements without one.

        Raises TrainingError when it is not finite.
        """
        progress, config = self.progress, self.config
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss after step {progress.step} is {loss}")
        progress.evaluations.append((progress.step, loss))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            self._best = self.weights.values.detach().clone()
        else:
            progress.stale += 1
            progress.stopped_early = config.early_stop_patience is not None and progress.stale >= config.early_stop_patience
        charge(progress, spent)
        self._write(validation_loss=loss)

    def _shown(self, row: EncodedRow, draw: str) -> EncodedRow:
        """The row as the forward sees it."""
        return row if self._masking is None else self._masking.hide(row, draw)

    def _group(self, rows: list[EncodedRow]) -> RowGroup:
        return RowGroup(rows, shared_beginning(rows, self._positions) if self._shares else 0)

    def _rows_of_step(self, step: int) -> list[int]:
        epoch, place = divmod(step, self._steps_an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self._lengths, self.config.batch_size, self.config.seed, epoch))
        return self._epoch[1][place]

    def _write(self, **numbers: float) -> None:
        if self._log is not None:
            self._log.write(self.progress.step, **numbers)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(f"{what}: training diverged", hint=f"lower trainer.learning_rate (now {self.config.learning_rate})")


@dataclass
class _Step:
    """What a step has gathered so far: gradients or none yet, summed loss in nats, tokens of rows, time; and the labels that it will have in all."""

    labels: int = 1
    has_grads: bool = False
    loss: float = 0.0
    tokens: int = 0
    spent: Spent = field(default_factory=Spent)
