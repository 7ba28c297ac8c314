"""train/loop.py: the loop takes the steps that the config describes, whatever the micro-batches, and keeps the best."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.adapters import packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model
from tests.train.jobs import log_lines, toy_config, toy_decoder, toy_job, toy_rows

from atoll.data.batches import epoch_batches
from atoll.data.encode import EncodedRow
from atoll.errors import TrainingError
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.batch import AdapterBatch
from atoll.model.decoder import Decoder
from atoll.model.loss import label_losses
from atoll.train.checkpoint import FILE
from atoll.train.job import total_steps
from atoll.train.rows import label_batch
from atoll.train.schedule import learning_rate
from atoll.train.weights import TrainableAdapter


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return toy_decoder()


def mean_loss(decoder: Decoder, weights: TrainableAdapter, rows: list[EncodedRow]) -> float:
    """The loss a label token of some rows, one row at a time."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = packed_logits(decoder, [row.token_ids[:-1]], [weights])[0][row.num_prompt - 1 :]
            total += float(F.cross_entropy(logits, torch.tensor(row.token_ids[row.num_prompt :]), reduction="sum"))
    return total / sum(row.num_labels for row in rows)


# ---- Rows to batches


def test_labels_are_the_completions_tokens_and_their_states_the_tokens_before(decoder: Decoder) -> None:
    """Off by one, and the model learns to repeat instead of to answer; the prompt counts only when asked."""
    rows = [EncodedRow([5, 6, 7, 8, 2], 3, "a"), EncodedRow([9, 10, 2], 1, "b", train_on_prompt=False), EncodedRow([11, 12, 13, 2], 3, "c", True)]
    packed = label_batch(rows, "cpu")
    assert packed.batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert packed.batch.output_index is not None
    assert packed.batch.output_index.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert packed.labels.tolist() == [8, 2, 10, 2, 12, 13, 2]
    assert packed.num_labels == sum(row.num_labels for row in rows)


def test_the_packed_loss_is_the_sum_of_the_rows(decoder: Decoder) -> None:
    """Packing is an optimisation: the loss of a batch is the loss of its rows."""
    rows = toy_rows(9)
    weights = TrainableAdapter(random_adapter(decoder), decoder.shape.linears)
    packed = label_batch(rows, "cpu")
    hidden = decoder.forward(packed.batch, AdapterBatch.single(weights, packed.batch.num_tokens))
    loss = float(label_losses(hidden, decoder.head, packed.labels).sum().detach()) / packed.num_labels
    assert loss == pytest.approx(mean_loss(decoder, weights, rows), rel=1e-5)


# ---- Steps


def test_micro_batches_of_any_size_give_the_gradient_of_the_big_batch(decoder: Decoder, tmp_path: Path) -> None:
    """micro_batch_tokens is for memory; a loss averaged per micro-batch would weigh rows by their neighbours."""
    grads, losses = [], []
    for tokens in (4096, 1, 9, 20):
        adapter = random_adapter(decoder, 4)
        job = toy_job(
            tmp_path / str(tokens), decoder=decoder, adapter=adapter, max_steps=1, batch_size=24, micro_batch_tokens=tokens, max_grad_norm=0
        )
        job.weights.drop_grads = lambda weights=job.weights: grads.append(weights.grads.clone())
        job.run()
        losses.append(log_lines(tmp_path / str(tokens))[0]["loss"])
    assert losses[0] == pytest.approx(mean_loss(decoder, TrainableAdapter(random_adapter(decoder, 4), decoder.shape.linears), toy_rows()), rel=1e-5)
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=1e-6 * float(grads[0].abs().max()) + 1e-8)


def test_six_steps_are_pefts_six_steps(decoder: Decoder, tmp_path: Path) -> None:
    """The whole recipe against its usual form, written out: PEFT's model, torch's AdamW and clipping, the same rows and rates."""
    adapter = random_adapter(decoder, 4)
    config = {"max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_fraction": 0.3}
    toy_job(tmp_path / "ours", decoder=decoder, adapter=adapter, **config).run()
    model = peft_model(tiny_model("llama"), adapter, tmp_path / "peft")
    rows, asked = toy_rows(), toy_config(**config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1)
    expected = []
    for step in range(6):
        epoch, place = divmod(step, 4)
        chosen = [rows[i] for i in epoch_batches([len(row.token_ids) for row in rows], 6, 0, epoch)[place]]
        losses = []
        for row in chosen:
            labels = torch.tensor(row.token_ids[row.num_prompt :])
            losses.append(F.cross_entropy(reference(model, row.token_ids[:-1])[row.num_prompt - 1 :], labels, reduction="sum"))
        loss = torch.stack(losses).sum() / sum(row.num_labels for row in chosen)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step, 6, asked)
        optimizer.step()
        expected.append({"step": step + 1, "loss": float(loss.detach()), "learning_rate": learning_rate(step, 6, asked), "grad_norm": float(norm)})
    found = log_lines(tmp_path / "ours")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, truth in zip(found, expected, strict=True):
        assert line == pytest.approx(truth, rel=1e-3)
    assert max(line["grad_norm"] for line in expected) > 0.5, "nothing was clipped, so clipping was not tested"


