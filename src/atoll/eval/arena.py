"""Measure a base, adapters of the hub and adapters in memory on tasks, and keep what was measured.

A score is a file named by the hash of everything that decided it (base, adapter, rows, prompts, limits, metric), so it is measured once, found
again, and never mistaken for another. All contestants of a task are asked in one continuous batch. Scores of the base and of versions are entered
into the hub's ledger too; those of entrants, which nobody can look up there, are files alone.

Used by workflows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

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
from atoll.train.cost import Cost

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.engine.request import Request, ScoreRequest
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entrant:
    """A contestant that is no version of the hub: an adapter in memory, or the base asked otherwise (adapter None), in each of its prompt styles.

    model: its name in scores. kind, digest: what it is, and the identity of its content. All are asked in the task's own prompts. data: the task with
    other prompts before the same answers, all test rows of which are asked; None for the task's own.
    """

    model: str
    kind: Kind
    digest: str
    adapter: Adapter | None = None
    data: TaskData | None = None


class _Asked(NamedTuple):
    """A run, where its score stands, and whether the hub's ledger takes it."""

    run: TaskRun
    path: Path
    recorded: bool


class Arena:
    """Measures versions of a hub against one base, and keeps every score in `folder`; with `record`, in the hub's ledger too."""

    def __init__(self, base: Base, hub: Hub, settings: EvalConfig, folder: Path, *, record: bool = True, ignore_quantization: bool = False) -> None:
        self._base, self._hub, self._settings, self._folder, self._record_all = base, hub, settings, folder, record
        self._ignore_quantization = ignore_quantization
        self._adapters: dict[str, Adapter] = {}
        self.warnings: list[str] = []

    def measure(
        self, data: TaskData, versions: Sequence[Version], generation: GenerationConfig, progress: Progress, *, entrants: Sequence[Entrant] = ()
    ) -> list[Score]:
        """Scores of the base in each prompt style, of every version and of every entrant, asked together; those on disk are read instead."""
        asked = self._asked(data, versions, entrants, generation)
        found = {path: _read_if_whole(path) for _, path, _ in asked}
        missing = [one for one in asked if found[one.path] is None]
        if missing:
            adapters = {version.digest: self._adapters[version.digest] for version in versions}
            adapters |= {entrant.digest: entrant.adapter for entrant in entrants if entrant.adapter is not None}
            found.update(self._ask(data.task.name, missing, adapters, progress))
        scores = []
        for run, path, _ in asked:
            score = found[path]
            assert score is not None
            scores.append(replace(score, model=run.contestant.model))  # a digest may have several names
            if score.prompts_cut:
                self.warnings.append(f"{data.task.name}: {score.prompts_cut} of {score.n} prompts lost their beginning to fit the base's context")
        return scores

    def _asked(self, data: TaskData, versions: Sequence[Version], entrants: Sequence[Entrant], generation: GenerationConfig) -> list[_Asked]:
        base, settings = self._base, self._settings
        max_new_tokens, stop = limits(generation, data, base.tokenizer)
        common: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "num_rows": settings.test_rows,
            "context_length": base.context_length,
            "max_options": settings.max_options if settings.option_scoring else 0,
        }
        contestant = Contestant(base.title, "base", base.fingerprint.digest)
        styles = [style for style in prompt_styles(data.task, base.tokenizer) if settings.chat_base or style == "plain" or data.task.chat]
        runs = [(plan_run(data, contestant, base.tokenizer, style=style, **common), True) for style in styles]
        for version in versions:
            adapter = self._adapter(version)
            own = adapter.manifest.get("prompt")
            form = PromptFormat.from_json(own) if own else None
            contestant = Contestant(version.ref, cast(Kind, version.kind), version.digest, adapter=version.digest)  # the hub's kinds are all ours
            runs.append((plan_run(data, contestant, base.tokenizer, prompt_format=form, **common), True))
        for entrant in entrants:
            key = None if entrant.adapter is None else entrant.digest
            contestant = Contestant(entrant.model, entrant.kind, entrant.digest, adapter=key)
            own_rows = {} if entrant.data is None else {"num_rows": None}
            for style in styles if key is None else styles[:1]:
                run = plan_run(entrant.data or data, contestant, base.tokenizer, style=style, **{**common, **own_rows})
                runs.append((run, False))
        return [_Asked(run, self._score_path(run), recorded) for run, recorded in runs]

    def _adapter(self, version: Version) -> Adapter:
        """The version's adapter, read once, and checked against the base."""
        if version.digest not in self._adapters:
            from atoll.model.base import tensor_shapes

            base = self._base
            found = self._hub.check_base(
                version.ref, base.fingerprint.to_json(), tensor_shapes(base.path), ignore_quantization=self._ignore_quantization
            )
            if found.kind == "refused":
                hint = found.hint("evaluate it on the base it was trained on")
                raise BaseMismatch(f"{version.ref} does not fit {base.title}: {found.reason}", hint=hint)
            if found.kind == "compatible":
                self.warnings.append(f"{version.ref} fits {base.title} in shape, but is not known to have been trained on it: {found.reason}")
            self._adapters[version.digest] = read_adapter(self._hub.path(version))
        return self._adapters[version.digest]

    def _ask(self, name: str, missing: Sequence[_Asked], adapters: Mapping[str, Adapter], progress: Progress) -> dict[Path, Score]:
        """Generate the answers of all runs in one batch and score the options; each run's score and outputs are files before anything is returned.

        Raises EngineError when the engine could not answer a request: a failure of the machine is not a wrong answer, and must not be kept as one.
        """
        if self._base.decoder.classifies:
            return self._classify(name, missing, adapters, progress)
        options = {path: option_requests(run, self._base.tokenizer) for run, path, _ in missing}
        requests = [request for run, _, _ in missing for request in requests_for(run)]
        used = {key: adapters[key] for key in dict.fromkeys(run.contestant.adapter for run, _, _ in missing) if key is not None}
        engine = self._engine_for(requests, [item for items in options.values() for item in items], list(used.values()))
        for key, adapter in used.items():
            engine.register(key, adapter)
        completions = engine.generate(requests, progress=lambda stage, done, total: progress(f"evaluate {name}", done, total))
        broken = [completion for completion in completions if completion.finish_reason in BROKEN]
        if broken:
            raise EngineError(f"{len(broken)} of {len(completions)} requests of task {name!r} failed: {broken[0].error}", hint="run it again")
        scores = {}
        for run, path, recorded in missing:
            items = options[path]
            log_probs = engine.score(items, progress=lambda stage, done, total: progress(f"options {name}", done, total)) if items else []
            score, outputs = with_options(*score_completions(run, completions), run, log_probs)
            write_outputs(path.with_suffix(".outputs.jsonl"), outputs)
            write_score(path, score)
            if recorded and self._record_all:
                self._record(score, path)
            scores[path] = score
        return scores

    def _classify(self, name: str, missing: Sequence[_Asked], adapters: Mapping[str, Adapter], progress: Progress) -> dict[Path, Score]:
        """The same where the base is an encoder: each row's answer is the likeliest class of the contestant's own, and no option is scored apart."""
        from atoll.engine.request import Completion, ScoreRequest

        scores = {}
        for run, path, recorded in missing:
            key = run.contestant.adapter
            labels = tuple(adapters[key].manifest.get("labels") or ()) if key is not None else run.data.task.label_set or ()
            if not labels:
                raise DataError(f"{run.contestant.model} names no classes, so its answers have no names", hint="add labels to its manifest")
            classes = tuple((number,) for number in range(len(labels)))
            items = [ScoreRequest(prompt_ids=list(prompt), continuations=classes, adapter=key) for prompt in run.prompts]
            engine = self._engine_for([], items, [adapters[key]] if key is not None else [])
            if key is not None:
                engine.register(key, adapters[key])
            found = engine.score(items, progress=lambda stage, done, total: progress(f"evaluate {name}", done, total))
            best = [max(range(len(labels)), key=odds.__getitem__) for odds in found]
            completions = [
                Completion(f"{run.run_id}|{row}", key, len(prompt), (number,), labels[number], "stop")
                for row, (prompt, number) in enumerate(zip(run.prompts, best, strict=True))
            ]
            score, outputs = score_completions(run, completions)
            write_outputs(path.with_suffix(".outputs.jsonl"), outputs)
            write_score(path, score)
            if recorded and self._record_all:
                self._record(score, path)
            scores[path] = score
        return scores

    def _engine_for(self, requests: Sequence[Request], items: Sequence[ScoreRequest], adapters: Sequence[Adapter]) -> Engine:
        """An engine with rows just long enough for the longest prompt with its answer or option, and room for the largest adapter."""
        from atoll.engine.config import EngineConfig
        from atoll.engine.engine import Engine

        lengths = [len(request.prompt_ids) + (request.sampling.max_new_tokens or 0) for request in requests]
        lengths += [len(item.prompt_ids) + max(map(len, item.continuations)) for item in items]
        shape = self._base.decoder.shape
        rank = sum(d_out + d_in for d_out, d_in in shape.linears.values()) * shape.num_layers * self._base.dtype.itemsize
        largest = max((2 * adapter.max_rank * rank for adapter in adapters), default=0)  # the engine pads ranks to powers of two
        usual = EngineConfig.model_fields["adapter_bytes"].default
        return Engine(self._base, EngineConfig(max_rows=self._settings.batch_size, max_row_tokens=max(lengths), adapter_bytes=max(usual, largest)))

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


def note_of(data: TaskData, scores: Sequence[Score], settings: EvalConfig, versions: Sequence[Version], hub: Hub) -> RowNote:
    """What the leaderboard's page says beside a row: the majority answer's score, the base's better style, the adapters' sizes and costs."""
    base = better_base([score for score in scores if score.kind == "base"])
    majority = majority_baseline(data, choose_examples(data, settings.test_rows))
    return RowNote(majority, base.prompt_style, sizes_of(versions), costs_of(hub, [version.digest for version in versions]))


def sizes_of(versions: Sequence[Version]) -> dict[str, Size]:
    """By digest, what the hub knows of versions' sizes."""
    return {version.digest: Size(version.num_parameters, version.size_bytes) for version in versions}


def costs_of(hub: Hub, digests: Iterable[str]) -> dict[str, Cost]:
    """By digest, what the newest finished run cost that made it; digests of which the hub knows none are left out."""
    found = {}
    for digest in dict.fromkeys(digests):
        costs = [run.cost for run in hub.runs(digest=digest, status="finished") if run.cost is not None]
        if costs:
            found[digest] = Cost.from_json(costs[0])
    return found
