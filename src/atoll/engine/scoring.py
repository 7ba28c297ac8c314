"""Log-probabilities of given continuations: how an engine ranks the options of a closed label set.

Each prompt is computed once into a KV row; its continuations then run as rows that read that row and store nothing. The prompt's last hidden state
predicts a continuation's first token, so only the tokens before a continuation's last are fed, and one-token continuations need no second forward.

Used by Engine.score, which lends KV rows and adapters. Prompts and continuations are packed up to the step's token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.engine.request import ScoreRequest
from atoll.engine.runner import LOGIT_ROWS, Row, Runner
from atoll.engine.step import not_finite


@dataclass
class Scoring:
    """One prompt being scored: holds a KV row and its adapter until its sums are there."""

    item: ScoreRequest
    kv_row: int
    sums: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.item.prompt_ids)


def score_batch(runner: Runner, batch: Sequence[Scoring], max_tokens: int) -> None:
    """Fill in the sums of every prompt of the batch. Raises EngineError, naming the adapter, where a log-probability is not finite."""
    for chunk in _prompt_chunks(batch, max_tokens):
        _score_first_tokens(runner, chunk)
    for rows in _continuation_rows(batch, max_tokens):
        _score_later_tokens(runner, rows)
    for scoring in batch:
        if not torch.isfinite(torch.tensor(scoring.sums)).all():
            raise not_finite(scoring.item.adapter)


Chunk = tuple[Scoring, int, int]  # tokens start to stop of a prompt


def _prompt_chunks(batch: Sequence[Scoring], max_tokens: int) -> Iterator[list[Chunk]]:
    """Prompts' tokens in forwards of at most max_tokens; a prompt's chunks stand in successive forwards, since each reads the one before."""
    chunks: list[Chunk] = []
    room = max_tokens
    for scoring in batch:
        start = 0
        while start < scoring.length:
            stop = min(scoring.length, start + room)
            chunks.append((scoring, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunks
                chunks, room = [], max_tokens
    if chunks:
        yield chunks


def _score_first_tokens(runner: Runner, chunks: Sequence[Chunk]) -> None:
    """Prefill; where a prompt ends, start the sums with each continuation's first token."""
    ends = [i for i, (scoring, _, stop) in enumerate(chunks) if stop == scoring.length]
    rows = [
        Row(
            scoring.item.prompt_ids[start:stop],
            start,
            scoring.kv_row,
            scoring.item.adapter,
            "last" if stop == scoring.length else "none",
            scoring.length,
        )
        for scoring, start, stop in chunks
    ]
    out = runner.forward(rows)
    if not ends:
        return
    logits = runner.logits(out.last(ends))
    totals = logits.logsumexp(-1)
    for row, i in enumerate(ends):
        scoring = chunks[i][0]
        firsts = torch.tensor([continuation[0] for continuation in scoring.item.continuations], device=logits.device)
        scoring.sums = (logits[row, firsts] - totals[row]).tolist()


def _continuation_rows(batch: Sequence[Scoring], max_tokens: int) -> Iterator[list[tuple[Scoring, int]]]:
    """(prompt, index of the continuation) in forwards of about max_tokens; a longer continuation has one of its own."""
    rows: list[tuple[Scoring, int]] = []
    tokens = 0
    for scoring in batch:
        for index, continuation in enumerate(scoring.item.continuations):
            length = len(continuation) - 1
            if length == 0:
                continue
            if rows and tokens + length > max_tokens:
                yield rows
                rows, tokens = [], 0
            rows.append((scoring, index))
            tokens += length
    if rows:
        yield rows


def _score_later_tokens(runner: Runner, members: Sequence[tuple[Scoring, int]]) -> None:
    """One forward over continuations without their last token: each token's state predicts the next one."""
    continuations = [scoring.item.continuations[index] for scoring, index in members]
    rows = [
        Row(continuation[:-1], scoring.length, scoring.kv_row, scoring.item.adapter, "all")
        for (scoring, _), continuation in zip(members, continuations, strict=True)
    ]
    out = runner.forward(rows, store=False)
    targets = torch.zeros(out.hidden.shape[0], dtype=torch.int64, device=out.hidden.device)
    for (start, stop), continuation in zip(out.spans, continuations, strict=True):
        targets[start:stop] = torch.tensor(continuation[1:], device=targets.device)
    found = _target_logprobs(runner, out.hidden, targets)
    for (scoring, index), (start, stop) in zip(members, out.spans, strict=True):
        scoring.sums[index] += float(found[start:stop].sum())


def _target_logprobs(runner: Runner, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] float64 log-probabilities of targets [N] int64 under hidden [N, D]."""
    parts = []
    for start in range(0, hidden.shape[0], LOGIT_ROWS):
        logits = runner.logits(hidden[start : start + LOGIT_ROWS])
        parts.append(logits.gather(1, targets[start : start + LOGIT_ROWS].unsqueeze(1)).squeeze(1) - logits.logsumexp(-1))
    return torch.cat(parts).double()
