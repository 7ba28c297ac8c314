"""train/loop.py with many jobs: each ends as it would alone, and none can harm another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.jobs import log_lines, toy_decoder, toy_job, toy_reft, toy_rows

from atoll.errors import Interrupted, TrainingError
from atoll.model.decoder import Decoder
from atoll.train.checkpoint import FILE
from atoll.train.job import TrainingJob, TrainResult
from atoll.train.loop import JobStatus, train_jobs

Maker = Callable[[], TrainingJob]
Outcomes = dict[int, TrainResult | Exception]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return toy_decoder()


def makers(decoder: Decoder, folder: Path) -> list[Maker]:
    """Five jobs that differ in kind, data, length, batches, dropout and seed."""
    return [
        lambda: toy_job(folder / "a", decoder=decoder, max_steps=6, validation=toy_rows(6), eval_every=2),
        lambda: toy_job(folder / "b", decoder=decoder, max_steps=3, dropout=0.3, seed=5),
        lambda: toy_job(folder / "c", decoder=decoder, adapter=toy_reft(lora=2), max_steps=5, rows=toy_rows(9, shift=60)),
        lambda: toy_job(folder / "d", decoder=decoder, adapter=toy_reft(layers=(1, 2)), epochs=2, batch_size=12, micro_batch_tokens=30),
        lambda: toy_job(folder / "e", decoder=decoder, max_steps=4, batch_size=2, learning_rate=2e-2, schedule="constant"),
    ]


def breaking(decoder: Decoder, folder: Path) -> TrainingJob:
    """A job whose second forward fails, with whatever stands beside its rows."""
    job = toy_job(folder, decoder=decoder, max_steps=5)
    update, calls = job.weights.update, list[int]()

    def fails(layer: int, group: int) -> Any:
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("not enough memory")
        return update(layer, group)

    job.weights.update = fails  # type: ignore[method-assign]
    return job


def run(jobs: Sequence[Maker], **settings: Any) -> Outcomes:
    found: Outcomes = {}
    train_jobs(jobs, found.__setitem__, **settings)
    return found


def weights_of(outcome: TrainResult | Exception) -> torch.Tensor:
    assert isinstance(outcome, TrainResult), outcome
    tensors = [t for _, m in sorted(outcome.adapter.modules.items(), key=str) for t in (m.a, m.b)]
    tensors += [t for _, edit in sorted(outcome.adapter.edits.items(), key=str) for t in edit.tensors.values()]
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_a_job_that_cannot_be_opened_is_closed(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the reason, its log is not left open, and the next one trains."""
    job, closed = toy_job(tmp_path / "a", decoder=decoder, max_steps=1), list[bool]()

    def fails() -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(job, "open", fails)
    monkeypatch.setattr(job, "close", lambda: closed.append(True))
    found = run([lambda: job, lambda: toy_job(tmp_path / "b", decoder=decoder, max_steps=1)])
    assert closed == [True] and isinstance(found[0], TrainingError) and isinstance(found[1], TrainResult)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_each_job_ends_as_it_would_alone(decoder: Decoder, tmp_path: Path, at_once: int) -> None:
    """Joined forwards, places that others leave, and jobs that come later: none may show in the weights, beyond the rounding of float32."""
    alone = [run([make])[0] for make in makers(decoder, tmp_path / "alone")]
    order: list[int] = []
    together: Outcomes = {}

    def ended(index: int, outcome: TrainResult | Exception) -> None:
        order.append(index)
        together[index] = outcome

    train_jobs(makers(decoder, tmp_path / "together"), ended, at_once=at_once)
    assert sorted(order) == [0, 1, 2, 3, 4] and (order == sorted(order)) == (at_once == 1)
    for index, name in enumerate("abcde"):
        ours, truth = together[index], alone[index]
        torch.testing.assert_close(weights_of(ours), weights_of(truth), rtol=1e-4, atol=1e-5)
        assert isinstance(ours, TrainResult) and isinstance(truth, TrainResult)
        assert ours.progress.step == truth.progress.step and ours.progress.tokens == truth.progress.tokens
        for line, expected in zip(log_lines(tmp_path / "together" / name), log_lines(tmp_path / "alone" / name), strict=True):
            assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("joined_below", [0, 512], ids=["forwards of one job", "shared forwards"])
def test_gradients_exist_from_a_job_s_first_forward_to_its_step(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined_below: int
) -> None:
    """Memory of many jobs must be a base and their weights: where no forward is shared, one job has gradients at a time; of failed ones, none."""
    monkeypatch.setattr("atoll.train.loop._JOINED_BELOW", joined_below)
    holding, most = set[int](), list[int]()

    def watched(make: Maker) -> TrainingJob:
        job = make()
        zero, drop = job.weights.zero_grads, job.weights.drop_grads

        def zero_grads() -> None:
            holding.add(id(job))
            most.append(len(holding))
            zero()

        def drop_grads() -> None:
            holding.discard(id(job))
            drop()

        job.weights.zero_grads, job.weights.drop_grads = zero_grads, drop_grads  # type: ignore[method-assign]
        return job

    wild = {"max_steps": 50, "batch_size": 16, "learning_rate": 1.0, "weight_decay": 1e30, "max_grad_norm": 0}
    jobs = [*makers(decoder, tmp_path), lambda: toy_job(tmp_path / "wild", decoder=decoder, **wild), lambda: breaking(decoder, tmp_path / "broken")]
    found = run([lambda make=make: watched(make) for make in jobs])
    assert [isinstance(found[index], TrainResult) for index in range(7)] == [True] * 5 + [False] * 2
    assert not holding
    assert max(most) == 1 or joined_below


