"""How long things live: requests until their deadline, adapters until their last request; and what a caller is told of time and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Completion, Request, SamplingParams, ScoreRequest
from atoll.errors import ConfigError, EngineError, QueueFull, RequestRefused
from atoll.model.adapter import Adapter
from atoll.model.base import Base
from atoll.model.batch import AdapterBatch

MakeEngine = Callable[..., Engine]


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(make_engine: MakeEngine, clock: Clock) -> MakeEngine:
    """make_engine with that clock."""

    def make(**settings: Any) -> Engine:
        engine = make_engine(**settings)
        engine._intake.clock = clock
        return engine

    return make


def ask(adapter: str | None = None, deadline_s: float | None = None, request_id: str | None = None, **settings: Any) -> Request:
    sampling = SamplingParams(**{"max_new_tokens": 20, "ignore_eos": True, **settings})
    return Request([5, 6, 7], adapter, sampling, request_id, deadline_s=deadline_s)


def completions(engine: Engine) -> dict[str, Completion]:
    return {event.request_id: event.completion for event in engine.step() if event.completion is not None}


def test_a_request_ends_at_its_deadline_with_what_it_has(timed: MakeEngine, clock: Clock) -> None:
    """Waiting and running ones alike; nobody reads an answer that comes later, and its row is somebody else's."""
    engine = timed(max_rows=1)
    engine.add(ask("r8", 5.0, "running"))
    engine.add(ask("r4", 3.0, "waiting"))
    engine.add(ask(None, 50.0, "in time"))
    for _ in range(2):
        assert not completions(engine)
        clock.now += 1.0
    clock.now += 1.0
    assert completions(engine)["waiting"].finish_reason == "deadline"
    clock.now += 2.0
    late = completions(engine)["running"]
    assert (late.finish_reason, len(late.token_ids)) == ("deadline", 3)
    assert late.text
    engine.check()
    while engine.has_work:
        done = completions(engine)
    assert done["in time"].finish_reason == "length"
    assert engine.stats()["finished_deadline"] == 2


def test_an_id_used_again_does_not_inherit_a_deadline(timed: MakeEngine, clock: Clock) -> None:
    """The first request's time is its own, long after it has ended."""
    engine = timed()
    engine.generate([ask(None, 5.0, "same", max_new_tokens=1)])
    engine.add(ask(None, None, "same"))
    clock.now += 10.0
    engine.step()
    assert engine.stats()["running"] == 1
    with pytest.raises(RequestRefused, match="deadline_s is 0"):
        engine.add(ask(None, 0.0))
    with pytest.raises(RequestRefused, match="deadline_s is nan"):
        engine.add(ask(None, float("nan")))


def test_a_completion_says_how_long_it_took(timed: MakeEngine, clock: Clock) -> None:
    """Waiting, the first token, all of it: what dashboards show and limits are set by."""
    engine = timed(max_rows=1)
    engine.add(ask(None, None, "first", max_new_tokens=2))
    engine.add(ask(None, None, "second", max_new_tokens=3))
    done: dict[str, Completion] = {}
    while engine.has_work:
        clock.now += 1.0
        done |= completions(engine)
    assert (done["first"].timing.queue_s, done["first"].timing.first_token_s, done["first"].timing.total_s) == (1.0, 1.0, 2.0)
    assert (done["second"].timing.queue_s, done["second"].timing.first_token_s, done["second"].timing.total_s) == (3.0, 3.0, 5.0)


def test_a_full_queue_says_when_to_come_again(timed: MakeEngine, clock: Clock) -> None:
    """At the pace of those that finished last; an invented number would bring everybody back at once, or never."""
    engine = timed(max_rows=1, max_waiting=6)
    for i in range(6):
        engine.add(ask(None, None, f"r{i}", max_new_tokens=1))
    with pytest.raises(QueueFull) as unknown:
        engine.add(ask())
    assert unknown.value.retry_after_s == 1.0
    for _ in range(4):
        engine.step()
        clock.now += 2.0
    for _ in range(4):
        engine.add(ask(max_new_tokens=1))
    with pytest.raises(QueueFull) as known:
        engine.add(ask())
    assert known.value.retry_after_s == 12.0
    clock.now += 1e6
    engine.step()
    engine.add(ask())
    with pytest.raises(QueueFull) as long:
        engine.add(ask())
    assert long.value.retry_after_s == 60.0


def test_an_adapter_that_is_used_leaves_with_its_last_request(make_engine: MakeEngine, adapters: dict[str, Adapter]) -> None:
    """An unload may wait for those who are being answered; who comes later is refused, and its name is free when it is gone."""
    engine = make_engine(max_rows=1)
    engine.add(ask("r8", max_new_tokens=4))
    engine.add(ask("r8", max_new_tokens=4))
    with pytest.raises(EngineError, match="in use by 2 waiting or running"):
        engine.unregister("r8")
    assert engine.unregister("r8", wait=True) is False
    with pytest.raises(RequestRefused, match="'r8' is being unregistered"):
        engine.add(ask("r8"))
    with pytest.raises(RequestRefused, match="'r8' is being unregistered"):
        engine.score([ScoreRequest([5], [[6]], "r8")])
    while engine.has_work:
        assert engine.is_registered("r8")
        engine.step()
    assert not engine.is_registered("r8")
    assert engine.stats()["finished_length"] == 2
    assert engine.unregister("r4", wait=True) is True
    engine.check()


