"""The report of a composition: what was made of what, a line for each contestant, what it took, and advice.

Every figure says on what it stands: held-out losses on the examples, scores on test rows, mean and spread over seeds. A gain is paired: both
contestants met the same rows or folds. The report is a file beside the adapter, and its figures go into the adapter's manifest.

Used by compose.py; the command line prints it, the server sends it. The advice is compose_advice.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from atoll.errors import DataError
from atoll.eval.metrics import metrics
from atoll.eval.score import Score
from atoll.eval.stats import mean_stderr

_T = (12.7, 4.3, 3.2, 2.8, 2.6, 2.4, 2.4, 2.3, 2.3)  # 97.5 % of Student's t for 1 to 9 degrees of freedom; 2 beyond


def counted(num: float, what: str) -> str:
    """ "1 example", "3 examples", "1,240 examples"."""
    return f"{num:,g} {what}{'' if num == 1 else 's'}" if num < 1e6 else f"{num:,.0f} {what}s"


@dataclass(frozen=True)
class Gain:
    """How much better one contestant is than another: a difference of scores, or how much smaller a loss is. stderr None: cannot be told.

    clear_beyond: how many standard errors make it clear; more than 2 where the error itself stands on few numbers.
    """

    value: float
    stderr: float | None
    clear_beyond: float = 2.0

    @classmethod
    def over_folds(cls, value: float, stderr: float | None, num_folds: int) -> Gain:
        """A gain whose standard error is that of a mean over so many folds: Student's t decides."""
        return cls(value, stderr, _T[num_folds - 2] if 2 <= num_folds <= len(_T) + 1 else 2.0)

    @property
    def is_clear(self) -> bool:
        """Further from zero than `clear_beyond` standard errors, in either direction."""
        return self.stderr is not None and abs(self.value) > self.clear_beyond * self.stderr


@dataclass(frozen=True)
class Line:
    """One contestant. what: what it is. loss, loss_stderr: held out, in nats a label token, mean and its standard error over folds.

    scores, options: on the test rows, one a seed; options is the accuracy of the likeliest label. score_stderr: of the mean score, over test rows.
    gain: over the base, by score where there are test rows, else by loss. seconds: of making it, mean over seeds. note: why a figure is missing.
    """

    name: str
    what: str = ""
    loss: float | None = None
    loss_stderr: float | None = None
    scores: tuple[float, ...] = ()
    options: tuple[float, ...] = ()
    score_stderr: float | None = None
    gain: Gain | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def score(self) -> float | None:
        """The mean over seeds."""
        return sum(self.scores) / len(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    @property
    def option(self) -> float | None:
        """The mean accuracy of the likeliest label."""
        return sum(self.options) / len(self.options) if self.options else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score, "spread": self.spread, "option": self.option}


@dataclass(frozen=True)
class Listed:
    """An adapter of the shortlist: by what it was ranked, and its weight in the result.

    layer_weights: where each layer has its own, of which weight is the mean over the layers that the adapter acts on: `layers`, None for all. In the
    others it is 0.
    """

    name: str
    digest: str | None
    weight: float
    loss: float | None
    slope: float | None
    similarity: float | None
    layer_weights: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    @property
    def by_layer(self) -> tuple[float, ...] | None:
        """The weights of the layers that it acts on; None where it has one weight."""
        if self.layer_weights is None or self.layers is None:
            return self.layer_weights
        return tuple(self.layer_weights[layer] for layer in self.layers)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Listed:
        layers = {key: tuple(value[key]) for key in ("layer_weights", "layers") if value.get(key) is not None}
        return cls(**{**value, **layers})


