"""Many adapters' training over one frozen base in one process: each job by its own rules, all through the same forwards.

Every round each job takes one optimizer step. A step's groups of rows that are too small to keep the processor busy are joined with those of other
jobs, for one forward and backward; the gradients of each job come from its own rows alone (train.rows.adapter_batch). So memory is one base, one
forward's activations, and the adapters; and a job ends with the weights that it would have alone, to the rounding of products of another height.

A job that diverges, fails or is cancelled ends alone: what it shared with others is computed again without it. Used by plan.py and workflows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import AtollError, Interrupted, TrainingError
from atoll.model.decoder import Decoder
from atoll.model.memory import keep_freed_memory, release_memory
from atoll.train.cost import Meter, Spent, charge
from atoll.train.interrupt import interruptible
from atoll.train.job import Report, TrainingJob, TrainResult
from atoll.train.rows import LabelledBatch, RowGroup, adapter_batch, pack_groups
from atoll.train.team import ALONE, Team

JOBS_AT_ONCE = 8
_JOINED_TOKENS = 1024  # padded tokens of a forward that several jobs share,
_JOINED_BELOW = 512  # and of a group that is worth joining: beyond, a product is bound by arithmetic and gains nothing
_MOST_NAMED = 8  # jobs in one sentence

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobStatus:
    """One running job between two rounds. index: its place among the jobs that were asked for. seconds_left: at the pace of this run."""

    index: int
    headline: str
    step: int
    total_steps: int
    tokens_per_s: float
    seconds_left: float


class _Item(NamedTuple):
    """A group of a job's step, and its number within the step."""

    job: TrainingJob
    group: RowGroup
    place: int

    @property
    def padded_tokens(self) -> int:
        return self.group.shared + len(self.group.rows) * max(len(row.token_ids) - self.group.shared for row in self.group.rows)


def train(job: TrainingJob, report: Report | None = None, cancelled: Callable[[], bool] = lambda: False) -> TrainResult:
    """Train one job from its last checkpoint, or from the start.

    Ctrl-C, or a `cancelled` that says so, ends the step at hand, writes a checkpoint and raises Interrupted. Raises TrainingError when a loss is not
    finite, StorageError when a checkpoint cannot be written.
    """
    found: list[TrainResult | Exception] = []

    def told(statuses: Sequence[JobStatus]) -> None:
        if report is not None:
            for status in statuses:
                report(status.headline, status.step, status.total_steps)

    train_jobs([lambda: job], lambda index, outcome: found.append(outcome), report=told, cancelled=lambda index: cancelled(), team=job.team)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def train_jobs(
    makers: Sequence[Callable[[], TrainingJob]],
    on_result: Callable[[int, TrainResult | Exception], None],
    *,
    at_once: int = JOBS_AT_ONCE,
    report: Callable[[Sequence[JobStatus]], None] | None = None,
    cancelled: Callable[[int], bool] = lambda index: False,
    team: Team = ALONE,
) -> None:
    """Train jobs of one base, at most `at_once` together; each is made when its turn comes, and the next joins as soon as one has ended.

    on_result gets each job's result, or the error that ended it, the moment it ends; an error that on_result raises ends all. Ctrl-C ends the round
    at hand, writes every running job's checkpoint and raises Interrupted. cancelled(index) is asked between rounds: such a job keeps its checkpoint
    and ends with Interrupted. team: the jobs'; all of its processes end each round alike.
    """
    keep_freed_memory()
    meter = Meter()
    running: dict[int, _Running] = {}
    waiting = iter(enumerate(makers))
    try:
        with interruptible(in_team=team.count > 1) as stop_asked:
            while True:
                try:
                    _admit(running, waiting, at_once, on_result)
                except Exception:
                    _keep(running.values())
                    raise
                if not running:
                    return
                with meter.round([entry.job.progress for entry in running.values()]):
                    _round([entry.job for entry in running.values()], {id(entry.job): entry for entry in running.values()})
                try:
                    statuses = [entry.status() for entry in running.values()]
                    if report is not None:
                        report(statuses)
                    stopping = team.any(stop_asked())
                    for index, entry in list(running.items()):
                        outcome = _outcome(entry, stopping, team.any(cancelled(index)))
                        if outcome is not None and not (stopping and isinstance(outcome, Interrupted)):
                            del running[index]
                            entry.job.close()
                            on_result(index, outcome)
                except Exception:  # the caller's, which ends all: nothing that is trained is lost
                    _keep(running.values())
                    raise
                if stopping and (running or next(waiting, None) is not None):
                    raise _interrupted(list(running.values()), len(makers))
    finally:
        for entry in running.values():
            entry.job.close()
        release_memory()


