"""How fast is a search for composition weights, beside lorahub 0.1.0 and beside the loop that one would write first?

    .venv/bin/python bench/compose.py --lorahub VENV [--t5 small] [--targets q,v] [--base smollm2-135m-instruct] [--rounds 3] [--only lorahub,naive]

lorahub: a T5 of random weights in a published size, 20 modules of rank 16 (see random_t5.py), 5 examples, 40 evaluations. Per evaluation:
those of lorahub's search after the first; and Atoll's, of the same 40 candidates scored together, in both forms and both dtypes. The losses that the
two give to a candidate are compared (at the weights that lorahub's bug leaves it, see atoll/lorahub/compatible.py).

Time to loss: lorahub's call, from the names of the modules to the merged model, and what Atoll needs from and to the same points with its default
method until a candidate's loss is at or below that of the model that lorahub returns. Since lorahub's bug spoils some of its candidates, the same is
told, as time to best, of the lowest loss that lorahub saw on the way. Loading base and modules is in all of these times; importing libraries is in
none.

naive: Atoll's batched search on a decoder base against a loop over the candidates: merge the adapters, load the result, run, all logits.

VENV: see compare_lorahub.py. Each contestant is a process of its own, stopped while another is measured; measurements are interleaved. Run it on a
machine that does nothing else. Tables go to stderr; the only line on stdout is one JSON object, whose `ratios` are medians over rounds of the rounds'
own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.controls import Controls, describe_machine, format_controls
from peers.random_t5 import SHAPES, write_base, write_taught_modules
from peers.workers import Contestant, Workers
from peers.workload import write_adapters

MODULES, RANK, ALPHA, STEPS = 20, 16, 32.0, 40
NUM_EXAMPLES, INPUT_TOKENS, LABEL_TOKENS = 5, 104, 8  # 112 in all: LoraHub's article counts 111.6 tokens an example on BIG-Bench Hard
FLOORS = {"evaluation_vs_lorahub": 5.0, "time_to_loss_vs_lorahub": 10.0}
SANE = 2.0  # largest weight at which losses are compared: lorahub's bug lets them grow to ten, where float32 itself has no three digits
VARIANTS = tuple((form, dtype) for form in ("product", "cat") for dtype in ("float32", "bfloat16"))
NAIVE_CANDIDATES = 3  # of the loop, a round: they all take the same time

_FORM_OF = {
    "evaluation_vs_lorahub": "product",
    "time_to_loss_vs_lorahub": "product",
    "time_to_best_vs_lorahub": "product",
    "evaluation_vs_naive": "cat",
}  # the form that a ratio is claimed for
_PEERS = Path(__file__).parent / "peers"
Figures = dict[str, list[float]]


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as folder, Workers(Path(folder)) as workers:
        print(json.dumps(run(arguments, Path(folder), workers)))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lorahub", type=Path, help="virtual environment with lorahub 0.1.0 (default: that part is left out)")
    parser.add_argument("--t5", choices=tuple(SHAPES), default="small", help="size of the T5")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=["q", "v"], help="linears that its modules change (LoraHub's: q,v)")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder or alias of the decoder base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=lambda text: text.split(","), default=["lorahub", "naive"], help="lorahub, naive")
    return parser.parse_args()


def run(arguments: argparse.Namespace, folder: Path, workers: Workers) -> dict[str, Any]:
    """Both parts, with the machine's controls around them."""
    controls, machine = Controls(folder), describe_machine(arguments.threads)
    say(f"machine: {machine}\ncontrols: {format_controls(controls.measure(), controls.note)}")
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: Figures = {}
    notes: list[str] = []
    if "lorahub" in arguments.only and arguments.lorahub is not None:
        against_lorahub(arguments, folder, workers, environment, found, notes)
    elif "lorahub" in arguments.only:
        notes.append("no --lorahub: nothing was compared with lorahub")
    if "naive" in arguments.only:
        against_loop(arguments, folder, workers, environment, found, notes)
    say(f"controls: {format_controls(controls.measure(), controls.note)}")
    ratios, all_ratios = summarise(found)
    for name, value in ratios.items():
        if value is not None:
            floor = f" (floor {FLOORS[name]:g})" if name in FLOORS else ""
            say(f"{name} {value:.2f}{floor}: {notes_of(name, all_ratios)}")
    settings = {"t5": arguments.t5, "targets": arguments.targets, "modules": MODULES, "rank": RANK, "examples": NUM_EXAMPLES, "evaluations": STEPS}
    return {"bench": "compose", "ratios": ratios, "by_variant": all_ratios, "rounds": found, "settings": settings, "machine": machine, "notes": notes}


