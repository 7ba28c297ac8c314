"""The serving bench: its ratios, its workload, its stream reader and its workers' ends. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
NAMES = {
    "base_vs_vllm",
    "base_vs_vllm_32",
    "mixed32_vs_vllm_base",
    "mixed32_vs_vllm_base_32",
    "mixed32_vs_vllm_lora",
    "mixed32_vs_peft",
    "mixed32_vs_mixed1",
    "registered256_vs_mixed32",
    "single_vs_transformers",
    "http_vs_inprocess",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bench's modules, found as they are when serve.py runs, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    before = set(sys.modules)
    import http_client
    from peers import contestants, ratios, workers, workload

    yield SimpleNamespace(contestants=contestants, ratios=ratios, workers=workers, workload=workload, http_client=http_client)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("peers", "http_client"):
            del sys.modules[name]


def setting(bench: Any, **changes: Any) -> Any:
    """What the command line would give with every peer present."""
    venv = Path("/nowhere/venv")
    given = {"vllm": venv, "peft": venv, "llama_server": venv, "gguf": venv, "vllm_mode": "eager", "full": False, "threads": 2}
    given |= {"base": Path("/nowhere/base"), "adapters": [f"/nowhere/{n}" for n in range(256)], "cold_adapter": "/nowhere/cold", "home": venv}
    return bench.contestants.Setting(**{**given, **changes})


def test_the_help_text_works_without_any_peer() -> None:
    """Who wants to run the bench starts with --help; it must not need a peer, a base or a compiler."""
    result = subprocess.run([sys.executable, str(BENCH / "serve.py"), "--help"], capture_output=True, text=True, check=True)
    assert "--vllm" in result.stdout and "--peft" in result.stdout


def test_every_promised_ratio_is_there_and_is_measured_by_somebody(bench: Any) -> None:
    """A ratio whose cell no contestant measures would be null forever, and a missing name would break whoever reads the JSON line."""
    assert set(bench.ratios.RATIOS) == NAMES
    entries = bench.contestants.make_entries(setting(bench))
    cells = {cell.name for cell in bench.workload.make_cells(quick=False)}
    assert set(entries) == set(bench.contestants.NAMES)
    for above, below, _floor in bench.ratios.RATIOS.values():
        for contestant, cell in (above, below):
            assert cell in cells and cell in entries[contestant].cells


def test_a_ratio_is_the_median_of_its_rounds_not_the_ratio_of_medians(bench: Any) -> None:
    """The machine drifts: only what was measured in the same round may be divided."""
    measured = {("atoll", "base_128"): [100.0, 300.0, 90.0], ("vllm", "base_128"): [50.0, 100.0, 90.0], ("vllm", "base_32"): [7.0, None, None]}
    medians, rounds = bench.ratios.compute_ratios(measured)
    assert rounds["base_vs_vllm"] == [2.0, 3.0, 1.0] and medians["base_vs_vllm"] == 2.0
    assert set(medians) == NAMES


def test_a_round_without_one_side_is_left_out_and_a_missing_peer_is_named(bench: Any) -> None:
    """Slow peers run in the first round only; an absent one must leave null and a sentence, not a zero."""
    measured = {("atoll", "mixed32_32"): [40.0, 60.0], ("peft", "mixed32_32"): [4.0, None], ("atoll", "single"): [9.0, 9.0]}
    medians, rounds = bench.ratios.compute_ratios(measured)
    assert medians["mixed32_vs_peft"] == 10.0 and rounds["mixed32_vs_peft"] == [10.0]
    notes = bench.ratios.find_missing(medians, measured)
    assert medians["single_vs_transformers"] is None and notes["single_vs_transformers"] == "not measured: transformers single"
    assert "mixed32_vs_peft" not in notes
    table = bench.ratios.format_ratios(medians, rounds, notes)
    assert all(name in table for name in NAMES) and "not measured: transformers single" in table


def test_prompts_are_the_same_for_everyone_and_new_in_every_round(bench: Any) -> None:
    """Equal prompts make contestants comparable; a prompt asked twice would let a prefix cache win."""
    cells = {cell.name: cell for cell in bench.workload.make_cells(quick=False)}
    adapters = [f"a{number}" for number in range(256)]
    first, again, second = (bench.workload.make_order(cells["mixed32_128"], number, 49152, adapters, "cold") for number in (0, 0, 1))
    assert first == again and first["prompts"] != second["prompts"]
    assert [len(prompt) for prompt in first["prompts"]] == [128] * 32 and first["new_tokens"] == 128
    assert sorted(first["adapters"]) == sorted(adapters[:32])
    drawn = bench.workload.make_order(cells["registered256_128"], 0, 49152, adapters, "cold")["adapters"]
    assert len(set(drawn)) > 8 and drawn.count("a0") > 1, "zipf's law: many adapters, the first ones often"


def test_written_adapters_are_read_by_atoll_with_both_factors_at_work(bench: Any, tmp_path: Path) -> None:
    """An adapter that does nothing, or on fewer linears, would make the mixed batch cheaper than what is claimed."""
    from atoll.model.adapter_files import read_adapter

    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [folder] = bench.workload.write_adapters(tmp_path / "made", tmp_path, 1, 16)
    adapter = read_adapter(Path(folder))
    assert len(adapter.modules) == 2 * 7 and adapter.spec.rank == 16
    assert all(module.a.abs().sum() > 0 and module.b.abs().sum() > 0 for module in adapter.modules.values())


@pytest.mark.parametrize("step", [1, 7, 60, 10_000])
def test_a_stream_is_read_however_its_bytes_were_cut(bench: Any, step: int) -> None:
    """TCP and chunks cut where they like: tokens, text and the moment of each event must not depend on it."""
    contents = (
        b'data: {"choices":[{"text":"a"}]}\n\n: keep-alive\n\n',
        b'data: {"choices":[{"text":"b"}]}\n\ndata: {"choices":[{"te',
        b'xt":"c"}],"usage":null}\n\n',
        b'data: {"choices":[],"usage":{"completion_tokens":3}}\n',
        b"\ndata: [DONE]\n\n",
    )
    body = b"".join(b"%x\r\n%s\r\n" % (len(content), content) for content in contents) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = head + body
    pieces = [(float(at), received[at : at + step]) for at in range(0, len(received), step)]
    answer = bench.http_client._read_answer(bench.http_client.Stream(b"", None, pieces))
    assert (answer.text, answer.num_tokens, len(answer.moments)) == ("abc", 3, 3)
    ends = [received.index(mark) + len(mark) - 1 for mark in (b'"a"}]}\n\n', b'"b"}]}\n\n', b"null}\n\n")]
    assert answer.moments == [end // step * step for end in ends]


def test_a_stream_that_breaks_off_is_no_measurement(bench: Any) -> None:
    """Half an answer in half the time must not look like speed."""
    received = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n22\r\ndata: {"choices":[{"text":"a"}]}\n\n\r\n'
    with pytest.raises(RuntimeError, match="hung up"):
        bench.http_client._read_answer(bench.http_client.Stream(b"", None, [(0.0, received)]))


WORKER = """
import os, subprocess, sys, time
sys.path.insert(0, {peers!r})
from protocol import run_worker

