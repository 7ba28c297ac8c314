"""The joined verbs: train and publish, evaluate and record, land. The command line, the server and the library call these and nothing below them.

Everything is kept as it is done: an adapter is in the hub before the next one trains, a score is a file before the next task is asked, and each is
found again by the digest of what it was made from. So a land that was stopped goes on, and one whose inputs changed redoes just what they touch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import DataConfig, EvalConfig, GenerationConfig, LandConfig, QuantizationConfig, TrainConfig
from atoll.data.prompt import PromptFormat, encode_prompt
from atoll.data.task import TaskData, load_task
from atoll.errors import AtollError, Busy, ConfigError, Interrupted, StorageError, TrainingError
from atoll.eval.arena import Arena, limits, note_of
from atoll.eval.leaderboard import Leaderboard, RowNote, build_leaderboard, write_leaderboard
from atoll.eval.score import Score
from atoll.files import write_file
from atoll.hub.names import check_name
from atoll.model.adapter_files import read_adapter, write_adapter

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base
    from atoll.train.plan import TrainingPlan

Progress = Callable[[str, int, int], None]
RESULT_FILE = "result.json"
_ENDS_A_LAND = (Interrupted, StorageError, Busy)  # what no other task can be spared from


def _silent(stage: str, done: int, total: int) -> None:
    """The default progress."""


@dataclass(frozen=True)
class TrainOutcome:
    """A trained adapter: its folder, its version in the hub (None if not published), its training record.

    reused: found finished, not trained now. warnings: sentences that the user should see.
    """

    adapter_folder: Path
    version: Version | None
    training: Mapping[str, Any]
    reused: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LandOutcome:
    """The leaderboard, where it was written, the tasks that failed with their errors, and sentences that the user should see."""

    leaderboard: Leaderboard
    notes: Mapping[str, RowNote]
    json_path: Path
    markdown_path: Path
    failures: Mapping[str, AtollError] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


# ---- train ----


def make_plan(
    config: TrainConfig, *, root: Path | None = None, base: Base | None = None, data: TaskData | None = None, progress: Progress = _silent
) -> TrainingPlan:
    """Load data and base (those not given) and fix everything that decides the training's result. Nothing is written."""
    from atoll.model.base import load_base
    from atoll.train.plan import plan_training

    data = data or load_task(config.require_data(), name=config.name, root=root)
    trainer = config.trainer
    base = base or load_base(config.base, dtype=trainer.dtype, device=trainer.device, quantization=config.quantization, progress=progress)
    return plan_training(config, base, data, stop=limits(config.generation, data, base.tokenizer)[1])


def train_and_publish(
    config: TrainConfig,
    *,
    root: Path | None = None,
    out: Path | None = None,
    hub: Hub | None = None,
    publish: bool = True,
    progress: Progress = _silent,
) -> TrainOutcome:
    """Train one adapter into `out` (default: runs/<name>) and publish it under its name.

    root: the folder that the config's relative paths start at. Goes on from a checkpoint of the same job in `out`. Raises what loading, training and
    publishing raise, see errors.py.
    """
    plan = make_plan(config, root=root, progress=progress)
    folder = out or Path("runs") / _name(plan)
    with locked(folder):
        return run_plan_in(folder, plan, hub or _open_hub() if publish else None, progress=progress)


def run_plan_in(folder: Path, plan: TrainingPlan, hub: Hub | None, *, progress: Progress = _silent) -> TrainOutcome:
    """Carry out a plan in `folder` and publish to `hub` (None: write the adapter folder only). A finished run of the same job is found and kept."""
    from atoll.train.checkpoint import FILE as CHECKPOINT
    from atoll.train.plan import run_plan

    done = _finished(folder, plan, hub)
    if done is not None:
        return done
    target = folder / "adapter"
    with _recorded_run(hub, plan) as record:
        result = run_plan(plan, folder, lambda headline, step, total: progress(f"train {_name(plan)}: {headline}", step, total))
        write_adapter(target, result.adapter)
        version = hub.publish(target, _name(plan), message=f"trained {result.progress.step} steps on {plan.data.task.name}") if hub else None
        record.update(seconds=result.progress.seconds, digest=version.digest if version else None)
    written = {"job": plan.digest, "digest": version.digest if version else None}
    write_file(folder / RESULT_FILE, (json.dumps(written, indent=2) + "\n").encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)  # the adapter is safe, and a checkpoint is four times its size
    training = {**result.adapter.manifest["training"], "seconds": round(result.progress.seconds, 1)}
    return TrainOutcome(target, version, training, warnings=plan.warnings)


