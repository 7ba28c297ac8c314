"""Log-probabilities of given continuations: how an engine ranks the options of a closed label set.

Each prompt is computed once; its continuations then are forks that share its pages. The prompt's last hidden state predicts a continuation's first
token, so only the tokens before a continuation's last are fed, and one-token continuations need no second forward.

Used by engine.py, as a job of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.engine.jobs import Job, Lack, Lender, Text
from atoll.engine.pages import Pages, Prefix
from atoll.engine.request import ScoreRequest
from atoll.engine.runner import LOGIT_ROWS, Row, Runner
from atoll.engine.step import not_finite


@dataclass
class _Member:
    """A prompt of the batch at hand, the sums of its continuations, and what of them is left: those of several tokens after the first `done`."""

    index: int
    item: ScoreRequest
    text: Text
    sums: list[float]
    done: int

    @property
    def left(self) -> Iterator[int]:
        """The numbers of the continuations that need a forward of their own still."""
        return (i for i in range(self.done, len(self.item.continuations)) if len(self.item.continuations[i]) > 1)


class _Option(NamedTuple):
    """One continuation of at least two tokens, with its page table."""

    member: _Member
    number: int
    pages: Sequence[int]

    @property
    def tokens(self) -> Sequence[int]:
        return self.member.item.continuations[self.number]

    @property
    def num_prompt(self) -> int:
        return len(self.member.text.tokens)


def pages_for_item(item: ScoreRequest, pages: Pages) -> int:
    """Pages that must be free for an item when nothing of it is known: its prompt, and one continuation at a time."""
    return pages.pages_for(len(item.prompt_ids)) + _fork_pages(item, pages)


def _fork_pages(item: ScoreRequest, pages: Pages) -> int:
    """Pages that the longest continuation of an item takes for itself."""
    length = len(item.prompt_ids)
    new = max(map(len, item.continuations), default=0) - 1
    return pages.pages_for(length + new) - length // pages.page_tokens if new > 0 else 0


class ScoreJob(Job[list[float]]):
    """One sum of log-probabilities, in nats, a continuation. A prompt with many continuations takes several steps, and is borrowed anew in each."""

    def __init__(self, items: Sequence[ScoreRequest], prefixes: Sequence[Prefix | None]) -> None:
        """prefixes: what names each prompt's pages for reuse; None: they are not reused."""
        super().__init__([item.adapter for item in items], items[0].scope if items else "")
        self._items, self._prefixes = items, prefixes
        self._sums: list[list[float]] = [[] for _ in items]
        self._done = [0] * len(items)  # continuations of each item whose sums are complete, from the first
        self._todo = deque(sorted((i for i, item in enumerate(items) if item.continuations), key=lambda i: items[i].adapter or ""))
        self.num_done = len(items) - len(self._todo)
        self.finished = not self._todo

    def step(self, lender: Lender) -> Lack | None:
        members: list[_Member] = []
        failed = True
        try:
            lack = self._take(lender, members)
            _score_first_tokens(lender, members)
            _score_later_tokens(lender, members)
            failed = False
        finally:
            lender.give_back([member.text for member in members], failed=failed)
        for member in reversed(members):
            self._done[member.index] = member.done
            if member.done < len(member.item.continuations):
                self._todo.appendleft(member.index)
        self.num_done = len(self._items) - len(self._todo)
        self.finished = not self._todo
        return None if members else lack

    def _take(self, lender: Lender, members: list[_Member]) -> Lack | None:
        """As many prompts as fit one step's tokens, and their continuations another's (one at least), with pages left for any continuation."""
        room, room_later, spare = lender.max_tokens, lender.max_tokens, 0
        while self._todo and (not members or (len(self._items[self._todo[0]].prompt_ids) <= room and room_later > 0)):
            index = self._todo[0]
            item = self._items[index]
            spare = max(spare, _fork_pages(item, lender.pages))
            text = lender.borrow(item.prompt_ids, item.adapter, self._prefixes[index], spare=spare)
            if isinstance(text, Lack):
                return text
            member = _Member(self._todo.popleft(), item, text, self._sums[index], self._done[index])
            members.append(member)
            room -= len(text.tokens) - text.num_known * lender.pages.page_tokens
            room_later -= sum(len(item.continuations[number]) - 1 for number in member.left)
        return None

    def _results(self) -> list[list[float]]:
        return self._sums


