"""How fast does Atoll train LoRA adapters against transformers with PEFT and against TRL, and what do many jobs at once cost?

    .venv/bin/python bench/train.py --data FOLDER [--peft VENV] [--trl VENV] [--rounds 3] [--only peers,jobs]

FOLDER holds the task folders agnews, jigsaw_toxicity, e2e_nlg and gsm8k (task.json, train.jsonl). One epoch over the first rows of each: rank 16
on all linears, batches of 16, bfloat16, loss on completions; transformers' Trainer with PEFT and TRL's SFTTrainer with dynamic padding and rows of
like length together. Then eight jobs of one base at once against the same eight one after another, with batches of 16 rows and of 4 short ones; and
the peak memory of a process that trains the eight at once, of one that trains them one at a time, of each of the eight alone, and of one that trains
a single job on all their rows.

Each contestant is a process of its own, stopped while another is measured; a peer's measurements are interleaved with ours, and it ends before the
next begins (two together fill 24 GB). Run it on a machine that does nothing else.
Tables go to stderr; the only line on stdout is one JSON object, whose `ratios` are medians over rounds of the rounds' own ratios. *_vs_peft and
worst_vs_trl are times of the peer over ours; jobs8_vs_sequential is the time one after another over the time at once, jobs8_short_vs_sequential the
same with batches of 4; memory_one_vs_jobs8 is the memory of one at a time over that of eight, memory_largest_vs_jobs8 and memory_smallest_vs_jobs8
that of the job which needs most and least alone (batches differ), memory_same_rows_vs_jobs8 that of the single job.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.controls import Controls, describe_machine, format_controls
from peers.workers import Contestant, OrderFailed, WorkerFailed, Workers

ROWS = {"agnews": 96, "jigsaw_toxicity": 96, "e2e_nlg": 96, "gsm8k": 48}  # of an epoch
BATCH, RANK, LEARNING_RATE = 16, 16, 5e-4
JOBS, JOB_ROWS = 8, 32
SHORT_BATCH, SHORT_TOKENS = 4, 72  # rows of at most so many tokens
PEERS = ("peft", "trl")

_PEERS = Path(__file__).parent / "peers"


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as folder, Workers(Path(folder)) as workers:
        print(json.dumps(Bench(arguments, Path(folder), workers).run()))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder or alias of the base model")
    parser.add_argument("--data", type=Path, required=True, help=f"folder of the tasks {', '.join(ROWS)}")
    parser.add_argument("--peft", type=Path, help="virtual environment with transformers, peft and accelerate")
    parser.add_argument("--trl", type=Path, help="virtual environment with trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=lambda text: text.split(","), default=["peers", "jobs"], help="peers, jobs")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(ROWS), help="some of the tasks")
    return parser.parse_args()


class Bench:
    """One run of everything that was asked for."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, workers: Workers) -> None:
        from atoll.model.pull import pull

        self._arguments, self._folder, self._workers = arguments, folder, workers
        self._options = {"base": str(pull(arguments.base)), "threads": arguments.threads, "rank": RANK, "learning_rate": LEARNING_RATE}
        self._found: dict[str, list[float]] = {}
        self._losses: dict[str, list[float]] = {}
        self._notes: list[str] = []

    def run(self) -> dict[str, Any]:
        """Start, warm, interleave, report."""
        controls, machine = Controls(self._folder), describe_machine(self._arguments.threads)
        say(f"machine: {machine}\ncontrols: {format_controls(controls.measure(), controls.note)}")
        rows = {task: encode(Path(self._options["base"]), self._arguments.data / task, ROWS[task]) for task in self._arguments.tasks}
        self._start("atoll", sys.executable, "train_worker.py")
        if "atoll" in self._workers and "peers" in self._arguments.only:
            self._against_peers(rows)
        if "atoll" in self._workers and "jobs" in self._arguments.only:
            self._many_jobs()
        say(f"controls: {format_controls(controls.measure(), controls.note)}")
        ratios: dict[str, float | None] = {f"{task}_vs_peft": self._ratio(f"{task}_peft_s", f"{task}_atoll_beside_peft_s") for task in ROWS}
        against_trl = [found for task in ROWS if (found := self._ratio(f"{task}_trl_s", f"{task}_atoll_beside_trl_s")) is not None]
        ratios["worst_vs_trl"] = min(against_trl) if len(against_trl) == len(ROWS) else None
        ratios["jobs8_vs_sequential"] = self._ratio("sequential_s", "jobs8_s")
        ratios["jobs8_short_vs_sequential"] = self._ratio("sequential_short_s", "jobs8_short_s")
        ratios["memory_one_vs_jobs8"] = self._ratio("memory_one_mb", "memory_jobs8_mb")
        for name, choose in (("largest", max), ("smallest", min)):
            if alone := self._found.get("memory_alone_mb"):
                self._found[f"memory_{name}_mb"] = [choose(alone)]
            ratios[f"memory_{name}_vs_jobs8"] = self._ratio(f"memory_{name}_mb", "memory_jobs8_mb")
        ratios["memory_same_rows_vs_jobs8"] = self._ratio("memory_same_rows_mb", "memory_jobs8_mb")
        return {"bench": "train", "ratios": ratios, "rounds": self._found, "losses": self._losses, "machine": machine, "notes": self._notes}

    def _against_peers(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        for peer in PEERS:
            venv = getattr(self._arguments, peer)
            if venv is not None:
                self._start(peer, venv / "bin" / "python", "peft_train_worker.py", trl=peer == "trl")
                if peer in self._workers:
                    self._against(peer, rows)
                    self._workers.end(peer)

    def _against(self, peer: str, rows: dict[str, list[dict[str, Any]]]) -> None:
        sides = {"atoll": f"atoll_beside_{peer}", peer: peer}
        for name in sides:  # warm: libraries, kernels, memory
            self._ask(name, {"do": "train", "rows": rows[self._arguments.tasks[0]][: 2 * BATCH], "batch": BATCH})
        for number in range(self._arguments.rounds):
            for task in self._arguments.tasks:
                for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                    answer = self._ask(name, {"do": "train", "rows": rows[task], "batch": BATCH})
                    if answer is not None:
                        self._note(f"{task}_{sides[name]}_s", answer["seconds"], answer)
                        self._losses[f"{task}_{name}"] = [round(answer["losses"][0], 4), round(statistics.mean(answer["losses"][-2:]), 4)]

    def _many_jobs(self) -> None:
        base, task = Path(self._options["base"]), self._arguments.data / self._arguments.tasks[0]
        rows = encode(base, task, JOBS * JOB_ROWS)
        jobs = [rows[number::JOBS] for number in range(JOBS)]
        short = sorted(encode(base, task, 8 * JOBS * JOB_ROWS), key=lambda row: len(row["ids"]))[: JOBS * JOB_ROWS]
        if len(short) < JOBS * JOB_ROWS or len(short[-1]["ids"]) > SHORT_TOKENS:
            sys.exit(f"{task} has fewer than {JOBS * JOB_ROWS} rows of at most {SHORT_TOKENS} tokens")
        short_jobs = [short[number::JOBS] for number in range(JOBS)]
        for number in range(self._arguments.rounds):
            for at_once in (1, JOBS) if number % 2 == 0 else (JOBS, 1):
                for suffix, some, batch in (("", jobs, BATCH), ("_short", short_jobs, SHORT_BATCH)):
                    answer = self._ask("atoll", {"do": "jobs", "rows": some, "batch": batch, "at_once": at_once})
                    if answer is not None:
                        self._note(f"{'sequential' if at_once == 1 else 'jobs8'}{suffix}_s", answer["seconds"], answer)
        self._workers.end("atoll")
        orders = [("memory_jobs8_mb", jobs, JOBS), ("memory_one_mb", jobs, 1), ("memory_same_rows_mb", [rows], 1)]
        for name, some, at_once in [*orders, *(("memory_alone_mb", [job], 1) for job in jobs)]:
            self._start("atoll", sys.executable, "train_worker.py")
            answer = self._ask("atoll", {"do": "jobs", "rows": some, "batch": BATCH, "at_once": at_once})
            if answer is not None:
                self._note(name, answer["peak_bytes"] / 1e6, answer)
            self._workers.end("atoll")

    def _start(self, name: str, python: str | Path, program: str, **options: Any) -> None:
        quiet = {"OMP_NUM_THREADS": str(self._arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            worker = self._workers.start(Contestant(name, [str(python), str(_PEERS / program)], {**self._options, **options}, quiet))
            say(f"{name} is loaded: {worker.details}")
        except WorkerFailed as error:
            self._failed(error)

    def _ask(self, name: str, order: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._workers[name].ask(order)
        except (OrderFailed, WorkerFailed) as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        self._notes.append(str(error).splitlines()[0])
        say(f"failed: {error}")

    def _note(self, name: str, value: float, answer: dict[str, Any]) -> None:
        self._found.setdefault(name, []).append(round(value, 2))
        foreign = answer["foreign_cores"]
        say(f"  {name} {value:.1f}" + (f" (others took {foreign:.2f} cores)" if foreign and foreign > 0.1 else ""))

    def _ratio(self, above: str, below: str) -> float | None:
        """The median over rounds of above / below; None if one of them was not measured."""
        pairs = list(zip(self._found.get(above, ()), self._found.get(below, ()), strict=False))
        return round(statistics.median(a / b for a, b in pairs), 3) if pairs else None


def encode(base: Path, folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """The first training rows of a task folder, as all sides get them: token ids and the length of the prompt."""
    from atoll.config import DataConfig
    from atoll.data.encode import encode_examples
    from atoll.data.task import load_task

    tokenizer, context, eos_ids = _tokenizer_of(base)
    data = load_task(DataConfig(path=str(folder), max_train_rows=num_rows, max_validation_rows=1, max_test_rows=1))
    encoded = encode_examples(data.train, tokenizer, None, context=context, eos_ids=eos_ids).rows
    return [{"ids": row.token_ids, "num_prompt": row.num_prompt} for row in encoded]


@functools.cache
def _tokenizer_of(base: Path) -> tuple[Any, int, Any]:
    """(tokenizer, context in tokens, ids that end a text)."""
    from atoll.model.base import load_base

    loaded = load_base(str(base))
    return loaded.tokenizer, loaded.context_length, loaded.eos_ids


def say(text: str) -> None:
    """Everything but the JSON line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