class _Running:
    """A job in the loop: since when, and what ended it, if anything has."""

    def __init__(self, index: int, job: TrainingJob) -> None:
        self.index, self.job = index, job
        self.error: Exception | None = None
        self._since, self._from_step, self._from_tokens = time.perf_counter(), job.progress.step, job.progress.tokens

    def status(self) -> JobStatus:
        progress, seconds = self.job.progress, time.perf_counter() - self._since
        pace = seconds / max(1, progress.step - self._from_step)
        speed = (progress.tokens - self._from_tokens) / seconds
        left = 0.0 if self.job.finished else pace * (self.job.total_steps - progress.step)
        return JobStatus(self.index, self.job.headline, progress.step, self.job.total_steps, speed, left)


def _admit(
    running: dict[int, _Running],
    waiting: Iterator[tuple[int, Callable[[], TrainingJob]]],
    at_once: int,
    on_result: Callable[[int, TrainResult | Exception], None],
) -> None:
    """Fill the places that are free. A job that cannot begin, or has nothing left to do, ends at once."""
    while len(running) < at_once and (following := next(waiting, None)) is not None:
        index, make = following
        started, job = Spent.now(), None
        try:
            job = make()
            making = Spent.now() - started
            job.open()
            charge(job.progress, making)
        except Exception as error:
            if job is not None:
                job.close()
            on_result(index, _as_training_error(error))
            continue
        if job.finished:
            job.close()
            on_result(index, job.result())
        else:
            running[index] = _Running(index, job)


def _outcome(entry: _Running, stopping: bool, cancelled: bool) -> TrainResult | Exception | None:
    """What a job ends with now, or None where it goes on. A checkpoint is written where the job stops before its end."""
    job = entry.job
    if entry.error is not None:
        return entry.error
    if job.finished:
        return job.result()
    if not (stopping or cancelled):
        return None
    try:
        job.team.together(job.checkpoint)
    except AtollError as error:
        return error
    what = "training stopped" if stopping else "cancelled"
    return Interrupted(f"{what} after step {job.progress.step} of {job.total_steps}", hint="run the same command again to go on from there")


