"""Who runs in the next step: plain Python, without torch.

Every running sequence that decodes gets its one token; what is left of the step's token budget goes to prompts, first those already begun, then
waiting ones, in order of arrival. A waiting request whose adapter has no place now is passed over, not waited for; but whoever was passed
`max_overtakes` times comes next: until it starts, no later request may take or keep busy a place among the adapters.

    waiting ──admit (KV row + hold on adapter)──► running: prefill in chunks ──► running: decode ──► released

Used by engine.py, which lends it rows and adapters through `Places` and gives them back itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from atoll.engine.sequence import Sequence


class Places(Protocol):
    """What a sequence needs to run. A hold on an adapter and a KV row are always taken together."""

    @property
    def num_free_rows(self) -> int: ...

    def hold(self, adapter: str) -> bool:
        """Take a hold on a resident adapter, loading it if there is room; False if it has no place now. Raises if it never can have one."""
        ...

    def is_pinned(self, adapter: str) -> bool:
        """Whether the adapter stays resident whoever uses it, so that using it keeps nobody waiting."""
        ...

    def take_row(self) -> int: ...


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
    """Waiting and running sequences in order of arrival."""

    def __init__(self, max_step_tokens: int, max_overtakes: int) -> None:
        self._max_step_tokens, self._max_overtakes = max_step_tokens, max_overtakes
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.waiting or request_id in self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request_id] = sequence

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a sequence; None if it is not here. Its row and its hold stay with it: the caller gives them back."""
        return self.waiting.pop(request_id, None) or self.running.pop(request_id, None)

    def schedule(self, places: Places) -> Plan:
        """Choose the work of the next step, admitting waiting sequences. Decode work comes first."""
        plan = Plan([Work(s, s.num_cached, len(s.tokens)) for s in self.running.values() if s.is_decoding])
        budget = self._max_step_tokens - len(plan.work)
        budget = self._prefill((s for s in self.running.values() if not s.is_decoding), budget, plan)
        if budget > 0 and self.waiting and places.num_free_rows:
            self._admit(budget, places, plan)
        return plan

    def _prefill(self, sequences: Iterable[Sequence], budget: int, plan: Plan) -> int:
        """Plan the next chunk of each prompt while the budget lasts; returns what is left."""
        for sequence in sequences:
            if budget <= 0:
                break
            stop = min(len(sequence.tokens), sequence.num_cached + budget)
            plan.work.append(Work(sequence, sequence.num_cached, stop))
            budget -= stop - sequence.num_cached
        return budget

    def _admit(self, budget: int, places: Places, plan: Plan) -> None:
        """Start waiting sequences in order, passing over those whose adapter has no place now."""
        passed: list[Sequence] = []  # over in this step
        no_place: set[str] = set()
        overdue: str | None = None  # the adapter that comes next
        for sequence in list(self.waiting.values()):
            if budget <= 0 or places.num_free_rows == 0:
                break
            adapter = sequence.adapter
            if adapter is not None:
                must_wait = adapter in no_place or (overdue is not None and not places.is_pinned(adapter))
                try:
                    held = not must_wait and places.hold(adapter)
                except Exception as error:  # whatever is wrong with one adapter is the end of its requests only
                    del self.waiting[sequence.request_id]
                    plan.failed.append((sequence, error))
                    continue
                if not held:
                    passed.append(sequence)
                    no_place.add(adapter)
                    if overdue is None and sequence.overtaken >= self._max_overtakes:
                        overdue = adapter
                    continue
            del self.waiting[sequence.request_id]
            self.running[sequence.request_id] = sequence
            sequence.kv_row = places.take_row()
            budget = self._prefill((sequence,), budget, plan)
            for other in passed:
                other.overtaken += 1

    def check(self) -> None:
        """Raise AssertionError where a sequence is in two states, finished but still here, or holds what it should not."""
        for request_id, sequence in self.waiting.items():
            if request_id in self.running or sequence.kv_row is not None or sequence.completion is not None:
                raise AssertionError(f"waiting request {request_id} also runs, holds a row or is finished")
        for request_id, sequence in self.running.items():
            if sequence.kv_row is None or sequence.completion is not None:
                raise AssertionError(f"running request {request_id} holds no row or is finished")
            if not 0 <= sequence.num_cached < len(sequence.tokens):
                raise AssertionError(f"running request {request_id} has {sequence.num_cached} of {len(sequence.tokens)} tokens cached")
