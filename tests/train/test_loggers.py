"""train/loggers.py: curves reach W&B and MLflow as they are in the log, resumed runs go on, and nothing there can stop a training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from atoll.config import TrainConfig
from atoll.config_file import json_schemas
from atoll.errors import ConfigError
from atoll.train import loggers
from atoll.train.log import RunLog, read_log
from atoll.workflows import make_plan

SETTINGS = {"base": "tiny", "adapter": {"r": 4, "target_modules": ["q_proj"]}}


class Fake:
    """A logger that keeps what it is told, and breaks at a step."""

    told: dict[str, list[tuple[int, dict[str, float]]]] = {}  # noqa: RUF012 (emptied by each test)

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], ids: dict[str, str]) -> None:
        self._id = ids.setdefault("wandb", f"id-{len(self.told)}")
        self.told.setdefault(self._id, [])

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == 4:
            raise ConnectionError("no network")
        self.told[self._id].append((step, dict(numbers)))

    def close(self, whole: bool) -> None:
        raise OSError("cannot say good-bye")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(loggers, "_WEIGHTS_OR_FLOW", {"wandb": Fake})
    monkeypatch.setattr(Fake, "told", {})
    return Fake


def test_a_resumed_run_goes_on_in_its_place_and_a_new_one_gets_its_own(fake: type[Fake], tmp_path: Path) -> None:
    """Otherwise every Ctrl-C would cut a curve in two, and a second training would be drawn over the first."""
    with RunLog(tmp_path, 0, ["wandb"]) as log:
        log.write(1, loss=1.0)
        log.write(2, loss=0.5)
    with RunLog(tmp_path, 2, ["wandb"]) as log:
        log.write(3, loss=0.25)
    with RunLog(tmp_path, 0, ["wandb"]) as log:
        log.write(1, loss=9.0)
    assert [[step for step, _ in curve] for curve in fake.told.values()] == [[1, 2, 3], [1]]


def test_a_logger_that_fails_is_left_with_a_warning_and_the_log_is_whole(fake: type[Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training of hours must not end because a server far away does."""
    with caplog.at_level(logging.WARNING), RunLog(tmp_path, 0, ["wandb", "mlflow"]) as log:  # mlflow is none of the fakes: it cannot be opened
        for step in (3, 4, 5):
            log.write(step, loss=float(step))
    assert [line["step"] for line in read_log(tmp_path)] == [3, 4, 5] and [step for step, _ in fake.told["id-0"]] == [3]
    assert "mlflow could not be opened" in caplog.text and "no network" in caplog.text


def test_one_that_is_not_installed_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and how to get it; unknown names are refused as any wrong value."""
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    config = TrainConfig.model_validate({"base": "nowhere", "data": "builtin:dates", "trainer": {"log_to": ["tensorboard", "mlflow"]}})
    with pytest.raises(ConfigError, match=r"trainer\.log_to names mlflow, which is not installed") as caught:
        make_plan(config)
    assert "atoll[mlflow]" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="log_to"):
        TrainConfig(base="tiny", trainer={"log_to": ["wandbb"]})
    assert "log_to" in json.dumps(json_schemas()["train"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_takes_the_curve_over_a_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real package and a store in one file."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with RunLog(tmp_path, 0, ["mlflow"], title="tickets", settings=SETTINGS) as log:
        log.write(1, loss=1.0, learning_rate=0.1)
        log.write(1, validation_loss=2.0)
    with RunLog(tmp_path, 1, ["mlflow"], title="tickets", settings=SETTINGS) as log:
        log.write(2, loss=0.5)
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("atoll").experiment_id])
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.0), (2, 0.5)]
    assert run.data.params["adapter.r"] == "4" and run.data.metrics["validation_loss"] == 2.0
    assert run.info.run_name == "tickets" and run.info.status == "FINISHED"
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, 2, ["mlflow"], title="tickets", settings=SETTINGS):
        raise KeyboardInterrupt
    assert client.get_run(run.info.run_id).info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_writes_offline_beside_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real package, two runs at a time as jobs that train together have them; nobody is asked to log in."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with RunLog(tmp_path / "a", 0, ["wandb"], title="a", settings=SETTINGS) as one, RunLog(tmp_path / "b", 0, ["wandb"], title="b") as other:
        one.write(1, loss=1.0)
        other.write(1, loss=2.0)
        one.write(2, loss=0.5)
    for name in ("a", "b"):
        run_id = json.loads((tmp_path / name / loggers.FILE).read_text())["wandb"]
        [written] = (tmp_path / name).glob(f"wandb/offline-run-*/run-{run_id}.wandb")
        until = time.monotonic() + 60
        while written.stat().st_size <= 500 and time.monotonic() < until:  # W&B's own process writes it, soon after the run has ended
            time.sleep(0.05)
        assert written.stat().st_size > 500
