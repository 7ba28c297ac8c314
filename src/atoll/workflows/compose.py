"""Compose: from the hub's adapters and a few examples of a new task, one new adapter, published, with a report of what it is worth.

    plan ─► rank and search, once a seed ─► choose a seed ─► controls ─► adapter and report ─► hub

The adapter's folder takes its name in one rename, before the controls and with their figures after them, and only then the result is marked as done:
whatever stops the work, there is a whole adapter of before or of now, or none. The same command goes on with the controls' finished folds and scores,
and publishes a result that could not be published.

Used by the command line, the server's worker and the library.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.compose.controls import COMPOSED
from atoll.compose.pool import FAR, Pool
from atoll.config_compose import ComposeConfig
from atoll.config_cost import CostConfig
from atoll.config_quantization import QuantizationConfig
from atoll.data.task import TaskData
from atoll.errors import AtollError, StorageError
from atoll.files import write_file
from atoll.hub.names import name_key
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.train.cost import Cost, Meter, Used
from atoll.train.interrupt import interruptible
from atoll.workflows.compose_clock import Clock
from atoll.workflows.compose_controls import Measured, held_out_losses, test_scores
from atoll.workflows.compose_instead import TRAIN_FILE, training_file
from atoll.workflows.compose_lines import report_of
from atoll.workflows.compose_plan import ComposePlan, plan_composition
from atoll.workflows.compose_report import Report, counted
from atoll.workflows.compose_search import Searched, adapter_of, chosen, controls_of, search_all
from atoll.workflows.runs import recorded_run
from atoll.workflows.start import Progress, locked, open_hub, silent
from atoll.workflows.training import RESULT_FILE

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.base import Base

REPORT_FILE = "report.json"
FOLDS_FILE = "held_out.json"  # finished folds of the controls, for a run that goes on with them


@dataclass(frozen=True)
class Part:
    """One adapter of a composition, and its weight; layer_weights where each layer has its own, of which weight is the mean."""

    name: str
    digest: str | None
    weight: float
    layer_weights: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        layers = {} if self.layer_weights is None else {"layer_weights": list(self.layer_weights)}
        return {"name": self.name, "digest": self.digest, "weight": self.weight, **layers}


@dataclass(frozen=True)
class ComposeOutcome:
    """A composed adapter: its folder, its version in the hub (None if not published), what it was made of, and the report.

    reused: found finished, not made now. warnings: sentences that the user should see. score: its own on the test rows, where it was measured now, in
    the words of Hub.record_score.
    """

    version: Version | None
    adapter_folder: Path
    weights: tuple[Part, ...]
    report: Report
    warnings: tuple[str, ...] = ()
    reused: bool = False
    score: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The outcome as one JSON object."""
        return {
            "version": None if self.version is None else self.version.to_json(),
            "adapter_folder": str(self.adapter_folder),
            "weights": [part.to_json() for part in self.weights],
            "reused": self.reused,
            "warnings": list(self.warnings),
            "report": self.report.to_json(),
        }


def compose_and_publish(
    config: ComposeConfig,
    *,
    root: Path | None = None,
    out: Path | None = None,
    hub: Hub | None = None,
    publish: bool = True,
    base: Base | None = None,
    data: TaskData | None = None,
    progress: Progress = silent,
    stop_asked: Callable[[], bool] | None = None,
) -> ComposeOutcome:
    """Compose one adapter of the hub's for the examples of `config.data`, into `out` (default: runs/compose/<name>), and publish it under its name.

    root: the folder that the config's relative paths start at. base, data: used instead of what the config names. The first Ctrl-C, or stop_asked()
    once true, ends the search and keeps the best so far; during the controls it leaves out the rest of them. The same inputs in the same folder are
    found again.

    Raises Interrupted where it is stopped before a first search has begun, Busy, and what plan_composition, rank, search and publishing raise.
    """
    hub, clock, asked = hub or open_hub(), Clock(), stop_asked or _never
    used, rates = Used(), CostConfig().rates()
    with clock.part("reading"):
        plan = plan_composition(config, hub, root=root, base=base, data=data, progress=progress)
    folder = out or Path("runs") / "compose" / plan.name
    with locked(folder):
        done = _finished(folder, plan, hub if publish else None)
        if done is not None:
            return done
        with recorded_run(hub if publish else None, "compose", plan.name, config.model_dump(mode="json"), folder) as record:
            with Meter().round([used]):
                outcome = _composed(plan, hub, folder, publish, clock, progress, asked)
            spent = {"seconds": clock.total, "cost": Cost.of(None, used, rates).to_json()}
            record.update(**spent, digest=outcome.version.digest if outcome.version else None)
        if config.data.is_given:
            write_file(folder / TRAIN_FILE, training_file(plan, root))
        _mark(folder, plan, outcome, spent)
    return outcome