# ---- lorahub ----


def against_lorahub(
    arguments: argparse.Namespace, folder: Path, workers: Workers, environment: dict[str, str], found: Figures, notes: list[str]
) -> None:
    """Write the job, start both sides, warm them, and measure them in turn."""
    base = folder / "t5"
    write_base(base, SHAPES[arguments.t5])
    taught = [make_examples(1 + number) for number in range(MODULES)]
    modules = write_taught_modules(folder, base, taught, rank=RANK, alpha=ALPHA, targets=arguments.targets)
    inputs, outputs = make_examples(0)
    options = {"threads": arguments.threads, "base": str(base), "modules": modules, "inputs": inputs, "outputs": outputs}
    start(workers, "lorahub", arguments.lorahub / "bin" / "python", "lorahub_worker.py", options, environment)
    start(workers, "atoll", sys.executable, "search_worker.py", options, environment)
    workers["lorahub"].ask({"do": "learn", "steps": 2})
    for form, dtype in VARIANTS:
        workers["atoll"].ask({"do": "reach", "target": 0.0, "steps": 1, "form": form, "dtype": dtype})
    for number in range(arguments.rounds):
        theirs = workers["lorahub"].ask({"do": "learn", "steps": STEPS})
        note(found, "lorahub_evaluation_s", theirs["evaluation_s"], theirs)
        note(found, "lorahub_learn_s", theirs["seconds"], theirs)
        best = min(theirs["losses"])
        say(f"    loss {theirs['losses'][0]:.4f} at w = 0, {best:.4f} the best tried, {theirs['loss']:.4f} in the end")
        candidates = effective(theirs["candidates"])
        for form, dtype in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            ours = workers["atoll"].ask({"do": "evaluate", "candidates": candidates, "form": form, "dtype": dtype})
            note(found, f"atoll_{form}_{dtype}_evaluation_s", ours["evaluation_s"], ours)
            if form == "product":
                note(found, f"product_{dtype}_largest_difference_of_losses", largest_difference(ours["losses"], theirs["losses"], candidates), ours)
            for name, target in (("loss", theirs["loss"]), ("best", min(best, theirs["loss"]))):
                ours = workers["atoll"].ask({"do": "reach", "target": target, "steps": STEPS, "form": form, "dtype": dtype})
                if not ours["reached"]:
                    notes.append(f"{form} {dtype} did not reach {target:.4f}: its loss is {ours['loss']:.4f}")
                    say(f"    {notes[-1]}")
                    continue
                note(found, f"atoll_{form}_{dtype}_to_{name}_s", ours["seconds"], ours)
                say(f"    loss {ours['loss']:.4f} after {ours['evaluations']:.0f} evaluations, {ours['search_s']:.2f} s of it searching")
    workers.end("lorahub")
    workers.end("atoll")


def effective(candidates: list[list[float]]) -> list[list[float]]:
    """The weights that lorahub's candidates really have: what one writes into the model is the last module of the next (see compatible.py)."""
    found: list[list[float]] = []
    before = [*[0.0] * (len(candidates[0]) - 1), 1.0]
    for candidate in candidates:
        before = [own + candidate[-1] * last for own, last in zip([*candidate[:-1], 0.0], before, strict=True)]
        found.append(before)
    return found


def largest_difference(ours: list[float], theirs: list[float], candidates: list[list[float]]) -> float:
    """Of the losses of candidates none of whose weights is beyond SANE."""
    rows = zip(ours, theirs, candidates, strict=True)
    return max(abs(one - other) for one, other, weights in rows if max(map(abs, weights)) <= SANE)


def make_examples(seed: int) -> tuple[list[str], list[str]]:
    """Inputs and outputs of random letters; a letter is a token. Outputs are of one length, so that a mean over examples is one over tokens."""
    draw = random.Random(seed)

    def text(length: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length))

    return [text(INPUT_TOKENS - 1) for _ in range(NUM_EXAMPLES)], [text(LABEL_TOKENS - 1) for _ in range(NUM_EXAMPLES)]


# ---- the loop ----