def test_the_loss_curve_is_the_expected_one(decoder: Decoder, tmp_path: Path) -> None:
    """A fixed seed gives a fixed end; a change of the recipe that nobody meant shows up here first."""
    job = toy_job(tmp_path, decoder=decoder, validation=toy_rows(7), epochs=10, learning_rate=1e-2)
    assert job.total_steps == 40
    progress = job.run().progress
    losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    assert losses[0] == pytest.approx(5.774922, abs=1e-4)
    assert losses[-1] == pytest.approx(1.856066, abs=1e-4)
    assert progress.train_loss == losses[-1]
    assert progress.best_loss == pytest.approx(1.905890, abs=1e-4)
    assert progress.tokens == 10 * sum(len(row.token_ids) - 1 for row in toy_rows())
    assert progress.label_tokens == 10 * sum(row.num_labels for row in toy_rows())


def test_max_steps_decides_the_length(decoder: Decoder, tmp_path: Path) -> None:
    """In the middle of an epoch, or beyond the epochs asked for."""
    assert total_steps(24, toy_config(max_steps=5)) == 5
    assert total_steps(24, toy_config(max_steps=100)) == 100
    assert total_steps(24, toy_config(epochs=2)) == 8
    assert total_steps(25, toy_config(epochs=2)) == 10
    assert total_steps(24, toy_config(epochs=0.5)) == 2
    assert total_steps(1, toy_config(epochs=0.01)) == 1
    assert toy_job(tmp_path, decoder=decoder, max_steps=11).run().progress.step == 11


def test_dropout_changes_training_and_follows_the_seed(decoder: Decoder, tmp_path: Path) -> None:
    """Regularisation that is switched on but never drawn, or drawn from the clock, would go unnoticed."""
    ends = []
    for name, dropout, seed in (("none", 0.0, 0), ("some", 0.3, 0), ("same", 0.3, 0), ("other", 0.3, 1)):
        job = toy_job(tmp_path / name, decoder=decoder, dropout=dropout, max_steps=3, seed=seed)
        job.run()
        ends.append(job.weights.values.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[1], ends[3])


def test_logging_every_so_many_steps(decoder: Decoder, tmp_path: Path) -> None:
    """A long run's log stays short; validation is always there."""
    toy_job(tmp_path, decoder=decoder, validation=toy_rows(3), max_steps=8, eval_every=4, logging_every=3).run()
    assert [(line["step"], "loss" in line) for line in log_lines(tmp_path)] == [(3, True), (4, False), (6, True), (8, False)]


# ---- The best step


def test_early_stopping_keeps_the_best_step(decoder: Decoder, tmp_path: Path) -> None:
    """Rows that follow another rule get worse as training goes on; the adapter must be the one measured best, not the last."""
    validation = toy_rows(6, shift=80)
    job = toy_job(tmp_path, decoder=decoder, validation=validation, epochs=20, eval_every=1, early_stop_patience=3)
    result = job.run()
    progress = result.progress
    assert progress.stopped_early
    assert progress.step == progress.best_step + 3 < job.total_steps
    assert [step for step, _ in progress.evaluations] == list(range(1, progress.step + 1))
    assert dict(progress.evaluations)[progress.best_step] == min(loss for _, loss in progress.evaluations) == progress.best_loss
    best = TrainableAdapter(result.adapter, decoder.shape.linears)
    assert mean_loss(decoder, best, validation) == pytest.approx(progress.best_loss, rel=1e-5)
    assert mean_loss(decoder, job.weights, validation) > progress.best_loss


def test_without_patience_training_goes_on_and_still_keeps_the_best(decoder: Decoder, tmp_path: Path) -> None:
    """Early stopping off is not best-keeping off."""
    validation = toy_rows(6, shift=80)
    job = toy_job(tmp_path, decoder=decoder, validation=validation, epochs=10, eval_every=1, early_stop_patience=None)
    result = job.run()
    assert result.progress.step == job.total_steps == 40
    assert not result.progress.stopped_early
    assert result.progress.best_step < 40
    best = TrainableAdapter(result.adapter, decoder.shape.linears)
    assert mean_loss(decoder, best, validation) == pytest.approx(result.progress.best_loss, rel=1e-5)


def test_the_last_step_is_always_measured(decoder: Decoder, tmp_path: Path) -> None:
    """Otherwise the last steps of a run could never win."""
    result = toy_job(tmp_path, decoder=decoder, validation=toy_rows(3), max_steps=5, eval_every=3).run()
    assert [step for step, _ in result.progress.evaluations] == [3, 5]


