"""Is a composed adapter worth having? Many tasks, each made of adapters that were not trained on it, against everything simpler.

    .venv/bin/python bench/compose_evidence.py --work FOLDER --family domain_format [--k 5] [--seeds 3] [--methods gradient,cma]
    .venv/bin/python bench/compose_evidence.py --work FOLDER --tasks FOLDER... --hub HUB [--k 5,20,100]
    .venv/bin/python bench/compose_evidence.py --work FOLDER --bbh FOLDER --hub HUB [--k 5]

--family trains an adapter for every cell of a grid of skills.py, keeps them in the work folder, and leaves each cell out in turn. --tasks takes task
folders and the adapters of a hub; those that were trained on the task itself are left out. --bbh takes BIG-Bench Hard's files, asked as Atoll reads
them, with 60 % of each for the test.

For each task, k and seed: draw k examples, rank, search and compose as `atoll compose` does, make its controls from the same examples, and score all
on the same test rows in one batch. The first method is the one that is compared; others add a line each. Beside them, for a family, the adapter that
was trained on the cell itself: what there would be to win. What is done is kept, so a stopped run goes on and a second one only prints.

Tables in Markdown go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import skills
from evidence_tables import MEASURES, Entry, contestants_of, first_line, plain, summary_table, task_table

if TYPE_CHECKING:
    from atoll.data.task import TaskData
    from atoll.eval.score import Score
    from atoll.hub.store import Hub
    from atoll.model.base import Base
    from atoll.workflows.compose_controls import Measured
    from atoll.workflows.compose_plan import ComposePlan

COMPOSED, OWN = "composed", "trained on the task"
BBH_RATIOS = (0.4, 0.0, 0.6)
BBH_STOP = ("\nQuestion:",)  # a line end would end every answer at its first line, and then strict would be no other score


@dataclass(frozen=True)
class Item:
    """A task to compose for: where its rows are, adapters that may not be used, and the adapter that was trained on it, if it is to be shown."""

    name: str
    data: dict[str, Any]
    exclude: tuple[str, ...] = ()
    own: str | None = None


def main() -> None:
    arguments = read_arguments()
    import torch

    from atoll.model.base import load_base

    torch.set_num_threads(arguments.threads)
    base = load_base(arguments.base)
    hub, items = prepare(arguments, base)
    methods = arguments.methods.split(",")
    for k in map(int, arguments.k.split(",")):
        entries = []
        for number, item in enumerate(items, 1):
            say(f"[{number}/{len(items)}] {item.name}, k = {k}")
            entries.append(measure(item, k, methods, arguments, base, hub))
            for name in contestants_of(entries[-1:]):
                say(f"    {name:28} {entries[-1].mean(name, 'strict')}")
        print(report(entries, k), flush=True)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters, outputs and results")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--family", choices=tuple(skills.FAMILIES))
    what.add_argument("--tasks", type=Path, nargs="+", help="task folders")
    what.add_argument("--bbh", type=Path, help="folder with BIG-Bench Hard's JSON files")
    parser.add_argument("--hub", type=Path, help="folder of the hub (default: for a family one in the work folder, else the Atoll home's)")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these tasks or cells alone, by name")
    parser.add_argument("--k", default="5", help="numbers of examples, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="gradient_per_layer", help="methods of the search, with commas between")
    parser.add_argument(
        "--few-shot-steps", type=int, nargs="*", default=[], help="LoRA trained on the examples for so many steps, beside the control's own"
    )
    parser.add_argument("--top-k", type=int, help="adapters that the search gets (default: that of atoll compose)")
    parser.add_argument("--test-rows", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the compose section, as JSON; repeatable")
    parser.add_argument("--rank", type=int, default=8, help="of a family's adapters")
    parser.add_argument("--train-rows", type=int, default=200, help="of each cell of a family")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


# ---- what is composed for, and of what ----


def prepare(arguments: argparse.Namespace, base: Base) -> tuple[Hub, list[Item]]:
    """The hub, with a family's adapters trained, and the tasks."""
    from atoll.hub.store import Hub

    if arguments.family is not None:
        hub = Hub(arguments.hub or arguments.work / "hub")
        items = list(train_family(arguments, base, hub))
    else:
        hub = Hub(arguments.hub)
        items = list(bbh_items(arguments.bbh) if arguments.bbh is not None else task_items(arguments.tasks, hub))
    return hub, [item for item in items if arguments.only is None or item.name in arguments.only]


