"""Work over given texts (scoring, embedding) between the steps of generation: in batches that borrow pages and adapters and give them back at once.

A job holds nothing from one step to the next, so it can neither starve running requests nor be preempted. A batch takes as many texts as a step has
tokens and as there are free pages for. One batch a step is computed, in turn for each scope, and in a scope for each of its jobs.

Used by engine.py, which owns the Jobs; scoring.py and embedding.py are the two kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from atoll.engine.pages import Pages, Prefix
from atoll.engine.pool import AdapterPool
from atoll.engine.runner import Outputs, Row, Runner, StepOutput
from atoll.engine.step import not_finite

T = TypeVar("T")


@dataclass
class Text:
    """One text with borrowed pages: the first num_known of them were there already, and the hold on its adapter."""

    tokens: Sequence[int]
    adapter: str | None
    prefix: Prefix | None
    pages: list[int]
    num_known: int
    forks: list[list[int]] = field(default_factory=list)  # page tables of continuations


class Chunk(NamedTuple):
    """Tokens start to stop of texts[which]."""

    which: int
    start: int
    stop: int


class Lack(NamedTuple):
    """What a text found no room for: a place for this adapter, or (None) pages."""

    adapter: str | None


class Lender:
    """Lends pages and adapters to the batch of one job, and runs its texts."""

    def __init__(self, pages: Pages, pool: AdapterPool, runner: Runner, max_tokens: int, *, whole: bool = False) -> None:
        """whole: a text is computed in one forward, however long, since the states of its beginning depend on its end."""
        self.pages, self.runner, self.max_tokens, self._whole = pages, runner, max_tokens, whole
        self._pool = pool

    def borrow(self, tokens: Sequence[int], adapter: str | None, prefix: Prefix | None = None, *, spare: int = 0) -> Text | Lack:
        """Pages and adapter for a text, with `spare` pages left; what it lacks, if they are in use now. Raises what AdapterPool.hold raises."""
        known = self.pages.match(prefix, tokens) if prefix is not None else []
        missing = self.pages.pages_for(len(tokens)) - len(known)
        enough = missing + spare <= self.pages.num_free
        try:
            if enough and (adapter is None or self._pool.hold(adapter)):
                return Text(tokens, adapter, prefix, known + self.pages.take(missing), len(known))
        except BaseException:
            self.pages.release(known)
            raise
        self.pages.release(known)
        return Lack(adapter if enough else None)

    def give_back(self, texts: Sequence[Text], *, failed: bool) -> None:
        """Return what texts hold. failed: their pages may hold values that are not finite; else whole pages of those with a prefix become known."""
        for text in texts:
            if failed:  # forks first: while they are held, a page that they share with their prompt counts as somebody else's too
                self._clean([*text.pages[self.pages.pages_for(len(text.tokens)) :], *(page for fork in text.forks for page in fork)])
            self.release_forks(text)
            if failed:
                self._clean(text.pages)
            elif text.prefix is not None:
                full = len(text.tokens) // self.pages.page_tokens
                self.pages.index(text.prefix, text.tokens, text.pages, text.num_known, full)
            self.pages.release(text.pages)
            if text.adapter is not None:
                self._pool.release(text.adapter)

    def continue_text(self, text: Text, num_new: int, *, last: bool) -> list[int] | None:
        """A page table for num_new tokens behind a text; None if there are too few free pages. The last continuation writes into the text's own."""
        length, pages = len(text.tokens), self.pages
        total = pages.pages_for(length + num_new)
        if last:
            if total - len(text.pages) > pages.num_free:
                return None
            text.pages += pages.take(max(0, total - len(text.pages)))
            return text.pages
        if total - length // pages.page_tokens > pages.num_free:
            return None
        table, copied = pages.fork(text.pages, length, length + num_new)
        if copied is not None:
            self.runner.copy_page(*copied)
        text.forks.append(table)
        return table

    def release_forks(self, text: Text) -> None:
        """Return the pages of its continuations so far. What they hold has been found finite, or cleaned."""
        for table in text.forks:
            self.pages.release(table)
        text.forks = []
        own = self.pages.pages_for(len(text.tokens))
        self.pages.release(text.pages[own:])
        del text.pages[own:]

    def forwards(self, texts: Sequence[Text], outputs: Callable[[int, bool], Outputs]) -> Iterator[tuple[list[Chunk], StepOutput]]:
        """Compute what the texts' known pages lack. outputs(index of a text, whether its last token is there): the hidden states that are wanted.

        Raises EngineError where a state of an edited token is not finite.
        """
        for chunks in self._chunks(texts):
            rows = []
            for index, start, stop in chunks:
                text = texts[index]
                wanted = outputs(index, stop == len(text.tokens))
                rows.append(Row(text.tokens[start:stop], start, text.pages, text.adapter, len(text.tokens), wanted))
            out = self.runner.forward(rows)
            if out.broken:
                raise not_finite(rows[out.broken[0]].adapter)
            yield chunks, out

    def _chunks(self, texts: Sequence[Text]) -> Iterator[list[Chunk]]:
        """Tokens in forwards of at most max_tokens; a text's chunks stand in successive forwards, since each reads the one before."""
        chunks: list[Chunk] = []
        room = self.max_tokens
        for index, text in enumerate(texts):
            start = text.num_known * self.pages.page_tokens
            if self._whole:
                if chunks and len(text.tokens) > room:
                    yield chunks
                    chunks, room = [], self.max_tokens
                room = max(room, len(text.tokens))
            while start < len(text.tokens):
                stop = min(len(text.tokens), start + room)
                chunks.append(Chunk(index, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield chunks
                    chunks, room = [], self.max_tokens
        if chunks:
            yield chunks

    def _clean(self, pages: Sequence[int]) -> None:
        suspect = self.pages.unknown(pages)
        if suspect:
            self.runner.zero_pages(suspect)


class Job(ABC, Generic[T]):
    """Texts in, one result a text out, a batch at a time. Made by Engine.begin_score and begin_embed; `finished` says when to ask for `result`."""

    def __init__(self, adapters: Sequence[str | None], scope: str) -> None:
        """adapters: each text's. scope: whose job it is."""
        self.scope = scope
        self.users = Counter(adapter for adapter in adapters if adapter is not None)  # how often it names each adapter
        self.num_items, self.num_done = len(adapters), 0
        self.num_waits = 0  # turns in succession in which it found no room
        self.lack: Lack | None = None  # what it found no room for in its last turn
        self.finished = False
        self._error: Exception | None = None

    @abstractmethod
    def step(self, lender: Lender) -> Lack | None:
        """Compute one batch; what is missing, if there is no room for even one text now."""

    @abstractmethod
    def _results(self) -> list[T]: ...

    def fail(self, error: Exception) -> None:
        """End the job; `result` raises the error."""
        self._error, self.finished = error, True

    def result(self) -> list[T]:
        """One result an item, in order. Raises what ended the job."""
        if self._error is not None:
            raise self._error
        assert self.finished, "the job has not finished"
        return self._results()


class Jobs:
    """All jobs that are not finished: one batch a step, the scopes in turn."""

    def __init__(self) -> None:
        self._scopes: OrderedDict[str, deque[Job[Any]]] = OrderedDict()  # whose turn it is first; in a scope likewise

    def __len__(self) -> int:
        return sum(map(len, self._scopes.values()))

    def __iter__(self) -> Iterator[Job[Any]]:
        return (job for jobs in self._scopes.values() for job in jobs)

    def add(self, job: Job[Any]) -> None:
        self._scopes.setdefault(job.scope, deque()).append(job)

    def remove(self, job: Job[Any]) -> bool:
        """Forget a job; False if it is not here."""
        jobs = self._scopes.get(job.scope, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._scopes[job.scope]
        return True

    def step(self, lender: Lender) -> Job[Any]:
        """One batch of the job whose turn it is; returns that job, forgotten if it has finished."""
        scope, jobs = next(iter(self._scopes.items()))
        job = jobs[0]
        try:
            job.lack = job.step(lender)
        except Exception as error:
            job.fail(error)
        else:
            job.num_waits = 0 if job.lack is None else job.num_waits + 1
        jobs.rotate(-1)
        self._scopes.move_to_end(scope)
        if job.finished:
            self.remove(job)
        return job

    def lack(self, max_waits: int) -> Lack | None:
        """What those lack who found no room more than max_waits times: pages, if one of them does, else the longest waiting one's adapter."""
        late = [job for job in self if job.num_waits > max_waits and job.lack is not None]
        if not late:
            return None
        return next((job.lack for job in late if job.lack == Lack(None)), max(late, key=lambda job: job.num_waits).lack)