def test_a_job_that_diverges_ends_alone(decoder: Decoder, tmp_path: Path) -> None:
    """Its infinities stand in the same forward as the others' rows."""
    jobs = makers(decoder, tmp_path)
    wild = {"max_steps": 50, "batch_size": 16, "learning_rate": 1.0, "weight_decay": 1e30, "max_grad_norm": 0}  # the largest group stands first
    jobs.insert(0, lambda: toy_job(tmp_path / "wild", decoder=decoder, **wild))
    found = run(jobs)
    assert isinstance(found[0], TrainingError) and "training diverged" in str(found[0])
    for index, make in zip((1, 2, 3, 4, 5), makers(decoder, tmp_path / "alone"), strict=True):
        torch.testing.assert_close(weights_of(found[index]), weights_of(run([make])[0]), rtol=1e-4, atol=1e-5)


def test_a_job_that_breaks_a_shared_forward_ends_alone(decoder: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others' steps are taken again without it, from the beginning: half of a backward may be in their gradients."""
    found = run([*makers(decoder, tmp_path), lambda: breaking(decoder, tmp_path / "broken")])
    assert isinstance(found[5], TrainingError) and "not enough memory" in str(found[5])
    assert "is done again job by job" in caplog.text
    for index, make in enumerate(makers(decoder, tmp_path / "alone")):
        torch.testing.assert_close(weights_of(found[index]), weights_of(run([make])[0]), rtol=1e-4, atol=1e-5)


def test_a_job_that_cannot_begin_leaves_its_place_to_the_next(decoder: Decoder, tmp_path: Path) -> None:
    """A folder of another job's checkpoint, rows without labels: said of that job only."""

    def refused() -> TrainingJob:
        raise TrainingError("there are no training rows")

    found = run([refused, *makers(decoder, tmp_path)], at_once=1)
    assert isinstance(found[0], TrainingError)
    assert all(isinstance(found[index], TrainResult) for index in range(1, 6))


def test_a_cancelled_job_keeps_its_checkpoint_and_the_others_go_on(decoder: Decoder, tmp_path: Path) -> None:
    """Run again, it goes on from there."""
    stop: list[int] = []

    def report(statuses: Sequence[JobStatus]) -> None:
        stop.extend(status.index for status in statuses if status.index == 0 and status.step == 3)

    found = run(makers(decoder, tmp_path), report=report, cancelled=stop.__contains__)
    assert isinstance(found[0], Interrupted) and "after step 3 of 6" in str(found[0])
    assert (tmp_path / "a" / FILE).is_file()
    assert all(isinstance(found[index], TrainResult) for index in range(1, 5))
    again = run(makers(decoder, tmp_path)[:1])[0]
    torch.testing.assert_close(weights_of(again), weights_of(run(makers(decoder, tmp_path / "alone")[:1])[0]), rtol=1e-4, atol=1e-5)


def test_ctrl_c_keeps_every_running_job(decoder: Decoder, tmp_path: Path) -> None:
    """What has ended is told, what runs has a checkpoint, and the same call goes on."""
    found: Outcomes = {}

    def report(statuses: Sequence[JobStatus]) -> None:
        if statuses[0].step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"3 of 5 jobs running: job 1 after step 4 of 6, job 3 after step 4 of 5, job 5"):
        train_jobs(makers(decoder, tmp_path), found.__setitem__, at_once=4, report=report)
    assert isinstance(found[1], TrainResult), "it needed three steps"
    assert (tmp_path / "a" / FILE).is_file() and (tmp_path / "c" / FILE).is_file()
    again = run(makers(decoder, tmp_path), at_once=4)
    for index, make in enumerate(makers(decoder, tmp_path / "alone")):
        torch.testing.assert_close(weights_of(again[index]), weights_of(run([make])[0]), rtol=1e-4, atol=1e-5)


def test_the_report_names_every_running_job(decoder: Decoder, tmp_path: Path) -> None:
    """What a live table shows."""
    seen: list[list[JobStatus]] = []
    run(makers(decoder, tmp_path), at_once=3, report=lambda statuses: seen.append(list(statuses)))
    assert [status.index for status in seen[0]] == [0, 1, 2]
    assert all(status.step == 1 and status.total_steps >= 3 and status.tokens_per_s > 0 and status.seconds_left > 0 for status in seen[0])
    assert {status.index for statuses in seen for status in statuses} == {0, 1, 2, 3, 4}