def train_family(arguments: argparse.Namespace, base: Base, hub: Hub) -> Iterator[Item]:
    """Write the cells' rows and train an adapter for each; those that are there already are found."""
    from atoll.config import TrainConfig
    from atoll.workflows import make_plan, run_plan_in

    folders = skills.write_cells(arguments.work / "tasks", arguments.family, skills.Sizes(train=arguments.train_rows), seed=17)
    for number, (cell, folder) in enumerate(folders.items(), 1):
        data = {"path": str(folder.resolve())}
        trainer = {"epochs": 3, "learning_rate": 1e-3, "early_stop_patience": None, "checkpoint_every": None}
        config = TrainConfig.model_validate(
            {"base": arguments.base, "name": cell, "data": data, "adapter": {"r": arguments.rank}, "trainer": trainer}
        )
        plan = make_plan(config, base=base)
        outcome = run_plan_in(arguments.work / "adapters" / f"{cell}-{plan.digest[:8]}", plan, hub, progress=_progress(f"[{number}/{len(folders)}]"))
        assert outcome.version is not None
        say(f"[{number}/{len(folders)}] {outcome.version.ref} {'found' if outcome.reused else 'trained'}")
        yield Item(cell, data, exclude=(cell,), own=outcome.version.ref)


def task_items(folders: Sequence[Path], hub: Hub) -> Iterator[Item]:
    """Task folders, and for each the adapters that say they were trained on it."""
    from atoll.config import DataConfig
    from atoll.data.task import load_task
    from atoll.model.adapter_files import read_manifest

    trained_on = {version.name: str(read_manifest(hub.path(version)).get("task")) for version in hub.list()}
    for folder in folders:
        name = load_task(DataConfig(path=str(folder))).task.name
        exclude = tuple(adapter for adapter, task in trained_on.items() if name in (adapter, task))
        yield Item(name, {"path": str(folder.resolve())}, exclude)


def bbh_items(folder: Path) -> Iterator[Item]:
    """BIG-Bench Hard's files; the hub's adapters were trained on none of them."""
    for path in sorted(folder.glob("*.json")):
        yield Item(path.stem, {"path": str(path.resolve()), "ratios": list(BBH_RATIOS)})


# ---- measure ----


def measure(item: Item, k: int, methods: Sequence[str], arguments: argparse.Namespace, base: Base, hub: Hub) -> Entry:
    """The scores of all contestants of a task; read where they are known."""
    merged: Entry | None = None
    for place, method in enumerate(methods):
        entry = measure_method(item, k, method, arguments, base, hub, controls=place == 0)
        if place:
            renamed = {f"{COMPOSED} ({method})": found for name, found in entry.scores.items() if name == COMPOSED}
            seconds = {f"{COMPOSED} ({method})": found for name, found in entry.seconds.items() if name == COMPOSED}
            assert merged is not None
            entry = replace(merged, scores={**merged.scores, **renamed}, seconds={**merged.seconds, **seconds})
        merged = entry
    assert merged is not None
    for steps in arguments.few_shot_steps:
        found = measure_few_shot(item, k, methods[0], steps, arguments, base, hub)
        merged = replace(merged, scores={**merged.scores, f"k-shot LoRA, {steps} steps": found})
    return merged


