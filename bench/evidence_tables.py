"""What compose_evidence.py keeps of one task, and the Markdown tables that it makes of many: pure functions, tested without a model.

Three scores of an answer, since a gain may be of form alone:

    strict      the task's metric on the whole text; on BIG-Bench Hard LoraHub's rule: equal without case, full stops and outer blanks
    first_line  the same of the first line that is not empty
    options     whether the right label is the likeliest one, where labels are a closed set
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MEASURES = ("strict", "first_line", "options")


@dataclass(frozen=True)
class Entry:
    """One task at one k: for each contestant and measure a score a seed; and what is known of how they came about.

    seconds: of making a contestant, a seed. notes: what else a reader should know, such as the adapters with the largest weights.
    """

    task: str
    k: int
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        return cls(**value)

    def mean(self, contestant: str, measure: str) -> float | None:
        """Over seeds; None where it was not measured."""
        found = self.scores.get(contestant, {}).get(measure, ())
        return statistics.fmean(found) if found else None


def plain(text: str) -> str:
    """A text as LoraHub compares it."""
    return text.strip().lower().replace(".", "")


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")


def contestants_of(entries: Sequence[Entry]) -> list[str]:
    """All names, in order of appearance."""
    return list(dict.fromkeys(name for entry in entries for name in entry.scores))


def task_table(entries: Sequence[Entry], measure: str) -> str:
    """A row a task, a column a contestant: the mean over seeds, in per cent, the best in bold; and their mean over tasks."""
    names = contestants_of(entries)
    lines = [f"| task | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for entry in entries:
        lines.append(_row(entry.task, [entry.mean(name, measure) for name in names]))
    means = []
    for name in names:
        found = [value for entry in entries if (value := entry.mean(name, measure)) is not None]
        means.append(statistics.fmean(found) if len(found) == len(entries) else None)
    return "\n".join([*lines, _row("**mean**", means)])


def summary_table(entries: Sequence[Entry], mine: str = "composed") -> str:
    """A row a contestant: mean over tasks ± the standard deviation of that mean over seeds, for each measure; and what `mine` gains over it.

    The gain is in `strict`, its error the standard error over tasks of the tasks' differences; beside it, in how many tasks `mine` is better.
    """
    lines = ["| contestant | strict | first line | options | gain of composed | better in | s |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name in contestants_of(entries):
        cells = [_with_spread(*over_seeds(entries, name, measure)) for measure in MEASURES]
        if name == mine:
            gain, better = "", ""
        else:
            differences = paired(entries, mine, name)
            gain = _with_spread(*_mean_and_error(differences), sign=True)
            better = f"{sum(difference > 0 for difference in differences)} of {len(differences)}" if differences else "-"
        seconds = [second for entry in entries for second in entry.seconds.get(name, ())]
        lines.append(f"| {name} | {' | '.join(cells)} | {gain} | {better} | {f'{statistics.fmean(seconds):.0f}' if seconds else ''} |")
    return "\n".join(lines)


def over_seeds(entries: Sequence[Entry], name: str, measure: str) -> tuple[float | None, float | None]:
    """(mean over tasks and seeds, standard deviation over seeds of the mean over tasks), of tasks where the measure is there."""
    rows = [found for entry in entries if (found := entry.scores.get(name, {}).get(measure))]
    if not rows:
        return None, None
    seeds = min(map(len, rows))
    means = [statistics.fmean(row[seed] for row in rows) for seed in range(seeds)]
    return statistics.fmean(means), statistics.stdev(means) if seeds > 1 else None


def paired(entries: Sequence[Entry], mine: str, other: str, measure: str = "strict") -> list[float]:
    """For each task, how much better `mine` is than `other`, both means over seeds."""
    pairs = [(entry.mean(mine, measure), entry.mean(other, measure)) for entry in entries]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _with_spread(value: float | None, spread: float | None, *, sign: bool = False) -> str:
    """In per cent."""
    if value is None:
        return "-"
    shown = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return shown if spread is None else f"{shown} ± {100 * spread:.1f}"


def _row(title: str, values: Sequence[float | None]) -> str:
    best = max((value for value in values if value is not None), default=None)
    shown = ["-" if value is None else f"**{100 * value:.0f}**" if value == best else f"{100 * value:.0f}" for value in values]
    return f"| {title} | {' | '.join(shown)} |"
