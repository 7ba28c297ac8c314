"""Who runs next: budgets, chunks, skipping, ageing, fairness. Plain Python, fake adapters."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tests.engine.scheduling import Bench, FakeAdapters, sequence

from atoll.engine.sequence import Sequence


def test_the_scheduler_and_what_users_hold_import_no_torch() -> None:
    """Scheduling is testable and fast because it is plain Python; a request can be made without loading a gigabyte of libraries."""
    modules = "atoll.engine.scheduler, atoll.engine.request, atoll.engine.sequence, atoll.engine.stops, atoll.engine.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_running_rows_come_first_and_prompts_get_what_is_left_in_chunks() -> None:
    """A long prompt must neither stall those who already answer nor wait for a step that has room for all of it."""
    bench = Bench(max_step_tokens=10)
    bench.add(sequence("short", prompt=4))
    assert bench.step() == [("short", 0, 4)]
    bench.add(sequence("long", prompt=15))
    assert bench.step() == [("short", 4, 5), ("long", 0, 9)]
    assert bench.step() == [("short", 5, 6), ("long", 9, 15)]
    assert bench.step() == [("short", 6, 7), ("long", 15, 16)]


def test_a_long_prompt_leaves_room_for_others() -> None:
    """First come, first served alone would make a ten-token question wait until a book is read."""
    bench = Bench(max_step_tokens=64)
    bench.add(sequence("book", prompt=1000))
    assert bench.step() == [("book", 0, 64)]
    bench.add(sequence("question", prompt=10))
    assert bench.step() == [("book", 64, 118), ("question", 0, 10)], "what nobody else takes is the book's"
    for i in range(10):
        bench.add(sequence(f"book{i}", prompt=1000))
    for _ in range(4):
        bench.step()
    bench.add(sequence("late", prompt=5, scope="somebody else"))
    shares = {name: stop - start for name, start, stop in bench.step()}
    assert shares["late"] == 5
    assert shares["book"] == max(n for name, n in shares.items() if name != "late"), "whoever came first has the largest share"


def test_rows_are_given_in_order_of_arrival() -> None:
    """Without adapters in the way the queue is first come, first served."""
    bench = Bench(max_rows=2)
    for name in "abc":
        bench.add(sequence(name))
    assert [name for name, _, _ in bench.step()] == ["a", "b"]
    bench.remove("a")
    bench.step()
    assert bench.running == ["b", "c"]


def test_a_scope_with_many_requests_keeps_nobody_else_waiting() -> None:
    """One key's backlog is that key's own: the next free row goes to whoever has the fewest."""
    bench = Bench(max_rows=4)
    for i in range(50):
        bench.add(sequence(f"big{i}", scope="big", max_new=3))
    bench.step()
    bench.add(sequence("small", scope="small"))
    while "small" in bench.waiting:
        bench.step()
    assert bench.running == ["big4", "small", "big5", "big6"]


def test_a_request_whose_adapter_has_no_place_does_not_block_those_behind_it() -> None:
    """LoRAX stops at the first adapter that is not ready; every tenant behind it then waits for one."""
    bench = Bench(FakeAdapters(room=1))
    for name, adapter in (("a1", "A"), ("b1", "B"), ("base", None), ("a2", "A")):
        bench.add(sequence(name, adapter=adapter))
    bench.step()
    assert bench.running == ["a1", "base", "a2"]
    assert bench.waiting == ["b1"]


def test_whoever_was_overtaken_too_often_gets_the_next_place() -> None:
    """A busy adapter must not starve a rare one: its later requests wait until the rare one has started, the base's do not."""
    bench = Bench(FakeAdapters(room=1), max_overtakes=2)
    bench.add(sequence("a0", adapter="A", max_new=3))
    bench.add(sequence("b", adapter="B"))
    for step in range(1, 30):
        bench.add(sequence(f"a{step}", adapter="A", max_new=3))
        bench.add(sequence(f"base{step}", max_new=3))
        bench.step()
        if "b" in bench.running:
            break
    assert step <= 8
    assert f"base{step}" in bench.running
    assert f"a{step}" in bench.waiting