@dataclass(frozen=True)
class Report:
    """All that is known of a composition.

    examples: k, those of one seed. seeds: those that were done. seed: the one that was kept, chosen by `chosen_by`, never by test rows. search: how
    it went. measure: what gains and advice stand on, "score", "loss" or "" for nothing. versus: what the composition gains over each contestant.
    took: seconds by part. stopped: what a stop left out, in a sentence, or "". energy_kept: the share of the updates' squared norm that is left where
    they were compressed to `rank`.
    """

    task: str
    base: str
    metric: str
    examples: int
    test_rows: int
    candidates: int
    method: str
    form: str
    rank: int
    seeds: tuple[int, ...]
    seed: int
    chosen_by: str
    search: Mapping[str, Any]
    shortlist: tuple[Listed, ...]
    lines: tuple[Line, ...] = ()
    measure: str = ""
    versus: Mapping[str, Gain] = field(default_factory=dict)
    options_gain: Gain | None = None
    advice: tuple[str, ...] = ()
    took: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""
    energy_kept: float = 1.0

    def line(self, name: str) -> Line | None:
        """The contestant of that name, or None."""
        return next((line for line in self.lines if line.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that from_json turns back into an equal report; means and spreads are added for readers."""
        return {**asdict(self), "lines": [line.to_json() for line in self.lines]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """The inverse of to_json. Raises DataError for anything else."""
        try:
            return cls(
                **{
                    **value,
                    "seeds": tuple(value["seeds"]),
                    "shortlist": tuple(Listed.from_json(one) for one in value["shortlist"]),
                    "lines": tuple(_line(one) for one in value["lines"]),
                    "versus": {name: Gain(**gain) for name, gain in value["versus"].items()},
                    "options_gain": None if value["options_gain"] is None else Gain(**value["options_gain"]),
                    "advice": tuple(value["advice"]),
                }
            )
        except (AttributeError, KeyError, TypeError) as problem:
            raise DataError(f"the report of a composition does not have the expected form: {problem}", hint="compose again") from problem

    def figures(self) -> dict[str, Any]:
        """What the adapter's manifest says of the controls: no times, so that the same composition is the same version."""
        kept = {}
        for line in self.lines:
            found = {"loss": line.loss, "loss_stderr": line.loss_stderr, "scores": list(line.scores), "options": list(line.options)}
            kept[line.name] = {key: value for key, value in found.items() if value not in (None, [])}
        return {name: found for name, found in kept.items() if found}


def _line(value: Mapping[str, Any]) -> Line:
    known = {key: found for key, found in value.items() if key not in ("score", "spread", "option")}
    gain = None if known["gain"] is None else Gain(**known["gain"])
    return Line(**{**known, "scores": tuple(known["scores"]), "options": tuple(known["options"]), "gain": gain})


def score_gain(mine: Sequence[Score], other: Sequence[Score]) -> Gain:
    """How much better `mine` are, one score a seed each, on the same rows.

    The standard error has two parts: over rows, of each row's difference averaged over seeds; and over seeds, of their mean differences.
    """
    pairs = list(zip(mine, other, strict=False))  # a stop may have left one of them out
    differences = [a.value - b.value for a, b in pairs]
    parts = [_rows_stderr(pairs)]
    if len(pairs) > 1:
        parts.append(mean_stderr(np.array(differences)))
    known = [part for part in parts if part is not None]
    return Gain(sum(differences) / len(differences), math.hypot(*known) if known else None)


def scores_stderr(scores: Sequence[Score]) -> float | None:
    """Standard error over rows of the mean of scores on the same rows, one a seed."""
    if not scores:
        return None
    if not metrics()[scores[0].metric].is_mean:
        return scores[0].stderr
    return mean_stderr(np.mean([score.matrix()[:, 0] for score in scores], axis=0))


def options_gain(mine: Sequence[Score], other: Sequence[Score]) -> Gain | None:
    """The same for the likeliest label, from the seeds' standard errors; None where labels are open."""
    pairs = [(a, b) for a, b in zip(mine, other, strict=False) if a.options_value is not None and b.options_value is not None]
    if not pairs:
        return None
    differences = [float(a.options_value or 0) - float(b.options_value or 0) for a, b in pairs]
    errors = [math.hypot(a.options_stderr, b.options_stderr) for a, b in pairs if a.options_stderr is not None and b.options_stderr is not None]
    return Gain(sum(differences) / len(differences), sum(errors) / len(errors) if errors else None)


def _rows_stderr(pairs: Sequence[tuple[Score, Score]]) -> float | None:
    if not metrics()[pairs[0][0].metric].is_mean:  # no value a row: as if the rows were not the same, which is too careful
        errors = [math.hypot(a.stderr, b.stderr) for a, b in pairs if a.stderr is not None and b.stderr is not None]
        return sum(errors) / len(errors) if errors else None
    return mean_stderr(np.mean([a.matrix()[:, 0] - b.matrix()[:, 0] for a, b in pairs], axis=0))
