"""The leaderboard: which model is best at which task, as leaderboard.json and as a page of Markdown.

The file has a fixed form, checked when it is written and when it is read:
{"base": {"name", "fingerprint"}, "rows": [{"task", "task_version", "metric", "n", "entries": [{"model", "kind", "digest", "value", "stderr",
"failures", "p_vs_base", "options_value"}]}]}. A row is one task measured on the same test rows; its base entry is the base in its better prompt
style, and every p_vs_base is against that. All metrics are better when higher.

Used by workflows, the command line and the server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from atoll.errors import BaseMismatch, DataError
from atoll.eval.baseline import Baseline
from atoll.eval.score import KINDS, Score, better_base, p_value, parse_json_file
from atoll.files import write_file
from atoll.train.cost import Cost, price_text

JSON_NAME, MARKDOWN_NAME = "leaderboard.json", "leaderboard.md"
REDO = "it was written by another version or edited; run the evaluation again"


@dataclass(frozen=True)
class LeaderboardEntry:
    """One model on one task. None stands for no number: stderr of a single row, p_vs_base of the base, options_value without a closed label set."""

    model: str
    kind: str
    digest: str
    value: float
    stderr: float | None
    failures: int
    p_vs_base: float | None
    options_value: float | None


@dataclass(frozen=True)
class LeaderboardRow:
    """One task on one set of `n` test rows, and everyone's entry: the base first, then by falling value."""

    task: str
    task_version: str
    metric: str
    n: int
    entries: tuple[LeaderboardEntry, ...]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes two rows the same measurement."""
        return self.task, self.task_version, self.metric, self.n

    @property
    def base(self) -> LeaderboardEntry | None:
        """The base's entry, or None."""
        return next((entry for entry in self.entries if entry.kind == "base"), None)