def test_those_who_waited_for_an_overdue_request_go_on_when_it_is_cancelled() -> None:
    """They were held back for its sake only; nothing changed among the adapters that would wake them."""
    bench = Bench(FakeAdapters(room=2), max_overtakes=0)
    for name, adapter in (("a", "A"), ("b", "B"), ("c", "C"), ("a2", "A")):
        bench.add(sequence(name, adapter=adapter, max_new=50))
    bench.step()
    assert bench.waiting == ["c", "a2"]
    bench.remove("c")
    bench.step()
    assert bench.running == ["a", "b", "a2"]


def test_pinned_adapters_go_on_beside_an_overdue_request() -> None:
    """Using a pinned adapter frees no place by waiting, so making it wait would help nobody."""
    bench = Bench(FakeAdapters(room=1, pinned=("P",)), max_overtakes=0)
    for name, adapter in (("a", "A"), ("b", "B"), ("p", "P"), ("a2", "A")):
        bench.add(sequence(name, adapter=adapter))
    bench.step()
    assert bench.running == ["a", "p"]


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only() -> None:
    """One damaged adapter in the queue is not the others' problem."""
    bench = Bench(FakeAdapters(broken=("X",)))
    for name, adapter in (("a", "A"), ("x", "X"), ("b", "B")):
        bench.add(sequence(name, adapter=adapter))
    plan = bench.scheduler.schedule()
    bench.run(plan)
    assert bench.running == ["a", "b"]
    assert [(failed.request_id, str(error)) for failed, error in plan.failed] == [("x", "X is broken")]
    assert "x" not in bench.scheduler


def test_ten_thousand_waiting_requests_are_not_looked_at_in_every_step() -> None:
    """With every adapter's place taken, a step asks for none of those that wait: nothing has changed."""
    bench = Bench(FakeAdapters(room=1))
    bench.add(sequence("a", adapter="A", max_new=100))
    for i in range(10_000):
        bench.add(sequence(f"w{i}", adapter=f"B{i % 500}", scope=f"s{i % 7}"))
    bench.step()
    asked = bench.adapters.num_asked
    assert asked <= 1 + 7 * 500

    class Untouched(dict[str, Sequence]):
        def __iter__(self) -> Any:
            raise AssertionError("a step went through all that wait")

        values = items = keys = __iter__

    bench.scheduler.waiting._sequences = Untouched(bench.scheduler.waiting._sequences)
    for _ in range(20):
        for item in bench.scheduler.schedule().work:
            bench.scheduler.computed(item, sound=True)
            item.sequence.append(9, None)
    assert bench.adapters.num_asked == asked


def test_nobody_is_admitted_while_jobs_wait_for_room() -> None:
    """Scoring that never finds pages because requests take each one that comes free would never end."""
    bench = Bench()
    bench.add(sequence("a"))
    bench.step()
    bench.add(sequence("b"))
    assert bench.step(admit=False) == [("a", 4, 5)]
    assert [name for name, _, _ in bench.step()] == ["a", "b"]


def test_those_who_take_no_place_go_on_while_a_job_waits_for_an_adapter() -> None:
    """A job that waits for a place must get one in the end; rows of the base, of pinned adapters and of its own adapter take none from it."""
    bench = Bench(FakeAdapters(room=2, pinned=("P",)))
    for name, adapter in (("base", None), ("pinned", "P"), ("other", "B"), ("own", "J")):
        bench.add(sequence(name, adapter=adapter))
    assert {name for name, _, _ in bench.step(wanted="J")} == {"base", "pinned", "own"}
    bench.step(wanted="J")
    assert bench.waiting == ["other"]
    bench.step()  # the job is gone, and nothing else has changed
    assert "other" in bench.running


def test_the_check_finds_a_sequence_in_two_states() -> None:
    """The integrity check is only worth running if it can fail."""
    bench = Bench()
    bench.add(sequence("a"))
    bench.step()
    bench.add(bench.scheduler.running["a"])
    with pytest.raises(AssertionError, match="also runs"):
        bench.scheduler.check()