def _finished(folder: Path, plan: TrainingPlan, hub: Hub | None) -> TrainOutcome | None:
    """The outcome of an earlier run of this very job in `folder`, if its adapter is still where it was put."""
    path = folder / RESULT_FILE
    if not path.is_file() or not (folder / "adapter").is_dir():
        return None
    written = json.loads(path.read_text(encoding="utf-8"))
    if written.get("job") != plan.digest:
        raise TrainingError(
            f"{folder} holds the finished run of another job: config, data or base have changed since",
            hint="choose another --out folder, or delete this one to train again",
        )
    adapter = read_adapter(folder / "adapter")
    version = None
    if hub is not None:
        version = hub.publish(folder / "adapter", _name(plan))  # the same content is the same version; new only if it was not (or no longer) there
    return TrainOutcome(folder / "adapter", version, adapter.manifest["training"], reused=True, warnings=plan.warnings)


@contextlib.contextmanager
def _recorded_run(hub: Hub | None, plan: TrainingPlan) -> Iterator[dict[str, Any]]:
    """Keep the hub's record of a run true however the run ends; what the body puts into the dict joins the record of a finished one."""
    found: dict[str, Any] = {}
    if hub is None:
        yield found
        return
    config, started = plan.config.model_dump(mode="json"), datetime.now(UTC)

    def record(status: str, run_id: int | None = None, **facts: Any) -> int:
        return hub.record_run("train", config, status=status, started=started, name=_name(plan), run_id=run_id, **facts).id

    for run in hub.runs(name=_name(plan), kind="train"):
        if run.status == "running" and run.config == config:  # its process is dead: this one holds the folder's lock
            record("interrupted", run.id, message="ended without a word")
    run_id = record("running")
    try:
        yield found
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        record(status, run_id, finished=datetime.now(UTC), message=str(error)[:500])
        raise
    record("finished", run_id, finished=datetime.now(UTC), **found)


def prompt_ids(base: Base, adapter: Adapter, **fields: Any) -> list[int]:
    """The tokens of a prompt in the adapter's own words: its template filled with `fields`, as it was trained and is evaluated.

    An adapter without a template takes the one field `prompt` as it is. Raises DataError for a field that is missing.
    """
    form = PromptFormat.from_json(adapter.manifest["prompt"]) if adapter.manifest.get("prompt") else PromptFormat()
    return encode_prompt(form.render(fields), base.tokenizer, form.chat)


# ---- evaluate ----


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
    out: Path | None = None,
    progress: Progress = _silent,
) -> LandOutcome:
    """Score the base and some adapters of the hub on one task, in one continuous batch; raw outputs and the leaderboard go to `out`.

    models: hub references ("name", "name@2", "name:tag"); ignore_quantization: take adapters of a base that is rounded otherwise, too.
    Raises AdapterNotFound, BaseMismatch for an adapter of another base, and what loading raises.
    """
    from atoll.model.base import load_base

    _require("scipy", "rouge_score")
    hub, settings, generation, out = hub or _open_hub(), settings or EvalConfig(), generation or GenerationConfig(), out or Path("runs/eval")
    task = load_task(data, root=root)
    base = load_base(base_name, dtype=dtype, device=device, quantization=quantization, progress=progress)
    versions = [hub.resolve(model) for model in models]
    with locked(out):
        arena = Arena(base, hub, settings, out / "scores", ignore_quantization=ignore_quantization)
        scores = arena.measure(task, versions, generation, progress)
        note = {task.task.name: note_of(task, scores, settings, versions)}
        return _write_board(base, scores, note, out, {}, arena.warnings)


# ---- land ----


