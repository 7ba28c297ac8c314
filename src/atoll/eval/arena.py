"""Measure a base and adapters of the hub on tasks, and keep what was measured.

A score is a file named by the hash of everything that decided it (base, adapter, rows, prompts, limits, metric), so it is measured once, found
again, and never mistaken for another. All contestants of a task are asked in one continuous batch.

Used by workflows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from atoll.config import EvalConfig, GenerationConfig
from atoll.data.prompt import PromptFormat
from atoll.data.task import TaskData
from atoll.errors import BaseMismatch, DataError, EngineError
from atoll.eval.baseline import majority_baseline
from atoll.eval.evaluate import (
    BROKEN,
    Contestant,
    TaskRun,
    choose_examples,
    generation_limits,
    option_requests,
    plan_run,
    prompt_styles,
    requests_for,
    score_completions,
    with_options,
)
from atoll.eval.leaderboard import RowNote, Size
from atoll.eval.score import Kind, Score, better_base, read_score, write_outputs, write_score
from atoll.model.adapter_files import read_adapter

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.engine.request import Request, ScoreRequest
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

Progress = Callable[[str, int, int], None]


class Arena:
    """Measures versions of a hub against one base, and keeps every score in `folder`."""

    def __init__(self, base: Base, hub: Hub, settings: EvalConfig, folder: Path) -> None:
        self._base, self._hub, self._settings, self._folder = base, hub, settings, folder
        self._adapters: dict[str, Adapter] = {}
        self.warnings: list[str] = []

    def measure(self, data: TaskData, versions: Sequence[Version], generation: GenerationConfig, progress: Progress) -> list[Score]:
        """Scores of the base in each prompt style and of every version, asked together; those on disk are read instead."""
        runs = [(run, self._score_path(run)) for run in self._runs(data, versions, generation)]
        found = {path: _read_if_whole(path) for _, path in runs}
        missing = [(run, path) for run, path in runs if found[path] is None]
        if missing:
            found.update(self._ask(data.task.name, missing, progress))
        scores = []
        for run, path in runs:
            score = found[path]
            assert score is not None
            scores.append(replace(score, model=run.contestant.model))  # a digest may have several names
            if score.prompts_cut:
                self.warnings.append(f"{data.task.name}: {score.prompts_cut} of {score.n} prompts lost their beginning to fit the base's context")
        return scores

    def _runs(self, data: TaskData, versions: Sequence[Version], generation: GenerationConfig) -> list[TaskRun]:
        base, settings = self._base, self._settings
        max_new_tokens, stop = limits(generation, data, base.tokenizer)
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
                    Contestant(version.ref, cast(Kind, version.kind), version.digest, adapter=version.digest),  # the hub's kinds are all ours
                    base.tokenizer,
                    prompt_format=PromptFormat.from_json(own) if own else None,
                    **common,
                )
            )
        return runs

    def _adapter(self, version: Version) -> Adapter:
        """The version's adapter, read once, and checked against the base."""
        if version.digest not in self._adapters:
            from atoll.model.base import tensor_shapes

            found = self._hub.check_base(version.ref, self._base.fingerprint.to_json(), tensor_shapes(self._base.path))
            if found.kind == "refused":
                raise BaseMismatch(f"{version.ref} does not fit {self._base.name}: {found.reason}", hint="evaluate it on the base it was trained on")
            if found.kind == "compatible":
                self.warnings.append(f"{version.ref} fits {self._base.name} in shape, but is not known to have been trained on it: {found.reason}")
            self._adapters[version.digest] = read_adapter(self._hub.path(version))
        return self._adapters[version.digest]

    def _ask(self, name: str, missing: Sequence[tuple[TaskRun, Path]], progress: Progress) -> dict[Path, Score]:
        """Generate the answers of all runs in one batch and score the options; each run's score and outputs are files before anything is returned.

        Raises EngineError when the engine could not answer a request: a failure of the machine is not a wrong answer, and must not be kept as one.
        """
        if self._base.decoder.classifies:
            return self._classify(name, missing, progress)
        options = {path: option_requests(run, self._base.tokenizer) for run, path in missing}
        requests = [request for run, _ in missing for request in requests_for(run)]
        engine = self._engine_for(requests, [item for items in options.values() for item in items])
        for key in {run.contestant.adapter for run, _ in missing} - {None}:
            engine.register(str(key), self._adapters[str(key)])
        completions = engine.generate(requests, progress=lambda stage, done, total: progress(f"evaluate {name}", done, total))
        broken = [completion for completion in completions if completion.finish_reason in BROKEN]
        if broken:
            raise EngineError(f"{len(broken)} of {len(completions)} requests of task {name!r} failed: {broken[0].error}", hint="run it again")
        scores = {}
        for run, path in missing:
            items = options[path]
            log_probs = engine.score(items, progress=lambda stage, done, total: progress(f"options {name}", done, total)) if items else []
            score, outputs = with_options(*score_completions(run, completions), run, log_probs)
            write_outputs(path.with_suffix(".outputs.jsonl"), outputs)
            write_score(path, score)
            self._record(score, path)
            scores[path] = score
        return scores

    def _classify(self, name: str, missing: Sequence[tuple[TaskRun, Path]], progress: Progress) -> dict[Path, Score]:
        """The same where the base is an encoder: each row's answer is the likeliest class of the contestant's own, and no option is scored apart."""
        from atoll.engine.request import Completion, ScoreRequest

        scores = {}
        for run, path in missing:
            key = run.contestant.adapter
            labels = tuple(self._adapters[key].manifest.get("labels") or ()) if key is not None else run.data.task.label_set or ()
            if not labels:
                raise DataError(f"{run.contestant.model} names no classes, so its answers have no names", hint="add labels to its manifest")
            classes = tuple((number,) for number in range(len(labels)))
            items = [ScoreRequest(prompt_ids=list(prompt), continuations=classes, adapter=key) for prompt in run.prompts]
            engine = self._engine_for([], items)
            if key is not None:
                engine.register(key, self._adapters[key])
            found = engine.score(items, progress=lambda stage, done, total: progress(f"evaluate {name}", done, total))
            best = [max(range(len(labels)), key=odds.__getitem__) for odds in found]
            completions = [
                Completion(f"{run.run_id}|{row}", key, len(prompt), (number,), labels[number], "stop")
                for row, (prompt, number) in enumerate(zip(run.prompts, best, strict=True))
            ]
            score, outputs = score_completions(run, completions)
            write_outputs(path.with_suffix(".outputs.jsonl"), outputs)
            write_score(path, score)
            self._record(score, path)
            scores[path] = score
        return scores

    def _engine_for(self, requests: Sequence[Request], items: Sequence[ScoreRequest]) -> Engine:
        """An engine whose rows are just long enough for the longest prompt with its answer or its longest option."""
        from atoll.engine.config import EngineConfig
        from atoll.engine.engine import Engine

        lengths = [len(request.prompt_ids) + (request.sampling.max_new_tokens or 0) for request in requests]
        lengths += [len(item.prompt_ids) + max(map(len, item.continuations)) for item in items]
        return Engine(self._base, EngineConfig(max_rows=self._settings.batch_size, max_row_tokens=max(lengths)))

    def _record(self, score: Score, path: Path) -> None:
        """Enter a new score into the hub's ledger."""
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
            details={"prompt_style": score.prompt_style, "model": score.model, "outputs": path.with_suffix(".outputs.jsonl").name},
        )

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


def _read_if_whole(path: Path) -> Score | None:
    """The score of an earlier run, or None where there is none that this version can read: it is measured again then."""
    try:
        return read_score(path) if path.is_file() else None
    except DataError:
        return None


def limits(generation: GenerationConfig, data: TaskData, tokenizer: Any) -> tuple[int, tuple[str, ...]]:
    """(max_new_tokens, stop): what the config says, else what fits the training answers."""
    max_new_tokens, stop = generation_limits(data, tokenizer)
    return generation.max_new_tokens or max_new_tokens, generation.stop or stop


def note_of(data: TaskData, scores: Sequence[Score], settings: EvalConfig, versions: Sequence[Version]) -> RowNote:
    """What the leaderboard's page says beside a row: the majority answer's score, the base's better prompt style, and how large the adapters are."""
    base = better_base([score for score in scores if score.kind == "base"])
    majority = majority_baseline(data, choose_examples(data, settings.test_rows))
    return RowNote(majority, base.prompt_style, sizes_of(versions))


def sizes_of(versions: Sequence[Version]) -> dict[str, Size]:
    """By digest, what the hub knows of versions' sizes."""
    return {version.digest: Size(version.num_parameters, version.size_bytes) for version in versions}
