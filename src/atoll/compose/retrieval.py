"""Which adapters of a hub are worth composing for a new task: measure them all, pass the best few on to the search.

Three measures, from dear to cheap:

    loss     the mean label loss of the examples under each adapter alone, at weight 1; many adapters are one batch
    slope    -dL/dwᵢ at w = 0 in the exact sum: what the first bit of each adapter gains. One forward and backward of the base for many adapters
    text     likeness of the task's description and what an adapter says of itself; needs no model

A hub of hundreds never stands in memory: adapters are read in chunks, measured and let go. One that is broken or does not fit is left out, with a
sentence that says so. Every measure is kept example by example, so the ranking that some of the examples alone would give, as cross-validation needs
it, costs nothing more.

Used by workflows and controls.py. Measuring is in measuring.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from atoll.compose.measuring import Candidate as Candidate
from atoll.compose.measuring import Measuring
from atoll.compose.run import Report
from atoll.compose.text_similarity import similarity as similarity
from atoll.data.encode import EncodedRow
from atoll.errors import ConfigError
from atoll.model.decoder import Decoder
from atoll.model.memory import keep_freed_memory, release_memory
from atoll.train.interrupt import interruptible

By = Literal["auto", "loss", "slope", "text"]
MEASURED = 64  # candidates among which losses decide; of more, slope and text choose so many first
SAMPLED = 32  # examples that candidates are measured on; of more, so many are drawn: enough to tell which adapters are worth a search


@dataclass(frozen=True)
class Ranked:
    """A candidate by its index, and what is known of it; None is not measured. loss in nats a label token, slope in nats a unit of weight.

    A smaller loss is better, of the others a greater value.
    """

    index: int
    loss: float | None = None
    slope: float | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Every measure of N candidates on k examples, float32 and NaN where not taken (at most SAMPLED examples are measured on).

    losses, slopes [N, k]; likeness [N]; base [k], the base's own losses; usable [N] bool: not found broken or misfitting. left_out: a sentence for
    each of those that was.
    """

    by: By
    losses: Tensor
    slopes: Tensor
    likeness: Tensor
    base: Tensor
    usable: Tensor
    left_out: tuple[str, ...]

    def best(self, top_k: int, examples: Sequence[int] | None = None) -> list[Ranked]:
        """At most top_k candidates, best first, as some of the examples (None: all) alone would rank them.

        Raises ConfigError for a top_k below 1, and where no candidate is usable.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}, expected at least 1 adapter", hint="10 is a good start")
        if not bool(self.usable.any()):
            raise ConfigError("no adapter is left to compose", hint=self.left_out[0] if self.left_out else "name at least one adapter of the hub")
        chosen = list(range(self.losses.shape[1])) if examples is None else list(examples)
        loss, slope = self.losses[:, chosen].nanmean(1), self.slopes[:, chosen].nanmean(1)
        among = self.finalists(chosen)
        value = {"slope": slope, "text": self.likeness}.get(self.by, -loss)
        order = _descending(value, among)[:top_k]
        return [Ranked(index, _number(loss[index]), _number(slope[index]), _number(self.likeness[index])) for index in order]

    def finalists(self, examples: Sequence[int]) -> list[int]:
        """The usable candidates that the last measure decides among: all, or the MEASURED that slope on these examples and text choose in turn."""
        everyone = self.usable.nonzero().flatten().tolist()
        if self.by != "auto" or len(everyone) <= MEASURED:
            return everyone
        orders = [self.slopes[:, list(examples)].nanmean(1), self.likeness]
        return _in_turn([_descending(order, everyone) for order in orders if not bool(order[everyone].isnan().all())], MEASURED)


def rank(
    candidates: Sequence[Candidate],
    decoder: Decoder,
    rows: Sequence[EncodedRow],
    *,
    by: By = "auto",
    description: str = "",
    subsets: Sequence[Sequence[int]] = (),
    report: Report | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> Ranking:
    """Measure candidates on examples encoded as for training.

    by: "loss", "slope", "text" (needs a description), or "auto": by loss, and of more than MEASURED candidates among those that slope and, with a
    description, text choose. subsets: the groups of examples, beside all of them, that `Ranking.best` will be asked for.

    Where there are more than SAMPLED examples, candidates are measured on so many, the same in every call.

    Raises ConfigError for no candidates, an unknown `by`, or text without a description; DataError as LabelLosses does; Interrupted on Ctrl-C or once
    stop_asked() is true.
    """
    if not candidates:
        raise ConfigError("there are no adapters to compose", hint="train or publish some for this base first")
    if by not in get_args(By):
        raise ConfigError(f"adapters cannot be ranked by {by!r}", hint=f"choose one of {', '.join(get_args(By))}")
    if by == "text" and not description.strip():
        raise ConfigError("adapters can be ranked by text only with a description of the task", hint="describe the task, or rank by loss")
    texts = [candidate.text for candidate in candidates]
    likeness = torch.tensor(similarity(description, texts) if description.strip() else [math.nan] * len(texts), dtype=torch.float32)
    keep_freed_memory()
    try:
        with interruptible() as interrupted:
            sample = sorted(random.Random("atoll ranking").sample(range(len(rows)), min(len(rows), SAMPLED)))
            work = Measuring(candidates, decoder, rows, sample, report, lambda: interrupted() or (stop_asked is not None and stop_asked()))
            everyone = range(len(candidates))
            if by == "text":
                work.check(everyone)
            if by == "slope" or (by == "auto" and len(candidates) > MEASURED):
                work.measure_slopes(everyone)
            ranking = _so_far(by, work, likeness)
            if by in ("auto", "loss"):
                wanted = {index for subset in (range(len(rows)), *subsets) for index in ranking.finalists(subset)}
                work.measure_losses(sorted(wanted))
                ranking = _so_far(by, work, likeness)
            return ranking
    finally:
        release_memory()


def _so_far(by: By, work: Measuring, likeness: Tensor) -> Ranking:
    usable = torch.tensor([index not in work.refused for index in range(len(likeness))])
    return Ranking(by, work.losses, work.slopes, likeness, work.base, usable, tuple(work.refused[index] for index in sorted(work.refused)))


def _descending(values: Tensor, among: Iterable[int]) -> list[int]:
    """Indices by their values, greatest first, equal ones in order; what is not a number comes last."""
    return sorted(among, key=lambda index: (bool(values[index].isnan()), -float(values[index].nan_to_num(0.0)), index))


def _in_turn(orders: Sequence[Sequence[int]], num: int) -> list[int]:
    """The first `num` different indices of several orders of the same indices, taken in turn."""
    return list(dict.fromkeys(index for places in zip(*orders, strict=True) for index in places))[:num]


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