def land(config: LandConfig, out: Path, *, root: Path | None = None, hub: Hub | None = None, progress: Progress = _silent) -> LandOutcome:
    """Train every task of the file over one base, publish, evaluate base and adapters through the engine, write the leaderboard to `out`.

    All data is read before the first step, so a bad file stops the land at once. A task that fails later is reported in `failures`; the others go on.
    Run again, it redoes only what is missing or whose inputs changed. Raises Busy if another land works in `out`, Interrupted on Ctrl-C.
    """
    _require("scipy", "rouge_score")
    hub = hub or _open_hub()
    with locked(out):
        jobs = config.jobs()
        data = {job.name: load_task(job.require_data(), name=job.name, root=root) for job in jobs}
        bases = _Bases(config.base, progress)
        plans = [make_plan(job, base=bases.of(job), data=data[job.name]) for job in jobs]
        for plan in plans:
            check_name(_name(plan))
        versions: dict[str, Version] = {}
        failures: dict[str, AtollError] = {}
        for number, plan in enumerate(plans, 1):
            name = _name(plan)
            try:
                outcome = run_plan_in(out / "tasks" / name / plan.digest[:12], plan, hub, progress=_prefixed(progress, f"[{number}/{len(plans)}]"))
            except _ENDS_A_LAND:
                raise
            except AtollError as error:
                failures[name] = error
                continue
            assert outcome.version is not None
            versions[name] = outcome.version
        arenas = {id(base): Arena(base, hub, config.eval, out / "scores") for base in bases.loaded.values()}
        scores: list[Score] = []
        notes: dict[str, RowNote] = {}
        for number, plan in enumerate(plans, 1):
            name, stage = _name(plan), _prefixed(progress, f"[{number}/{len(plans)}]")
            if name in failures:
                continue
            try:
                measured = arenas[id(plan.base)].measure(plan.data, [versions[name]], plan.config.generation, stage)
                notes[plan.data.task.name] = note_of(plan.data, measured, config.eval, [versions[name]])
                scores += measured
            except KeyboardInterrupt:
                raise Interrupted(f"stopped while task {name!r} was measured", hint="run the same command again to go on from there") from None
            except _ENDS_A_LAND:
                raise
            except AtollError as error:
                failures[name] = error
        warnings = [*(warning for plan in plans for warning in plan.warnings), *(warning for arena in arenas.values() for warning in arena.warnings)]
        return _write_board(next(iter(bases.loaded.values())), scores, notes, out, failures, warnings)


class _Bases:
    """The land's base, loaded once for each dtype and device that its jobs train in."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self.loaded: dict[tuple[str, str], Base] = {}

    def of(self, job: TrainConfig) -> Base:
        from atoll.model.base import load_base

        key = (job.trainer.dtype, job.trainer.device)
        if key not in self.loaded:
            self.loaded[key] = load_base(self._name, dtype=key[0], device=key[1], quantization=job.quantization, progress=self._progress)
        return self.loaded[key]


def _write_board(
    base: Base, scores: Sequence[Score], notes: Mapping[str, RowNote], out: Path, failures: Mapping[str, AtollError], warnings: Sequence[str]
) -> LandOutcome:
    board = build_leaderboard(base.title, base.fingerprint.digest, scores)
    json_path, markdown_path = write_leaderboard(out, board, notes)
    return LandOutcome(board, notes, json_path, markdown_path, failures, tuple(warnings))


def _name(plan: TrainingPlan) -> str:
    return plan.config.name or plan.data.task.name


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: progress(f"{prefix} {stage}", done, total)


def _require(*modules: str) -> None:
    """Say before the work, not after it, that an extra is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"measuring needs the package {module}, which is not installed", hint='install Atoll with its extras: pip install "atoll[all]"'
            )


def _open_hub() -> Hub:
    _require("sqlalchemy", "alembic", "fsspec")
    from atoll.hub.store import Hub

    return Hub()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process (made if absent); the lock ends with the process, however it ends. Raises Busy or StorageError."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise Busy(f"{folder} is in use by another Atoll process", hint="wait for it, or choose another --out folder") from None
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}", hint="choose another --out folder") from error
    try:
        yield
    finally:
        lock.release()
