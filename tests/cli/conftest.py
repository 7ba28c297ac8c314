"""Run command lines in this process, and a home folder in which an adapter has been trained on the tiny base."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.cli.main import run


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Runner = Callable[..., Result]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The tiny base is faster on one: threads that wait for each other cost more than its products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def atoll(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    """atoll("hub", "list", stdin="…") runs a command line as the program would, but for the process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments: object, stdin: str | None = None) -> Result:
        capsys.readouterr()
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


def write_rows(path: Path, num_rows: int = 40) -> Path:
    """Rows with the columns text and colour; of ten, eight are for training, then one for validation and one for test."""
    colours, parts = ("red", "blue", "green"), (*["train"] * 8, "validation", "test")
    rows = [{"text": f"a {colours[i % 3]} thing {i}", "colour": colours[i % 3], "split": parts[i % 10]} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_train_yaml(path: Path, base: Path, **changes: Any) -> Path:
    """A training file for rows.jsonl beside it; JSON is YAML too."""
    config = {
        "base": str(base),
        "name": "colours",
        "data": {"path": "rows.jsonl", "template": "{text} is", "target": "colour"},
        "adapter": {"r": 4},
        "trainer": {"dtype": "float32", "max_steps": 2, "batch_size": 4},
        **changes,
    }
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def job(tmp_path: Path, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training file beside its rows, in the working directory."""
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return write_train_yaml(tmp_path / "train.yaml", tiny_base_dir)


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path) -> Path:
    """A home whose hub holds "colours", trained on the tiny base; do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "rows.jsonl")
    file = write_train_yaml(folder / "train.yaml", tiny_base_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(folder / "home"))
        assert run(["train", str(file), "--out", str(folder / "run")]) == 0
    return folder / "home"


@pytest.fixture
def trained(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the trained home the one at hand."""
    monkeypatch.setenv("ATOLL_HOME", str(trained_home))
    return trained_home
