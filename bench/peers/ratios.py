"""What the bench claims: which two measurements each ratio divides, and how rounds become one figure.

A machine's speed drifts between minutes, so a ratio is taken inside each round and its median over rounds is published with the smallest and largest.

Used by serve.py; pure functions, tested without a worker.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Measured = Mapping[tuple[str, str], Sequence[float | None]]  # (contestant, cell) -> output tokens per second in each round, None where not measured

# name: (contestant, cell) above, (contestant, cell) below, the floor that was promised
RATIOS: dict[str, tuple[tuple[str, str], tuple[str, str], float]] = {
    "base_vs_vllm": (("atoll", "base_128"), ("vllm", "base_128"), 2.0),
    "base_vs_vllm_32": (("atoll", "base_32"), ("vllm", "base_32"), 1.3),
    "mixed32_vs_vllm_base": (("atoll", "mixed32_128"), ("vllm", "base_128"), 1.5),
    "mixed32_vs_vllm_base_32": (("atoll", "mixed32_32"), ("vllm", "base_32"), 1.0),
    "mixed32_vs_vllm_lora": (("atoll", "mixed32_32"), ("vllm_lora", "mixed32_32"), 25.0),
    "mixed32_vs_peft": (("atoll", "mixed32_32"), ("peft", "mixed32_32"), 10.0),
    "mixed32_vs_mixed1": (("atoll", "mixed32_128"), ("atoll", "mixed1_128"), 0.65),
    "registered256_vs_mixed32": (("atoll", "registered256_128"), ("atoll", "mixed32_128"), 0.9),
    "single_vs_transformers": (("atoll", "single"), ("transformers", "single"), 2.5),
    "http_vs_inprocess": (("atoll_http", "base_128"), ("atoll", "base_128"), 0.9),
}


def compute_ratios(measured: Measured) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """(median, per-round values) of every ratio; None and [] where one side was never measured in the same round."""
    medians: dict[str, float | None] = {}
    rounds: dict[str, list[float]] = {}
    for name, (above, below, _floor) in RATIOS.items():
        pairs = zip(measured.get(above, ()), measured.get(below, ()), strict=False)
        rounds[name] = [round(a / b, 3) for a, b in pairs if a is not None and b is not None]
        medians[name] = round(statistics.median(rounds[name]), 3) if rounds[name] else None
    return medians, rounds


def find_missing(medians: Mapping[str, float | None], measured: Measured) -> dict[str, str]:
    """For each ratio without a value, the sentence that says why."""
    notes = {}
    for name, value in medians.items():
        if value is None:
            absent = [f"{contestant} {cell}" for contestant, cell in RATIOS[name][:2] if not any(measured.get((contestant, cell), ()))]
            notes[name] = f"not measured: {', '.join(absent)}" if absent else "its two sides were measured in different rounds only"
    return notes


def format_ratios(medians: Mapping[str, float | None], rounds: Mapping[str, Sequence[float]], notes: Mapping[str, str]) -> str:
    """A table: ratio, median, range, floor, and a word where the floor was missed."""
    lines = [f"{'ratio':26} {'median':>8} {'min..max':>15} {'floor':>6}"]
    for name, (_above, _below, floor) in RATIOS.items():
        value = medians[name]
        if value is None:
            lines.append(f"{name:26} {'-':>8} {'':>15} {floor:6.2f}  {notes[name]}")
            continue
        spread = f"{min(rounds[name]):.2f}..{max(rounds[name]):.2f}"
        lines.append(f"{name:26} {value:8.2f} {spread:>15} {floor:6.2f}  {'' if value >= floor else 'below the floor'}".rstrip())
    return "\n".join(lines)


def format_figures(measured: Measured, cells: Sequence[str], *, last_only: bool = False) -> str:
    """Output tokens per second, a row a cell and a column a contestant: of the last round, or medians over rounds."""
    contestants = list(dict.fromkeys(contestant for contestant, _cell in measured))
    lines = [f"{'output tokens/s':18}" + "".join(f"{name:>14}" for name in contestants)]
    for cell in cells:
        row = [measured.get((contestant, cell), ()) for contestant in contestants]
        if any(any(values) for values in row):
            lines.append(f"{cell:18}" + "".join(f"{_pick(values, last_only):>14}" for values in row))
    return "\n".join(lines)


def median_of(values: Sequence[float | None]) -> float | None:
    """The median of what is there."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def summarise(measured: Measured) -> dict[str, Any]:
    """Raw figures for the JSON line: contestant -> cell -> tokens per second of each round."""
    out: dict[str, Any] = {}
    for (contestant, cell), values in measured.items():
        out.setdefault(contestant, {})[cell] = [None if value is None else round(value, 1) for value in values]
    return out


def _pick(values: Sequence[float | None], last_only: bool) -> str:
    value = (values[-1] if values else None) if last_only else median_of(values)
    return "-" if value is None else f"{value:.1f}"