@dataclass(frozen=True)
class Leaderboard:
    """A base, named and fingerprinted, and a row a task, sorted by task."""

    base_name: str
    base_fingerprint: str
    rows: tuple[LeaderboardRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of leaderboard.json."""
        return {
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "rows": [{**asdict(row), "entries": [asdict(entry) for entry in row.entries]} for row in self.rows],
        }

    @classmethod
    def from_json(cls, value: Any) -> Leaderboard:
        """The inverse of to_json; raises DataError naming the place that has not the fixed form."""
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key != "costs"}  # what `atoll leaderboard --json` says beside the form
        given = _object(value, ("base", "rows"), "leaderboard")
        base = _object(given["base"], ("name", "fingerprint"), "leaderboard.base")
        rows = []
        for number, item in enumerate(_list(given["rows"], "leaderboard.rows")):
            where = f"leaderboard.rows[{number}]"
            row = _object(item, tuple(ROW_TYPES), where)
            entries = [_entry(entry, f"{where}.entries[{place}]") for place, entry in enumerate(_list(row["entries"], f"{where}.entries"))]
            rows.append(LeaderboardRow(**{**_typed(row, ROW_TYPES, where), "entries": _ranked(entries)}))
        names = _typed(base, {"name": (str,), "fingerprint": (str,)}, "leaderboard.base")
        board = cls(names["name"], names["fingerprint"], _sorted(rows))
        if len({row.key for row in board.rows}) != len(board.rows):
            raise DataError("the leaderboard has two rows for one task, version, metric and n", hint=REDO)
        return board


class Size(NamedTuple):
    """How large an adapter is: its trained numbers, and the bytes of its files. None where the hub has not counted."""

    num_parameters: int | None
    num_bytes: int


@dataclass(frozen=True)
class RowNote:
    """What the page says of a row beside the file: the constant answer's score, the style in which the base did better, adapters' sizes and costs by
    digest.
    """

    majority: Baseline | None = None
    base_prompt_style: str = ""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)


def beats(entry: LeaderboardEntry, base: LeaderboardEntry) -> bool:
    """Whether `entry` is above `base` by more than the standard error of their difference, sqrt(se² + se_base²); without errors, never."""
    if entry.stderr is None or base.stderr is None:
        return False
    return entry.value - base.value > math.hypot(entry.stderr, base.stderr)


def build_leaderboard(base_name: str, base_fingerprint: str, scores: Iterable[Score]) -> Leaderboard:
    """Scores as a leaderboard: those of the base in several styles become its better one, all others are tested against it.

    Of several scores of one model (same kind and digest) the best prompt style of a base counts, else the last given. Raises TaskError when two
    scores of a row were not measured on the same prompts' rows.
    """
    grouped: dict[tuple[str, str, str, int], list[Score]] = {}
    for score in scores:
        grouped.setdefault((score.task, score.task_version, score.metric, score.n), []).append(score)
    rows = []
    for (task, version, metric, n), group in grouped.items():
        bases = [score for score in group if score.kind == "base"]
        base = better_base(bases) if bases else None
        others = {(score.kind, score.model, score.digest): score for score in group if score.kind != "base"}
        entries = [_entry_of(base, None)] if base else []
        entries += [_entry_of(score, p_value(score, base) if base else None) for score in others.values()]
        rows.append(LeaderboardRow(task, version, metric, n, _ranked(entries)))
    return Leaderboard(base_name, base_fingerprint, _sorted(rows))


def merge_leaderboards(older: Leaderboard, newer: Leaderboard) -> Leaderboard:
    """Both boards' rows; where both have an entry of the same model (kind, name and digest) in the same row, the newer one.

    Another version of a task, or another n, is another row. A base entry of `newer` takes the place of the older one. Raises BaseMismatch for boards
    of different bases.
    """
    if older.base_fingerprint != newer.base_fingerprint:
        raise BaseMismatch(
            f"the leaderboards are of different bases: {older.base_name!r} ({older.base_fingerprint[:16]}) and "
            f"{newer.base_name!r} ({newer.base_fingerprint[:16]})",
            hint="keep one leaderboard a base",
        )
    rows = {row.key: row for row in older.rows}
    for row in newer.rows:
        entries = {_identity(entry): entry for entry in (rows[row.key].entries if row.key in rows else ())}
        entries |= {_identity(entry): entry for entry in row.entries}
        rows[row.key] = replace(row, entries=_ranked(entries.values()))
    return Leaderboard(newer.base_name, newer.base_fingerprint, _sorted(rows.values()))


def write_leaderboard(folder: Path, board: Leaderboard, notes: Mapping[str, RowNote] | None = None) -> tuple[Path, Path]:
    """Write leaderboard.json and leaderboard.md into `folder`, each whole or not at all; returns their paths. notes: by task name.

    Raises DataError if the board has a number that is not finite (nothing is written), StorageError.
    """
    checked = Leaderboard.from_json(board.to_json())
    paths = folder / JSON_NAME, folder / MARKDOWN_NAME
    write_file(paths[0], json.dumps(checked.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(paths[1], render_markdown(checked, notes))
    return paths


def read_leaderboard(path: Path) -> Leaderboard:
    """The leaderboard of a file, or of the leaderboard.json in a folder; raises DataError naming file and place when it has not the fixed form."""
    file = path / JSON_NAME if path.is_dir() else path
    try:
        return Leaderboard.from_json(parse_json_file(file))
    except DataError as problem:
        raise DataError(f"{file}: {problem.message}", hint=problem.hint) from problem


def render_markdown(board: Leaderboard, notes: Mapping[str, RowNote] | None = None) -> str:
    """The page: one line an adapter, beside the base and the constant answer, with the verdict in words; below it how to read the columns."""
    notes = notes or {}
    asked, model = ("task", "metric", "n", "majority", "base"), ("model", "kind", "parameters", "bytes", "CPU-seconds", "cost")
    head = (*asked, *model, "score", "gain", "p", "failures", "options (base)", "verdict")
    lines = [_line(head), _line(["---", "---", *["---:"] * 3, "---", "---", *["---:"] * 9, "---"])]
    for row in board.rows:
        lines += [_line(cells) for cells in _cells(row, notes.get(row.task, RowNote()))]
    return "\n".join([f"# Leaderboard: {_escape(board.base_name)}", "", f"Base fingerprint `{board.base_fingerprint}`.", "", *lines, "", READING, ""])


READING = """How to read it. Scores are from 0 to 1 (correlations from -1), higher is better, ± is one standard error. *base* is the base model with
the task's prompt, plain or inside its chat template, whichever scored higher (named where known). *majority* gives every row the most common
training answer. *parameters* are an adapter's trained numbers, *bytes* its files. *CPU-seconds* are what its training took of all processors, *cost*
the price of that at the rates of its run: price_per_hour * hours + price_per_cpu_hour * CPU-hours. *failures* counts outputs without a usable
answer; they count as wrong. *gain* is score minus base; *p* is the two-sided paired test that there is no difference. *options* is how often the
right label was the likeliest one, for closed label sets, and in brackets the same for the base. *verdict*: better or worse when the gain is larger
than its own standard error, else no difference."""

ROW_TYPES: Mapping[str, tuple[type, ...]] = {"task": (str,), "task_version": (str,), "metric": (str,), "n": (int,), "entries": (list,)}
ENTRY_TYPES: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "kind": (str,),
    "digest": (str,),
    "value": (float, int),
    "stderr": (float, int, type(None)),
    "failures": (int,),
    "p_vs_base": (float, int, type(None)),
    "options_value": (float, int, type(None)),
}


def _entry_of(score: Score, p: float | None) -> LeaderboardEntry:
    return LeaderboardEntry(score.model, score.kind, score.digest, score.value, score.stderr, score.failures, p, score.options_value)


def _identity(entry: LeaderboardEntry) -> tuple[str, ...]:
    return ("base",) if entry.kind == "base" else (entry.kind, entry.model, entry.digest)


def _ranked(entries: Iterable[LeaderboardEntry]) -> tuple[LeaderboardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.kind != "base", -entry.value, entry.model, entry.digest)))


def _sorted(rows: Iterable[LeaderboardRow]) -> tuple[LeaderboardRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.key))


def _cells(row: LeaderboardRow, note: RowNote) -> list[list[str]]:
    base = row.base
    others = [entry for entry in row.entries if entry.kind != "base"]
    style = f" ({note.base_prompt_style})" if note.base_prompt_style else ""
    start = [
        row.task,
        row.metric,
        str(row.n),
        _number(note.majority.value if note.majority else None),
        f"{_measured(base)}{style}" if base else "-",
    ]
    base_failures = f" (base {base.failures})" if base else ""
    lines = []
    for entry in others:
        options = _number(entry.options_value)
        if base and base.options_value is not None:
            options += f" ({_number(base.options_value)})"
        gain = f"{entry.value - base.value:+.3f}" if base else "-"
        known = note.sizes.get(entry.digest)
        sizes = [_count(known.num_parameters if known else None), _count(known.num_bytes if known else None)]
        failures = f"{entry.failures}{base_failures}"
        cost = note.costs.get(entry.digest)
        took = _count(round(cost.cpu_seconds)) if cost and cost.cpu_seconds is not None else "-"
        sizes += [took, (price_text(cost) if cost else None) or "-"]
        result = [_measured(entry), gain, _p(entry.p_vs_base), failures, options, _verdict(entry, base)]
        lines.append([*start, entry.model, entry.kind, *sizes, *result])
    if base and not others:
        lines.append([*start, *["-"] * 9, f"-{base_failures}", f"- ({_number(base.options_value)})", "base only"])
    return lines


def _verdict(entry: LeaderboardEntry, base: LeaderboardEntry | None) -> str:
    if base is None:
        return "no base"
    return "better" if beats(entry, base) else "worse" if beats(base, entry) else "no difference"


def _measured(entry: LeaderboardEntry) -> str:
    return _number(entry.value) + ("" if entry.stderr is None else f" ± {entry.stderr:.3f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _object(value: Any, keys: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, expected an object with {', '.join(keys)}", hint=REDO)
    if value.keys() != set(keys):
        missing, extra = sorted(set(keys) - value.keys()), sorted(value.keys() - set(keys))
        raise DataError(f"{where} has other keys than the fixed ones: missing {missing or 'none'}, unknown {extra or 'none'}", hint=REDO)
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} is {type(value).__name__}, expected a list", hint=REDO)
    return value


def _typed(value: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    for key, kinds in types.items():
        found = value[key]
        good = isinstance(found, kinds) and not isinstance(found, bool)
        if not good or (isinstance(found, float) and not math.isfinite(found)):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise DataError(f"{where}.{key} is {found!r}, expected {expected}", hint=REDO)
    return dict(value)


def _entry(value: Any, where: str) -> LeaderboardEntry:
    entry = LeaderboardEntry(**_typed(_object(value, tuple(ENTRY_TYPES), where), ENTRY_TYPES, where))
    if entry.kind not in KINDS:
        raise DataError(f"{where}.kind is {entry.kind!r}, expected one of {', '.join(KINDS)}", hint=REDO)
    return entry
