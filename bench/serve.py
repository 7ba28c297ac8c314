"""How fast does Atoll serve adapters against vLLM, transformers + PEFT and llama.cpp on this machine?

    .venv/bin/python bench/serve.py --base smollm2-135m-instruct --vllm VENV --peft VENV [--rounds 3] [--quick] [--only atoll,vllm]

Workload W: 32 requests at once, 128 random prompt tokens each, greedy, 32 and 128 output tokens, over 0, 1, 8 and 32 adapters and over 256
registered ones drawn by zipf's law; one request alone; 32 streams through the HTTP server; an adapter's cold load. Each contestant is a process of
its own, loaded once and stopped while others are measured; measurements are interleaved, cell by cell, because the speed of such a machine drifts.
VENV is a virtual environment that holds the peer; without one, its ratios are null with a note. Run it on a machine that does nothing else: two
threads that wait for each other become many times slower beside a third. Tables go to stderr; the only line on stdout is one JSON object, whose
`ratios` are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers.contestants import NAMES, Entry, Setting, make_entries
from peers.controls import Controls, describe_machine, format_controls
from peers.ratios import compute_ratios, find_missing, format_figures, format_ratios, median_of, summarise
from peers.workers import OrderFailed, WorkerFailed, Workers
from peers.workload import COLD_RANK, RANK, Cell, make_cells, make_order, write_adapters

DISTURBED_CORES = 0.1  # what others may take of the processor before a measurement is repeated and, if that does not help, marked
ATTEMPTS, REPEAT_BELOW_S = 3, 30.0  # measurements longer than that are not repeated
COLD_PARTS = ("read", "register", "first_token", "warm_first_token")  # the last: the same with the adapter resident


def main() -> None:
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the `with` blocks end the workers
    with ExitStack() as stack:
        folder = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atoll-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        try:
            bench = Bench(arguments, folder)
            bench.run(stack.enter_context(Workers(folder)))
        except KeyboardInterrupt:
            sys.exit("interrupted: all workers are ended")
    print(json.dumps(bench.result()))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder or alias of the base model")
    parser.add_argument("--vllm", type=Path, help="virtual environment with vLLM for CPUs")
    parser.add_argument("--vllm-mode", choices=("compile", "eager"), default="compile", help="vLLM with torch.compile (default) or without")
    parser.add_argument("--peft", type=Path, help="virtual environment with transformers and peft (default: this one)")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server binary")
    parser.add_argument("--gguf", type=Path, help="the same base for llama-server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="one round of a few tokens: tries the bench, measures nothing")
    parser.add_argument("--full", action="store_true", help="measure slow peers in every round and with 1 and 8 adapters too")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES), help=f"contestants, of {', '.join(NAMES)}")
    parser.add_argument("--cells", type=lambda text: text.split(","), help="cells, such as base_128,single (default: all)")
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, default=True, help="measure through the HTTP server too")
    parser.add_argument("--work", type=Path, help="keep adapters and logs in this folder, and use adapters found there")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.only if name not in NAMES] + [
        cell for cell in arguments.cells or () if cell not in {known.name for known in make_cells(quick=False)}
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; contestants are {', '.join(NAMES)}; cells {', '.join(c.name for c in make_cells(quick=False))}")
    if (arguments.llama_server is None) != (arguments.gguf is None):
        parser.error("--llama-server and --gguf go together")
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return arguments


class Bench:
    """One run: who takes part, what was found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._quick, self._rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
        self._cells = [cell for cell in make_cells(quick=self._quick) if arguments.cells is None or cell.name in arguments.cells]
        self._controls, self._machine = Controls(folder), describe_machine(arguments.threads)
        self._entries, self._vocabulary, self._setting = self._prepare(arguments, folder)
        self._measured: dict[tuple[str, str], list[float | None]] = {}
        self._answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._found_controls: list[dict[str, Any] | None] = []
        self._details: dict[str, Any] = {}
        self._notes: list[str] = []

    def _prepare(self, arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Entry], int, Setting]:
        """Find the base, write the adapters, make the list of contestants."""
        from atoll.model.pull import pull

        base = pull(arguments.base)
        needed = max(cell.num_adapters for cell in self._cells)
        say(f"{base}: writing {needed} adapters of rank {RANK}")
        adapters = write_adapters(folder / "adapters", base, needed, RANK)
        [cold] = write_adapters(folder / "cold", base, 1, COLD_RANK)
        setting = Setting(
            base=base,
            adapters=adapters,
            cold_adapter=cold,
            home=folder / "home",
            threads=arguments.threads,
            full=arguments.full,
            vllm=arguments.vllm,
            vllm_mode=arguments.vllm_mode,
            peft=arguments.peft or Path(sys.prefix),
            llama_server=arguments.llama_server,
            gguf=arguments.gguf,
        )
        wanted = {name for name in arguments.only if arguments.http or name != "atoll_http"}
        cells = {cell.name for cell in self._cells}
        entries = {name: entry for name, entry in make_entries(setting).items() if name in wanted and cells & set(entry.cells)}
        return entries, int(json.loads((base / "config.json").read_text())["vocab_size"]), setting

    def run(self, workers: Workers) -> None:
        """Start everyone, warm everyone, then the rounds."""
        say(f"machine: {self._machine}")
        for name, entry in self._entries.items():
            try:
                started = time.monotonic()
                self._details[name] = workers.start(entry.contestant).details
                self._warm(workers, name)
                say(f"{name} is loaded and warm after {time.monotonic() - started:.0f} s: {self._details[name]}")
            except (WorkerFailed, OrderFailed) as error:
                self._note(workers, name, error)
        for number in range(self._rounds):
            self._measure_controls()
            for cell in self._cells:
                self._measure_cell(workers, cell, number)
            for name in [name for name, entry in self._entries.items() if entry.rounds == number + 1]:
                workers.end(name)  # its memory is of use to the others
            figures = format_figures(self._measured, [cell.name for cell in self._cells], last_only=True)
            say(f"\nround {number + 1} of {self._rounds}\n{figures}\n")
        self._measure_controls()
        self._report()

    def _warm(self, workers: Workers, name: str) -> None:
        """A short run of the kinds of cell the contestant will measure: memory is touched, graphs are compiled, adapters are where they are used."""
        kinds = [cell for cell in self._cells if cell.name in self._entries[name].cells]
        for cell in {(cell.action, cell.num_adapters > 0): cell for cell in kinds}.values():
            short = Cell(cell.name, min(cell.new_tokens, 4), cell.num_adapters, cell.zipf, cell.action)
            workers[name].ask(self._order(short, -1))

    def _order(self, cell: Cell, round_number: int, attempt: int = 0) -> dict[str, Any]:
        return make_order(cell, round_number, self._vocabulary, list(self._setting.adapters), self._setting.cold_adapter, attempt)

    def _measure_cell(self, workers: Workers, cell: Cell, number: int) -> None:
        """One cell of one round with everyone who measures it; who comes first changes from round to round."""
        names = [name for name, entry in self._entries.items() if cell.name in entry.cells]
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            entry, values = self._entries[name], self._measured.setdefault((name, cell.name), [])
            if name not in workers or (entry.rounds is not None and number >= entry.rounds):
                values.append(None)
                continue
            try:
                answer = self._ask(workers, name, cell, number)
            except (WorkerFailed, OrderFailed) as error:
                values.append(None)
                self._note(workers, name, error)
                continue
            values.append(answer["tokens"] / answer["seconds"] if "tokens" in answer else None)
            self._answers.setdefault((name, cell.name), []).append(answer)
            disturbed = f" (others took {answer['foreign_cores']:.2f} cores)" if is_disturbed(answer) else ""
            say(f"  {cell.name} {name}: " + (f"{values[-1]:.1f} tokens/s" if values[-1] else f"{answer['ms']:.0f} ms") + disturbed)

    def _ask(self, workers: Workers, name: str, cell: Cell, number: int) -> dict[str, Any]:
        """The least disturbed of a few attempts, one if it was not disturbed. Whoever is measured, the rule is the same and looks at no figure."""
        attempts: list[dict[str, Any]] = []
        while not attempts or (is_disturbed(attempts[-1]) and len(attempts) < ATTEMPTS and attempts[-1].get("seconds", 0.0) < REPEAT_BELOW_S):
            answer = workers[name].ask(self._order(cell, number, len(attempts)))
            attempts.append({**answer, "round": number, "attempt": len(attempts)})
        return min(attempts, key=lambda answer: answer["foreign_cores"] or 0.0)

    def _measure_controls(self) -> None:
        self._found_controls.append(self._controls.measure())
        say(f"controls: {format_controls(self._found_controls[-1], self._controls.note)}")

    def _note(self, workers: Workers, name: str, error: WorkerFailed | OrderFailed) -> None:
        """Keep what went wrong; a worker that no longer answers is left out from here on."""
        self._notes.append(str(error).splitlines()[0])
        say(f"failed: {error}")
        if isinstance(error, WorkerFailed):
            workers.end(name)

    def _report(self) -> None:
        medians, rounds = compute_ratios(self._measured)
        say("medians over rounds\n" + format_figures(self._measured, [cell.name for cell in self._cells]) + "\n")
        say(format_ratios(medians, rounds, find_missing(medians, self._measured)))
        if self._quick:
            say("a quick run: answers of 2 and 4 tokens, so these figures measure nothing")
        say("\n".join(f"controls: {format_controls(found, self._controls.note)}" for found in self._found_controls))
        for name, share in self._agreement().items():
            say(f"{name}: {share:.0%} of rows agree with Atoll's")

    def result(self) -> dict[str, Any]:
        """The JSON line."""
        medians, rounds = compute_ratios(self._measured)
        ranges = {name: [min(values), max(values)] for name, values in rounds.items() if values}
        return {
            "bench": "serve",
            "quick": self._quick,
            "ratios": medians,
            "ratio_ranges": ranges,
            "ratio_rounds": rounds,
            "missing": find_missing(medians, self._measured),
            "cold_load_ms": self._pick("ms", ("atoll", "cold_load")),
            "cold_load_parts_ms": {part: self._pick(f"{part}_ms", ("atoll", "cold_load")) for part in COLD_PARTS},
            "ttft_ms": {name: self._pick("ttft_ms", (name, "single")) for name in self._details},
            "itl_ms": {name: self._pick("itl_ms", (name, "single")) for name in self._details},
            "tokens_per_s": summarise(self._measured),
            "agreement": self._agreement(),
            "controls": self._found_controls,
            "controls_note": self._controls.note,
            "machine": self._machine,
            "contestants": self._details,
            "disturbed": self._disturbed(),
            "notes": self._notes,
        }

    def _disturbed(self) -> dict[str, float]:
        """Cores that others took during a measurement, where it was too much for the figure to be trusted."""
        found = [(f"{name} {cell} round {a['round'] + 1}", a) for (name, cell), answers in self._answers.items() for a in answers]
        return {where: answer["foreign_cores"] for where, answer in found if is_disturbed(answer)}

    def _pick(self, field: str, where: tuple[str, str]) -> float | None:
        value = median_of([answer.get(field) for answer in self._answers.get(where, [])])
        return None if value is None else round(value, 2)

    def _agreement(self) -> dict[str, float]:
        """The share of rows that agree with Atoll's on the same prompts and adapters: a peer's in the first token (bfloat16 engines drift apart after
        it), our server's in the whole text. Near 1, or somebody does other work than was asked for."""
        shares: dict[str, float] = {}
        for (name, cell), answers in self._answers.items():
            ours = {(answer["round"], answer["attempt"]): answer for answer in self._answers.get(("atoll", cell), [])}
            for answer in answers if name != "atoll" else ():
                own, key = ours.get((answer["round"], answer["attempt"]), {}), "token_ids" if "token_ids" in answer else "texts"
                pairs = list(zip(own.get(key, ()), answer.get(key, ()), strict=False))
                length = None if name == "atoll_http" else 1
                if pairs:
                    shares[f"{name} {cell}"] = sum(a[:length] == b[:length] for a, b in pairs) / len(pairs)
        return shares


def is_disturbed(answer: dict[str, Any]) -> bool:
    """Whether others took too much of the processor for this figure to be trusted."""
    return answer["foreign_cores"] is not None and answer["foreign_cores"] > DISTURBED_CORES


def say(text: str) -> None:
    """Everything but the JSON line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
