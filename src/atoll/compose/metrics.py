"""Scores that are not the loss of one completion: which option a candidate prefers, and any callable on the texts that it writes.

They say more directly what a task asks for, but with k examples they take k + 1 values: a search without gradients must find its way over steps. The
label loss is the better guide unless it is known to mislead.

For callers of search.py from Python, in place of losses.LabelLosses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from atoll.compose.candidates import Candidates
from atoll.compose.losses import FORWARD_TOKENS, LabelLosses
from atoll.compose.pool import Pool
from atoll.data.encode import EncodedRow
from atoll.errors import DataError
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.kv_cache import PAGE_TOKENS, KvCache

Metric = Callable[[str, int], float]  # (text that was written, index of the example) -> 1.0 for right, 0.0 for wrong, or between


class OptionScores:
    """Scores by likelihood among given options: 1 where another option than the right one is likeliest, or how unlikely the right one is."""

    def __init__(
        self,
        decoder: Decoder,
        pool: Pool,
        options: Sequence[Sequence[EncodedRow]],
        right: Sequence[int],
        *,
        soft: bool = False,
        form: str = "cat",
        forward_tokens: int = FORWARD_TOKENS,
    ) -> None:
        """options: for each example, the prompt with each option as a row; right: the index of the right one.

        The likeliest option is the one with the greatest sum of log-probabilities. soft: minus the log of the right option's share of all options'
        probability, which has gradients. Raises DataError for an example with fewer
        than two options or a right one that is not among them.
        """
        for example, (rows, index) in enumerate(zip(options, right, strict=True)):
            if len(rows) < 2 or not 0 <= index < len(rows):
                raise DataError(
                    f"example {example + 1} has {len(rows)} options, of which number {index + 1} is right",
                    hint="give at least two, and the right one",
                )
        self.differentiable = soft
        self._losses = LabelLosses(decoder, pool, [row for rows in options for row in rows], form=form, forward_tokens=forward_tokens)
        self._labels = torch.tensor([float(row.num_labels) for row in self._losses.rows])
        self._rows = [list(range(start, stop)) for start, stop in pairwise((0, *accumulate(map(len, options))))]
        self._right = list(right)

    @property
    def num_adapters(self) -> int:
        return self._losses.num_adapters

    @property
    def num_layers(self) -> int:
        return self._losses.num_layers

    @property
    def num_examples(self) -> int:
        return len(self._rows)

    def at_once(self, examples: Sequence[int]) -> int:
        return self._losses.at_once(self._flat(examples))

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        """One example at a time: its options are compared, so they stand in one graph."""
        return [[example] for example in examples]

    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, len(examples)]: 0 or 1, or nats if soft."""
        flat = self._flat(examples)
        log_probs = -self._losses.scores(weights, flat) * self._labels[flat]
        found = []
        start = 0
        for example in examples:
            stop = start + len(self._rows[example])
            mine, right = log_probs[:, start:stop], self._right[example]
            found.append(-torch.log_softmax(mine, 1)[:, right] if self.differentiable else (mine.argmax(1) != right).float())
            start = stop
        return torch.stack(found, 1)

    def _flat(self, examples: Sequence[int]) -> list[int]:
        return [row for example in examples for row in self._rows[example]]