def measure_method(item: Item, k: int, method: str, arguments: argparse.Namespace, base: Base, hub: Hub, *, controls: bool) -> Entry:
    """One method on one task, with the controls or alone, in a folder of its own. A result of other inputs or settings is made anew."""
    from atoll.workflows.compose_clock import Clock
    from atoll.workflows.compose_controls import Measured, test_scores
    from atoll.workflows.compose_search import search_all

    plan = plan_of(item, k, method, arguments, base, hub, controls=controls)
    folder = folder_of(item, k, method, plan, arguments)
    kept = folder / "entry.json"
    if kept.is_file():
        return Entry.from_json(json.loads(kept.read_text()))
    progress, clock, measured = _progress(f"{item.name} {method}"), Clock(), Measured()
    searched = search_all(plan, clock, progress, _never)
    test_scores(plan, searched, hub, folder / "scores", measured, clock, progress, _never)
    scores = {name: three_scores(found, folder / "scores", plan, bbh=arguments.bbh is not None) for name, found in measured.scores.items()}
    if controls:
        scores |= majority_of(plan, measured, bbh=arguments.bbh is not None)
        scores |= own_score(item, plan, hub, folder / "scores") if item.own is not None else {}
    weights = [dict(sorted(_named(plan, one.shortlist, one.found.weights).items(), key=lambda pair: -abs(pair[1]))[:6]) for one in searched]
    notes = {
        "weights": weights,
        "evaluations": [one.found.evaluations for one in searched],
        "failures": dict(measured.failures),
        "parts": clock.parts,
    }
    entry = Entry(item.name, k, scores, {name: list(found) for name, found in measured.seconds.items()}, notes)
    kept.write_text(json.dumps(entry.to_json(), indent=1) + "\n")
    return entry


def measure_few_shot(item: Item, k: int, method: str, steps: int, arguments: argparse.Namespace, base: Base, hub: Hub) -> dict[str, list[float]]:
    """LoRA trained on each seed's examples for `steps` steps, on the same test rows."""
    from atoll.compose.few_shot_lora import few_shot_trainer, train_on_examples
    from atoll.eval.arena import Arena, Entrant
    from atoll.eval.score import better_base
    from atoll.workflows.compose_controls import content_digest

    plan = plan_of(item, k, method, arguments, base, hub, controls=True)
    folder = folder_of(item, k, method, plan, arguments)
    kept = folder / f"few-shot-{steps}.json"
    if kept.is_file():
        found: dict[str, list[float]] = json.loads(kept.read_text())
        return found
    arena, scores = Arena(base, hub, plan.config.eval, folder / "scores", record=False), []
    for draw in plan.draws:
        trainer = few_shot_trainer(k, draw.seed).model_copy(update={"max_steps": steps})
        adapter = train_on_examples(base.decoder, draw.few.rows, base=base.name, seed=draw.seed, trainer=trainer)
        entrant = Entrant("k-shot LoRA", "lora", content_digest(adapter), adapter)
        asked = arena.measure(plan.data, [], plan.config.generation, _progress(f"{item.name} {steps} steps"), entrants=[entrant])
        scores.append(better_base([score for score in asked if score.model == entrant.model]))
    found = three_scores(scores, folder / "scores", plan, bbh=arguments.bbh is not None)
    kept.write_text(json.dumps(found) + "\n")
    return found


def plan_of(item: Item, k: int, method: str, arguments: argparse.Namespace, base: Base, hub: Hub, *, controls: bool) -> ComposePlan:
    """The composition of one task, as `atoll compose` plans it."""
    from atoll.config_compose import ComposeConfig
    from atoll.workflows.compose_plan import plan_composition

    settings: dict[str, Any] = {"k": k, "method": method, "seeds": arguments.seeds, "exclude": list(item.exclude)}
    settings |= {} if arguments.top_k is None else {"top_k": arguments.top_k}
    settings |= {key: _value(text) for key, _, text in (given.partition("=") for given in arguments.set)}
    config = {
        "base": arguments.base,
        "name": item.name,
        "data": item.data,
        "compose": settings,
        "controls": controls,
        "eval": {"test_rows": arguments.test_rows},
        "generation": {"stop": list(BBH_STOP)} if arguments.bbh is not None else {},
    }
    return plan_composition(ComposeConfig.model_validate(config), hub, base=base)


def folder_of(item: Item, k: int, method: str, plan: ComposePlan, arguments: argparse.Namespace) -> Path:
    """Where the results of a plan are."""
    folder: Path = arguments.work / "results" / f"{item.name}-k{k}" / f"{method.replace(':', '-')}-{plan.digest[:8]}"
    return folder


