"""What an evaluation leaves behind: a Score, and one RowOutput a row with the raw text the model wrote.

A score carries what produced it (task version, metric version, prompts' hash, the model's digest) and its evidence, so it can be compared, tested
against another one, and folded again long after the models are gone. Files are JSON and JSONL, written whole or not at all.

Used by eval.evaluate, eval.leaderboard, workflows and the hub's cards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from atoll.errors import DataError, TaskError
from atoll.eval.metrics import Evidence, Matrix, metrics
from atoll.eval.stats import paired_p
from atoll.files import write_file

Kind = Literal["base", "lora", "reft", "lora+reft", "composed", "endpoint"]  # of an adapter: what the hub calls it
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Score:
    """One model's result on one task, asked in one prompt style.

    task, task_version: the task and the digest of its test rows. metric, metric_version, match: the definition. n: rows. value, stderr: see the
    metric; stderr is None for a single row. failures: rows without a usable answer (empty, cut, unreadable, broken off), each counted as wrong.
    model, kind, digest: whose score. prompt_style: "plain" or "chat". prompt_hash: over the prompts' tokens; rows_hash: over the gold answers.
    prompts_cut: prompts shortened at their beginning to fit the context. max_new_tokens, stop: the generation limits.
    options_value: accuracy of the likeliest label, where the label set is closed; options_stderr its standard error.
    seconds: wall time of the run, None when it shared batches with others. values, evidence: a row each, in the order of the test set.
    """

    task: str
    task_version: str
    metric: str
    metric_version: int
    match: str | None
    n: int
    value: float
    stderr: float | None
    failures: int
    model: str
    kind: str
    digest: str
    prompt_style: str
    prompt_hash: str
    rows_hash: str
    prompts_cut: int
    max_new_tokens: int
    stop: tuple[str, ...]
    options_value: float | None = None
    options_stderr: float | None = None
    seconds: float | None = None
    values: tuple[float | None, ...] = ()
    evidence: tuple[Evidence, ...] = ()

    def matrix(self) -> Matrix:
        """The evidence as `[n, k]`."""
        return np.array(self.evidence, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that from_json turns back into an equal Score; NaN is written as null."""
        return {**asdict(self), "stop": list(self.stop), "values": list(self.values), "evidence": [_without_nan(row) for row in self.evidence]}

    @classmethod
    def from_json(cls, value: Any) -> Score:
        """The inverse of to_json; raises DataError for anything else."""
        given = _exact_keys(cls, value, "a score")
        try:
            evidence = tuple(_with_nan(row) for row in given["evidence"])
            score = cls(**{**given, "stop": tuple(given["stop"]), "values": tuple(given["values"]), "evidence": evidence})
            whole = len(evidence) == len(score.values) == score.n and math.isfinite(score.value) and score.kind in KINDS
        except (TypeError, ValueError) as problem:
            raise DataError(f"a score holds a value of the wrong type: {problem}", hint="evaluate again") from problem
        if not whole:
            raise DataError(f"the score of {score.model!r} on {score.task!r} contradicts itself (rows, value or kind)", hint="evaluate again")
        return score


@dataclass(frozen=True)
class RowOutput:
    """One row's raw output and what it was worth.

    index, where: which test row. prompt_hash: over its prompt's tokens. prediction: the text as generated. gold: the answer it was scored against.
    value: 0..1, None where the metric has no row value. failed: no usable answer. finish_reason: why generation ended. num_tokens: how many were
    generated. option: the likeliest label, where options were scored.
    """

    index: int
    where: str
    prompt_hash: str
    prediction: str
    gold: str
    value: float | None
    failed: bool
    finish_reason: str
    num_tokens: int
    option: str | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that from_json turns back into an equal RowOutput."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> RowOutput:
        """The inverse of to_json; raises DataError for anything else."""
        return cls(**_exact_keys(cls, value, "an output"))


def p_value(score: Score, base: Score) -> float:
    """Two-sided p of the paired test that `score` and `base` are equally good.

    Raises TaskError unless both were measured by the same metric version on the same rows.
    """
    for name in ("task", "rows_hash", "n", "metric", "metric_version", "match"):
        if getattr(score, name) != getattr(base, name):
            raise TaskError(
                f"{score.model!r} and {base.model!r} cannot be compared on {score.task!r}: "
                f"{name} is {getattr(score, name)!r} for one and {getattr(base, name)!r} for the other",
                hint="evaluate both again on the same test rows",
            )
    kind = metrics()[score.metric]
    return paired_p(kind.aggregate, kind.is_mean, score.matrix(), base.matrix())


def better_base(scores: Iterable[Score]) -> Score:
    """The base's score in its better prompt style, by value; at equal values the first. Raises TaskError without any."""
    candidates = list(scores)
    if not candidates:
        raise TaskError("there is no score of the base to compare with", hint="evaluate the base on this task")
    return max(candidates, key=lambda score: score.value)


def write_score(path: Path, score: Score) -> None:
    """Write one score as JSON, whole or not at all. Raises StorageError."""
    write_file(path, json.dumps(score.to_json(), allow_nan=False, ensure_ascii=False) + "\n")


def read_score(path: Path) -> Score:
    """The score of a file; raises DataError naming it when it is missing or no score."""
    return Score.from_json(_parse(_read(path), str(path)))


def write_outputs(path: Path, outputs: Iterable[RowOutput]) -> None:
    """Write raw outputs as JSONL, one row a line, whole or not at all. Raises StorageError."""
    # Escaped to ASCII: a model can generate half a surrogate pair, which UTF-8 cannot hold but an escape can.
    write_file(path, "".join(json.dumps(output.to_json(), allow_nan=False) + "\n" for output in outputs))


def read_outputs(path: Path) -> list[RowOutput]:
    """The raw outputs of a file; raises DataError naming file and line."""
    lines = _read(path).split("\n")
    return [RowOutput.from_json(_parse(line, f"{path}:{number}")) for number, line in enumerate(lines, start=1) if line]


def parse_json_file(path: Path) -> Any:
    """The JSON value of a file; raises DataError naming it."""
    return _parse(_read(path), str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} could not be read: {problem}", hint="evaluate again to write it anew") from problem


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{where} is not JSON: {problem}", hint="the file was damaged or edited; evaluate again to write it anew") from problem


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _exact_keys(kind: type, value: Any, what: str) -> Mapping[str, Any]:
    expected = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != expected:
        found = sorted(expected ^ value.keys()) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{what} does not have the expected keys; they differ in: {found}", hint="it was written by another version; evaluate again")
    return value


def _without_nan(row: Evidence) -> list[float | None]:
    return [None if math.isnan(number) else number for number in row]


def _with_nan(row: list[float | None]) -> Evidence:
    return tuple(math.nan if number is None else float(number) for number in row)