def test_without_validation_rows_the_last_step_is_the_adapter(decoder: Decoder, tmp_path: Path) -> None:
    """Nothing to choose by."""
    job = toy_job(tmp_path, decoder=decoder, max_steps=3)
    result = job.run()
    assert result.progress.evaluations == []
    last = job.weights.adapter()
    assert all(torch.equal(module.b, last.modules[site].b) for site, module in result.adapter.modules.items())


def test_progress_is_reported_every_step(decoder: Decoder, tmp_path: Path) -> None:
    """A command that is silent for six minutes looks hung."""
    seen: list[tuple[str, int, int]] = []
    toy_job(tmp_path, decoder=decoder, validation=toy_rows(3), max_steps=4, eval_every=2).run(lambda *report: seen.append(report))
    assert [(step, total) for _, step, total in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[0][0].startswith("loss ")
    assert ", validation " in seen[-1][0]


# ---- What must not happen


def test_the_base_is_untouched_by_training(decoder: Decoder, tmp_path: Path) -> None:
    """Hundreds of adapters share it; one step that wrote into it would change all of them."""

    def digest() -> str:
        layers = [t for layer in decoder.layers for t in (*layer.weights, layer.input_norm, layer.post_norm)]
        whole = hashlib.sha256()
        for tensor in (decoder.embedding, decoder.head, decoder.final_norm, *layers):
            assert not tensor.requires_grad
            assert tensor.grad is None
            whole.update(tensor.numpy().tobytes())
        return whole.hexdigest()

    before = digest()
    toy_job(tmp_path, decoder=decoder, dropout=0.1, validation=toy_rows(3), max_steps=3).run()
    assert digest() == before


def absurd_adapter(decoder: Decoder) -> Adapter:
    """A fresh LoRA scaled so that its first step makes the next forward overflow: gate times up is 1e30, and down makes it infinite."""
    fresh = random_adapter(decoder, 4, alpha=1e15, target_modules=("gate_proj", "up_proj", "down_proj"))
    return Adapter(fresh.spec, {site: LoraModule(m.a, torch.zeros_like(m.b), m.scaling) for site, m in fresh.modules.items()})


def test_a_diverged_loss_ends_the_run_and_keeps_the_checkpoint(decoder: Decoder, tmp_path: Path) -> None:
    """The run must stop with a way out, not train NaNs to the end."""
    with pytest.raises(TrainingError, match=r"the loss at step 2 is .*: training diverged") as found:
        toy_job(tmp_path, decoder=decoder, adapter=absurd_adapter(decoder), max_grad_norm=0, learning_rate=1.0, checkpoint_every=1).run()
    assert found.value.hint == "lower trainer.learning_rate (now 1.0)"  # with another rate it is another job, which needs no checkpoint of this one
    assert (tmp_path / FILE).is_file()
    assert [line["step"] for line in log_lines(tmp_path)] == [1]


def test_a_loss_is_told_in_four_digits(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a sentence for people."""
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda values: math.inf)
    with pytest.raises(TrainingError, match=r"the loss at step 1 is \d\.\d{1,3} with a gradient norm of inf"):
        toy_job(tmp_path, decoder=decoder).run()


def test_a_validation_loss_that_is_not_finite_ends_the_run(decoder: Decoder, tmp_path: Path) -> None:
    """As first measurement it would stay the best for ever, since no number is smaller than NaN."""
    with pytest.raises(TrainingError, match="the validation loss after step 1 is nan: training diverged"):
        toy_job(
            tmp_path, decoder=decoder, adapter=absurd_adapter(decoder), validation=toy_rows(3), max_steps=1, max_grad_norm=0, learning_rate=1.0
        ).run()


def test_an_adapter_with_nan_is_found_at_the_first_step(decoder: Decoder, tmp_path: Path) -> None:
    """Training from a damaged adapter must not take a step."""
    adapter = random_adapter(decoder, 4)
    adapter.modules[next(iter(adapter.modules))].b[0, 0] = math.nan
    job = toy_job(tmp_path, decoder=decoder, adapter=adapter)
    with pytest.raises(TrainingError, match="the loss at step 1 is nan"):
        job.run()
    assert not (tmp_path / FILE).exists()


def test_no_training_rows_is_an_error(decoder: Decoder, tmp_path: Path) -> None:
    """A split that left nothing to train on."""
    with pytest.raises(TrainingError, match="no training rows"):
        toy_job(tmp_path, decoder=decoder, rows=[])


def test_another_jobs_folder_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    """The config changed, the folder did not."""
    toy_job(tmp_path, decoder=decoder, max_steps=2).run()
    with pytest.raises(TrainingError, match="checkpoint of another job"):
        toy_job(tmp_path, decoder=decoder, max_steps=2, digest="other").run()
