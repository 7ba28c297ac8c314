"""What does ReFT cost a server, and how fast does it train beside PyReFT?

    .venv/bin/python bench/reft.py --base smollm2-135m-instruct [--pyreft VENV] [--rounds 5] [--only serve,train]

Serving, in one engine: 32 requests at once of 128 random prompt tokens and 128 greedy ones, of the base and of one LoReFT adapter (rank 4, all
layers, f7+l7); and 64 requests of the base and of 64 different such adapters. Training: the same rows of a built-in task, LoReFT of the same shape,
batches of 16, bfloat16, with PyReFT's own trainer in VENV and with Atoll's; rows a second after the first step. Each contestant is a process of its
own, stopped while another is measured; measurements are interleaved. Run it on a machine that does nothing else. Tables go to stderr; the only line
on stdout is one JSON object, whose `ratios` are medians over rounds of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.controls import Controls, describe_machine, format_controls
from peers.workers import Contestant, OrderFailed, WorkerFailed, Workers

PROMPT_TOKENS, NEW_TOKENS, RANK, POSITIONS = 128, 128, 4, "f7+l7"
SERVING = {"base32": (32, 0), "reft32": (32, 1), "base64": (64, 0), "reft64": (64, 64)}  # requests, adapters
ROWS, BATCH, TASK, LEARNING_RATE = 96, 16, "builtin:support_intents", 4e-3

_PEERS = Path(__file__).parent / "peers"


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as folder, Workers(Path(folder)) as workers:
        print(json.dumps(run(arguments, Path(folder), workers)))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder or alias of the base model")
    parser.add_argument("--pyreft", type=Path, help="virtual environment with pyreft 0.1.0 (default: Atoll's training alone is timed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=lambda text: text.split(","), default=["serve", "train"], help="serve, train")
    return parser.parse_args()


def run(arguments: argparse.Namespace, folder: Path, workers: Workers) -> dict[str, Any]:
    """Everything: start, warm, interleave, report."""
    from atoll.model.pull import pull

    base = pull(arguments.base)
    controls, machine = Controls(folder), describe_machine(arguments.threads)
    say(f"machine: {machine}\ncontrols: {format_controls(controls.measure(), controls.note)}")
    quiet = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    common = {"base": str(base), "threads": arguments.threads}
    found: dict[str, list[float]] = {}
    notes: list[str] = []
    if "serve" in arguments.only:
        adapters = write_adapters(folder / "adapters", base, max(count for _, count in SERVING.values()))
        vocabulary = int(json.loads((base / "config.json").read_text())["vocab_size"])
        start(workers, "serve", sys.executable, "atoll_worker.py", {**common, "adapters": adapters}, quiet)
        for name in SERVING:
            workers["serve"].ask(serving_order(name, -1, vocabulary, adapters, new_tokens=2))
        for number in range(arguments.rounds):
            names = list(SERVING) if number % 2 == 0 else list(SERVING)[::-1]
            for name in names:
                answer = workers["serve"].ask(serving_order(name, number, vocabulary, adapters))
                note(found, f"{name}_tokens_per_s", answer["tokens"] / answer["seconds"], answer)
        workers.end("serve")
    if "train" in arguments.only:
        rows = training_rows(base)
        options = {**common, "rows": rows, "batch": BATCH, "rank": RANK, "positions": POSITIONS, "learning_rate": LEARNING_RATE}
        start(workers, "atoll", sys.executable, "reft_train_worker.py", options, quiet)
        if arguments.pyreft is not None:
            try:
                start(workers, "pyreft", arguments.pyreft / "bin" / "python", "pyreft_worker.py", options, quiet)
            except WorkerFailed as error:
                notes.append(str(error).splitlines()[0])
                say(f"failed: {error}")
        for number in range(arguments.rounds):
            for name in ("atoll", "pyreft") if number % 2 == 0 else ("pyreft", "atoll"):
                if name not in workers:
                    continue
                try:
                    answer = workers[name].ask({"do": "train"})
                except OrderFailed as error:
                    notes.append(str(error).splitlines()[0])
                    say(f"failed: {error}")
                    workers.end(name)
                    continue
                note(found, f"train_{name}_rows_per_s", answer["rows"] / answer["seconds"], answer)
                say(f"    loss {answer['first_loss']:.3f} -> {answer['last_loss']:.3f}")
    say(f"controls: {format_controls(controls.measure(), controls.note)}")
    ratios = {
        "train_vs_pyreft": ratio(found, "train_atoll_rows_per_s", "train_pyreft_rows_per_s"),
        "serve_reft_vs_base": ratio(found, "reft32_tokens_per_s", "base32_tokens_per_s"),
        "serve_reft64_vs_base": ratio(found, "reft64_tokens_per_s", "base64_tokens_per_s"),
    }
    return {"bench": "reft", "ratios": ratios, "rounds": found, "machine": machine, "notes": notes}


def start(workers: Workers, name: str, python: str | Path, program: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Start a contestant and say what it is."""
    worker = workers.start(Contestant(name, [str(python), str(_PEERS / program)], options, environment))
    say(f"{name} is loaded: {worker.details}")


