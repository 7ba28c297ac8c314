"""Who waits, and who of them comes next: the scope with the fewest running rows, and in a scope whoever came first.

Requests of one scope and one adapter form a lane, in order of arrival. A lane whose adapter has no place is parked: it is not looked at again before
something has changed among the adapters, and then in turn, so ten thousand waiting requests cost a step next to nothing. A sequence may also follow
another, whose work it can use: it leaves its lane until that is done. A preempted sequence goes before everybody else.

Used by scheduler.py. Plain Python; the heaps hold entries that may be out of date, and are thrown away when they come up.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator

from atoll.engine.sequence import Sequence

_UNPARKED_AT_ONCE = 64  # lanes in a step; those that find no place again cost about ten microseconds each
_SPARE_ENTRIES = 64  # of the heap of scopes, before entries that are out of date are swept


class Lane:
    """The waiting sequences of one scope and adapter; never empty while somebody can see it.

    parked: not looked at. blocked_at: how many sequences had been admitted when its first one found no place; None if it did not have to wait.
    """

    def __init__(self, scope: str, adapter: str | None) -> None:
        self.scope, self.adapter = scope, adapter
        self.sequences: OrderedDict[str, Sequence] = OrderedDict()
        self.parked = False
        self.blocked_at: int | None = None

    @property
    def head(self) -> Sequence:
        return next(iter(self.sequences.values()))

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: 0 for a preempted sequence and 1 for a new one, then by arrival."""
        head = self.head
        return (0 if head.preempted else 1, head.arrival)


class _Scope:
    """One scope's lanes; the heap holds (rank of a lane's head, a number that breaks ties, the lane)."""

    def __init__(self) -> None:
        self.lanes: dict[str | None, Lane] = {}
        self.heap: list[tuple[tuple[int, int], int, Lane]] = []

    def best(self) -> Lane | None:
        while self.heap:
            rank, _, lane = self.heap[0]
            if lane.sequences and not lane.parked and lane.rank == rank:
                return lane
            heapq.heappop(self.heap)
        return None


