"""Where a run's curve goes besides its own log: TensorBoard files, Weights & Biases, MLflow.

Each takes the numbers of log.jsonl under the same names. A run that is resumed goes on in the same place: what W&B and MLflow call it stands in
loggers.json beside the log. None of them can stop a training: one that fails is named in a warning and left.

W&B works offline unless somebody has logged in (or WANDB_MODE says otherwise); its files are in the run's folder, `wandb sync` sends them. MLflow
writes where MLFLOW_TRACKING_URI says, or else to its own default, a file mlflow.db where Atoll was started. Projects are called atoll, or as
WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say. Used by log.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from atoll.config_section import by_dotted_key
from atoll.errors import ConfigError
from atoll.files import write_file

FILE = "loggers.json"
PROJECT = "atoll"
_log = logging.getLogger(__name__)


class Logger(Protocol):
    """One place that takes a curve."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self, whole: bool) -> None:
        """The run is over, or, where it is not whole, failed or stopped for now."""


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger that was asked for by name and is not installed: before the training, not in its middle."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"trainer.log_to names {name}, which is not installed", hint=f'pip install "atoll[{name}]", or take it out of log_to')


def open_loggers(names: Sequence[str], folder: Path, from_step: int, title: str, settings: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run in `folder` that goes on after from_step (0: it begins). Those that cannot be opened are left out with a warning."""
    opened: list[Logger] = []
    ids = _ids(folder) if from_step else {}
    for name in names:
        try:
            if name == "tensorboard":
                if importlib.util.find_spec("tensorboard") is None:
                    _log.warning("tensorboard is not installed, so the curve is in log.jsonl only")
                    continue
                opened.append(_TensorBoard(folder / "tensorboard", from_step))
            else:
                opened.append(_WEIGHTS_OR_FLOW[name](folder, title, settings, ids))
        except Exception as error:  # another project's, of any kind: the training matters more
            _log.warning("%s could not be opened and is left out: %s", name, error)
    if ids:
        write_file(folder / FILE, json.dumps(ids, indent=2) + "\n")
    return opened


def tell(loggers: list[Logger], step: int, numbers: Mapping[str, float]) -> None:
    """Give numbers to all; one that fails is taken out of the list."""
    for logger in list(loggers):
        try:
            logger.write(step, numbers)
        except Exception as error:
            loggers.remove(logger)
            _log.warning("%s failed at step %d and gets no more: %s", type(logger).__name__.lstrip("_"), step, error)


def close_all(loggers: Sequence[Logger], whole: bool) -> None:
    """Close each, whatever the others do."""
    for logger in loggers:
        try:
            logger.close(whole)
        except Exception as error:
            _log.warning("%s could not be closed: %s", type(logger).__name__.lstrip("_"), error)


class _TensorBoard:
    def __init__(self, folder: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, whole: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], ids: dict[str, str]) -> None:
        import wandb

        ids.setdefault("wandb", secrets.token_hex(4))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=title or None,
            id=ids["wandb"],
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            reinit="create_new",  # several jobs train in one process
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


def _logged_in(wandb: Any) -> bool:
    """Whether W&B has a key, without asking for one."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)


class _MLflow:
    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], ids: dict[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if "mlflow" not in ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
            ids["mlflow"] = self._client.create_run(experiment, run_name=title or None, tags={"folder": str(folder.absolute())}).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in by_dotted_key(settings)]
            for start in range(0, len(params), 100):  # MLflow takes a hundred at a time
                self._client.log_batch(ids["mlflow"], params=params[start : start + 100])
        self._run_id = ids["mlflow"]
        self._client.update_run(self._run_id, status="RUNNING")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[self._metric(name, float(value), now, step) for name, value in numbers.items()])

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED" if whole else "KILLED")


_WEIGHTS_OR_FLOW: Mapping[str, Any] = {"wandb": _WandB, "mlflow": _MLflow}


def _ids(folder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    return {}