def _interrupted(entries: Sequence[_Running], num_jobs: int) -> Interrupted:
    hint = "run the same command again to go on from there"
    if num_jobs == 1:
        job = entries[0].job
        return Interrupted(f"training stopped after step {job.progress.step} of {job.total_steps}", hint=hint)
    named = [f"{entry.job.title or f'job {entry.index + 1}'} after step {entry.job.progress.step} of {entry.job.total_steps}" for entry in entries]
    more = [f"{len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    stood = f": {', '.join(named[:_MOST_NAMED] + more)}" if named else ""
    return Interrupted(f"training stopped with {len(entries)} of {num_jobs} jobs running{stood}", hint=hint)


def _round(jobs: Sequence[TrainingJob], entries: dict[int, _Running]) -> None:
    """One optimizer step of every job, with what is due after it. What goes wrong with one job is kept as its error.

    Forwards go job by job, the job of the largest first, since later ones fit into the memory that it frees. A job takes its optimizer step as soon
    as its last forward is done, so that few jobs have gradients at a time; one trained by a team takes it after all forwards, in the order of the
    jobs, which is alike in all processes.
    """
    items = [_Item(job, group, place) for job in jobs for place, group in enumerate(job.begin_step())]
    batches, order = _joined(items), dict[int, int]()
    for place, batch in enumerate(batches):
        for item in batch:
            order.setdefault(id(item.job), place)
    left = Counter(id(item.job) for item in items)
    alone: set[int] = set()  # jobs whose step was begun again, by themselves
    walks = jobs[0].team.most(len(batches)) if jobs[0].decoder.shards is not None else 0  # a team has one job
    for batch in sorted(batches, key=lambda batch: min(order[id(item.job)] for item in batch)):
        together = [item for item in batch if id(item.job) not in alone]
        with _walk(batch[0].job.decoder, backward=True):
            error = _attempt(functools.partial(_forward_backward, together))
        if error is not None:
            if len(together) > 1:
                _log.warning("a forward that %d jobs shared failed and is done again job by job: %s", len(together), error)
            for item in together:
                item.job.weights.drop_grads()
            for item in together:
                alone.add(id(item.job))
                entries[id(item.job)].error = error if len(together) == 1 else _attempt(functools.partial(_step_alone, item.job))
        for item in batch:
            left[id(item.job)] -= 1
            if not left[id(item.job)] and item.job.team.count == 1:
                _finish(entries[id(item.job)])
    for _ in range(walks - len(batches)):
        with _walk(jobs[0].decoder, backward=True):
            pass
    for job in jobs:
        if job.team.count > 1:
            _finish(entries[id(job)])


def _walk(decoder: Decoder, *, backward: bool) -> contextlib.AbstractContextManager[None]:
    """What a forward is in, with its backward: processes that hold the base together all walk through its blocks, each as often as the others."""
    return decoder.shards.walk(backward=backward) if decoder.shards is not None else contextlib.nullcontext()


def _finish(entry: _Running) -> None:
    """What follows a job's gradients, unless they failed, here or elsewhere in its team."""
    job = entry.job
    if job.team.count > 1:
        if entry.error is None:
            entry.error = _attempt(job.need_grads)  # zeros, where this process had no rows of the step
        entry.error = _attempt(functools.partial(job.team.together, functools.partial(_raise, entry.error)))
    if entry.error is None:
        entry.error = _attempt(functools.partial(_after_gradients, job))
    if entry.error is not None:
        job.weights.drop_grads()


def _attempt(work: Callable[[], None]) -> Exception | None:
    """The error that some work of a job ended with, if it did; nothing of what was computed stays in memory with it."""
    try:
        work()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return _as_training_error(error)
    return None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _step_alone(job: TrainingJob) -> None:
    """A step's gradients from the beginning, sharing nothing."""
    for place, group in enumerate(job.begin_step()):
        _forward_backward([_Item(job, group, place)])


def _keep(entries: Iterable[_Running]) -> None:
    """Checkpoints of jobs that stand between two steps, as far as they can be written."""
    for entry in entries:
        if entry.error is None:
            with contextlib.suppress(AtollError):
                entry.job.checkpoint()


def _as_training_error(error: Exception) -> Exception:
    """A failure of torch (out of memory, mostly) as one sentence; what is ours already stays."""
    if isinstance(error, AtollError):
        return error
    _log.warning("a job failed: %s", error, exc_info=error)
    return TrainingError(f"training failed: {error or type(error).__name__}", hint="lower trainer.micro_batch_tokens if memory is short")


def _joined(items: Sequence[_Item]) -> list[list[_Item]]:
    """Items in forwards: small ones of different jobs together, first fit, the others alone."""
    batches: list[list[_Item]] = []
    open_batches: list[tuple[list[_Item], int]] = []
    for item in sorted(items, key=lambda item: -item.padded_tokens):
        size = item.padded_tokens
        if size >= _JOINED_BELOW or item.job.enters_above:
            batches.append([item])
            continue
        for place, (batch, taken) in enumerate(open_batches):
            most = min(_JOINED_TOKENS, *(member.job.config.micro_batch_tokens for member in (item, *batch)))
            if taken + size <= most and all(other.job is not item.job and other.job.decoder is item.job.decoder for other in batch):
                batch.append(item)
                open_batches[place] = (batch, taken + size)
                break
        else:
            batches.append([item])
            open_batches.append((batches[-1], size))
    return batches


def _forward_backward(items: Sequence[_Item]) -> None:
    """One forward of all items and its backward; each job is told what its rows added."""
    if not items:
        return
    started = Spent.now()
    for item in items:
        item.job.need_grads()
    losses = _losses(items, training=True)
    parts = [item.job.mean(loss) for item, loss in zip(items, losses, strict=True)]
    if losses[0].requires_grad:  # not where none of the rows' prompts has a token that is edited
        torch.stack(parts).sum().backward()
    spent = Spent.now() - started
    num_tokens = [sum(row.num_inputs for row in item.group.rows) for item in items]
    for item, loss, tokens in zip(items, losses, num_tokens, strict=True):
        item.job.add(float(loss.detach()), tokens, spent.share(tokens / sum(num_tokens)))


def _losses(items: Sequence[_Item], *, training: bool) -> list[Tensor]:
    """The summed label loss of each item."""
    decoder: Decoder = items[0].job.decoder
    entering = [item.job.enter(item.group, item.place if training else None) for item in items]
    packed = pack_groups([item.group for item in items], decoder.device)
    adapters = adapter_batch(packed, [item.job.weights for item in items])
    noise = _noise(packed, items) if training else None
    hidden = decoder.forward(packed.batch, adapters, entering=entering[0] if len(items) == 1 else None, noise=noise)
    each = decoder.label_losses(hidden, packed.labels)
    return [each[start:stop].sum() for start, stop in packed.label_spans]


def _noise(packed: LabelledBatch, items: Sequence[_Item]) -> Tensor | None:
    """What the jobs of a forward add to its embeddings, [T, D] float32; None where none of them adds anything."""
    if all(item.job.config.neftune_noise_alpha is None for item in items):
        return None
    lengths, counts, pieces = packed.batch.lengths, Counter[int](), []
    for length, owner in zip(lengths, packed.owners, strict=True):
        drawn = items[owner].job.noise(length, counts[owner])
        counts[owner] += 1
        pieces.append(torch.zeros(length, items[0].job.decoder.shape.hidden) if drawn is None else drawn)
    return torch.cat(pieces).to(packed.batch.token_ids.device)


def _after_gradients(job: TrainingJob) -> None:
    job.team.together(job.finish_step)  # it writes in the first process alone
    if job.validation_is_due:
        started = Spent.now()
        groups = job.team.together(job.validation_groups)
        total, labels = job.team.sums(*job.team.together(functools.partial(_validation, job, groups)))
        job.team.together(functools.partial(job.validated, total / labels, (Spent.now() - started).of_each(job.team.count)))
    if job.checkpoint_is_due:
        started = Spent.now()
        job.team.together(job.checkpoint)
        charge(job.progress, Spent.now() - started)


@torch.no_grad()
def _validation(job: TrainingJob, groups: Sequence[RowGroup]) -> tuple[float, int]:
    """The summed loss of this process's validation rows, and how many labels they have."""
    total, labels, error = 0.0, 0, None

    def add(place: int) -> None:
        nonlocal total, labels
        total += float(_losses([_Item(job, groups[place], place)], training=False)[0])
        labels += sum(row.num_labels for row in groups[place].rows)

    for place in range(job.team.most(len(groups)) if job.decoder.shards is not None else len(groups)):
        with _walk(job.decoder, backward=False):
            if place < len(groups) and error is None:
                error = _attempt(functools.partial(add, place))
    _raise(error)
    return total, labels