class Waiting:
    """All waiting sequences. running counts the running rows of every scope that has any."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.num_admitted = 0
        self._sequences: dict[str, Sequence] = {}
        self._scopes: dict[str, _Scope] = {}
        self._heap: list[tuple[tuple[int, int, int], str]] = []
        self._followers: dict[bytes, dict[str, Sequence]] = {}  # sequences outside their lanes, by what they wait for
        self._followed: dict[str, bytes] = {}
        self._parked: dict[Lane, None] = {}  # longest parked first
        self._num_due = 0  # of the first of them, to be looked at again
        self._blocked: dict[Lane, None] = {}  # lanes with a blocked_at, the one that has waited longest first
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Append a new sequence to its lane; a preempted one goes back to the front."""
        if not sequence.arrival:
            sequence.arrival = next(self._numbers)
        self._sequences[sequence.request_id] = sequence
        if sequence.preempted:
            self._put_in_front([sequence])
            return
        lane = self._lane(sequence)
        lane.sequences[sequence.request_id] = sequence
        if lane.head is sequence:
            self._offer(lane)

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out wherever it stands; None if it does not wait."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if request_id in self._followed:
            del self._followers[self._followed.pop(request_id)][request_id]
            return sequence
        lane = self._scopes[sequence.scope].lanes[sequence.adapter]
        was_head = lane.head is sequence
        del lane.sequences[request_id]
        self._after(lane, head_left=was_head)
        return sequence

    def follow(self, lane: Lane, key: bytes) -> None:
        """Look at the head of a lane no more until `lead_is_done` for this key, and at those behind it instead."""
        request_id, sequence = lane.sequences.popitem(last=False)
        self._followers.setdefault(key, {})[request_id] = sequence
        self._followed[request_id] = key
        self._after(lane, head_left=True)

    def lead_is_done(self, key: bytes) -> None:
        """What some sequences waited for is there, or will not come: they are in front of their lanes again."""
        followers = self._followers.pop(key, {})
        for request_id in followers:
            del self._followed[request_id]
        by_lane: dict[tuple[str, str | None], list[Sequence]] = {}
        for sequence in followers.values():
            by_lane.setdefault((sequence.scope, sequence.adapter), []).append(sequence)
        for sequences in by_lane.values():
            self._put_in_front(sequences)

    def best(self) -> Lane | None:
        """The lane whose head comes next; None if every lane is parked."""
        while self._heap:
            key, name = self._heap[0]
            scope = self._scopes.get(name)
            lane = scope.best() if scope is not None else None
            if lane is not None and self._key(lane) == key:
                return lane
            heapq.heappop(self._heap)
        return None

    def admit(self, lane: Lane) -> Sequence:
        """Take the head of a lane out: it runs now."""
        request_id, sequence = lane.sequences.popitem(last=False)
        del self._sequences[request_id]
        self.num_admitted += 1
        if lane.blocked_at is not None:
            lane.blocked_at = None
            del self._blocked[lane]
        self.count_running(lane.scope, 1)
        self._after(lane, head_left=True)
        return sequence

    def count_running(self, scope: str, change: int) -> None:
        """A row of this scope starts (1) or ends (-1)."""
        self.running[scope] += change
        if not self.running[scope]:
            del self.running[scope]
        if scope in self._scopes:
            self._offer_scope(scope)

    def park(self, lane: Lane) -> None:
        """Look at a lane no more until `unpark`: its adapter has no place now."""
        lane.parked = True
        self._parked[lane] = None
        if lane.blocked_at is None:
            lane.blocked_at = self.num_admitted
            self._blocked[lane] = None
        self._offer_scope(lane.scope)

    def wake(self) -> None:
        """Something has changed among the adapters: every parked lane is due to be looked at again."""
        self._num_due = len(self._parked)

    def unpark(self) -> None:
        """Look again at parked lanes that are due: the one that has waited longest, and some of the others in turn."""
        if not self._num_due or not self._parked:
            return
        longest = next(iter(self._blocked))
        due = [longest] if longest.parked else []
        due += [lane for lane in itertools.islice(self._parked, min(self._num_due, _UNPARKED_AT_ONCE)) if lane is not longest]
        self._num_due = max(0, self._num_due - _UNPARKED_AT_ONCE)
        for lane in due:
            del self._parked[lane]
            lane.parked = False
            self._offer(lane)

    def overdue(self, max_overtakes: int) -> Lane | None:
        """The lane that has been passed for longest, if more than max_overtakes sequences were admitted since."""
        lane = next(iter(self._blocked), None)
        if lane is None or lane.blocked_at is None or self.num_admitted - lane.blocked_at < max_overtakes:
            return None
        return lane

    def check(self) -> None:
        """Raise AssertionError where a waiting sequence is in no lane, or in a lane that nobody would look at again."""
        lanes = [lane for scope in self._scopes.values() for lane in scope.lanes.values()]
        groups = [*(lane.sequences for lane in lanes), *self._followers.values()]
        known = [sequence for group in groups for sequence in group.values()]
        if {s.request_id: s for s in known} != self._sequences or len(known) != len(self._sequences):
            raise AssertionError("lanes and the list of waiting requests disagree")
        for lane in lanes:
            if not lane.sequences or lane.parked != (lane in self._parked) or (lane.blocked_at is not None) != (lane in self._blocked):
                raise AssertionError(f"the lane of scope {lane.scope!r} and adapter {lane.adapter!r} is empty, lost or wrongly parked")
        if self._followed != {request_id: key for key, group in self._followers.items() for request_id in group}:
            raise AssertionError("requests that follow others are lost")

    def _lane(self, sequence: Sequence) -> Lane:
        lanes = self._scopes.setdefault(sequence.scope, _Scope()).lanes
        lane = lanes.get(sequence.adapter)
        if lane is None:
            lane = lanes[sequence.adapter] = Lane(sequence.scope, sequence.adapter)
        return lane

    def _put_in_front(self, sequences: list[Sequence]) -> None:
        """Put sequences of one lane, given in order, before all others in it, but behind other preempted ones if they are not preempted."""
        lane = self._lane(sequences[0])
        ahead = [] if sequences[0].preempted else list(itertools.takewhile(lambda s: s.preempted, lane.sequences.values()))
        for sequence in reversed([*ahead, *sequences]):
            lane.sequences[sequence.request_id] = sequence
            lane.sequences.move_to_end(sequence.request_id, last=False)
        self._offer(lane)

    def _key(self, lane: Lane) -> tuple[int, int, int]:
        """A scope's key: a preempted sequence first, then fewest running rows, then who has waited longest."""
        is_new, arrival = lane.rank
        return is_new, self.running[lane.scope] if is_new else 0, arrival

    def _offer(self, lane: Lane) -> None:
        if not lane.parked:
            heapq.heappush(self._scopes[lane.scope].heap, (lane.rank, next(self._numbers), lane))
            self._offer_scope(lane.scope)

    def _offer_scope(self, name: str) -> None:
        lane = self._scopes[name].best()
        if lane is not None:
            heapq.heappush(self._heap, (self._key(lane), name))
        if len(self._heap) > _SPARE_ENTRIES + 4 * len(self._scopes):
            best = ((name, scope.best()) for name, scope in self._scopes.items())
            self._heap = [(self._key(lane), name) for name, lane in best if lane is not None]
            heapq.heapify(self._heap)

    def _after(self, lane: Lane, *, head_left: bool) -> None:
        """A sequence has left its lane: offer the next one, or forget the lane."""
        if lane.sequences:
            if head_left:
                self._offer(lane)
            return
        scope = self._scopes[lane.scope]
        del scope.lanes[lane.adapter]
        self._parked.pop(lane, None)
        if lane.blocked_at is not None:
            del self._blocked[lane]
            self.wake()  # some may have had to wait for it
        if scope.lanes:
            self._offer_scope(lane.scope)
        else:
            del self._scopes[lane.scope]
