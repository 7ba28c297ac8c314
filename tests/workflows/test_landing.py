"""A land end to end on a tiny base: what is kept, what is redone, what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from atoll.config import DataConfig, LandConfig
from atoll.errors import Busy, DataError, Interrupted
from atoll.eval.leaderboard import read_leaderboard
from atoll.hub.store import Hub
from atoll.workflows import evaluate, land, locked

ROWS = {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 4, "dtype": "float32"}


@pytest.fixture
def land_config(tiny_base_dir: Path) -> LandConfig:
    """Two built-in tasks over the tiny base, two steps each."""
    return LandConfig.model_validate(
        {
            "base": str(tiny_base_dir),
            "defaults": {"data": ROWS, "trainer": QUICK, "adapter": {"r": 4}, "generation": {"max_new_tokens": 6}},
            "tasks": ["builtin:support_intents", "builtin:unit_conversion"],
            "eval": {"batch_size": 8},
        }
    )


def stages(calls: list[str], word: str) -> int:
    return sum(word in call for call in calls)


def test_a_land_trains_publishes_measures_and_writes_the_board(land_config: LandConfig, tmp_path: Path) -> None:
    """The main job: every task has a published adapter with the prompt it was trained on, a score file, raw outputs, and a row in the fixed form."""
    outcome = land(land_config, tmp_path / "out")
    assert not outcome.failures
    board = json.loads(outcome.json_path.read_text())
    assert set(board) == {"base", "rows"} and set(board["base"]) == {"name", "fingerprint"}
    assert [row["task"] for row in board["rows"]] == ["support_intents", "unit_conversion"]
    for row in board["rows"]:
        assert set(row) == {"task", "task_version", "metric", "n", "entries"} and row["n"] == 6
        assert [entry["kind"] for entry in row["entries"]].count("base") == 1
        for entry in row["entries"]:
            assert set(entry) == {"model", "kind", "digest", "value", "stderr", "failures", "p_vs_base", "options_value"}
    assert read_leaderboard(outcome.json_path) == outcome.leaderboard
    assert "support_intents" in outcome.markdown_path.read_text()
    hub = Hub()
    version = hub.resolve("support_intents")
    manifest = json.loads((hub.path(version) / "manifest.json").read_text())
    assert manifest["prompt"]["template"] and manifest["base"]["weights_fingerprint"] and manifest["training"]["steps"] == 2
    assert [score.task for score in hub.scores(version.digest)] == ["support_intents"]
    assert [run.status for run in hub.runs(name="support_intents")] == ["finished"]
    outputs = list((tmp_path / "out" / "scores" / "support_intents").glob("*.outputs.jsonl"))
    assert len(outputs) == 3  # the base plainly, the base in its chat template, the adapter
    assert all(len(path.read_text().splitlines()) == 6 for path in outputs)


def test_a_land_run_again_redoes_nothing_and_a_changed_task_redoes_only_itself(land_config: LandConfig, tmp_path: Path) -> None:
    """Resuming by digest: hours of training must neither be repeated for nothing nor be reused for something else."""
    calls: list[str] = []
    first = land(land_config, tmp_path / "out")
    again = land(land_config, tmp_path / "out", progress=lambda stage, done, total: calls.append(stage))
    assert again.leaderboard == first.leaderboard
    assert stages(calls, "loss") == 0 and stages(calls, "evaluate") == 0
    changed = land_config.model_dump(mode="json", exclude_unset=True)
    changed["tasks"][1] = {"name": "unit_conversion", "data": {"path": "builtin:unit_conversion"}, "adapter": {"r": 2}}
    third = land(LandConfig.model_validate(changed), tmp_path / "out", progress=lambda stage, done, total: calls.append(stage))
    assert stages(calls, "loss of support_intents") == 0 and stages(calls, "loss of unit_conversion") == 2
    assert third.leaderboard.rows[0] == first.leaderboard.rows[0]
    assert [version.number for version in Hub().list("unit_conversion")] in ([1, 2], [2, 1])


EDITS = {"type": "loreft", "rank": 2, "layers": [0, 2], "positions": "f2+l2"}


def test_a_land_of_lora_and_reft_trains_measures_and_tells_them_apart(land_config: LandConfig, tmp_path: Path) -> None:
    """One base, one LoRA, one LoReFT and one of both: the board says which is which and what each weighs, and a second run finds all of it done."""
    asked = land_config.model_dump(mode="json", exclude_unset=True)
    data = {"data": {"path": "builtin:unit_conversion"}}
    asked["tasks"] = ["builtin:support_intents", {**data, "name": "edits", "adapter": EDITS}, {**data, "name": "both", "adapter": {"reft": EDITS}}]
    config = LandConfig.model_validate(asked)
    outcome = land(config, tmp_path / "out")
    assert not outcome.failures
    hub = Hub()
    versions = {name: hub.resolve(name) for name in ("support_intents", "edits", "both")}
    kinds = {name: version.kind for name, version in versions.items()}
    assert kinds == {"support_intents": "lora", "edits": "reft", "both": "lora+reft"}
    entries = {entry.model: entry for row in outcome.leaderboard.rows for entry in row.entries if entry.kind != "base"}
    assert {model: entry.kind for model, entry in entries.items()} == {f"{name}@1": kind for name, kind in kinds.items()}
    lora, reft, both = (versions[name].num_parameters or 0 for name in ("support_intents", "edits", "both"))
    assert reft == 2 * (2 * 64 + 2 * 64 + 2) and both == lora + reft
    assert f"| edits@1 | reft | {reft:,} | {versions['edits'].size_bytes:,} |" in outcome.markdown_path.read_text()
    assert [run.status for run in hub.runs(name="edits")] == ["finished"]
    assert "| loreft | 0, 2 | 2 | f2" in hub.show("edits").markdown()
    calls: list[str] = []
    again = land(config, tmp_path / "out", progress=lambda stage, done, total: calls.append(stage))
    assert again.leaderboard == outcome.leaderboard
    assert stages(calls, "loss") == 0 and stages(calls, "evaluate") == 0
    rows = DataConfig.model_validate({"path": "builtin:unit_conversion", **ROWS})
    one_batch = evaluate(config.base, ["edits", "both"], rows, dtype="float32", generation=config.defaults.generation, out=tmp_path / "eval")
    measured = {entry.model: entry for entry in one_batch.leaderboard.rows[0].entries if entry.kind != "base"}
    assert measured == {model: entries[model] for model in ("edits@1", "both@1")}


def test_an_interrupted_land_goes_on_where_it_was(land_config: LandConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second task keeps the first task's adapter and says how to go on."""
    from atoll.train.job import TrainingJob

    steps: list[int] = []
    original = TrainingJob.finish_step

    def ctrl_c_at_the_third(self: Any) -> None:
        original(self)
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingJob, "finish_step", ctrl_c_at_the_third)
    with pytest.raises(Interrupted):
        land(land_config, tmp_path / "out", at_once=1)
    assert [run.status for run in Hub().runs(kind="train")] == ["interrupted", "finished"]
    monkeypatch.undo()
    calls: list[str] = []
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "atoll-home"))
    outcome = land(land_config, tmp_path / "out", progress=lambda stage, done, total: calls.append(stage))
    assert stages(calls, "loss of support_intents") == 0 and len(outcome.leaderboard.rows) == 2


