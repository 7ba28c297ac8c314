"""Train one adapter and publish it: plan, run or resume, write, publish, record.

Used by many.py for each of its jobs, the command line and the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import TrainConfig
from atoll.data.prompt import PromptFormat, encode_prompt
from atoll.data.task import TaskData, load_task
from atoll.errors import TrainingError
from atoll.eval.arena import limits
from atoll.files import write_file
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.train.cost import Cost
from atoll.train.loggers import check_installed
from atoll.workflows.cancelling import announced, is_cancelled
from atoll.workflows.runs import recorded_run
from atoll.workflows.start import Progress, locked, open_hub, silent

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base
    from atoll.train.job import TrainingJob, TrainResult
    from atoll.train.plan import TrainingPlan
    from atoll.train.team import Team

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainOutcome:
    """A trained adapter: its folder, its version in the hub (None if not published), its training record.

    reused: found finished, not trained now. warnings: sentences that the user should see. cost: None for one from before costs were recorded.
    """

    adapter_folder: Path
    version: Version | None
    training: Mapping[str, Any]
    reused: bool = False
    warnings: tuple[str, ...] = ()
    cost: Cost | None = None


def make_plan(
    config: TrainConfig,
    *,
    root: Path | None = None,
    base: Base | None = None,
    data: TaskData | None = None,
    team: Team | None = None,
    progress: Progress = silent,
) -> TrainingPlan:
    """Load data and base (those not given) and fix everything that decides the training's result. team: the processes that will train it together.

    Nothing is written.
    """
    from atoll.model.base import load_base
    from atoll.train.plan import plan_training

    config.cost.rates()  # one that cannot be read is found now, not when there is something to record
    check_installed(config.trainer.log_to)
    data = data or load_task(config.require_data(), name=config.name, root=root)
    trainer = config.trainer
    if base is None:
        device, share = (trainer.device, None) if team is None else (team.device(trainer.device), team.base_share if trainer.fsdp else None)
        base = load_base(config.base, dtype=trainer.dtype, device=device, quantization=config.quantization, share=share, progress=progress)
    return plan_training(config, base, data, stop=limits(config.generation, data, base.tokenizer)[1])


def train_and_publish(
    config: TrainConfig,
    *,
    root: Path | None = None,
    out: Path | None = None,
    hub: Hub | None = None,
    publish: bool = True,
    progress: Progress = silent,
) -> TrainOutcome:
    """Train one adapter into `out` (default: runs/<name>) and publish it under its name.

    root: the folder that the config's relative paths start at. Goes on from a checkpoint of the same job in `out`. Raises what loading, training and
    publishing raise, see errors.py.

    Where torchrun has started several processes, they train it together (train.team), and all return the outcome; the first alone tells progress,
    writes and publishes.
    """
    from atoll.train.team import launched_team

    with launched_team() as team, ExitStack() as stack:
        told = progress if team.is_first else silent
        plan = team.together(lambda: make_plan(config, root=root, team=team, progress=told))
        team.agree(plan.digest)
        folder = out or Path("runs") / plan_name(plan)
        opened: list[Hub] = []

        def begin() -> None:
            stack.enter_context(locked(folder))
            opened.extend([hub or open_hub()] if publish else ())

        team.from_first(begin)
        return run_plan_in(folder, plan, opened[0] if opened else None, progress=told, team=team)


def run_plan_in(folder: Path, plan: TrainingPlan, hub: Hub | None, *, progress: Progress = silent, team: Team | None = None) -> TrainOutcome:
    """Carry out a plan in `folder` and publish to `hub` (None: write the adapter folder only). A finished run of the same job is found and kept.

    team: the processes that do so together; the first alone has a hub.
    """
    from atoll.train.loop import train
    from atoll.train.plan import training_job, with_manifest
    from atoll.train.team import ALONE

    team = team or ALONE
    done = team.from_first(lambda: finished(folder, plan, hub))
    if done is not None:
        return done
    name = plan_name(plan)

    def report(headline: str, step: int, total: int) -> None:
        progress(f"train {name}: {headline}", step, total)

    with recorded_run(hub, "train", name, plan.config.model_dump(mode="json"), folder) as record, ExitStack() as stack:
        if team.is_first:
            stack.enter_context(announced(folder, name))
        job = training_job(plan, folder, team)
        try:
            result = train(job, report, lambda: team.is_first and is_cancelled(folder))
        finally:
            record.update(reached(plan, job))
        return team.from_first(lambda: keep(folder, plan, with_manifest(plan, result), hub, record))


def keep(folder: Path, plan: TrainingPlan, result: TrainResult, hub: Hub | None, record: dict[str, Any]) -> TrainOutcome:
    """Write what a plan's job ended with to `folder`, publish it, and add what belongs into the hub's record of the run."""
    from atoll.train.checkpoint import FILE as CHECKPOINT

    target, name = folder / "adapter", plan_name(plan)
    write_adapter(target, result.adapter)
    version = hub.publish(target, name, message=f"trained {result.progress.step} steps on {plan.data.task.name}") if hub else None
    digest = version.digest if version else None
    record.update(digest=digest)
    cost = Cost.of(result.progress.tokens, result.progress, plan.config.cost.rates())
    write_file(folder / RESULT_FILE, (json.dumps({"job": plan.digest, "digest": digest, "cost": cost.to_json()}, indent=2) + "\n").encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)  # the adapter is safe, and a checkpoint is four times its size
    training = {**result.adapter.manifest["training"], "seconds": round(result.progress.seconds, 1)}
    return TrainOutcome(target, version, training, warnings=plan.warnings, cost=cost)


def reached(plan: TrainingPlan, job: TrainingJob) -> dict[str, Any]:
    """How far a job is and what it has cost, for the hub's record of its run; a job that went on from a checkpoint counts from its start."""
    progress = job.progress
    keys = ("step", "train_loss", "best_loss", "best_step", "stopped_early")
    return {
        "seconds": progress.seconds,
        "cost": Cost.of(progress.tokens, progress, plan.config.cost.rates()).to_json(),
        "progress": {**{key: getattr(progress, key) for key in keys}, "total_steps": job.total_steps},
    }