def test_an_adapter_registered_again_while_it_was_leaving_stays(make_engine: MakeEngine, adapters: dict[str, Adapter]) -> None:
    """Unload and load cross one another under load; the one that came last counts."""
    engine = make_engine()
    engine.add(ask("r8", max_new_tokens=2))
    engine.unregister("r8", wait=True)
    engine.register("r8", adapters["r8"])
    engine.add(ask("r8", max_new_tokens=3))
    while engine.has_work:
        engine.step()
    assert engine.is_registered("r8")


def test_adapters_come_and_go_while_others_answer(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """Loading is a daily event: no stream may hiccup for it."""
    engine = make_engine()
    steady = ask("r8", request_id="steady", max_new_tokens=30)
    expected = make_engine().generate([steady])[0].token_ids
    engine.add(steady)
    done: dict[str, Completion] = {}
    for i in range(10):
        engine.register(f"new{i}", make_adapter(4, seed=50 + i))
        engine.add(ask(f"new{i}", request_id=f"n{i}", max_new_tokens=2))
        for _ in range(3):
            done |= completions(engine)
        engine.unregister(f"new{i}")
        engine.check()
    while engine.has_work:
        done |= completions(engine)
    assert done["steady"].token_ids == expected
    assert len(done) == 11


def test_counts_by_adapter_say_who_is_where(make_engine: MakeEngine) -> None:
    """What the list of models shows."""
    engine = make_engine(max_rows=1)
    engine.pin("r16")
    engine.add(ask("r8"))
    engine.add(ask("r4"))
    engine.step()
    found = engine.adapter_stats()
    assert {key: (a["resident"], a["pinned"], a["in_use"], a["loads"]) for key, a in found.items()} == {
        "r4": (False, False, 1, 0),
        "r8": (True, False, 1, 1),
        "r16": (True, True, 0, 1),
        "r8-too": (False, False, 0, 0),
    }
    assert all(a["bytes"] > 0 for a in found.values())


def test_the_cache_has_the_size_that_is_asked_for(base: Base) -> None:
    """By pages or by bytes; by default enough for every row, unless that were a share of memory that nobody expects."""
    token_bytes = base.decoder.new_cache(1).token_bytes
    assert Engine(base, EngineConfig(num_pages=7)).stats()["pages_total"] == 7
    assert Engine(base, EngineConfig(kv_bytes=5 * 32 * token_bytes + 1)).stats()["pages_total"] == 5
    assert Engine(base, EngineConfig(max_rows=3, max_row_tokens=70)).stats()["pages_total"] == 9
    assert EngineConfig(max_rows=64).cache_pages(2048, 32, 1 << 23) == 256
    assert EngineConfig(max_rows=64).cache_pages(32768, 32, 1 << 23) == 1024, "one full row at least"
    with pytest.raises(ConfigError, match="give one of them"):
        EngineConfig(num_pages=7, kv_bytes=1000)


def test_the_native_kernel_is_refused_where_it_cannot_run(base: Base) -> None:
    """Asked for by name it must not quietly be another; float32 is not what it computes."""
    with pytest.raises(ConfigError, match="native kernel cannot run"):
        Engine(base, EngineConfig(kernel="native"))
    assert Engine(base, EngineConfig(kernel="plain")).kernel == Engine(base).kernel == "plain"


def test_a_bank_that_does_not_gather_gets_a_segment_for_every_group(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled forward reads one adapter after another; rows of a bank would be a form that it does not have."""
    requests = [ask(key, request_id=f"{i}", max_new_tokens=4) for i, key in enumerate(("r4", "r8", None, "r16", "r8-too", "r8"))]
    expected = make_engine().generate(requests)
    engine = make_engine()
    engine._pool._bank.gathers = False
    seen: list[AdapterBatch] = []
    forward = engine.base.decoder.forward

    def watching(batch: Any, adapters: AdapterBatch, cache: Any) -> Any:
        seen.append(adapters)
        return forward(batch, adapters, cache)

    monkeypatch.setattr(engine.base.decoder, "forward", watching)
    found = engine.generate(requests)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert all(adapters.bank_rows is None and len(adapters.segments) == 4 for adapters in seen)
    assert [(s.start, s.stop) for s in seen[-1].segments] == [(1, 2), (2, 3), (3, 5), (5, 6)]


def test_deadlines_of_finished_requests_are_forgotten(make_engine: MakeEngine) -> None:
    """A server gives each request ten minutes; most end in a second, and what is left of them would be thousands of entries."""
    engine = make_engine()
    for i in range(500):
        engine.generate([Request([5 + i % 300], None, SamplingParams(max_new_tokens=1), deadline_s=600.0)])
    assert len(engine._deadlines) <= 100
