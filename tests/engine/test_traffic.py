"""Everything at once: random traffic over few pages, rows and places, each answer compared with the request alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from tests.engine.forwards import both_forwards
from tests.engine.test_batching import KEYS, KINDS, same

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Completion, EmbedRequest, Request, SamplingParams, ScoreRequest
from atoll.model.adapter import Adapter
from atoll.model.base import Base

pytestmark = both_forwards
MakeEngine = Callable[..., Engine]
BEGINNINGS = [[5 + (seed * 13 + 7 * i) % 300 for i in range(96)] for seed in range(2)]  # prompts share these


REFT = (None, "r8", "ends", "untied", "suffix", "all", "listed", "lora+reft", "parts")


def random_request(source: random.Random, number: int, keys: Sequence[str | None]) -> Request:
    kind = source.choice(KINDS)
    sampling = SamplingParams(
        max_new_tokens=source.choice((1, 5, 20, 50)),
        seed=source.randrange(1 << 32) if "temperature" in kind else None,
        ignore_eos=source.random() < 0.7,
        stop=source.choice(((), ("e", "zz"))),
        prompt_logprobs=source.choice((None, None, None, 0)),
        **kind,
    )
    tokens = [*source.choice(BEGINNINGS)[: source.choice((0, 20, 40, 70, 96))], *(source.randrange(5, 320) for _ in range(source.choice((1, 4, 30))))]
    deadline = source.choice((None, None, None, 50.0))
    return Request(tokens, source.choice(keys), sampling, f"r{number}", scope=source.choice(("", "alice", "bob")), deadline_s=deadline)


@pytest.mark.parametrize(("seed", "keys"), [(1, KEYS), (2, KEYS), (5, REFT), (6, REFT)], ids=["1", "2", "reft 5", "reft 6"])
def test_random_traffic_ends_with_every_answer_right_and_nothing_leaked(
    make_reft_engine: MakeEngine,
    adapters: dict[str, Adapter],
    reft_adapters: dict[str, Adapter],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    keys: Sequence[str | None],
) -> None:
    """Adds, cancels, deadlines, scores, preemption, reuse and adapters that change places: none of it may reach an answer or a page."""
    make_engine, source = make_reft_engine, random.Random(seed)
    requests = [random_request(source, i, keys) for i in range(50)]
    single = make_engine()
    alone = {request.request_id: single.generate([Request(request.prompt_ids, request.adapter, request.sampling)])[0] for request in requests}
    item = ScoreRequest(BEGINNINGS[0][:50], [[8, 9, 10], [11], [12, 13]], keys[2], scope="alice")
    [scores] = single.score([item])

    used = [adapter for key, adapter in {**adapters, **reft_adapters}.items() if key in (*keys, "r16")]
    sizes = [single._pool._bank.slot_bytes(adapter) for adapter in used]
    crowd = make_engine(max_rows=6, max_step_tokens=61, num_pages=14, adapter_bytes=sum(sizes) - min(sizes), max_overtakes=3)
    now = 0.0
    monkeypatch.setattr(crowd._intake, "clock", lambda: now)
    todo, done, cancelled = list(requests), dict[str, Completion](), set[str]()
    jobs = []
    while todo or crowd.has_work:
        now += 1.0
        for _ in range(min(len(todo), source.choice((0, 0, 1, 3, 9)))):
            crowd.add(todo.pop(0))
        if source.random() < 0.03:
            jobs.append(crowd.begin_score([item, item]))
            jobs.append(crowd.begin_embed([EmbedRequest(BEGINNINGS[1], "r16")]))
        for event in crowd.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
        crowd.check()
        live = [*crowd._scheduler.running, *(s.request_id for s in crowd._scheduler.waiting)]
        if live and source.random() < 0.05:
            name = source.choice(live)
            crowd.cancel(name)
            cancelled.add(name)
    stats = crowd.stats()
    assert set(done) == set(alone)
    for name, completion in done.items():
        if completion.finish_reason in ("cancelled", "deadline"):
            assert (name in cancelled) == (completion.finish_reason == "cancelled")
            assert completion.token_ids == alone[name].token_ids[: len(completion.token_ids)]
        else:
            assert same(completion, alone[name]), name
            assert completion.prompt_logprobs is None or len(completion.prompt_logprobs) == completion.num_prompt_tokens
    for job in jobs[::2]:
        for found in job.result():
            assert found == pytest.approx(scores, abs=1e-3)
    assert len(jobs) > 2 and len({tuple(job.result()[0]) for job in jobs[1::2]}) == 1
    for name in ("preemptions", "prefix_hits", "finished_cancelled", "finished_deadline", "adapter_evictions"):
        assert stats[name] > 0, f"this traffic was meant to have {name}"
    assert (stats["running"], stats["waiting"], stats["pages_free"]) == (0, 0, 14)
    assert stats["finished_stop"] + stats["finished_length"] > 20


def test_a_thousand_adapters_sixty_four_resident_thirty_two_in_a_batch(
    base: Base, forward: Literal["plain", "native"], make_adapter: Callable[..., Adapter]
) -> None:
    """Many tenants of which few are active: each gets its own adapter's answer, and only those in use take memory."""
    few = [make_adapter(4, ("q_proj", "v_proj"), seed=i) for i in range(40)]
    engine = Engine(base, EngineConfig(max_rows=32, kernel=forward))
    engine.register("first", few[0])
    slot = engine._pool._bank.slot_bytes(few[0])
    engine = Engine(base, EngineConfig(max_rows=32, adapter_bytes=64 * slot, kernel=forward))
    for i in range(1000):
        engine.register(f"a{i}", Adapter(few[i % 40].spec, few[i % 40].modules))
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True)
    source = random.Random(1)
    numbers = [source.randrange(1000) for _ in range(300)]
    for place, i in enumerate(numbers):
        engine.add(Request([5, 6, 7], f"a{i}", sampling, f"r{place}"))
    done: dict[str, Completion] = {}
    widest = 0
    while engine.has_work:
        done |= {event.request_id: event.completion for event in engine.step() if event.completion is not None}
        widest = max(widest, engine.stats()["adapters_in_use"])
    engine.check()
    expected: dict[int, Any] = {}
    for place, i in enumerate(numbers):
        completion = done[f"r{place}"]
        assert completion.finish_reason == "length"
        assert completion.token_ids == expected.setdefault(i % 40, completion.token_ids)
    assert len(set(expected.values())) > 30, "the adapters differ"
    stats = engine.stats()
    assert (stats["adapters_registered"], stats["adapters_resident"]) == (1000, 64)
    assert stats["adapter_bytes"] == 64 * slot
    assert widest >= 28
    per_adapter = engine.adapter_stats()
    assert sum(a["loads"] for a in per_adapter.values()) == stats["adapter_loads"]
    assert {a["in_use"] for a in per_adapter.values()} == {0}
