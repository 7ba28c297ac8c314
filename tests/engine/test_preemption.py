"""A request that lost its pages in the middle answers as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.conftest import write_tiny_base
from tests.engine.forwards import DTYPES, both_forwards

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Completion, Grammar, Request, SamplingParams
from atoll.errors import RequestRefused
from atoll.model.base import load_base

pytestmark = both_forwards
MakeEngine = Callable[..., Engine]
KEYS = (None, "r4", "r8", "r16")
REFT = ("all", "lora+reft", "suffix", "untied")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.95, "seed": 5},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "temperature": 0.8, "seed": 6},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1, "logprobs": 1},
    "stop": {"stop": ("\x00\x00 never", "e"), "min_new_tokens": 30},
    "grammar": {"grammar": Grammar("regex", "[ab]{30,39}c"), "temperature": 1.0, "seed": 8},
}


def prompt(number: int, length: int = 40) -> list[int]:
    return [5 + (number * 31 + 7 * i) % 300 for i in range(length)]


def ask(number: int, keys: Sequence[str | None] = KEYS, **settings: Any) -> Request:
    return Request(prompt(number), keys[number % 4], SamplingParams(**{"max_new_tokens": 40, "ignore_eos": True, **settings}), f"r{number}")


def same(one: Completion, other: Completion) -> None:
    """Equal in everything but rounding, and what says how it came about."""
    for field in ("token_ids", "text", "finish_reason", "stopped_by", "seed", "error"):
        assert getattr(one, field) == getattr(other, field)
    for name in ("logprobs", "prompt_logprobs"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert len(a or ()) == len(b or ())
        for x, y in zip(a or (), b or (), strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert (x.token_id, x.logprob) == (y.token_id, pytest.approx(y.logprob, abs=1e-3))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [*((kind, KEYS) for kind in KINDS), ("greedy", REFT), ("sampled", REFT), ("prompt_logprobs", REFT)],
    ids=lambda value: value if isinstance(value, str) else "reft" if value is REFT else "lora",
)
def test_a_preempted_request_answers_as_if_it_had_not_been(make_reft_engine: MakeEngine, kind: str, keys: Sequence[str | None]) -> None:
    """Tokens, text, stop, log-probabilities and grammar go on where they were; nothing is drawn, counted or collected twice.

    Of prompt and answer so far, computed again at once, the prompt's tokens are edited and the answer's are not.
    """
    make_engine = make_reft_engine
    requests = [ask(i, keys, **KINDS[kind]) for i in range(4)]
    reuse = kind != "sampled"  # without it everything is computed again
    scarce = make_engine(num_pages=8, reuse_prefixes=reuse, max_step_tokens=90)
    done = scarce.generate(requests)
    assert scarce.stats()["preemptions"] >= 1
    plenty = make_engine()
    alone = [plenty.generate([request])[0] for request in requests]
    assert plenty.stats()["preemptions"] == 0
    for completion, expected in zip(done, alone, strict=True):
        same(completion, expected)
    source = random.Random(3)
    for request in requests:
        scarce.add(request)
    again: dict[str, Completion] = {}
    while scarce.has_work:
        again |= {event.request_id: event.completion for event in scarce.step() if event.completion is not None}
        running = scarce._scheduler.running
        if running and source.random() < 0.15:
            scarce._scheduler._preempt(source.choice(list(running.values())))  # anybody, anywhere
        scarce.check()
    assert scarce.stats()["preemptions"] >= 5
    for expected in alone:
        same(again[expected.request_id], expected)


def test_one_preempted_in_its_prompt_starts_it_again(make_engine: MakeEngine) -> None:
    """What a chunk computed is given up, its prompt's log-probabilities are not collected twice."""
    requests = [
        ask(0, max_new_tokens=80),
        Request(prompt(1, 150), "r8", SamplingParams(max_new_tokens=5, prompt_logprobs=0, ignore_eos=True), "long"),
    ]
    plenty = [make_engine().generate([request])[0] for request in requests]
    engine = make_engine(num_pages=9, max_step_tokens=65)
    engine.add(requests[0])
    done: dict[str, Completion] = {}
    for step in range(400):
        if step == 20:
            engine.add(requests[1])
        for event in engine.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
        if engine.stats()["running"] == 2 and step == 21:
            engine._scheduler._preempt(engine._scheduler.running["long"])
            assert 1 < len(engine._scheduler.waiting.get("long").prompt_logprobs) < 150  # type: ignore[union-attr]
        engine.check()
        if len(done) == 2:
            break
    assert engine.stats()["preemptions"] == 1
    same(done["r0"], plenty[0])
    same(done["long"], plenty[1])


def test_a_stream_goes_on_after_a_preemption_without_a_token_twice(make_engine: MakeEngine) -> None:
    """A client must not see where its row lost its pages."""
    requests = [ask(i) for i in range(4)]
    engine = make_engine(num_pages=8)
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            if event.token_id is not None:
                tokens.setdefault(event.request_id, []).append(event.token_id)
        engine.check()
    assert engine.stats()["preemptions"] > 0
    for request in requests:
        assert tuple(tokens[str(request.request_id)]) == make_engine().generate([request])[0].token_ids


def test_a_request_that_can_never_fit_is_refused(make_engine: MakeEngine) -> None:
    """It would be preempted by itself for ever."""
    engine = make_engine(num_pages=3)
    with pytest.raises(RequestRefused, match="a row holds 96"):
        engine.add(Request(prompt(0), None, SamplingParams(max_new_tokens=57)))
    [longest, whole] = engine.generate(
        [Request(prompt(0), None, SamplingParams(max_new_tokens=56, ignore_eos=True)), Request(prompt(1), None, SamplingParams(ignore_eos=True))]
    )
    assert len(longest.token_ids) == len(whole.token_ids) == 56


@pytest.mark.usefixtures("built_kernels")
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_answers_that_cross_a_change_of_angles_survive_preemption(kind: str, forward: Literal["plain", "native"], tmp_path: Path) -> None:
    """Where angles depend on the length, tokens of an answer were computed with those of their time; a resumed row must compute them so again."""
    ropes: dict[str, dict[str, Any]] = {
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64},
        "dynamic": {"factor": 4.0},
    }
    folder = write_tiny_base(tmp_path / "base", rope_parameters={"rope_theta": 10_000.0, "rope_type": kind, **ropes[kind]})
    base = load_base(str(folder), dtype=DTYPES[forward], home=tmp_path / "home")
    sampling = SamplingParams(max_new_tokens=60, ignore_eos=True)
    requests = [Request(prompt(i, 30 + 10 * i), None, sampling) for i in range(4)]
    engine = Engine(base, EngineConfig(max_rows=4, num_pages=9, kernel=forward))
    done = engine.generate(requests)
    assert engine.stats()["preemptions"] > 0
    for completion, request in zip(done, requests, strict=True):
        [alone] = Engine(base, EngineConfig(max_rows=4, kernel=forward)).generate([request])
        assert completion.token_ids == alone.token_ids
