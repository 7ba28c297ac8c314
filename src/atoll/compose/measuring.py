"""Losses and slopes of many adapters, one chunk of them in memory at a time.

An adapter whose numbers are not finite, or that does not fit the base, must not spoil those beside it: in a batch where adapters are run stacked, a
NaN of one is a NaN of all. So each is looked at before it joins a chunk, and a chunk that still gives no numbers is measured one by one.

Used by retrieval.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.compose.losses import LabelLosses, check_rows
from atoll.compose.objective import Scores
from atoll.compose.pool import Pool, why_not
from atoll.compose.run import Report
from atoll.data.encode import EncodedRow
from atoll.errors import AtollError, Interrupted
from atoll.model.adapter import Adapter
from atoll.model.decoder import Decoder

CHUNK = 16  # adapters in memory at a time,
CHUNK_PARAMETERS = 100_000_000  # and fewer where they are large: 16 of rank 16 at all linears of a base of 135 M have 78 M

Chunk = list[tuple[int, Adapter]]  # candidates by index


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be composed. text: what is known of its task. load reads it; an AtollError or OSError there leaves it out."""

    name: str
    digest: str | None
    text: str
    load: Callable[[], Adapter]


def alone(scores: Scores) -> Tensor:
    """[N, k] float32: the scores of the examples under each adapter alone, at weight 1."""
    examples = range(scores.num_examples)
    return torch.cat([scores.scores(part, examples) for part in torch.eye(scores.num_adapters).split(scores.at_once(examples))])


def slopes(scores: Scores, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(-dL/dw at w = 0 [N, G], L [G]) for the mean score L of each group's examples. float32. Needs scores that are differentiable."""
    gradients, values = torch.empty(scores.num_adapters, len(groups)), torch.empty(len(groups))
    for place, group in enumerate(groups):
        weights = torch.zeros(1, scores.num_adapters, requires_grad=True)
        total = 0.0
        with torch.enable_grad():
            for portion in scores.portions(group, 1):
                mean = scores.scores(weights, portion).sum() / len(group)
                mean.backward()
                total += float(mean.detach())
        assert weights.grad is not None
        gradients[:, place], values[place] = -weights.grad[0], total
    return gradients, values


class Measuring:
    """Measures of N candidates on k examples, as far as they are taken; NaN where not.

    losses, slopes [N, k] float32; base [k]: the base's own losses; refused: by index, why a candidate is left out.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        decoder: Decoder,
        rows: Sequence[EncodedRow],
        sample: Sequence[int],
        report: Report | None,
        stop_asked: Callable[[], bool],
    ) -> None:
        """sample: the examples to measure on."""
        check_rows(rows, decoder.shape.context)
        self.losses = torch.full((len(candidates), len(rows)), math.nan)
        self.slopes = torch.full((len(candidates), len(rows)), math.nan)
        self.base = torch.full((len(rows),), math.nan)
        self.refused: dict[int, str] = {}
        self._candidates, self._decoder = candidates, decoder
        self._sample, self._rows = list(sample), [rows[example] for example in sample]
        self._report, self._stop_asked = report, stop_asked

    def check(self, indices: Iterable[int]) -> None:
        """Only look at each candidate, and let it go."""
        self._by_chunks(indices, "read adapters", lambda chunk: None)

    def measure_losses(self, indices: Iterable[int]) -> None:
        """Losses at weight 1, and the base's beside the first chunk."""
        self._by_chunks(indices, "rank by loss", lambda chunk: self._measure(chunk, self._losses_of))

    def measure_slopes(self, indices: Iterable[int]) -> None:
        """Slopes of each example at w = 0, and the base's losses on the way."""
        self._by_chunks(indices, "rank by slope", lambda chunk: self._measure(chunk, self._slopes_of))

    def _measure(self, chunk: Chunk, measure: Callable[[Chunk], bool]) -> None:
        if measure(chunk):
            return
        if len(chunk) > 1:
            for one in chunk:
                self._measure([one], measure)
        else:
            index = chunk[0][0]
            self.refused[index] = f"{self._candidates[index].name} is left out: under it the examples have no finite loss"

    def _losses_of(self, chunk: Chunk) -> bool:
        """Whether the chunk's losses are finite; they are kept then. Those of the base come with the first."""
        losses = self._label_losses(chunk)
        found = alone(losses)
        if not bool(torch.isfinite(found).all()):
            return False
        self.losses[self._places(chunk)] = found
        if bool(self.base.isnan().all()):
            self.base[self._sample] = losses.scores(torch.zeros(1, len(chunk)), range(len(self._rows)))[0]
        return True

    def _slopes_of(self, chunk: Chunk) -> bool:
        found, values = slopes(self._label_losses(chunk), [[example] for example in range(len(self._rows))])
        if not bool(torch.isfinite(found).all()):
            return False
        self.slopes[self._places(chunk)], self.base[self._sample] = found, values
        return True

    def _places(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Where a chunk's numbers [n, examples of the sample] stand in a table [N, k]."""
        return torch.tensor([index for index, _ in chunk]).unsqueeze(1), torch.tensor(self._sample).unsqueeze(0)

    def _label_losses(self, chunk: Chunk) -> LabelLosses:
        names = [self._candidates[index].name for index, _ in chunk]
        return LabelLosses(self._decoder, Pool.of([adapter for _, adapter in chunk], self._decoder, names), self._rows)

    def _by_chunks(self, indices: Iterable[int], stage: str, use: Callable[[Chunk], None]) -> None:
        """Read the candidates that can be used a chunk at a time; the others join `refused`. Raises Interrupted between them when asked to stop."""
        wanted = [index for index in indices if index not in self.refused]
        chunk: Chunk = []
        for done, index in enumerate(wanted):
            if self._report is not None:
                self._report(stage, done, len(wanted))
            if self._stop_asked():
                raise Interrupted(f"stopped after {done} of {len(wanted)} adapters were ranked", hint="run the same command again")
            adapter = self._read(index)
            if adapter is not None:
                chunk.append((index, adapter))
            del adapter  # or the last one would stay in memory beside the next chunk
            if len(chunk) == CHUNK or sum(held.num_parameters for _, held in chunk) >= CHUNK_PARAMETERS:
                use(chunk)
                chunk = []
        if chunk:
            use(chunk)
        if self._report is not None:
            self._report(stage, len(wanted), len(wanted))

    def _read(self, index: int) -> Adapter | None:
        """The candidate's adapter, or None where it cannot be composed."""
        candidate, shape = self._candidates[index], self._decoder.shape
        why = ""
        try:
            adapter = candidate.load()
            reason, _ = why_not(adapter)
            if reason:
                why = f"it is {reason}"
            else:
                adapter.check_fits(shape.linears, shape.num_layers)
                if not all(bool(torch.isfinite(factor).all()) for module in adapter.modules.values() for factor in (module.a, module.b)):
                    why = "it holds values that are not finite"
        except AtollError as error:
            why = error.message
        except OSError as error:
            why = f"it cannot be read: {error.strerror or error}"
        if why:
            self.refused[index] = f"{candidate.name} is left out: {why}"
            return None
        return adapter