def _score_first_tokens(lender: Lender, members: Sequence[_Member]) -> None:
    """Prefill; where a prompt ends, start the sums with each continuation's first token. Raises EngineError where a result is not finite."""
    texts = [member.text for member in members]
    for chunks, out in lender.forwards(texts, lambda _, at_end: "last" if at_end else "none"):
        ends = [row for row, chunk in enumerate(chunks) if chunk.stop == len(texts[chunk.which].tokens)]
        for start in range(0, len(ends), LOGIT_ROWS):
            part = ends[start : start + LOGIT_ROWS]
            logits = lender.runner.logits(out.last(part))
            totals = logits.logsumexp(-1)
            for place, row in enumerate(part):
                member = members[chunks[row].which]
                firsts = torch.tensor([continuation[0] for continuation in member.item.continuations], device=logits.device)
                found = logits[place, firsts] - totals[place]
                _check_finite(found, member)
                if member.done == 0:  # else its sums are further on already
                    member.sums[:] = found.tolist()


def _score_later_tokens(lender: Lender, members: Sequence[_Member]) -> None:
    """About a step's tokens of continuations without their last one: each token's state predicts the next. Raises EngineError as above."""
    todo = deque((member, number) for member in members for number in member.left)
    room = lender.max_tokens
    while todo and room > 0:
        options = _next_options(lender, todo, room)
        rows = [Row(o.tokens[:-1], o.num_prompt, o.pages, o.member.text.adapter, o.num_prompt, "all") for o in options]
        out = lender.runner.forward(rows)
        targets = torch.zeros(out.hidden.shape[0], dtype=torch.int64, device=out.hidden.device)
        for (start, stop), option in zip(out.spans, options, strict=True):
            targets[start:stop] = torch.tensor(option.tokens[1:], device=targets.device)
        found = _target_logprobs(lender.runner, out.hidden, targets)
        for (start, stop), option in zip(out.spans, options, strict=True):
            _check_finite(found[start:stop], option.member)
            option.member.sums[option.number] += float(found[start:stop].sum())
            option.member.done = option.number + 1
        for option in options:  # not before all are known to be finite: what is returned here is somebody else's next
            lender.release_forks(option.member.text)
        room -= sum(len(row.token_ids) for row in rows)
    left = {id(member) for member, _ in todo}
    for member in members:
        if id(member) not in left:
            member.done = len(member.item.continuations)


def _next_options(lender: Lender, todo: deque[tuple[_Member, int]], room: int) -> list[_Option]:
    """Continuations of `room` tokens, and as many as pages are free for; one always fits, as it did when its prompt was taken."""
    options: list[_Option] = []
    while todo:
        member, number = todo[0]
        new = len(member.item.continuations[number]) - 1
        last = len(todo) == 1 or todo[1][0] is not member
        table = lender.continue_text(member.text, new, last=last) if not options or new <= room else None
        if table is None:
            assert options, "a continuation found no pages"
            break
        todo.popleft()
        options.append(_Option(member, number, table))
        room -= new
    return options


def _check_finite(logprobs: Tensor, member: _Member) -> None:
    if not torch.isfinite(logprobs).all():
        raise not_finite(member.item.adapter)


def _target_logprobs(runner: Runner, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] float64 log-probabilities of targets [N] int64 under hidden [N, D]."""
    parts = []
    for start in range(0, hidden.shape[0], LOGIT_ROWS):
        logits = runner.logits(hidden[start : start + LOGIT_ROWS])
        parts.append(logits.gather(1, targets[start : start + LOGIT_ROWS].unsqueeze(1)).squeeze(1) - logits.logsumexp(-1))
    return torch.cat(parts).double()
