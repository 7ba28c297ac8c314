"""Who runs in the next step, and on which pages: plain Python, without torch.

Every running sequence that decodes gets its one token; what is left of the step's token budget goes to prompts, in chunks that leave room for others.
A sequence is admitted with the pages of all its tokens and no more; when a decoding one needs a page and none is free, the one admitted last is
preempted: it gives everything back and later goes on by prefill of prompt and answer so far. A waiting request whose adapter has no place now is
passed over, not waited for; but whoever was passed `max_overtakes` times comes next: until it starts, no other may take or keep busy a place among
the adapters.

    waiting ──admit (pages + hold on adapter)──► running: prefill in chunks ──► running: decode ──► removed
        ▲──────────────────preempt─────────────────────┴──────────────────────────────┘

Used by engine.py. Who waits in which order is waiting.py, whose page is whose pages.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from atoll.engine.pages import Pages
from atoll.engine.sequence import Sequence
from atoll.engine.waiting import Waiting


class Adapters(Protocol):
    """What the scheduler needs of the adapters: AdapterPool."""

    @property
    def epoch(self) -> int:
        """Changes whenever an adapter that had no place may have one."""
        ...

    def hold(self, key: str) -> bool:
        """Take a hold on a resident adapter, loading it if there is room; False if it has no place now. Raises if it never can have one."""
        ...

    def release(self, key: str) -> None: ...

    def is_pinned(self, key: str) -> bool:
        """Whether the adapter stays resident whoever uses it, so that using it keeps nobody waiting."""
        ...


class Work(NamedTuple):
    """Tokens start to stop (exclusive) of a sequence are computed in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def wants_token(self) -> bool:
        """The sequence's last token is among them, so the next one is chosen after this step."""
        return self.stop == len(self.sequence.tokens)


