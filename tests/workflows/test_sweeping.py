"""workflows/sweeping.py: a sweep trains its points, finds what is done, and publishes the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_tiny_base
from tests.train.test_masked_lm import write_masked_base

from atoll.config_sweep import load_sweep
from atoll.errors import ConfigError, Interrupted, TrainingError
from atoll.hub.store import Hub
from atoll.train.job import TrainingJob
from atoll.workflows import sweep
from atoll.workflows.sweeping import SweepLine, _ranked, plan_sweep, why_incomparable


@pytest.fixture
def file(tiny_base_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"base: {tiny_base_dir}\nname: dated\n"
        "data: {path: 'builtin:dates', max_train_rows: 8, max_validation_rows: 4, max_test_rows: 1}\n"
        "trainer: {max_steps: 3, batch_size: 4, dtype: float32}\n"
        "sweep:\n  adapter.r: [2, 4]\n  trainer.learning_rate: [1e-3, 1e-9]\n"
    )
    return path


def test_the_best_is_first_in_the_table_and_published(file: Path, tmp_path: Path) -> None:
    """By validation loss; with a value more, only what is new is trained."""
    found = sweep(load_sweep(file), out=tmp_path / "out")
    losses = [line.best_loss for line in found.lines]
    assert len(losses) == 4 and losses == sorted(losses, key=lambda loss: loss or 0.0) and found.best == found.lines[0].name  # type: ignore[arg-type]
    assert found.lines[0].values["trainer.learning_rate"] == 1e-3  # the other learns nothing
    hub = Hub()
    assert found.version is not None and found.version.ref == "dated@1" and hub.resolve(found.lines[0].name).digest == found.version.digest
    written = json.loads(found.path.read_text())
    assert written["best"] == found.best and written["published"] == "dated@1" and written["trainings"][0]["cost"]["tokens"] > 0
    assert {run.name for run in hub.runs(kind="train", status="finished")} == {line.name for line in found.lines}
    more = sweep(load_sweep(file, {"sweep.adapter.r": [2, 4, 6]}), out=tmp_path / "out")
    assert sorted(line.reused for line in more.lines) == [False, False, True, True, True, True]
    assert {line.values["adapter.r"] for line in more.lines if not line.reused} == {6}


def test_a_training_that_fails_is_a_line_at_the_end(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are compared without it."""
    original = TrainingJob.finish_step

    def finish_step(job: TrainingJob) -> None:
        if "dated-r_4-learning_rate_0.001" in job.folder.parts:
            raise TrainingError("the loss at step 1 is nan")
        original(job)

    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    found = sweep(load_sweep(file), out=tmp_path / "out")
    assert [line.error for line in found.lines] == [None, None, None, "the loss at step 1 is nan"]
    assert found.best == "dated-r_2-learning_rate_0.001"


def test_ctrl_c_loses_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done by then is found by the same command, and the rest goes on."""
    import signal

    original, steps = TrainingJob.finish_step, list[Any]()

    def finish_step(job: TrainingJob) -> None:
        original(job)
        steps.append(job.folder)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    with pytest.raises(Interrupted):
        sweep(load_sweep(file), out=tmp_path / "out", at_once=2)
    found = sweep(load_sweep(file), out=tmp_path / "out", at_once=2)
    assert len(steps) == 12 and sum(line.reused for line in found.lines) == 2  # four trainings of three steps, none taken twice


def test_by_metric_means_the_validation_rows(file: Path, tmp_path: Path) -> None:
    """Test rows choose nothing, and what was measured is no score of the hub's."""
    found = sweep(load_sweep(file, {"sweep.best_by": "metric", "sweep.adapter.r": [2]}), out=tmp_path / "out")
    assert all(line.score is not None for line in found.lines) and found.best == found.lines[0].name
    assert Hub().scores() == () and list((tmp_path / "out/scores").rglob("*.json"))
    with pytest.raises(ConfigError, match="--no-publish"):
        sweep(load_sweep(file, {"sweep.best_by": "metric"}), out=tmp_path / "out", publish=False)