def finished(folder: Path, plan: TrainingPlan, hub: Hub | None) -> TrainOutcome | None:
    """The outcome of an earlier run of this very job in `folder`, if its adapter is still where it was put."""
    path = folder / RESULT_FILE
    if not path.is_file() or not (folder / "adapter").is_dir():
        return None
    try:
        written = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:  # whose it is cannot be told, and its checkpoint is gone: nothing is trained over it
        raise TrainingError(
            f"{path} is damaged: expected the JSON object that a finished run leaves",
            hint="choose another --out folder, or delete this one to train again",
        ) from error
    if written.get("job") != plan.digest:
        raise TrainingError(
            f"{folder} holds the finished run of another job: config, data or base have changed since",
            hint="choose another --out folder, or delete this one to train again",
        )
    adapter = read_adapter(folder / "adapter")
    cost = Cost.from_json(written["cost"]) if written.get("cost") else None
    version = None
    if hub is not None:
        version = hub.publish(folder / "adapter", plan_name(plan))  # the same content is the same version; new only if it is no longer there
    return TrainOutcome(folder / "adapter", version, adapter.manifest["training"], reused=True, warnings=plan.warnings, cost=cost)


def prompt_ids(base: Base, adapter: Adapter, **fields: Any) -> list[int]:
    """The tokens of a prompt in the adapter's own words: its template filled with `fields`, as it was trained and is evaluated.

    An adapter without a template takes the one field `prompt` as it is. Raises DataError for a field that is missing.
    """
    form = PromptFormat.from_json(adapter.manifest["prompt"]) if adapter.manifest.get("prompt") else PromptFormat()
    return encode_prompt(form.render(fields), base.tokenizer, form.chat)


def plan_name(plan: TrainingPlan) -> str:
    """The name that a plan's adapter gets: the config's, or else the task's."""
    return plan.config.name or plan.data.task.name
