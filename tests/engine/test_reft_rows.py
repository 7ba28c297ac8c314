"""Rows with ReFT edits: the whole text at once, with the prompt's edited tokens, is what every way through the engine equals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.engine.forwards import both_forwards
from tests.engine.test_batching import random_request, same

from atoll.engine.engine import Engine
from atoll.engine.request import Completion, EmbedRequest, Request, SamplingParams, ScoreRequest
from atoll.model.adapter import Adapter
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec

pytestmark = both_forwards
MakeEngine = Callable[..., Engine]
REFT = ("ends", "untied", "suffix", "all", "listed", "lora+reft", "parts")
KEYS = (None, "r4", "r8", *REFT)


def prompt(length: int, number: int = 0) -> list[int]:
    return [5 + (number * 31 + 13 * i) % 311 for i in range(length)]


def ask(tokens: Sequence[int], key: str | None, name: str | None = None, **settings: Any) -> Request:
    return Request(tokens, key, SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True, **settings}), name)


def one(engine: Engine, request: Request) -> Completion:
    [completion] = engine.generate([request])
    return completion


@pytest.mark.parametrize("length", [1, 2, 5, 12, 40, 70])
def test_greedy_tokens_are_those_of_whole_forwards_with_edits(
    make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter], reference_greedy: Callable[..., list[int]], length: int
) -> None:
    """The cache holds what edited states made; generated tokens are never edited, however short the prompt is."""
    engine = make_reft_engine()
    base = reference_greedy(prompt(length), 6)
    changed = 0
    for key, adapter in reft_adapters.items():
        found = one(engine, ask(prompt(length), key)).token_ids
        assert list(found) == reference_greedy(prompt(length), 6, adapter), key
        changed += list(found) != base
    assert changed >= 4, "the adapters change answers"
    engine.check()


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_of_every_kind_in_one_batch_answer_as_alone(make_reft_engine: MakeEngine, seed: int) -> None:
    """Base, LoRA, ReFT of several ranks, sides and positions, and LoRA with ReFT, arriving and leaving at any time."""
    source = random.Random(seed)
    requests = [random_request(source, i, KEYS) for i in range(40)]
    single = make_reft_engine()
    alone = {request.request_id: one(single, request) for request in requests}
    crowd = make_reft_engine(max_rows=9, max_step_tokens=33)
    todo, done = list(requests), {}
    while todo or crowd.has_work:
        for _ in range(min(len(todo), source.choice((0, 1, 3, 9)))):
            crowd.add(todo.pop(0))
        done |= {event.request_id: event.completion for event in crowd.step() if event.completion is not None}
        crowd.check()
    assert {name: same(completion, alone[name]) for name, completion in done.items()} == dict.fromkeys(alone, True)


@pytest.mark.parametrize("budget", [2, 3, 7, 16, 69])
def test_a_prompt_in_chunks_is_edited_as_the_prompt_at_once(make_reft_engine: MakeEngine, forward: str, budget: int) -> None:
    """Places count from the prompt's first token, wherever a chunk begins; its end is the prompt's, not the chunk's."""
    requests = [ask(prompt(70, i), key, logprobs=1, prompt_logprobs=0) for i, key in enumerate(KEYS)]
    whole = make_reft_engine().generate(requests)
    pieces = make_reft_engine(max_rows=min(3, budget - 1), max_step_tokens=budget, reuse_prefixes=False).generate(requests)
    for one, other in zip(whole, pieces, strict=True):
        assert same(one, other), one.adapter
        for name in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                assert (a is None and b is None) or a.logprob == pytest.approx(b.logprob, rel=0, abs=1e-4 if forward == "plain" else 0)


def test_many_samples_of_one_prompt_are_each_the_sample_alone(make_reft_engine: MakeEngine) -> None:
    """n and best_of: the prompt is computed and edited once, and every sample goes on from the same pages."""
    for key in ("suffix", "untied", "lora+reft"):
        requests = [ask(prompt(70), key, temperature=1.0, seed=i) for i in range(5)]
        together = make_reft_engine().generate(requests)
        assert [c.num_reused_tokens for c in together] == [0] + [64] * 4
        apart = [one(make_reft_engine(), request).token_ids for request in requests]
        assert [c.token_ids for c in together] == apart
        assert len(set(apart)) > 1


def test_scores_and_vectors_do_not_depend_on_neighbours(make_reft_engine: MakeEngine) -> None:
    """Jobs pack texts of several adapters together, as steps do rows."""
    texts = [EmbedRequest(prompt(20 + i, i), key) for i, key in enumerate(KEYS)]
    items = [ScoreRequest(prompt(20 + i, i), [[8, 9], [10]], key) for i, key in enumerate(KEYS)]
    engine = make_reft_engine()
    for together, alone in zip(engine.embed(texts), [make_reft_engine().embed([text])[0] for text in texts], strict=True):
        assert together == pytest.approx(alone, abs=1e-4)
    for together, alone in zip(engine.score(items), [make_reft_engine().score([item])[0] for item in items], strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


def test_a_step_that_only_decodes_knows_nothing_of_edits(make_reft_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits end with the prompt: to decode beside a hundred ReFT adapters costs what the base costs."""
    engine = make_reft_engine()
    decoder = engine._runner._decoder
    forward, seen = decoder.forward, list[AdapterBatch]()

    def watched(batch: PackedBatch, adapters: AdapterBatch, cache: Any) -> Any:
        seen.append(adapters)
        return forward(batch, adapters, cache)

    monkeypatch.setattr(decoder, "forward", watched)
    keys = [key for key in REFT if key != "lora+reft"]
    engine.generate([ask(prompt(1 + 3 * i, i), key) for i, key in enumerate(keys)])
    assert len(seen) == 6
    assert seen[0].edits and not seen[0].segments
    assert all(adapters is BASE_ONLY for adapters in seen[1:])
    seen.clear()
    engine.generate([ask(prompt(40), "lora+reft"), ask(prompt(40), None)])
    assert seen[0].edits and all(adapters.segments and not adapters.edits for adapters in seen[1:])


def test_adapters_without_lora_take_no_place_among_gathered_rows(make_reft_engine: MakeEngine, forward: str) -> None:
    """They have no factors to gather: rows of three LoRA adapters beside them decode as without them; compiled, to the bit."""
    keys = ("r4", "r8", "r16", *REFT, None)
    requests = [ask(prompt(9, i), key, logprobs=2) for i, key in enumerate(keys)]
    together = make_reft_engine().generate(requests)
    alone = [one(make_reft_engine(), request) for request in requests]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    if forward == "native":
        assert [c.logprobs for c in together] == [c.logprobs for c in alone]


def test_an_adapter_that_edits_no_token_of_a_prompt_is_the_base_to_the_bit(make_reft_engine: MakeEngine, make_reft: Callable[..., Adapter]) -> None:
    """Listed places that a short prompt does not have."""
    engine = make_reft_engine()
    engine.register("far", make_reft(ReftSpec(rank=4, positions=Positions.parse([50, 60]))))
    far, base = engine.generate([ask(prompt(40), key, logprobs=3, prompt_logprobs=3) for key in ("far", None)])
    assert (far.token_ids, far.logprobs, far.prompt_logprobs) == (base.token_ids, base.logprobs, base.prompt_logprobs)
    far, base = engine.generate([ask(prompt(60), key, logprobs=0) for key in ("far", None)])
    assert far.logprobs != base.logprobs
