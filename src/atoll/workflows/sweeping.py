"""A sweep: train every point of it over one base in memory, say which was best, and publish that under the sweep's own name.

Each training has a folder of its values' name and its job's digest, so that a sweep that was stopped goes on, and one with more values trains only
those. Best is by validation loss, or by the task's metric on the validation rows: test rows choose nothing. Where the trainings were measured on
different things, nothing is best.

Used by the command line and the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import EvalConfig
from atoll.config_sweep import BestBy, LoadedSweep
from atoll.data.task import TaskData, load_task
from atoll.errors import AtollError, ConfigError, Interrupted
from atoll.files import write_file
from atoll.workflows.bases import Bases
from atoll.workflows.many import Table, run_plans_in
from atoll.workflows.start import Progress, locked, open_hub, require, silent
from atoll.workflows.training import TrainOutcome, make_plan

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.train.plan import TrainingPlan

RESULT_FILE = "sweep.json"
_METRIC_SETTINGS = EvalConfig(option_scoring=False, chat_base=False)


@dataclass(frozen=True)
class SweepLine:
    """One training of a sweep. best_loss: its lowest validation loss; score: the task's metric on the validation rows, where that was asked for.

    error: why there is none of this; cancelled: because somebody asked for its end.
    """

    name: str
    values: Mapping[str, Any]
    steps: int | None = None
    train_loss: float | None = None
    best_loss: float | None = None
    score: float | None = None
    cost: Mapping[str, Any] | None = None
    adapter: str | None = None
    folder: str | None = None
    reused: bool = False
    error: str | None = None
    cancelled: bool = False


@dataclass(frozen=True)
class SweepOutcome:
    """The lines of a sweep, best first (in the file's order where nothing is best) and failed ones last.

    best: the name of the best, None where nothing tells; version: as it was published.
    """

    name: str
    keys: tuple[str, ...]
    best_by: str
    lines: tuple[SweepLine, ...]
    best: str | None
    version: Version | None
    path: Path
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of sweep.json."""
        lines = [{**asdict(line), "values": dict(line.values)} for line in self.lines]
        published = self.version.ref if self.version is not None else None
        return {"name": self.name, "keys": list(self.keys), "best_by": self.best_by, "best": self.best, "published": published, "trainings": lines}


def plan_sweep(loaded: LoadedSweep, *, progress: Progress = silent) -> list[TrainingPlan]:
    """Every training of the sweep, planned over shared bases and data. Raises what loading raises; nothing is written."""
    bases, tasks, plans = Bases(progress), dict[str, TaskData](), list[Any]()
    for point in loaded.points:
        config = point.loaded.config
        key = config.require_data().model_dump_json()
        if key not in tasks:
            tasks[key] = load_task(config.data, name=loaded.name, root=loaded.root)
        plans.append(make_plan(config, base=bases.of(config), data=tasks[key], progress=progress))
    return plans


def why_incomparable(plans: Sequence[TrainingPlan], best_by: BestBy) -> str:
    """Why no training of a sweep can be best by its figure, in a sentence; "" where one can.

    A validation loss is a mean over label tokens: of another base, other texts or other tokens it is another quantity. A metric is over answers to
    rows, whatever base or prompt they come from.
    """
    differing = _measured_apart(plans, best_by)
    if not differing or not any(plan.validation.rows for plan in plans):  # without validation rows there is nothing to compare at all
        return ""
    figures, way_out = ("scores", "") if best_by == "metric" else ("validation losses", "; best_by: metric compares answers to the same rows")
    if any(plan.masking is not None for plan in plans) or _measured_apart(plans, "metric"):
        way_out = ""
    return f"no training is named best: {figures} cannot be compared where {' and '.join(differing)} differ{way_out}"


def _measured_apart(plans: Sequence[TrainingPlan], best_by: BestBy) -> list[str]:
    """What the figures of some plans are of that is not the same in all of them."""
    rows = [plan.validation.rows for plan in plans]
    of_loss: dict[str, Sequence[Any]] = {
        "the bases": [plan.base.fingerprint.digest for plan in plans],
        "the validation rows' texts": [[row.token_ids for row in each] for each in rows],
        "the tokens that count": [[row.num_labels for row in each] for each in rows],
        "the classes": [plan.labels for plan in plans],
        "the hidden tokens": [plan.masking and (plan.masking.probability, plan.masking.seed) for plan in plans],
    }
    of_metric: dict[str, Sequence[Any]] = {
        "the validation rows": [[example.row for example in plan.data.validation] for plan in plans],
        "the answers": [[example.row[plan.data.task.target] for example in plan.data.validation] for plan in plans],
        "the metrics": [(plan.data.task.metric, plan.data.task.match) for plan in plans],
    }
    parts = of_metric if best_by == "metric" else of_loss
    differing = [what for what, each in parts.items() if any(one != each[0] for one in each)]
    return [what for what in differing if what != "the tokens that count" or "the validation rows' texts" not in differing]


def sweep(
    loaded: LoadedSweep,
    *,
    out: Path | None = None,
    hub: Hub | None = None,
    publish: bool = True,
    at_once: int | None = None,
    progress: Progress = silent,
    table: Table | None = None,
) -> SweepOutcome:
    """Train every point into `out` (default: runs/<name>), at most `at_once` together, and write sweep.json there.

    With publish, every adapter is published under its own name and the best, if one can be told (why_incomparable), under the sweep's. A training
    that fails is a line with an error.
    Raises Interrupted on Ctrl-C (run again, what is done is found), ConfigError where best_by: metric is asked for without publishing.
    """
    by_metric = loaded.best_by == "metric"
    if by_metric:
        require("scipy", "rouge_score")
        if not publish:
            raise ConfigError("best_by: metric measures published adapters, and --no-publish asks for none", hint="use best_by: validation_loss")
    plans = plan_sweep(loaded, progress=progress)
    if by_metric and not all(plan.data.validation for plan in plans):
        raise ConfigError("best_by: metric needs validation rows, and there are none", hint="give data.validation, or a share in data.ratios")
    if by_metric and any(plan.masking is not None for plan in plans):
        raise ConfigError("best_by: metric needs answers to score, and mlm_probability trains on hidden tokens", hint="use best_by: validation_loss")
    folder = out or Path("runs") / loaded.name
    hub = hub or open_hub() if publish else None
    with locked(folder):
        folders = [folder / point.name / plan.digest[:12] for point, plan in zip(loaded.points, plans, strict=True)]
        outcomes = run_plans_in(list(zip(folders, plans, strict=True)), hub, at_once=at_once, progress=progress, table=table)
        scores = _scores(plans, outcomes, hub, folder, progress) if by_metric and hub is not None else {}
        doubt = why_incomparable(plans, loaded.best_by)
        figures: tuple[str, ...] = () if doubt else ("score",) if by_metric else ("best_loss",)
        if by_metric and figures and not _measured_apart(plans, "validation_loss"):
            figures += ("best_loss",)  # tells equal scores apart
        lines = _ranked(
            [
                _line(point.name, point.values, place, outcome, scores.get(index))
                for index, (point, place, outcome) in enumerate(zip(loaded.points, folders, outcomes, strict=True))
            ],
            figures,
        )
        best = lines[0] if figures and getattr(lines[0], figures[0]) is not None else None
        version = None
        if best is not None and hub is not None:
            assert best.folder is not None
            version = hub.publish(Path(best.folder) / "adapter", loaded.name, message=f"best of {len(lines)} by {loaded.best_by}: {best.name}")
        warnings = (*loaded.warnings, *dict.fromkeys(warning for plan in plans for warning in plan.warnings))
        if doubt:
            warnings += (doubt,)
        elif best is None and any(line.error is None for line in lines):
            warnings += ("there are no validation rows, so nothing says which training was best",)
        name = best.name if best is not None else None
        outcome = SweepOutcome(loaded.name, loaded.keys, loaded.best_by, tuple(lines), name, version, folder / RESULT_FILE, warnings)
        write_file(outcome.path, json.dumps(outcome.to_json(), indent=2, ensure_ascii=False) + "\n")
        return outcome


def _line(name: str, values: Mapping[str, Any], folder: Path, outcome: TrainOutcome | AtollError, score: float | None) -> SweepLine:
    if isinstance(outcome, AtollError):
        return SweepLine(name, values, folder=str(folder), error=outcome.message, cancelled=isinstance(outcome, Interrupted))
    training = outcome.training
    best = min((loss for _, loss in training["validation_losses"]), default=None)
    return SweepLine(
        name,
        values,
        training["steps"],
        training["train_loss"],
        best,
        score,
        outcome.cost.to_json() if outcome.cost is not None else None,
        outcome.version.ref if outcome.version is not None else None,
        str(folder),
        outcome.reused,
    )


def _ranked(lines: Sequence[SweepLine], figures: Sequence[str]) -> list[SweepLine]:
    """Best first by the first of `figures` (fields of SweepLine), then by the next; all metrics are better when higher, losses when lower."""

    def place(line: SweepLine, name: str) -> tuple[bool, float]:
        figure = getattr(line, name)
        return figure is None, 0.0 if figure is None else -figure if name == "score" else figure

    return sorted(lines, key=lambda line: (line.error is not None, *(place(line, name) for name in figures)))


def _scores(
    plans: Sequence[TrainingPlan], outcomes: Sequence[TrainOutcome | AtollError], hub: Hub, folder: Path, progress: Progress
) -> dict[int, float]:
    """By number, the task's metric of each trained adapter on the validation rows. They are not recorded as scores: those are of test rows."""
    from atoll.eval.arena import Arena

    found: dict[int, float] = {}
    arenas: dict[int, Arena] = {}
    for index, (plan, outcome) in enumerate(zip(plans, outcomes, strict=True)):
        if isinstance(outcome, AtollError) or outcome.version is None:
            continue
        arena = arenas.setdefault(id(plan.base), Arena(plan.base, hub, _METRIC_SETTINGS, folder / "scores", record=False))
        try:
            measured = arena.measure(replace(plan.data, test=plan.data.validation), [outcome.version], plan.config.generation, progress)
        except KeyboardInterrupt:
            raise Interrupted("stopped while the trainings were measured", hint="run the same command again to go on from there") from None
        found[index] = next(score.value for score in measured if score.digest == outcome.version.digest)
    return found
