"""Log-probabilities of given continuations: how an engine ranks the options of a closed label set.

Each prompt is computed once; its continuations then are forks that share its pages. The prompt's last hidden state predicts a continuation's first
token, so only the tokens before a continuation's last are fed, and one-token continuations need no second forward.

Used by engine.py, as a job of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.engine.jobs import Job, Lender, Text
from atoll.engine.pages import Pages, Prefix
from atoll.engine.request import ScoreRequest
from atoll.engine.runner import LOGIT_ROWS, Row, Runner
from atoll.engine.step import not_finite


class _Member(NamedTuple):
    """A prompt of the batch at hand, and the sums of its continuations."""

    item: ScoreRequest
    text: Text
    sums: list[float]


class _Option(NamedTuple):
    """One continuation of at least two tokens, with its page table."""

    member: _Member
    number: int
    pages: Sequence[int]

    @property
    def tokens(self) -> Sequence[int]:
        return self.member.item.continuations[self.number]


def pages_for_item(item: ScoreRequest, pages: Pages) -> int:
    """Pages that must be free for an item when nothing of it is known: its prompt, and one continuation at a time."""
    return pages.pages_for(len(item.prompt_ids)) + _fork_pages(item, pages)


def _fork_pages(item: ScoreRequest, pages: Pages) -> int:
    """Pages that the longest continuation of an item takes for itself."""
    length = len(item.prompt_ids)
    new = max(map(len, item.continuations), default=0) - 1
    return pages.pages_for(length + new) - length // pages.page_tokens if new > 0 else 0


class ScoreJob(Job[list[float]]):
    """One sum of log-probabilities, in nats, a continuation."""

    def __init__(self, items: Sequence[ScoreRequest], prefixes: Sequence[Prefix | None]) -> None:
        """prefixes: what names each prompt's pages for reuse; None: they are not reused."""
        super().__init__([item.adapter for item in items])
        self._items, self._prefixes = items, prefixes
        self._sums: list[list[float]] = [[] for _ in items]
        self._todo = deque(sorted((i for i, item in enumerate(items) if item.continuations), key=lambda i: items[i].adapter or ""))
        self.num_done = len(items) - len(self._todo)
        self.finished = not self._todo

    def step(self, lender: Lender) -> bool:
        members: list[_Member] = []
        failed = True
        try:
            self._take(lender, members)
            _score_first_tokens(lender, members)
            _score_later_tokens(lender, members)
            for member in members:
                if not torch.isfinite(torch.tensor(member.sums)).all():
                    raise not_finite(member.item.adapter)
            failed = False
        finally:
            lender.give_back([member.text for member in members], failed=failed)
        self.num_done += len(members)
        self.finished = not self._todo
        return bool(members)

    def _take(self, lender: Lender, members: list[_Member]) -> None:
        """As many prompts as fit one step's tokens (one at least), with pages left for the longest continuation of any."""
        room, spare = lender.max_tokens, 0
        while self._todo and (not members or len(self._items[self._todo[0]].prompt_ids) <= room):
            index = self._todo[0]
            item = self._items[index]
            spare = max(spare, _fork_pages(item, lender.pages))
            text = lender.borrow(item.prompt_ids, item.adapter, self._prefixes[index], spare=spare)
            if text is None:
                break
            members.append(_Member(item, text, self._sums[self._todo.popleft()]))
            room -= len(text.tokens) - text.num_known * lender.pages.page_tokens

    def _results(self) -> list[list[float]]:
        return self._sums


def _score_first_tokens(lender: Lender, members: Sequence[_Member]) -> None:
    """Prefill; where a prompt ends, start the sums with each continuation's first token."""
    texts = [member.text for member in members]
    for chunks, out in lender.forwards(texts, lambda _, at_end: "last" if at_end else "none"):
        ends = [row for row, chunk in enumerate(chunks) if chunk.stop == len(texts[chunk.which].tokens)]
        if not ends:
            continue
        logits = lender.runner.logits(out.last(ends))
        totals = logits.logsumexp(-1)
        for place, row in enumerate(ends):
            member = members[chunks[row].which]
            firsts = torch.tensor([continuation[0] for continuation in member.item.continuations], device=logits.device)
            member.sums[:] = (logits[place, firsts] - totals[place]).tolist()


def _score_later_tokens(lender: Lender, members: Sequence[_Member]) -> None:
    """Forwards over continuations without their last token: each token's state predicts the next one."""
    for options in _option_groups(lender, members):
        rows = [Row(o.tokens[:-1], len(o.member.text.tokens), o.pages, o.member.text.adapter, "all") for o in options]
        out = lender.runner.forward(rows)
        targets = torch.zeros(out.hidden.shape[0], dtype=torch.int64, device=out.hidden.device)
        for (start, stop), option in zip(out.spans, options, strict=True):
            targets[start:stop] = torch.tensor(option.tokens[1:], device=targets.device)
        found = _target_logprobs(lender.runner, out.hidden, targets)
        for (start, stop), option in zip(out.spans, options, strict=True):
            option.member.sums[option.number] += float(found[start:stop].sum())
        for option in options:
            lender.release_forks(option.member.text)


def _option_groups(lender: Lender, members: Sequence[_Member]) -> Iterator[list[_Option]]:
    """Continuations in forwards of about a step's tokens and as many as pages are free for; one always fits, as it did when the prompt was taken."""
    todo = [(m, i) for m in members for i, continuation in enumerate(m.item.continuations) if len(continuation) > 1]
    group: list[_Option] = []
    tokens = 0
    for place, (member, index) in enumerate(todo):
        new = len(member.item.continuations[index]) - 1
        last = place + 1 == len(todo) or todo[place + 1][0] is not member
        table = lender.continue_text(member.text, new, last=last) if not group or tokens + new <= lender.max_tokens else None
        if table is None:
            assert group, "a continuation found no pages"
            yield group
            group, tokens = [], 0
            table = lender.continue_text(member.text, new, last=last)
            assert table is not None, "a continuation found no pages"
        group.append(_Option(member, index, table))
        tokens += new
    if group:
        yield group


def _target_logprobs(runner: Runner, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] float64 log-probabilities of targets [N] int64 under hidden [N, D]."""
    parts = []
    for start in range(0, hidden.shape[0], LOGIT_ROWS):
        logits = runner.logits(hidden[start : start + LOGIT_ROWS])
        parts.append(logits.gather(1, targets[start : start + LOGIT_ROWS].unsqueeze(1)).squeeze(1) - logits.logsumexp(-1))
    return torch.cat(parts).double()