def _never() -> bool:
    return False


def _composed(
    plan: ComposePlan, hub: Hub, folder: Path, publish: bool, clock: Clock, progress: Progress, stop_asked: Callable[[], bool]
) -> ComposeOutcome:
    with interruptible() as interrupted:
        searched = search_all(plan, clock, progress, lambda: interrupted() or stop_asked())
    best = chosen(searched)
    pool = controls_of(plan, best).pool()
    composed = adapter_of(plan, pool, best.found, best.draw.few)
    measured = Measured()

    def with_report(stopped: str) -> tuple[Adapter, Report]:
        report = report_of(plan, searched, best, pool, composed, measured, clock, stopped)
        return replace(composed, manifest=_manifest(plan, composed, report)), report

    with interruptible() as interrupted:

        def asked() -> bool:
            return interrupted() or stop_asked()

        if plan.config.controls or plan.data.test:  # which may take longer than the search: whatever ends them, what was found is there
            _write(folder, *with_report("it ended during the controls, which are left out"))
        if plan.config.controls:
            held_out_losses(plan, best, folder / FOLDS_FILE, measured, clock, progress, asked)
        if plan.data.test and not measured.stopped:
            test_scores(plan, searched, hub, folder / "scores", measured, clock, progress, asked, record=publish)
    adapter, report = with_report(_stopped(plan, searched, measured))
    warnings = (*plan.warnings, *best.ranking.left_out, *dict.fromkeys(measured.warnings), *_far(pool), *_squeezed(plan, adapter), *_empty(adapter))
    warnings += _beside(hub, plan.name) if publish else ()
    _write(folder, adapter, report)
    if not measured.stopped:
        (folder / FOLDS_FILE).unlink(missing_ok=True)
    outcome = ComposeOutcome(None, folder / "adapter", _parts(adapter.manifest), report, warnings, score=_score(searched.index(best), measured))
    _mark(folder, plan, outcome, {})
    if publish:
        outcome = replace(outcome, version=hub.publish(folder / "adapter", plan.name, message=_message(adapter.manifest)))
        assert outcome.version is not None
        if outcome.score is not None:
            record_score(hub, outcome.version, outcome.score)
    return outcome


def _mark(folder: Path, plan: ComposePlan, outcome: ComposeOutcome, spent: Mapping[str, Any]) -> None:
    """Say that the folder holds the plan's result: with its score and what it took, for a hub that it is published to later."""
    done = {"job": plan.digest, "complete": not outcome.report.stopped, "warnings": list(outcome.warnings), "score": outcome.score, **spent}
    write_file(folder / RESULT_FILE, json.dumps(done, indent=2) + "\n")


def _stopped(plan: ComposePlan, searched: list[Searched], measured: Measured) -> str:
    """What a stop left out, in a sentence; "" where nothing was."""
    said = []
    if searched[-1].was_stopped:
        said.append("the search was stopped, and its best so far is kept")
    if len(searched) < len(plan.draws):
        said.append(f"{len(searched)} of {len(plan.draws)} seeds were done")
    if measured.stopped:
        said.append("the controls were stopped, and those that were not finished are left out")
    return "; ".join(said)


def _beside(hub: Hub, name: str) -> tuple[str, ...]:
    """A sentence where the name is that of an adapter which was trained: its users get the composition from now on."""
    named = [version for version in hub.list(name, all_versions=True) if name_key(version.name) == name_key(name) and not version.yanked]
    newest = max(named, key=lambda version: version.number, default=None)
    if newest is None or newest.kind == "composed":
        return ()
    return (f"{newest.ref} is an adapter of kind {newest.kind}: the composition becomes the newest version of {newest.name}, and {newest.ref} stays",)


def _far(pool: Pool) -> list[str]:
    """A sentence where one adapter is far larger than the others."""
    far = sorted(((reach * FAR, name) for name, reach in zip(pool.names, pool.reach, strict=True) if reach > 1), reverse=True)
    if not far:
        return []
    most, name = far[0]
    others = f" (and {counted(len(far) - 1, 'more adapter')} more than {FAR:g} times)" if len(far) > 1 else ""
    return [f"the update of {name} is {most:.3g} times as large as the median of those composed{others}: check its alpha; exclude it if it is broken"]


def _squeezed(plan: ComposePlan, adapter: Adapter) -> list[str]:
    """A sentence where the result was compressed though nobody asked for it."""
    kept = adapter.manifest["composition"]["energy_kept"]
    if plan.config.compose.rank is not None or kept >= 1:
        return []
    return [f"the ranks add up to more than {adapter.max_rank}, which a file can hold: compressed to that, keeping {kept:.2%} of the updates' energy"]


