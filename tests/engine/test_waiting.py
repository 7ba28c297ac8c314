"""engine/waiting.py: who comes next."""

from __future__ import annotations

import random
from collections import Counter

from atoll.engine.request import Request
from atoll.engine.sequence import Sequence
from atoll.engine.waiting import Waiting


def sequence(name: str, scope: str = "", adapter: str | None = None) -> Sequence:
    return Sequence(name, Request([7], adapter, scope=scope), 8, (2,), lambda ids: "x" * len(ids))


def drain(waiting: Waiting) -> list[str]:
    names = []
    while (lane := waiting.best()) is not None:
        names.append(waiting.admit(lane).request_id)
        waiting.check()
    return names


def test_in_one_scope_whoever_came_first_is_first_whatever_the_adapter() -> None:
    """Lanes by adapter are how it is kept, not who comes next."""
    waiting = Waiting()
    for i in range(20):
        waiting.add(sequence(str(i), adapter=(None, "a", "b")[i % 3]))
    assert drain(waiting) == [str(i) for i in range(20)]
    assert waiting.running == {"": 20}


def test_the_scope_with_the_fewest_running_rows_comes_next() -> None:
    """One key's thousand requests must not keep another key's one waiting behind them."""
    waiting = Waiting()
    for i in range(6):
        waiting.add(sequence(f"big{i}", "big"))
    waiting.add(sequence("small0", "small"))
    waiting.add(sequence("small1", "small"))
    assert drain(waiting) == ["big0", "small0", "big1", "small1", "big2", "big3", "big4", "big5"]


def test_rows_that_end_count_no_more() -> None:
    """Fairness is about what runs now, not about what once ran."""
    waiting = Waiting()
    for scope in "aab":
        waiting.add(sequence(scope + str(len(waiting)), scope))
    assert drain(waiting) == ["a0", "b2", "a1"]
    waiting.count_running("a", -1)
    waiting.count_running("a", -1)
    waiting.add(sequence("b3", "b"))
    waiting.add(sequence("a4", "a"))
    assert drain(waiting) == ["a4", "b3"]


def test_a_parked_lane_is_not_looked_at_until_something_changed() -> None:
    """What has no place now does not block, costs nothing, and is not forgotten."""
    waiting = Waiting()
    for name, adapter in (("a0", "a"), ("b0", "b"), ("a1", "a"), ("base", None)):
        waiting.add(sequence(name, adapter=adapter))
    lane = waiting.best()
    assert lane is not None and lane.adapter == "a"
    waiting.park(lane)
    waiting.check()
    assert drain(waiting) == ["b0", "base"]
    assert waiting.overdue(2) is lane and waiting.overdue(3) is None
    waiting.unpark()
    assert drain(waiting) == [], "nothing has changed"
    waiting.wake()
    waiting.unpark()
    assert drain(waiting) == ["a0", "a1"]
    assert waiting.overdue(0) is None


def test_many_parked_lanes_are_looked_at_in_turn_and_none_is_left_out() -> None:
    """A thousand adapters without a place, looked at all at once, would stall every step; a few at a time, each of them is asked."""
    waiting = Waiting()
    for i in range(300):
        waiting.add(sequence(f"r{i}", adapter=f"a{i}"))
    while (lane := waiting.best()) is not None:
        waiting.park(lane)
    waiting.wake()
    asked: list[str] = []
    for _ in range(8):
        waiting.unpark()
        before = len(asked)
        while (lane := waiting.best()) is not None:
            asked.append(lane.head.request_id)
            waiting.park(lane)
            waiting.check()
        assert len(asked) - before <= 65
        if len(asked) > 100:
            waiting.add(sequence(f"base{len(asked)}"))
            assert drain(waiting) == [f"base{len(asked)}"]
    assert asked[0] == "r0"
    assert set(asked) == {f"r{i}" for i in range(300)}


def test_a_preempted_sequence_goes_before_everybody_else() -> None:
    """It has waited its turn once, and what it was told already must go on."""
    waiting = Waiting()
    first, second = sequence("first", "busy"), sequence("second", "busy")
    for s in (first, second, sequence("third", "busy"), sequence("other", "idle")):
        waiting.add(s)
    lane = waiting.best()
    assert lane is not None
    waiting.admit(lane)
    waiting.admit(lane)
    for s in (second, first):  # as the scheduler does: from the end
        s.preempted = True
        waiting.count_running("busy", -1)
        waiting.add(s)
    waiting.count_running("busy", 5)
    assert drain(waiting) == ["first", "second", "other", "third"]


