"""A request gives the same tokens alone and in any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.engine.forwards import both_forwards

from atoll.engine.engine import Engine
from atoll.engine.request import Completion, Request, SamplingParams
from atoll.model.adapter import Adapter

pytestmark = both_forwards
KEYS = (None, "r4", "r8", "r16", "r8-too")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": 2},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"repetition_penalty": 1.5, "logit_bias": {17: 2.0}},
)


def random_request(source: random.Random, number: int, keys: Sequence[str | None] = KEYS) -> Request:
    kind = source.choice(KINDS)
    sampling = SamplingParams(
        max_new_tokens=source.randint(1, 14),
        seed=source.randrange(1 << 32) if "temperature" in kind else None,
        ignore_eos=source.random() < 0.5,
        stop=source.choice(((), ("e", "zz"), ("\n\n",))),
        **kind,
    )
    prompt = [source.randrange(5, 320) for _ in range(source.choice((1, 2, 5, 9, 30, 60)))]
    return Request(prompt, source.choice(keys), sampling, f"r{number}")


def same(one: Completion, other: Completion) -> bool:
    """Everything but the log-probabilities, which are equal to rounding only."""
    return (one.token_ids, one.text, one.finish_reason, one.stopped_by, one.seed) == (
        other.token_ids,
        other.text,
        other.finish_reason,
        other.stopped_by,
        other.seed,
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_request_gives_the_same_tokens_alone_and_in_any_batch(make_engine: Callable[..., Engine], seed: int) -> None:
    """Staggered arrivals, cancels, queueing, chunked prompts and changing neighbours: none of it may reach an answer."""
    source = random.Random(seed)
    requests = [random_request(source, i) for i in range(40)]
    single = make_engine()
    alone = {request.request_id: single.generate([request])[0] for request in requests}

    crowd = make_engine(max_rows=6, max_step_tokens=25)
    todo, done, cancelled = list(requests), {}, set()
    while todo or crowd.has_work:
        for _ in range(min(len(todo), source.choice((0, 0, 1, 3, 9)))):
            crowd.add(todo.pop(0))
        for event in crowd.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
        crowd.check()
        live = [*crowd._scheduler.running, *crowd._scheduler.waiting]
        if live and source.random() < 0.12:
            name = source.choice(live)
            crowd.cancel(name)
            cancelled.add(name)
    assert set(done) == set(alone) and cancelled
    for name, completion in done.items():
        if name in cancelled:
            assert completion.finish_reason == "cancelled"
            assert completion.token_ids == alone[name].token_ids[: len(completion.token_ids)]
        else:
            assert same(completion, alone[name])
    assert len(done) - len(cancelled) > 20


def test_a_prompt_in_chunks_is_the_prompt_at_once(make_engine: Callable[..., Engine]) -> None:
    """A prompt longer than a step's budget goes through in pieces that see each other through the cache; every split gives one answer."""
    prompt = [5 + (13 * i) % 311 for i in range(90)]
    requests = [Request(prompt[i:], key, SamplingParams(max_new_tokens=6, logprobs=1)) for i, key in enumerate(KEYS)]
    whole = make_engine().generate(requests)
    for budget in (3, 7, 16, 89):
        pieces = make_engine(max_rows=2, max_step_tokens=budget).generate(requests)
        for one, other in zip(whole, pieces, strict=True):
            assert same(one, other)
            assert one.logprobs is not None and other.logprobs is not None
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_base_rows_answer_the_same_beside_adapters(make_engine: Callable[..., Engine]) -> None:
    """The base's users pay nothing for others' adapters, not even rounding that shows."""
    prompts = [[9 + i, 30, 31 + i] for i in range(4)]
    sampling = SamplingParams(max_new_tokens=10, ignore_eos=True)
    alone = make_engine().generate([Request(prompt, None, sampling) for prompt in prompts])
    beside = make_engine().generate([Request(prompt, key, sampling) for prompt in prompts for key in KEYS])
    assert [c.token_ids for c in beside if c.adapter is None] == [c.token_ids for c in alone]


def test_a_step_of_many_adapters_equals_a_step_of_each(make_engine: Callable[..., Engine]) -> None:
    """Up to two adapters decode in segments, more in one gathered product: the two ways must not be told apart."""
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [Request([40 + i, 41, 42], KEYS[i % 5], sampling) for i in range(10)]
    many = make_engine().generate(requests)
    few = [make_engine(max_rows=2).generate([request, requests[(i + 1) % 10]])[0] for i, request in enumerate(requests)]
    assert [c.token_ids for c in many] == [c.token_ids for c in few]


def test_adapters_packed_on_other_threads_answer_as_those_packed_in_a_step(make_engine: Callable[..., Engine], adapters: dict[str, Adapter]) -> None:
    """A cold load in the middle of a step stalls every row, so workers do it ahead; what they made is used as it is, made anew once it is gone."""
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    expected = [c.token_ids for c in make_engine().generate([Request([40, 41, 42], key, sampling) for key in adapters])]
    sizes = [make_engine()._pool._bank.slot_bytes(adapter) for adapter in adapters.values()]
    engine = make_engine(adapter_bytes=max(sizes))
    with ThreadPoolExecutor(3) as workers:
        packed = list(workers.map(engine.pack, adapters.values()))
    for (key, adapter), ready in zip(adapters.items(), packed, strict=True):
        engine.register("packed " + key, adapter, ready)
    requests = [Request([40, 41, 42], "packed " + key, sampling) for key in adapters]
    for _ in range(2):
        assert [engine.generate([request])[0].token_ids for request in requests] == expected
    assert engine.stats()["adapter_evictions"] >= 6
    engine.check()
