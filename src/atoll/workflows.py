"""The joined verbs: train and publish, evaluate and record, land. The command line, the server and the library call these and nothing below them.

Everything is kept as it is done: an adapter is in the hub before the next one trains, a score is a file before the next task is asked, and each is
found again by the digest of what it was made from. So a land that was stopped goes on, and one whose inputs changed redoes just what they touch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import DataConfig, EvalConfig, GenerationConfig, LandConfig, TrainConfig
from atoll.data.prompt import PromptFormat
from atoll.data.task import TaskData, load_task
from atoll.errors import AtollError, BaseMismatch, Busy, EngineError, Interrupted, StorageError, TaskError, TrainingError
from atoll.eval.baseline import majority_baseline
from atoll.eval.evaluate import Contestant, TaskRun, generation_limits, option_requests, plan_run, prompt_styles, requests_for, score_completions
from atoll.eval.evaluate import with_options as score_options
from atoll.eval.leaderboard import Leaderboard, RowNote, build_leaderboard, write_leaderboard
from atoll.eval.score import Score, better_base, read_score, write_outputs, write_score
from atoll.files import write_file
from atoll.model.adapter_files import read_adapter, write_adapter

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base
    from atoll.train.plan import TrainingPlan

Progress = Callable[[str, int, int], None]
RESULT_FILE = "result.json"


def _silent(stage: str, done: int, total: int) -> None:
    """The default progress."""


@dataclass(frozen=True)
class TrainOutcome:
    """A trained adapter:

    its folder, its version in the hub (None if not published) and its training record. reused: found finished, not trained now.
    """

    adapter_folder: Path
    version: Version | None
    training: Mapping[str, Any]
    reused: bool = False


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
    base = base or load_base(config.base, dtype=config.trainer.dtype, progress=progress)
    return plan_training(config, base, data, stop=_limits(config.generation, data, base)[1])


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
    return TrainOutcome(target, version, result.adapter.manifest["training"])


def _finished(folder: Path, plan: TrainingPlan, hub: Hub | None) -> TrainOutcome | None:
    """The outcome of an earlier run of this very job in `folder`, if its adapter is still where it was put."""
    path = folder / RESULT_FILE
    if not path.is_file():
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
    return TrainOutcome(folder / "adapter", version, adapter.manifest["training"], reused=True)


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

    run_id = record("running")
    try:
        yield found
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        record(status, run_id, finished=datetime.now(UTC), message=str(error)[:500])
        raise
    record("finished", run_id, finished=datetime.now(UTC), **found)


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
    out: Path | None = None,
    progress: Progress = _silent,
) -> LandOutcome:
    """Score the base and some adapters of the hub on one task, in one continuous batch; raw outputs and the leaderboard go to `out`.

    models: hub references ("name", "name@2", "name:tag"). Raises AdapterNotFound, BaseMismatch for an adapter of another base, and what loading
    raises.
    """
    from atoll.model.base import load_base

    hub, settings, generation, out = hub or _open_hub(), settings or EvalConfig(), generation or GenerationConfig(), out or Path("runs/eval")
    task = load_task(data, root=root)
    base = load_base(base_name, dtype=dtype, progress=progress)
    versions = [hub.resolve(model) for model in models]
    with locked(out):
        arena = _Arena(base, hub, settings, out / "scores")
        scores = arena.measure(task, versions, generation, progress)
        note = {task.task.name: _note(task, scores, settings)}
        return _write_board(base, scores, note, out, {}, arena.warnings)


class _Arena:
    """One engine over one base, and the folder of scores that it has already measured."""

    def __init__(self, base: Base, hub: Hub, settings: EvalConfig, folder: Path) -> None:
        self._base, self._hub, self._settings, self._folder = base, hub, settings, folder
        self._engine: Engine | None = None
        self._registered: dict[str, Adapter] = {}
        self.warnings: list[str] = []

    def measure(self, data: TaskData, versions: Sequence[Version], generation: GenerationConfig, progress: Progress) -> list[Score]:
        """Scores of the base in each prompt style and of every version, asked together; those on disk are read instead."""
        runs = [(run, self._score_path(run)) for run in self._runs(data, versions, generation)]
        missing = [(run, path) for run, path in runs if not path.is_file()]
        if missing:
            self._ask(data.task.name, missing, progress)
        scores = [read_score(path) for _, path in runs]
        for score, (_, path) in zip(scores, runs, strict=True):
            if path in {path for _, path in missing}:
                details = {"prompt_style": score.prompt_style, "model": score.model, "outputs": str(path.with_suffix(".outputs.jsonl"))}
                self._hub.record_score(
                    score.digest,
                    score.task,
                    score.task_version,
                    score.metric,
                    score.value,
                    stderr=score.stderr,
                    n=score.n,
                    failures=score.failures,
                    options_value=score.options_value,
                    details=details,
                )
        return scores

    def _runs(self, data: TaskData, versions: Sequence[Version], generation: GenerationConfig) -> list[TaskRun]:
        base, settings = self._base, self._settings
        max_new_tokens, stop = _limits(generation, data, base)
        common: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "num_rows": settings.test_rows,
            "context_length": base.context_length,
            "max_options": settings.max_options if settings.option_scoring else 0,
        }
        contestant = Contestant(base.name, "base", base.fingerprint.digest)
        styles = [style for style in prompt_styles(data.task, base.tokenizer) if settings.chat_base or style == "plain" or data.task.chat]
        runs = [plan_run(data, contestant, base.tokenizer, style=style, **common) for style in styles]
        for version in versions:
            adapter = self._adapter(version)
            own = adapter.manifest.get("prompt")
            runs.append(
                plan_run(
                    data,
                    Contestant(version.ref, "lora", version.digest, adapter=version.digest),
                    base.tokenizer,
                    prompt_format=PromptFormat.from_json(own) if own else None,
                    **common,
                )
            )
        return runs

    def _adapter(self, version: Version) -> Adapter:
        """The version's adapter, read once, and checked against the base."""
        if version.digest not in self._registered:
            from atoll.model.base import tensor_shapes

            found = self._hub.check_base(version.ref, self._base.fingerprint.to_json(), tensor_shapes(self._base.path))
            if found.kind == "refused":
                raise BaseMismatch(f"{version.ref} does not fit {self._base.name}: {found.reason}", hint="evaluate it on the base it was trained on")
            if found.kind == "compatible":
                self.warnings.append(f"{version.ref} fits {self._base.name} in shape, but is not known to have been trained on it: {found.reason}")
            self._registered[version.digest] = read_adapter(self._hub.path(version))
        return self._registered[version.digest]

    def _ask(self, name: str, missing: Sequence[tuple[TaskRun, Path]], progress: Progress) -> None:
        """Generate all answers of all runs in one batch, score the options, and write score and outputs of each run."""
        engine = self._start_engine()
        for run, _ in missing:
            key = run.contestant.adapter
            if key is not None and not engine.is_registered(key):
                engine.register(key, self._registered[key])
        completions = engine.generate(
            [request for run, _ in missing for request in requests_for(run)], progress=_prefixed(progress, f"evaluate {name}")
        )
        for run, path in missing:
            items = option_requests(run, self._base.tokenizer)
            log_probs = engine.score(items, progress=_prefixed(progress, f"options {name}")) if items else []
            score, outputs = score_options(*score_completions(run, completions), run, log_probs)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_outputs(path.with_suffix(".outputs.jsonl"), outputs)
            write_score(path, score)

    def _start_engine(self) -> Engine:
        from atoll.engine.config import EngineConfig
        from atoll.engine.engine import Engine

        if self._engine is None:
            self._engine = Engine(self._base, EngineConfig(max_rows=self._settings.batch_size))
        return self._engine

    def _score_path(self, run: TaskRun) -> Path:
        """Where a run's score stands: everything that decides it is in the name's hash."""
        contestant = run.contestant
        identity = [
            contestant.kind,
            contestant.digest,
            self._base.fingerprint.digest,
            str(self._base.dtype),
            run.data.test_version,
            run.metric.name,
            run.metric.version,
            run.style,
            run.prompts,
            run.max_new_tokens,
            run.stop,
            run.labels,
        ]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        return self._folder / run.data.task.name / f"{contestant.kind}-{run.style}-{digest}.json"


