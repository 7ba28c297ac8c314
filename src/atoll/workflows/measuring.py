"""Measure a base and adapters of the hub on a task, and write the leaderboard.

Used by landing.py, the command line and the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.config import BUILTIN, DataConfig, EvalConfig, GenerationConfig, QuantizationConfig
from atoll.data.task import load_task
from atoll.errors import AtollError, TaskError
from atoll.eval.arena import Arena, note_of
from atoll.eval.leaderboard import Leaderboard, RowNote, build_leaderboard, write_leaderboard
from atoll.eval.score import Score
from atoll.workflows.start import Progress, locked, open_hub, require, silent

if TYPE_CHECKING:
    from atoll.hub.store import Hub
    from atoll.model.base import Base


@dataclass(frozen=True)
class LandOutcome:
    """The leaderboard, where it was written, the tasks that failed with their errors, and sentences that the user should see."""

    leaderboard: Leaderboard
    notes: Mapping[str, RowNote]
    json_path: Path
    markdown_path: Path
    failures: Mapping[str, AtollError] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def evaluate(
    base_name: str,
    models: Sequence[str],
    data: DataConfig,
    *,
    root: Path | None = None,
    hub: Hub | None = None,
    settings: EvalConfig | None = None,
    generation: GenerationConfig | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    quantization: QuantizationConfig | None = None,
    ignore_quantization: bool = False,
    all_rows: bool = False,
    out: Path | None = None,
    progress: Progress = silent,
) -> LandOutcome:
    """Score the base and some adapters of the hub on one task, in one continuous batch; raw outputs and the leaderboard go to `out`.

    models: hub references ("name", "name@2", "name:tag"); ignore_quantization: take adapters of a base that is rounded otherwise, too; all_rows:
    score those that training and validation would get from the task as well as its test rows.
    Raises AdapterNotFound, BaseMismatch for an adapter of another base, and what loading raises.
    """
    from atoll.model.base import load_base

    require("scipy", "rouge_score")
    hub, settings, generation, out = hub or open_hub(), settings or EvalConfig(), generation or GenerationConfig(), out or Path("runs/eval")
    task = load_task(data, root=root)
    others = (*task.train, *task.validation)
    is_file = data.path is not None and not data.path.startswith(BUILTIN) and not ((root or Path()) / Path(data.path).expanduser()).is_dir()
    if not task.test and not all_rows:
        raise TaskError(
            f"task {task.task.name!r} has no test rows to score: all {len(others)} are for training and validation",
            hint="--all-rows scores all of them",
        )
    split: tuple[str, ...] = ()
    if all_rows:
        task = replace(task, test=(*others, *task.test))
        if others:
            split = (f"all {len(task.test)} rows are scored, also those that training would get: adapters that have learned them score too well",)
    elif is_file:
        split = (f"scored is the test split of {data.path}, {len(task.test)} of its {len(others) + len(task.test)} rows; --all-rows scores all",)
    base = load_base(base_name, dtype=dtype, device=device, quantization=quantization, progress=progress)
    versions = [hub.resolve(model) for model in models]
    with locked(out):
        arena = Arena(base, hub, settings, out / "scores", ignore_quantization=ignore_quantization)
        scores = arena.measure(task, versions, generation, progress)
        note = {task.task.name: note_of(task, scores, settings, versions, hub)}
        return write_board(base, scores, note, out, {}, (*split, *arena.warnings))


def write_board(
    base: Base, scores: Sequence[Score], notes: Mapping[str, RowNote], out: Path, failures: Mapping[str, AtollError], warnings: Sequence[str]
) -> LandOutcome:
    """Scores as a leaderboard, written to `out`."""
    board = build_leaderboard(base.title, base.fingerprint.digest, scores)
    json_path, markdown_path = write_leaderboard(out, board, notes)
    return LandOutcome(board, notes, json_path, markdown_path, failures, tuple(warnings))