def _empty(adapter: Adapter) -> list[str]:
    """A sentence where the search has found that no adapter helps."""
    if any(weight for part in _parts(adapter.manifest) for weight in (part.layer_weights or (part.weight,))):
        return []
    return ["all weights that were found are 0: the result answers as the base does, so there is nothing to gain from it"]


def _message(manifest: Mapping[str, Any]) -> str:
    """What the hub says is new in the version."""
    return f"composed of {counted(len(manifest['parents']), 'adapter')} for {manifest['task']}"


def _manifest(plan: ComposePlan, adapter: Adapter, report: Report) -> dict[str, Any]:
    """What composing wrote, and what an adapter of the hub says of itself beside it."""
    task, made = plan.data.task, adapter.manifest
    figures = report.figures()
    return {
        **made,
        "name": plan.name,
        "description": plan.config.description or task.title or f"composed for {task.name} from {counted(report.examples, 'example')}",
        "task": task.name,
        "base": plan.base.describe(),
        "prompt": plan.prompt.to_json(),
        "quantization": QuantizationConfig.named(rounded).record() if (rounded := plan.base.fingerprint.quantization) else None,
        "training": None,
        "composition": {**made["composition"], "num_examples": report.examples, **({"controls": figures} if figures else {})},
        **({"labels": list(task.label_set)} if task.label_set else {}),
    }


def _write(folder: Path, adapter: Adapter, report: Report) -> None:
    """The adapter's folder in one rename, then the report. What is there of before is no longer marked as done."""
    target, passing = folder / "adapter", folder / ".adapter"
    (folder / RESULT_FILE).unlink(missing_ok=True)
    try:
        shutil.rmtree(passing, ignore_errors=True)
        write_adapter(passing, adapter)
        if target.exists():
            shutil.rmtree(target)
        passing.rename(target)
    except OSError as error:
        raise StorageError(f"{target} could not be written: {error.strerror or error}", hint="free some space or check permissions") from error
    write_file(folder / REPORT_FILE, json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def record_score(hub: Hub, version: Version, score: Mapping[str, Any]) -> None:
    """The published seed's own score (`ComposeOutcome.score`), into the hub's ledger."""
    hub.record_score(version.digest, **{**score, "details": {**score["details"], "model": version.ref}})


def _score(place: int, measured: Measured) -> dict[str, Any] | None:
    """What the ledger keeps of the score of the seed that was chosen; None where it was not measured."""
    scores = measured.scores.get(COMPOSED, [])
    if place >= len(scores):
        return None
    kept = ("task", "task_version", "metric", "value", "stderr", "n", "failures", "options_value")
    return {**{name: getattr(scores[place], name) for name in kept}, "details": {"prompt_style": scores[place].prompt_style}}


def _parts(manifest: Mapping[str, Any]) -> tuple[Part, ...]:
    return tuple(
        Part(parent["name"], parent["digest"], parent["weight"], tuple(parent["layer_weights"]) if "layer_weights" in parent else None)
        for parent in manifest["parents"]
    )


def _finished(folder: Path, plan: ComposePlan, hub: Hub | None) -> ComposeOutcome | None:
    """The outcome of an earlier composition of the same inputs in `folder`, if it was not stopped and is still whole."""
    target = folder / "adapter"
    try:
        written = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if written["job"] != plan.digest or not written["complete"]:
            return None
        report = Report.from_json(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
        manifest = read_adapter(target).manifest
        parts, warnings, score = _parts(manifest), tuple(written["warnings"]), written.get("score")
    except (OSError, ValueError, KeyError, AtollError):  # none, or damaged: it is made anew
        return None
    version = _publish_later(hub, plan, folder, manifest, score, written) if hub is not None else None
    return ComposeOutcome(version, target, parts, report, warnings, reused=True)


def _publish_later(hub: Hub, plan: ComposePlan, folder: Path, manifest: Mapping[str, Any], score: Any, written: Mapping[str, Any]) -> Version:
    """Publish a result that was found, with the score and the run that the hub has not heard of. The same content is the same version."""
    version = hub.publish(folder / "adapter", plan.name, message=_message(manifest))
    if score is not None and not hub.scores(version.digest, task=score["task"], task_version=score["task_version"]):
        record_score(hub, version, score)
    if not hub.runs(digest=version.digest, kind="compose"):
        with recorded_run(hub, "compose", plan.name, plan.config.model_dump(mode="json"), folder) as record:
            record.update({key: written[key] for key in ("seconds", "cost") if key in written}, digest=version.digest)
    return version