def _limits(generation: GenerationConfig, data: TaskData, base: Base) -> tuple[int, tuple[str, ...]]:
    """(max_new_tokens, stop): what the config says, else what fits the training answers."""
    max_new_tokens, stop = generation_limits(data, base.tokenizer)
    return generation.max_new_tokens or max_new_tokens, generation.stop or stop


def _note(data: TaskData, scores: Sequence[Score], settings: EvalConfig) -> RowNote:
    from atoll.eval.evaluate import choose_examples

    base = better_base([score for score in scores if score.kind == "base"])
    return RowNote(majority=majority_baseline(data, choose_examples(data, settings.test_rows)), base_prompt_style=base.prompt_style)


# ---- land ----


def land(config: LandConfig, out: Path, *, root: Path | None = None, hub: Hub | None = None, progress: Progress = _silent) -> LandOutcome:
    """Train every task of the file over one base, publish, evaluate base and adapters through the engine, write the leaderboard to `out`.

    All data is read before the first step, so a bad file stops the land at once. A task that fails later is reported in `failures`; the others go on.
    Run again, it redoes only what is missing or whose inputs changed. Raises Busy if another land works in `out`, Interrupted on Ctrl-C.
    """
    hub = hub or _open_hub()
    with locked(out):
        jobs = config.jobs()
        data = {job.name: load_task(job.require_data(), name=job.name, root=root) for job in jobs}
        bases = _Bases(config.base, progress)
        plans = [make_plan(job, base=bases.at(job.trainer.dtype), data=data[job.name]) for job in jobs]
        versions: dict[str, Version] = {}
        failures: dict[str, AtollError] = {}
        for number, plan in enumerate(plans, 1):
            name = _name(plan)
            try:
                outcome = run_plan_in(out / "tasks" / name / plan.digest[:12], plan, hub, progress=_prefixed(progress, f"[{number}/{len(plans)}]"))
            except TrainingError as error:
                failures[name] = error
                continue
            assert outcome.version is not None
            versions[name] = outcome.version
        arenas = {dtype: _Arena(base, hub, config.eval, out / "scores") for dtype, base in bases.loaded.items()}
        scores: list[Score] = []
        notes: dict[str, RowNote] = {}
        for number, plan in enumerate(plans, 1):
            name, stage = _name(plan), _prefixed(progress, f"[{number}/{len(plans)}]")
            if name in failures:
                continue
            try:
                measured = arenas[plan.config.trainer.dtype].measure(plan.data, [versions[name]], plan.config.generation, stage)
                notes[plan.data.task.name] = _note(plan.data, measured, config.eval)
                scores += measured
            except (EngineError, TaskError) as error:
                failures[name] = error
        warnings = [warning for arena in arenas.values() for warning in arena.warnings]
        return _write_board(next(iter(bases.loaded.values())), scores, notes, out, failures, warnings)


class _Bases:
    """The land's base, loaded once for each dtype that its jobs train in."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self.loaded: dict[str, Base] = {}

    def at(self, dtype: str) -> Base:
        from atoll.model.base import load_base

        if dtype not in self.loaded:
            self.loaded[dtype] = load_base(self._name, dtype=dtype, progress=self._progress)
        return self.loaded[dtype]


def _write_board(
    base: Base, scores: Sequence[Score], notes: Mapping[str, RowNote], out: Path, failures: Mapping[str, AtollError], warnings: Sequence[str]
) -> LandOutcome:
    board = build_leaderboard(base.name, base.fingerprint.digest, scores)
    json_path, markdown_path = write_leaderboard(out, board, notes)
    return LandOutcome(board, notes, json_path, markdown_path, failures, tuple(warnings))


def _name(plan: TrainingPlan) -> str:
    return plan.config.name or plan.data.task.name


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: progress(f"{prefix} {stage}", done, total)


def _open_hub() -> Hub:
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