def test_a_land_of_jobs_at_once_stopped_twice_takes_no_step_and_no_measurement_again(
    land_config: LandConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while both tasks train together, and once more while the second is measured: what was done by then stays done."""
    from atoll.eval.arena import Arena
    from atoll.train.job import TrainingJob

    finish, measure = TrainingJob.finish_step, Arena.measure
    steps, measured = list[str](), list[str]()

    def finish_step(self: Any) -> None:
        finish(self)
        steps.append(self.folder.parent.name)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)

    def measure_task(self: Any, data: Any, *rest: Any, **options: Any) -> Any:
        measured.append(data.task.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, data, *rest, **options)

    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    monkeypatch.setattr(Arena, "measure", measure_task)
    with pytest.raises(Interrupted):
        land(land_config, tmp_path / "out")
    assert sorted(steps) == ["support_intents", "unit_conversion"] and not measured  # the round at hand was ended
    with pytest.raises(Interrupted):
        land(land_config, tmp_path / "out")
    assert len(steps) == 4
    calls: list[str] = []
    outcome = land(land_config, tmp_path / "out", progress=lambda stage, done, total: calls.append(stage))
    assert len(steps) == 4 and stages(calls, "evaluate support_intents") == 0 and stages(calls, "evaluate unit_conversion") > 0
    assert len(outcome.leaderboard.rows) == 2 and not outcome.failures
    costs = outcome.notes["support_intents"].costs
    assert [cost.tokens for cost in costs.values()] == [json.loads(line)["tokens"] for line in _manifests("support_intents")]
    assert "CPU-seconds" in outcome.markdown_path.read_text()


def _manifests(name: str) -> list[str]:
    """The training record of an adapter of the hub, as a line of JSON."""
    hub = Hub()
    return [json.dumps(json.loads((hub.path(hub.resolve(name)) / "manifest.json").read_text())["training"])]


def test_two_lands_in_one_directory_are_refused(land_config: LandConfig, tmp_path: Path) -> None:
    """Two writers of one directory would mix their results."""
    with locked(tmp_path / "out"), pytest.raises(Busy, match="in use by another"):
        land(land_config, tmp_path / "out")


def test_bad_data_stops_a_land_before_anything_is_trained(land_config: LandConfig, tmp_path: Path) -> None:
    """All data is read first: a broken file of the last task must not surface after an hour of training the others."""
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    changed = land_config.model_dump(mode="json", exclude_unset=True)
    changed["tasks"].append({"name": "broken", "data": {"path": str(broken)}})
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        land(LandConfig.model_validate(changed), tmp_path / "out")
    assert Hub().runs() == ()


def test_a_failure_of_the_engine_is_not_kept_as_a_wrong_answer(land_config: LandConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine out of memory scored the base 0, for good: every adapter would have beaten it. The task fails; the next run measures it."""
    from atoll.model.decoder import Decoder

    original = Decoder.logits

    def out_of_memory(self: Any, hidden: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Decoder, "logits", out_of_memory)
    outcome = land(land_config, tmp_path / "out")
    assert set(outcome.failures) == {"support_intents", "unit_conversion"} and not outcome.leaderboard.rows
    assert "can't allocate memory" in outcome.failures["support_intents"].message
    monkeypatch.setattr(Decoder, "logits", original)
    assert len(land(land_config, tmp_path / "out").leaderboard.rows) == 2


def test_a_damaged_score_file_is_measured_again(land_config: LandConfig, tmp_path: Path) -> None:
    """A score that cannot be read must not be a dead end."""
    first = land(land_config, tmp_path / "out")
    for path in (tmp_path / "out" / "scores" / "unit_conversion").glob("*.json"):
        path.write_text("{")
    assert land(land_config, tmp_path / "out").leaderboard == first.leaderboard