class GeneratedScores:
    """Scores by what is written: 1 - metric(text, example), with greedy answers of all candidates to all prompts in one batch."""

    differentiable = False

    def __init__(
        self,
        decoder: Decoder,
        pool: Pool,
        prompts: Sequence[Sequence[int]],
        metric: Metric,
        detokenise: Callable[[list[int]], str],
        *,
        max_new_tokens: int,
        eos_ids: Collection[int],
        stop: Sequence[str] = (),
        form: str = "cat",
        forward_tokens: int = FORWARD_TOKENS,
    ) -> None:
        """detokenise turns the written ids, without the end mark, into text; a text ends before the first of `stop` strings.

        Raises DataError for no prompts, an empty one, or one that leaves no room in the base's context.
        """
        if not prompts:
            raise DataError("there are no examples to compose for", hint="give a few prompts with their completions; 5 to 100 are usual")
        for example, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= decoder.shape.context - max_new_tokens:
                raise DataError(
                    f"example {example + 1} has {len(prompt)} prompt tokens; with {max_new_tokens} new ones the base has room for "
                    f"{decoder.shape.context - max_new_tokens}",
                    hint="shorten the prompt, or ask for fewer new tokens",
                )
        self._decoder, self._pool = decoder, pool
        self._prompts, self._metric, self._detokenise = [list(prompt) for prompt in prompts], metric, detokenise
        self._max_new, self._eos, self._stop = max_new_tokens, frozenset(eos_ids), tuple(stop)
        self._candidates, self._forward_tokens = Candidates(pool, form), forward_tokens

    @property
    def num_adapters(self) -> int:
        return self._pool.num

    @property
    def num_layers(self) -> int:
        return self._pool.num_layers

    @property
    def num_examples(self) -> int:
        return len(self._prompts)

    def at_once(self, examples: Sequence[int]) -> int:
        return max(1, self._forward_tokens // sum(len(self._prompts[example]) + self._max_new for example in examples))

    def portions(self, examples: Sequence[int], num_candidates: int) -> list[list[int]]:
        raise AssertionError("written texts have no gradients")

    @torch.no_grad()
    def scores(self, weights: Tensor, examples: Sequence[int]) -> Tensor:
        """[P, len(examples)]: 0 for a text that the metric finds right."""
        found = []
        for part in weights.split(self.at_once(examples)):
            texts = self.texts(part, examples)
            found += [[1.0 - self._metric(text, example) for text, example in zip(row, examples, strict=True)] for row in texts]
        return torch.tensor(found, dtype=torch.float32)

    @torch.no_grad()
    def texts(self, weights: Tensor, examples: Sequence[int]) -> list[list[str]]:
        """What each candidate writes to each prompt, in one batch."""
        prompts = [self._prompts[example] for example in examples] * len(weights)
        written = self._greedy(weights.to(self._decoder.device), prompts)
        texts = [self._cut(self._detokenise(ids)) for ids in written]
        return [texts[start : start + len(examples)] for start in range(0, len(texts), len(examples))]

    def _cut(self, text: str) -> str:
        ends = [place for mark in self._stop if (place := text.find(mark)) >= 0]
        return text[: min(ends, default=len(text))]

    def _greedy(self, weights: Tensor, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy ids of every row, without the end mark. A row is left out of the steps after its own end."""
        decoder, each = self._decoder, len(prompts) // len(weights)
        tables, cache = _pages(decoder, prompts, self._max_new)
        lengths = [len(prompt) for prompt in prompts]
        batch = PackedBatch.of(prompts, pages=tables, outputs="last", num_prompts=lengths, device=decoder.device)
        _, best = decoder.best(decoder.forward(batch, self._candidates.batch(weights, batch.num_tokens), cache))
        written: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for step in range(self._max_new):
            for row, token in zip(running, best.tolist(), strict=True):
                written[row].append(token)
            running = [row for row in running if not self._ended(written[row])]
            if not running or step + 1 == self._max_new:
                break
            batch = PackedBatch.of(
                [written[row][-1:] for row in running],
                context=[lengths[row] + len(written[row]) - 1 for row in running],
                pages=[tables[row] for row in running],
                num_prompts=[lengths[row] for row in running],
                device=decoder.device,
            )
            mine = weights[[row // each for row in running]]  # a block of one token for each row
            _, best = decoder.best(decoder.forward(batch, self._candidates.batch(mine, len(running)), cache))
        return [ids[:-1] if ids[-1] in self._eos else ids for ids in written]

    def _ended(self, ids: list[int]) -> bool:
        if ids[-1] in self._eos:
            return True
        return bool(self._stop) and any(mark in self._detokenise(ids) for mark in self._stop)


def _pages(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[list[list[int]], KvCache]:
    """Each row's page table, none shared, and a cache that holds them all."""
    tables: list[list[int]] = []
    used = 0
    for prompt in prompts:
        count = -(-(len(prompt) + max_new_tokens) // PAGE_TOKENS)
        tables.append(list(range(used, used + count)))
        used += count
    return tables, decoder.new_cache(used)