class Fake:
    def __init__(self, options):
        self.child = subprocess.Popen(["sleep", "600"])
    def details(self):
        print("a library's chatter")
        return {{"child": self.child.pid}}
    def batch(self, prompts, adapters, new_tokens):
        if new_tokens == 13:
            raise ValueError("thirteen")
        if new_tokens == 99:
            os._exit(3)
        return {{"seconds": 1.0, "tokens": new_tokens}}

run_worker(Fake)
"""


def state_of(process: int) -> str:
    """The kernel's letter for a process: T stopped, S sleeping, Z or - ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "-"


def reaches(process: int, letters: str) -> bool:
    """Whether the process comes into one of these states; a signal takes a moment to act."""
    deadline = time.monotonic() + 10
    while state_of(process) not in letters and time.monotonic() < deadline:
        time.sleep(0.01)
    return state_of(process) in letters


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_an_idle_worker_is_stopped_and_none_outlives_the_bench(bench: Any, tmp_path: Path) -> None:
    """An engine that spins while it waits would slow the one that is measured; a worker left behind would slow everything after."""
    program = tmp_path / "worker.py"
    program.write_text(WORKER.format(peers=str(BENCH / "peers")))
    contestant = bench.workers.Contestant("fake", [sys.executable, str(program)], {})
    order = {"do": "batch", "prompts": [], "adapters": []}
    with pytest.raises(KeyboardInterrupt), bench.workers.Workers(tmp_path) as running:
        worker = running.start(contestant)
        child = worker.details["child"]
        assert reaches(child, "T")
        assert worker.ask({**order, "new_tokens": 5})["tokens"] == 5
        with pytest.raises(bench.workers.OrderFailed, match="thirteen"):
            worker.ask({**order, "new_tokens": 13})
        assert worker.ask({**order, "new_tokens": 6})["tokens"] == 6
        assert reaches(child, "T")
        raise KeyboardInterrupt
    assert reaches(child, "Z-")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_a_worker_that_dies_is_reported_with_the_end_of_its_log(bench: Any, tmp_path: Path) -> None:
    """A peer that crashes must cost its own figures only, and say why."""
    program = tmp_path / "worker.py"
    program.write_text(WORKER.format(peers=str(BENCH / "peers")))
    with bench.workers.Workers(tmp_path) as running:
        worker = running.start(bench.workers.Contestant("fake", [sys.executable, str(program)], {}))
        child = worker.details["child"]
        with pytest.raises(bench.workers.WorkerFailed, match=r"it has ended.*\n.*chatter"):
            worker.ask({"do": "batch", "prompts": [], "adapters": [], "new_tokens": 99})
        running.end("fake")
        assert "fake" not in running
        assert reaches(child, "Z-")