def three_scores(found: Sequence[Score], folder: Path, plan: ComposePlan, *, bbh: bool) -> dict[str, list[float]]:
    """The measures of one contestant, a value a seed, from the raw outputs."""
    from atoll.eval.score import read_outputs

    outputs = outputs_of(folder)
    read = first_line_reader(plan.data, bbh=bbh)
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for score in found:
        rows = read_outputs(outputs[score.digest, score.prompt_hash])
        strict = [float(plain(row.prediction) == plain(row.gold)) for row in rows]
        values["strict"].append(sum(strict) / len(strict) if bbh else score.value)
        values["first_line"].append(sum(read(row.index, first_line(row.prediction), row.gold) for row in rows) / len(rows))
        if score.options_value is not None:
            values["options"].append(score.options_value)
    return {name: value for name, value in values.items() if value}


def outputs_of(folder: Path) -> dict[tuple[str, str], Path]:
    """The raw outputs by (content of the contestant, prompts)."""
    from atoll.eval.score import read_score

    scores = {path: read_score(path) for path in folder.rglob("*.json")}
    return {(score.digest, score.prompt_hash): path.with_suffix(".outputs.jsonl") for path, score in scores.items()}


def first_line_reader(data: TaskData, *, bbh: bool) -> Callable[[int, str, str], float]:
    """What a first line is worth: by LoraHub's rule, or by the task's metric (0 where that has no value for a single row)."""
    from atoll.eval.metrics import metric_for

    if bbh:
        return lambda index, line, gold: float(plain(line) == plain(gold))
    metric = metric_for(data.task)
    examples = {metric.gold(example): example for example in data.test}

    def read(index: int, line: str, gold: str) -> float:
        evidence = metric.read(line.strip(), examples[gold]) if line.strip() else None
        value = None if evidence is None else metric.row_value(evidence)
        return 0.0 if value is None else value

    return read


def majority_of(plan: ComposePlan, measured: Measured, *, bbh: bool) -> dict[str, dict[str, list[float]]]:
    """The most common answer of the examples, where one is common."""
    if not measured.majority:
        return {}
    values = [one.value for one in measured.majority]
    return {"majority": {"strict": values, "first_line": values, "options": values}}


def own_score(item: Item, plan: ComposePlan, hub: Hub, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The adapter that was trained on the task, on the same rows."""
    from atoll.eval.arena import Arena

    arena = Arena(plan.base, hub, plan.config.eval, folder)
    version = hub.resolve(str(item.own))
    [score] = [score for score in arena.measure(plan.data, [version], plan.config.generation, _progress(OWN)) if score.digest == version.digest]
    return {OWN: {"strict": [score.value], **({"options": [score.options_value]} if score.options_value is not None else {})}}


# ---- say ----


def report(entries: Sequence[Entry], k: int) -> str:
    """The tables of one k."""
    seeds = max(len(found) for entry in entries for measures in entry.scores.values() for found in measures.values())
    parts = [f"## k = {k}: {len(entries)} tasks, {seeds} seeds", summary_table(entries), "Strict, by task:", task_table(entries, "strict")]
    if any(entry.scores[name].get("options") for entry in entries for name in entry.scores):
        parts += ["Options, by task:", task_table(entries, "options")]
    return "\n\n".join(parts) + "\n"


def _named(plan: ComposePlan, shortlist: Sequence[Any], weights: Any) -> dict[str, float]:
    """Each adapter's weight (the mean of its layers'), by name."""
    each = weights if weights.dim() == 1 else weights.mean(1)
    return {plan.candidates[ranked.index].name: round(float(weight), 3) for ranked, weight in zip(shortlist, each, strict=True)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _never() -> bool:
    return False


def _progress(what: str) -> Callable[[str, int, int], None]:
    """A line on stderr now and then."""
    last = [time.monotonic()]

    def progress(stage: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            say(f"  {what}: {stage} {done}/{total}")

    return progress


def say(text: str) -> None:
    """Everything but the tables goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