@dataclass
class Plan:
    """One step: the work, and the waiting sequences whose adapter turned out to be impossible, with the error."""

    work: list[Work] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, and what the running ones hold.

    zero_pages cleans pages that may hold values that are not finite. regime: which lengths have the same angles, for rope types where these depend on
    a sequence's length; None where they do not. whole_prompts: a prompt is computed in one step.
    """

    def __init__(
        self,
        pages: Pages,
        adapters: Adapters,
        zero_pages: Callable[[Seq[int]], None],
        *,
        max_rows: int,
        max_step_tokens: int,
        max_overtakes: int,
        regime: Callable[[int], int] | None = None,
        whole_prompts: bool = False,
    ) -> None:
        self._whole_prompts = whole_prompts
        self._pages, self._adapters, self._zero_pages, self._regime = pages, adapters, zero_pages, regime
        self._max_rows, self._max_step_tokens, self._max_overtakes = max_rows, max_step_tokens, max_overtakes
        self.waiting = Waiting()
        self.running: dict[str, Sequence] = {}  # in order of admission
        self._claims: dict[bytes, str] = {}  # key of the page that a running prompt will fill next, and whose it is
        self._epoch = -1
        self._wanted: str | None = None
        self.counts = Counter[str]()  # preemptions, prefix_hits, reused_tokens

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.running or request_id in self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def arrival(self, request_id: str) -> int | None:
        """The number of the sequence that has this id now; None if there is none."""
        sequence = self.running.get(request_id) or self.waiting.get(request_id)
        return sequence.arrival if sequence is not None else None

    def remove(self, request_id: str, *, failed: bool = False) -> Sequence | None:
        """Forget a sequence and give back what it holds; None if it is not here. failed: its last step left values that may not be finite."""
        sequence = self.running.pop(request_id, None)
        if sequence is None:
            return self.waiting.remove(request_id)
        self._give_back(sequence, failed=failed)
        return sequence

    def computed(self, item: Work, *, sound: bool) -> None:
        """The tokens of a piece of work are in the cache. sound: what was computed from them is finite, so their pages may be used again."""
        sequence = item.sequence
        sequence.num_cached = item.stop
        if not sound:
            return
        sequence.num_sound = item.stop
        if sequence.prefix is not None:
            full = self._num_reusable(sequence, item.stop)
            if full > sequence.num_indexed:
                self._pages.index(sequence.prefix, sequence.tokens, sequence.pages, sequence.num_indexed, full)
                sequence.num_indexed = full
            self._unclaim(sequence)

    def schedule(self, *, admit: bool = True, wanted: str | None = None) -> Plan:
        """Choose the work of the next step. Decode work comes first, then prompts already begun, then (if admit) waiting sequences.

        wanted: an adapter that somebody else has waited for too long; it is treated as that of a sequence that was passed too often.
        """
        plan = Plan()
        prompts = self._decode(plan)
        shares = _Shares(self._max_step_tokens - len(plan.work), self._max_step_tokens // 8, self._chunk_stop)
        for sequence in prompts:
            shares.give(sequence, keep_some=admit and len(self.waiting) > 0)
        if admit and self.waiting and len(self.running) < self._max_rows:
            self._admit(shares, plan, wanted)
        plan.work += shares.work()
        return plan

    def check(self) -> None:
        """Raise AssertionError where a sequence is in two states, finished but still here, or holds what it should not."""
        self.waiting.check()
        for sequence in self.waiting:
            if sequence.request_id in self.running or sequence.pages or sequence.completion is not None:
                raise AssertionError(f"waiting request {sequence.request_id} also runs, holds pages or is finished")
        for request_id, sequence in self.running.items():
            if not sequence.pages or sequence.completion is not None:
                raise AssertionError(f"running request {request_id} holds no pages or is finished")
            if not 0 <= sequence.num_cached < len(sequence.tokens):
                raise AssertionError(f"running request {request_id} has {sequence.num_cached} of {len(sequence.tokens)} tokens cached")
        if Counter(sequence.scope for sequence in self.running.values()) != self.waiting.running:
            raise AssertionError("running rows are not counted under their scopes")
        if any(owner not in self.running for owner in self._claims.values()):
            raise AssertionError("a page is claimed by a request that does not run")

    # Inside

    def _decode(self, plan: Plan) -> list[Sequence]:
        """Plan one token of every decoding row, preempting from the end where pages run out; returns the rows that are still in their prompts."""
        prompts: list[Sequence] = []
        page_tokens = self._pages.page_tokens
        for sequence in list(self.running.values()):
            if not sequence.pages:
                break  # preempted just now, and so is everybody after it
            if not sequence.is_decoding:
                prompts.append(sequence)
                continue
            length = len(sequence.tokens)
            if length <= len(sequence.pages) * page_tokens or self._find_page(sequence):
                plan.work.append(Work(sequence, sequence.num_cached, length))
        return prompts

    def _find_page(self, sequence: Sequence) -> bool:
        """One more page for a decoding row; False if it was itself the one to be preempted for it."""
        while not self._pages.num_free:
            last = next(reversed(self.running.values()))
            self._preempt(last)
            if last is sequence:
                return False
        sequence.pages += self._pages.take(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence.request_id]
        self._give_back(sequence, failed=False)
        sequence.preempted = True
        self.counts["preemptions"] += 1
        self.waiting.add(sequence)

    def _give_back(self, sequence: Sequence, *, failed: bool) -> None:
        """Pages and hold. Values of a prompt whose end was not reached, or of a failed step, may be NaN: clean pages that only this one had."""
        if failed or sequence.num_cached > sequence.num_sound:
            suspect = self._pages.unknown(sequence.pages[sequence.num_sound // self._pages.page_tokens :])
            if suspect:
                self._zero_pages(suspect)
        self._pages.release(sequence.pages)
        sequence.pages, sequence.num_cached, sequence.num_sound, sequence.num_indexed = [], 0, 0, 0
        self._unclaim(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
        self.waiting.count_running(sequence.scope, -1)

    def _admit(self, shares: _Shares, plan: Plan, wanted: str | None) -> None:
        """Start waiting sequences while there are rows, pages and tokens, passing over those whose adapter has no place now."""
        if self._epoch != self._adapters.epoch or self._wanted != wanted:
            self.waiting.wake()  # something came free, or those who had to wait for `wanted` need not any more
        self._wanted = wanted
        self.waiting.unpark()
        overdue = self.waiting.overdue(self._max_overtakes)
        first = overdue if overdue is not None and not overdue.parked else None
        while shares.left > 0 and len(self.running) < self._max_rows:
            lane, first = first or self.waiting.best(), None
            if lane is None:
                break
            first_adapter = wanted if wanted is not None or overdue is None else overdue.adapter
            if first_adapter is not None and lane.adapter not in (None, first_adapter) and not self._adapters.is_pinned(str(lane.adapter)):
                self.waiting.park(lane)
                continue
            sequence = lane.head
            found = self._match(sequence)
            claim = self._claim_on(sequence, len(found))
            if claim is not None:
                self._pages.release(found)
                self.waiting.follow(lane, claim)
                continue
            missing = self._pages.pages_for(len(sequence.tokens)) - len(found)
            if missing + self._pages_ahead(sequence) > self._pages.num_free:
                self._pages.release(found)
                break  # whoever needs many pages waits for them first in line, or small requests would take each one that comes free
            try:
                held = sequence.adapter is None or self._adapters.hold(sequence.adapter)
            except Exception as error:  # whatever is wrong with one adapter is the end of its requests only
                self._pages.release(found)
                self.waiting.remove(sequence.request_id)
                plan.failed.append((sequence, error))
                continue
            if not held:
                self._pages.release(found)
                self.waiting.park(lane)
                if overdue is None:
                    overdue = self.waiting.overdue(self._max_overtakes)
                continue
            if lane is overdue:
                overdue = None
            self.waiting.admit(lane)
            self._start(sequence, found + self._pages.take(missing), len(found))
            shares.give(sequence)
        self._epoch = self._adapters.epoch

    def _match(self, sequence: Sequence) -> list[int]:
        """Known pages at its beginning, held. None for a prompt whose log-probabilities are still to be computed: it needs every hidden state."""
        if sequence.prefix is None or sequence.wants_prompt_logprobs:
            return []
        return self._pages.match(sequence.prefix, sequence.tokens)

    def _claim_on(self, sequence: Sequence, num_found: int) -> bytes | None:
        """The key of the first page that this one lacks, if a running prompt is about to fill it: waiting for that is cheaper than doing it twice."""
        if not self._claims or sequence.prefix is None or sequence.preempted or sequence.wants_prompt_logprobs:
            return None
        page_tokens = self._pages.page_tokens
        if (num_found + 1) * page_tokens >= len(sequence.tokens):
            return None
        key = sequence.prefix.key(num_found, sequence.tokens, page_tokens)
        return key if key in self._claims else None

    def _pages_ahead(self, sequence: Sequence) -> int:
        """Pages that must be free beside its own: one to grow into, unless it will never need it."""
        return int(self._pages.pages_for(sequence.max_cached) > self._pages.pages_for(len(sequence.tokens)))

    def _start(self, sequence: Sequence, pages: list[int], num_found: int) -> None:
        reused = num_found * self._pages.page_tokens
        sequence.pages, sequence.num_indexed, sequence.preempted = pages, num_found, False
        sequence.num_cached = sequence.num_sound = reused
        self.running[sequence.request_id] = sequence
        sequence.admit(reused)
        self.counts["prefix_hits"] += reused > 0
        self.counts["reused_tokens"] += reused
        if sequence.prefix is not None and self._num_reusable(sequence, len(sequence.tokens)) > num_found:
            key = sequence.prefix.key(num_found, sequence.tokens, self._pages.page_tokens)
            if key not in self._claims:
                self._claims[key] = sequence.request_id
                sequence.claim = key

    def _unclaim(self, sequence: Sequence) -> None:
        if sequence.claim is not None:
            del self._claims[sequence.claim]
            self.waiting.lead_is_done(sequence.claim)
            sequence.claim = None

    def _num_reusable(self, sequence: Sequence, num_tokens: int) -> int:
        """How many pages of the first num_tokens others may reuse. Where angles depend on the length, an answer's differ from a prompt's."""
        return (num_tokens if self._regime is None else min(num_tokens, sequence.num_prompt)) // self._pages.page_tokens

    def _chunk_stop(self, sequence: Sequence, budget: int) -> int:
        """Where a prompt's next chunk ends. Where angles depend on the length, all of a chunk was first computed with the same ones."""
        start = sequence.num_cached
        if self._whole_prompts:  # however many tokens that is
            return len(sequence.tokens)
        stop = min(len(sequence.tokens), start + budget)
        if self._regime is None or stop <= sequence.num_prompt:
            return stop
        if start < sequence.num_prompt:
            return sequence.num_prompt
        while self._regime(stop) != self._regime(start + 1):  # ends at start + 1 at the latest
            stop = (start + 1 + stop) // 2
        return stop


class _Shares:
    """One step's prompt tokens, divided so that a long prompt leaves room for others: a prompt gets half of what is left at most, or `least` tokens.

    What nobody takes in the end goes to those who have more to compute, in order.
    """

    def __init__(self, tokens: int, least: int, chunk_stop: Callable[[Sequence, int], int]) -> None:
        self.left, self._least, self._chunk_stop = tokens, max(1, least), chunk_stop
        self._given: list[tuple[Sequence, int]] = []  # and where its chunk ends

    def give(self, sequence: Sequence, *, keep_some: bool = False) -> None:
        """Give a prompt its share. keep_some: leave `least` tokens for those who are not admitted yet."""
        room = max(0, self.left - self._least) if keep_some else self.left
        stop = self._chunk_stop(sequence, min(room, max(room // 2, self._least))) if room else sequence.num_cached
        self._given.append((sequence, stop))
        self.left -= stop - sequence.num_cached

    def work(self) -> list[Work]:
        found = []
        for sequence, end in self._given:
            stop = self._chunk_stop(sequence, end - sequence.num_cached + self.left) if self.left else end
            self.left -= stop - end
            if stop > sequence.num_cached:
                found.append(Work(sequence, sequence.num_cached, stop))
        return found