def test_a_sequence_that_follows_another_steps_aside_and_comes_back_in_order() -> None:
    """It waits for work that it can use; those behind it do not, and it loses its place to nobody for good."""
    waiting = Waiting()
    for name in ("a", "b", "c", "d"):
        waiting.add(sequence(name))
    preempted = sequence("p")
    for _ in range(2):
        lane = waiting.best()
        assert lane is not None
        waiting.follow(lane, b"key")
        waiting.check()
    lane = waiting.best()
    assert lane is not None and waiting.admit(lane).request_id == "c"
    assert len(waiting) == 3 and "a" in waiting
    preempted.preempted = True
    waiting.add(preempted)
    waiting.lead_is_done(b"key")
    waiting.lead_is_done(b"nobody's")
    waiting.check()
    assert drain(waiting) == ["p", "a", "b", "d"]


def test_a_follower_can_be_cancelled_and_a_lane_may_have_only_followers() -> None:
    """Nothing of it stays, and the lane is there again when they come back."""
    waiting = Waiting()
    for name in ("a", "b"):
        waiting.add(sequence(name))
        lane = waiting.best()
        assert lane is not None
        waiting.follow(lane, b"key")
    assert waiting.best() is None
    assert waiting.remove("a") is not None
    waiting.check()
    waiting.lead_is_done(b"key")
    assert drain(waiting) == ["b"]


def test_removing_anywhere_leaves_the_others_in_order() -> None:
    """Cancels come for heads, middles and whole lanes, parked ones too."""
    waiting = Waiting()
    for i in range(9):
        waiting.add(sequence(str(i), adapter=(None, "a", "b")[i % 3]))
    for name in ("0", "4", "8"):
        assert waiting.remove(name) is not None
        waiting.check()
    assert waiting.remove("0") is None
    lane = waiting.best()
    assert lane is not None
    waiting.park(lane)
    for name in ("1", "7"):
        waiting.remove(name)
        waiting.check()
    waiting.unpark()
    assert drain(waiting) == ["2", "3", "5", "6"]


def test_random_traffic_takes_whom_the_rule_names() -> None:
    """The heaps are checked against the rule itself: preempted first, then the scope with fewest rows, then the order of arrival."""
    source = random.Random(5)
    waiting, there, running = Waiting(), {}, Counter[str]()
    parked: set[tuple[str, str | None]] = set()
    ran: list[Sequence] = []
    for number in range(3000):
        action = source.random()
        if action < 0.4:
            s = sequence(str(number), source.choice("xyz"), source.choice((None, "a", "b")))
            waiting.add(s)
            there[s.request_id] = s
        elif action < 0.5 and there:
            waiting.remove(there.pop(source.choice(list(there))).request_id)
        elif action < 0.6 and ran:
            s = ran.pop(source.randrange(len(ran)))
            waiting.count_running(s.scope, -1)
            running[s.scope] -= 1
            if source.random() < 0.3:
                s.preempted = True
                waiting.add(s)
                there[s.request_id] = s
        elif action < 0.65:
            waiting.wake()
            waiting.unpark()
            parked.clear()
        else:
            lane = waiting.best()
            parked = {(name, adapter) for name, adapter in parked if any((s.scope, s.adapter) == (name, adapter) for s in there.values())}
            open_ones = [s for s in there.values() if (s.scope, s.adapter) not in parked]
            if not open_ones:
                assert lane is None
                continue
            assert lane is not None
            head = lane.head
            preempted = [s for s in open_ones if s.preempted]
            if preempted:
                assert head.preempted
            else:
                assert (running[head.scope], head.arrival) == min((running[s.scope], s.arrival) for s in open_ones)
            if source.random() < 0.2:
                waiting.park(lane)
                parked.add((lane.scope, lane.adapter))
            else:
                s = waiting.admit(lane)
                s.preempted = False
                ran.append(there.pop(s.request_id))
                running[s.scope] += 1
        if number % 50 == 0:
            waiting.check()
            assert len(waiting._heap) <= 64 + 4 * 3 + 1
    assert len(ran) > 100