def test_without_validation_rows_nothing_is_best(file: Path, tmp_path: Path) -> None:
    """The training loss would choose whatever learnt its rows by heart."""
    loaded = load_sweep(
        file, {"data.max_validation_rows": None, "data.ratios": [1.0, 0.0, 0.0], "data.path": str(tmp_path / "rows.jsonl"), "sweep.adapter.r": [2]}
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f" {i}"}) + "\n" for i in range(6)))
    found = sweep(loaded, out=tmp_path / "out", publish=False)
    assert found.best is None and found.version is None and "no validation rows" in found.warnings[-1]


def planned(tmp_path: Path, base: Path, axis: str) -> str:
    """Why the trainings of a sweep over one key have no best."""
    path = tmp_path / "one.yaml"
    rows = [{"text": f"thing {i}", "colour": ("red", "blue")[i % 2], "split": ("train", "val", "test")[i % 3]} for i in range(12)]
    for name, part in (("rows", rows), ("others", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path.write_text(
        f"base: {base}\nname: one\ndata: {{path: rows.jsonl, template: '{{text}} is', target: colour, split_column: split}}\n"
        f"trainer: {{max_steps: 1, dtype: float32}}\nsweep:\n  {axis}\n"
    )
    loaded = load_sweep(path)
    return why_incomparable(plan_sweep(loaded), loaded.best_by)


@pytest.mark.parametrize(
    ("axis", "what"),
    [
        ("trainer.train_on_prompt: [true, false]", "the tokens that count"),
        ("data.path: [rows.jsonl, others.jsonl]", "the validation rows' texts"),
        ("data.template: ['{text} is', 'What colour is {text}?']", "the validation rows' texts"),
        ("data.template: ['{text} is', 'What colour is {text}?']\n  best_by: metric", ""),
        ("data.path: [rows.jsonl, others.jsonl]\n  best_by: metric", "the validation rows"),
        ("data.max_train_rows: [4, 8]", ""),
        ("trainer.max_length: [64, 128]", ""),
        ("trainer.learning_rate: [1e-3, 1e-4]", ""),
        ("adapter: [{type: lora, r: 2}, {type: loreft, rank: 2}]", ""),
    ],
)
def test_what_is_measured_on_different_things_has_no_best(axis: str, what: str, tiny_base_dir: Path, tmp_path: Path) -> None:
    """A loss is a mean over label tokens: of other tokens it is another quantity, and its lowest says nothing. What is alike is compared as ever."""
    doubt = planned(tmp_path, tiny_base_dir, axis)
    assert (what in doubt and "cannot be compared" in doubt) if what else not doubt


def test_other_bases_and_other_hidden_tokens_have_no_best_loss(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Fewer hidden tokens are an easier task; and the metric, which needs answers, is no way out of that."""
    other = write_tiny_base(tmp_path / "other", seed=1)
    doubt = planned(tmp_path, tiny_base_dir, f"base: ['{tiny_base_dir}', '{other}']")
    assert "where the bases differ" in doubt and "best_by: metric" in doubt
    assert not planned(tmp_path, tiny_base_dir, f"base: ['{tiny_base_dir}', '{other}']\n  best_by: metric")
    encoder = write_masked_base(tmp_path / "encoder", "bert", pooler=True)
    doubt = planned(tmp_path, encoder, "trainer.mlm_probability: [0.05, 0.5]")
    assert "the hidden tokens differ" in doubt and "metric" not in doubt


def test_a_sweep_of_incomparable_losses_names_and_publishes_none(file: Path, tmp_path: Path) -> None:
    """The table has all of them, in the file's order."""
    loaded = load_sweep(file, {"sweep.adapter.r": [2], "sweep.trainer.learning_rate": [1e-3], "sweep.trainer.train_on_prompt": [True, False]})
    found = sweep(loaded, out=tmp_path / "out")
    assert found.best is None and found.version is None and "cannot be compared" in found.warnings[-1]
    assert [line.values["trainer.train_on_prompt"] for line in found.lines] == [True, False] and all(line.best_loss for line in found.lines)
    assert {record.name for record in Hub().list()} == {line.name for line in found.lines}


def test_the_loss_tells_equal_metrics_apart() -> None:
    """Small validation sets give equal scores often, and the file's order is no reason."""
    lines = [SweepLine(name, {}, best_loss=loss, score=score) for name, loss, score in (("a", 0.9, 0.5), ("b", 0.4, 0.5), ("c", 0.1, 0.25))]
    assert [line.name for line in _ranked(lines, ("score", "best_loss"))] == ["b", "a", "c"]