def serving_order(name: str, number: int, vocabulary: int, adapters: list[str], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """One batch of fresh prompts; base and adapters of one round get the same."""
    import random

    requests, count = SERVING[name]
    draw = random.Random(f"{number} {requests} {count}")  # no prompt comes twice: nothing is found in the prefix index
    prompts = [[draw.randrange(100, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(requests)]
    used = [adapters[i % count] for i in range(requests)] if count else [None] * requests
    return {"do": "batch", "prompts": prompts, "adapters": used, "new_tokens": new_tokens}


def write_adapters(folder: Path, base: Path, count: int) -> list[str]:
    """Folders of random LoReFT adapters whose edits are not zero."""
    import torch

    from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
    from atoll.model.adapter_files import write_adapter
    from atoll.model.base import load_base
    from atoll.model.positions import Positions
    from atoll.model.reft import Intervention, ReftSpec

    shape = load_base(str(base)).decoder.shape
    part = ReftSpec(rank=RANK, positions=Positions.parse(POSITIONS))
    generator = torch.Generator().manual_seed(0)
    folders = []
    for number in range(count):
        fresh = new_adapter(AdapterSpec("", RANK, float(RANK), target_modules=(), reft=(part,)), shape.linears, shape.num_layers, generator)
        edits = {
            site: Intervention(found.r, found.r + 0.02 * torch.randn(found.r.shape, generator=generator), found.b)
            for site, found in fresh.edits.items()
        }
        write_adapter(folder / f"r{number}", Adapter(fresh.spec, {}, edits=edits))
        folders.append(str(folder / f"r{number}"))
    return folders


def training_rows(base: Path) -> list[dict[str, Any]]:
    """The rows that both sides train on: token ids and the length of the prompt."""
    from atoll.config import DataConfig
    from atoll.data.encode import encode_examples
    from atoll.data.task import load_task
    from atoll.model.base import load_base

    loaded = load_base(str(base))
    data = load_task(DataConfig(path=TASK, max_train_rows=ROWS, max_validation_rows=1, max_test_rows=1))
    encoded = encode_examples(data.train, loaded.tokenizer, None, context=loaded.context_length, eos_ids=loaded.eos_ids).rows
    return [{"ids": row.token_ids, "num_prompt": row.num_prompt} for row in encoded]


def note(found: dict[str, list[float]], name: str, value: float, answer: dict[str, Any]) -> None:
    """Keep a figure and show it, with what others took of the machine meanwhile."""
    found.setdefault(name, []).append(round(value, 2))
    foreign = answer["foreign_cores"]
    say(f"  {name} {value:.1f}" + (f" (others took {foreign:.2f} cores)" if foreign and foreign > 0.1 else ""))


def ratio(found: dict[str, list[float]], above: str, below: str) -> float | None:
    """The median over rounds of above / below; None if one of them was not measured."""
    pairs = list(zip(found.get(above, ()), found.get(below, ()), strict=False))
    return round(statistics.median(a / b for a, b in pairs), 3) if pairs else None


def say(text: str) -> None:
    """Everything but the JSON line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