def against_loop(
    arguments: argparse.Namespace, folder: Path, workers: Workers, environment: dict[str, str], found: Figures, notes: list[str]
) -> None:
    """The batched search and the loop, in one process, in turn."""
    from atoll.model.pull import pull

    base = pull(arguments.base)
    draw = random.Random(0)
    vocabulary = int(json.loads((base / "config.json").read_text())["vocab_size"])
    rows = [[draw.randrange(100, vocabulary) for _ in range(INPUT_TOKENS + LABEL_TOKENS)] for _ in range(NUM_EXAMPLES)]
    options = {"threads": arguments.threads, "base": str(base), "adapters": write_adapters(folder, base, MODULES, RANK), "rows": rows}
    start(workers, "candidates", sys.executable, "candidates_worker.py", options, environment)
    candidates = [[draw.uniform(-0.5, 0.5) for _ in range(MODULES)] for _ in range(STEPS)]
    for form in ("cat", "product"):
        workers["candidates"].ask({"do": "batched", "candidates": candidates[:2], "form": form})
    for number in range(arguments.rounds):
        for form in ("cat", "product") if number % 2 == 0 else ("product", "cat"):
            batched = workers["candidates"].ask({"do": "batched", "candidates": candidates, "form": form})
            note(found, f"batched_{form}_evaluation_s", batched["evaluation_s"], batched)
            naive = workers["candidates"].ask({"do": "naive", "candidates": candidates[:NAIVE_CANDIDATES], "form": form})
            note(found, f"naive_{form}_evaluation_s", naive["evaluation_s"], naive)
            apart = max(abs(one - other) for one, other in zip(naive["losses"], batched["losses"], strict=False))
            note(found, f"{form}_largest_difference_of_losses", apart, naive)
        gradient = workers["candidates"].ask({"do": "gradient"})
        note(found, "gradient_step_s", gradient["step_s"], gradient)
    workers.end("candidates")


# ---- figures ----


def summarise(found: Figures) -> tuple[dict[str, float | None], dict[str, float]]:
    """(the ratios that are claimed, those of every variant).

    Against lorahub its own form is claimed, the product, in the faster dtype; beside the loop Atoll's own form, cat. lorahub itself runs in float32:
    how far the losses differ is said beside each figure.
    """
    every: dict[str, float] = {}
    for form, dtype in VARIANTS:
        for name, ours, theirs in (
            ("evaluation", "evaluation_s", "lorahub_evaluation_s"),
            ("time_to_loss", "to_loss_s", "lorahub_learn_s"),
            ("time_to_best", "to_best_s", "lorahub_learn_s"),
        ):
            value = ratio(found, theirs, f"atoll_{form}_{dtype}_{ours}")
            if value is not None:
                every[f"{name}_vs_lorahub_{form}_{dtype}"] = value
    for form in ("cat", "product"):
        value = ratio(found, f"naive_{form}_evaluation_s", f"batched_{form}_evaluation_s")
        if value is not None:
            every[f"evaluation_vs_naive_{form}"] = value
    names = tuple(_FORM_OF)
    claimed = {name: [value for key, value in every.items() if key.startswith(name) and _FORM_OF[name] in key] for name in names}
    return {name: max(values, default=None) for name, values in claimed.items()}, every


def notes_of(name: str, every: dict[str, float]) -> str:
    """All variants of a ratio, best first."""
    mine = {key.removeprefix(f"{name}_"): value for key, value in every.items() if key.startswith(name)}
    return ", ".join(f"{key} {value:.2f}" for key, value in sorted(mine.items(), key=lambda item: -item[1]))


def ratio(found: Figures, above: str, below: str) -> float | None:
    """The median over rounds of above / below; None if one of them was not measured in every round."""
    over, under = found.get(above, []), found.get(below, [])
    if not over or len(over) != len(under):
        return None
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


def start(workers: Workers, name: str, python: str | Path, program: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Start a contestant and say what it is."""
    worker = workers.start(Contestant(name, [str(python), str(_PEERS / program)], options, environment))
    say(f"{name} is loaded: {worker.details}")


def note(found: Figures, name: str, value: float, answer: dict[str, Any]) -> None:
    """Keep a figure and show it, with what others took of the machine meanwhile."""
    found.setdefault(name, []).append(round(value, 6))
    foreign = answer["foreign_cores"]
    say(f"  {name} {value:.4g}" + (f" (others took {foreign:.2f} cores)" if foreign and foreign > 0.1 else ""))


def say(text: str) -> None:
    """Everything but the JSON line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
