"""Who runs next: budgets, chunks, skipping, ageing. Plain Python, fake rows and adapters."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from atoll.engine.request import Request, SamplingParams
from atoll.engine.scheduler import Plan, Scheduler
from atoll.engine.sequence import Sequence
from atoll.errors import PoolFull


class FakePlaces:
    """`rows` KV rows, and room for `adapters` different adapters at once; some pinned, some broken."""

    def __init__(self, rows: int = 8, adapters: int = 8, pinned: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> None:
        self.num_free_rows, self._adapters = rows, adapters
        self.pinned, self.broken = pinned, broken
        self.holds: Counter[str] = Counter()
        self._next = 0

    def hold(self, adapter: str) -> bool:
        if adapter in self.broken:
            raise PoolFull(f"{adapter} is broken")
        if (
            adapter not in self.pinned
            and self.holds[adapter] == 0
            and sum(n > 0 for key, n in self.holds.items() if key not in self.pinned) >= self._adapters
        ):
            return False
        self.holds[adapter] += 1
        return True

    def is_pinned(self, adapter: str) -> bool:
        return adapter in self.pinned

    def take_row(self) -> int:
        self.num_free_rows -= 1
        self._next += 1
        return self._next

    def finish(self, scheduler: Scheduler, sequence: Sequence) -> None:
        """What the engine does when a sequence ends."""
        scheduler.remove(sequence.request_id)
        self.num_free_rows += 1
        if sequence.adapter is not None:
            self.holds[sequence.adapter] -= 1


def sequence(name: str, prompt: int = 4, adapter: str | None = None, max_new: int = 8) -> Sequence:
    request = Request([7] * prompt, adapter, SamplingParams(max_new_tokens=max_new))
    return Sequence(name, request, max_new, (2,), lambda ids: "x" * len(ids))


def run(plan: Plan) -> None:
    """What a step does to sequences: cache the tokens, append one where the last was among them."""
    for item in plan.work:
        item.sequence.num_cached = item.stop
        if item.stop == len(item.sequence.tokens):
            item.sequence.append(9, None)


def shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(item.sequence.request_id, item.start, item.stop) for item in plan.work]


def test_the_scheduler_and_what_users_hold_import_no_torch() -> None:
    """Scheduling is testable and fast because it is plain Python; a request can be made without loading a gigabyte of libraries."""
    modules = "atoll.engine.scheduler, atoll.engine.request, atoll.engine.sequence, atoll.engine.stops, atoll.engine.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_running_rows_come_first_and_prompts_get_what_is_left_in_chunks() -> None:
    """A long prompt must neither stall those who already answer nor wait for a step that has room for all of it."""
    scheduler, places = Scheduler(max_step_tokens=10, max_overtakes=4), FakePlaces()
    scheduler.add(sequence("short", prompt=4))
    scheduler.add(sequence("long", prompt=15))
    scheduler.add(sequence("next", prompt=5))
    plans = []
    for _ in range(4):
        plan = scheduler.schedule(places)
        plans.append(shape(plan))
        run(plan)
    assert plans == [
        [("short", 0, 4), ("long", 0, 6)],
        [("short", 4, 5), ("long", 6, 15)],
        [("short", 5, 6), ("long", 15, 16), ("next", 0, 5)],
        [("short", 6, 7), ("long", 16, 17), ("next", 5, 6)],
    ]
    scheduler.check()


def test_rows_are_given_in_order_of_arrival() -> None:
    """Without adapters in the way the queue is first come, first served."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=4), FakePlaces(rows=2)
    for name in "abc":
        scheduler.add(sequence(name))
    assert [name for name, _, _ in shape(scheduler.schedule(places))] == ["a", "b"]
    places.finish(scheduler, scheduler.running["a"])
    run(scheduler.schedule(places))
    assert list(scheduler.running) == ["b", "c"]


def test_a_request_whose_adapter_has_no_place_does_not_block_those_behind_it() -> None:
    """LoRAX stops at the first adapter that is not ready; every tenant behind it then waits for one."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=4), FakePlaces(adapters=1)
    for name, adapter in (("a1", "A"), ("b1", "B"), ("base", None), ("a2", "A")):
        scheduler.add(sequence(name, adapter=adapter))
    run(scheduler.schedule(places))
    assert list(scheduler.running) == ["a1", "base", "a2"]
    assert list(scheduler.waiting) == ["b1"]
    assert scheduler.waiting["b1"].overtaken == 2


def test_whoever_was_overtaken_too_often_gets_the_next_place() -> None:
    """A busy adapter must not starve a rare one: its later requests wait until the rare one has started, the base's do not."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=2), FakePlaces(rows=50, adapters=1)
    scheduler.add(sequence("a0", adapter="A"))
    scheduler.add(sequence("b", adapter="B"))
    for step in range(1, 30):
        scheduler.add(sequence(f"a{step}", adapter="A"))
        scheduler.add(sequence(f"base{step}"))
        run(scheduler.schedule(places))
        for done in [s for s in scheduler.running.values() if s.num_new == 3]:
            places.finish(scheduler, done)
        if "b" in scheduler.running:
            break
    assert step <= 8
    assert f"base{step}" in scheduler.running
    assert f"a{step}" in scheduler.waiting


def test_pinned_adapters_go_on_beside_an_overdue_request() -> None:
    """Using a pinned adapter frees no place by waiting, so making it wait would help nobody."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=0), FakePlaces(adapters=1, pinned=("P",))
    for name, adapter in (("a", "A"), ("b", "B"), ("p", "P"), ("a2", "A")):
        scheduler.add(sequence(name, adapter=adapter))
    scheduler.schedule(places)
    assert list(scheduler.running) == ["a", "p"]


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only() -> None:
    """One damaged adapter in the queue is not the others' problem."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=4), FakePlaces(broken=("X",))
    for name, adapter in (("a", "A"), ("x", "X"), ("b", "B")):
        scheduler.add(sequence(name, adapter=adapter))
    plan = scheduler.schedule(places)
    assert list(scheduler.running) == ["a", "b"]
    assert [(failed.request_id, str(error)) for failed, error in plan.failed] == [("x", "X is broken")]
    assert "x" not in scheduler


def test_the_check_finds_a_sequence_in_two_states() -> None:
    """The integrity check is only worth running if it can fail."""
    scheduler, places = Scheduler(max_step_tokens=100, max_overtakes=4), FakePlaces()
    scheduler.add(sequence("a"))
    scheduler.schedule(places)
    scheduler.waiting["a"] = scheduler.running["a"]
    with pytest.raises(AssertionError, match="also runs"):
        scheduler.check()
