"""Requests that begin alike share what was computed, and nobody who should not gets any of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.conftest import write_tiny_base
from tests.engine.forwards import DTYPES, both_forwards, cache_memory

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Completion, Request, SamplingParams, ScoreRequest
from atoll.model.adapter import Adapter
from atoll.model.base import load_base
from atoll.model.kv_cache import PAGE_TOKENS
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec

pytestmark = both_forwards
MakeEngine = Callable[..., Engine]
PROMPT = [5 + (7 * i) % 300 for i in range(100)]  # three full pages and four tokens


def ask(prompt: list[int] = PROMPT, adapter: str | None = None, scope: str = "", **settings: Any) -> Request:
    return Request(prompt, adapter, SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True, **settings}), scope=scope)


def one(engine: Engine, request: Request) -> Completion:
    [completion] = engine.generate([request])
    return completion


def test_a_prompt_asked_again_is_reused_and_answered_the_same(make_engine: MakeEngine) -> None:
    """Reuse that changed an answer would make it depend on who asked before."""
    engine, without = make_engine(), make_engine(reuse_prefixes=False)
    first, second = one(engine, ask(adapter="r8", logprobs=2)), one(engine, ask(adapter="r8", logprobs=2))
    plain = one(without, ask(adapter="r8", logprobs=2))
    assert (first.num_reused_tokens, second.num_reused_tokens, plain.num_reused_tokens) == (0, 96, 0)
    assert first.token_ids == second.token_ids == plain.token_ids
    for a, b in zip(first.logprobs or (), second.logprobs or (), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    stats = engine.stats()
    assert (stats["prefix_hits"], stats["reused_tokens"], stats["prefill_tokens"]) == (1, 96, 104)
    assert stats["pages_cached"] == 3
    assert one(without, ask(adapter="r8")).num_reused_tokens == 0


def test_a_prompt_of_whole_pages_computes_its_last_page(make_engine: MakeEngine) -> None:
    """Somebody has to say what follows the last token."""
    engine = make_engine()
    answers = [one(engine, ask(PROMPT[:64])) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].num_reused_tokens == 32


def test_a_conversation_reuses_its_own_answers(make_engine: MakeEngine, reference_greedy: Callable[..., list[int]]) -> None:
    """The next turn begins with prompt and answer of the one before: all of their full pages are known."""
    engine = make_engine()
    first = one(engine, ask(max_new_tokens=40))
    talk = [*PROMPT, *first.token_ids, 40, 41, 42]
    second = one(engine, ask(talk))
    assert second.num_reused_tokens == (100 + 39) // PAGE_TOKENS * PAGE_TOKENS
    assert list(second.token_ids) == reference_greedy(talk, 6)


def test_reuse_never_crosses_adapters_or_scopes(make_engine: MakeEngine) -> None:
    """Keys and values are an adapter's; and a prompt is its owner's, who must not be heard by the time an answer takes."""
    engine = make_engine()
    one(engine, ask(adapter="r8", scope="alice"))
    for adapter, scope in ((None, "alice"), ("r16", "alice"), ("r8", "bob"), ("r8", ""), (None, "")):
        assert one(engine, ask(adapter=adapter, scope=scope)).num_reused_tokens == 0
        fresh = one(make_engine(), ask(adapter=adapter))
        assert one(engine, ask(adapter=adapter, scope=scope)).token_ids == fresh.token_ids
    assert one(engine, ask(adapter="r8", scope="alice")).num_reused_tokens == 96
    assert one(engine, ask(PROMPT[:50], adapter="r8", scope="alice", prompt_logprobs=0)).num_reused_tokens == 0


def test_an_adapter_registered_again_finds_nothing_of_the_old_one(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """A reloaded adapter may have other weights under the same name; its first prompt is computed by itself."""
    engine = make_engine()
    old, new = make_adapter(8, seed=11), make_adapter(8, seed=12)
    engine.register("name", old)
    before = one(engine, ask(adapter="name"))
    assert engine.stats()["pages_cached"] == 3
    engine.unregister("name")
    assert engine.stats()["pages_cached"] == 0
    engine.register("name", new)
    after = one(engine, ask(adapter="name"))
    fresh = make_engine()
    fresh.register("name", new)
    assert after.num_reused_tokens == 0
    assert after.token_ids == one(fresh, ask(adapter="name")).token_ids != before.token_ids


def test_an_adapter_that_was_evicted_and_loaded_again_keeps_its_prefixes(make_engine: MakeEngine, adapters: dict[str, Adapter]) -> None:
    """Its weights are the same, so what they computed is; only its place among the resident ones has changed."""
    needed = max(make_engine()._pool._bank.slot_bytes(adapter) for adapter in adapters.values())
    engine = make_engine(adapter_bytes=needed)
    first = one(engine, ask(adapter="r8"))
    one(engine, ask(adapter="r16"))
    again = one(engine, ask(adapter="r8"))
    assert engine.stats()["adapter_evictions"] == 2
    assert (again.num_reused_tokens, again.token_ids) == (96, first.token_ids)


def test_samples_of_one_prompt_asked_at_once_compute_it_once(make_engine: MakeEngine) -> None:
    """best_of and n: eight samples cost one prompt, not eight."""
    engine = make_engine()
    requests = [ask(adapter="r8", temperature=1.0, seed=i) for i in range(8)]
    done = engine.generate(requests)
    assert [c.num_reused_tokens for c in done] == [0] + [96] * 7
    assert engine.stats()["prefill_tokens"] == 100 + 7 * 4
    apart = [one(make_engine(), request) for request in requests]
    assert [c.token_ids for c in done] == [c.token_ids for c in apart]


def test_what_a_failed_request_computed_is_never_reused(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages may be half written; the next request with the same prompt computes them itself."""
    engine = make_engine()
    decoder = engine._runner._decoder
    forward = decoder.forward

    def half_done(*arguments: Any) -> Any:
        forward(*arguments)
        raise RuntimeError("lost power")

    monkeypatch.setattr(decoder, "forward", half_done)
    assert one(engine, ask()).finish_reason == "error"
    monkeypatch.undo()
    assert engine.stats()["pages_cached"] == 0
    assert not cache_memory(engine).any(), "what it wrote is gone"
    assert one(engine, ask()).num_reused_tokens == 0


def test_cached_pages_give_way_to_new_requests(make_engine: MakeEngine) -> None:
    """A cache that kept what nobody uses from those who come now would be a leak."""
    engine = make_engine(num_pages=8)
    for i in range(6):
        assert one(engine, ask([5 + i, *PROMPT])).finish_reason == "length"
        assert engine.stats()["pages_free"] == 8
    assert one(engine, ask([10, *PROMPT])).num_reused_tokens == 96
    assert one(engine, ask([5, *PROMPT])).num_reused_tokens == 0


def test_scores_reuse_prompts_of_their_own_scope(make_engine: MakeEngine) -> None:
    """Options of a long instruction, asked row after row, compute the instruction once; another key's do not learn of it."""
    engine = make_engine()
    item = ScoreRequest(PROMPT, [[8, 9], [10]], "r8", scope="alice")
    first = engine.score([item])
    used = engine._pages.match(engine._intake._prefix("r8", "alice", 100), PROMPT)  # type: ignore[arg-type]
    engine._pages.release(used)
    assert len(used) == 3
    assert engine.score([item])[0] == pytest.approx(first[0], abs=1e-4)
    assert one(engine, ask(adapter="r8", scope="alice")).num_reused_tokens == 96
    assert one(engine, ask(adapter="r8", scope="bob")).num_reused_tokens == 0


def at_end(make_reft: Callable[..., Adapter], count: int, seed: int = 1) -> Adapter:
    """An adapter that edits so many last tokens."""
    return make_reft(ReftSpec(rank=4, positions=Positions(last=count)), seed=seed)


def test_what_stands_before_the_first_edited_token_is_shared_with_the_base(make_reft_engine: MakeEngine, make_reft: Callable[..., Adapter]) -> None:
    """A hundred adapters that edit the end of one long instruction compute it once, and so does the base; who edits its beginning shares nothing."""
    reused = {None: 96, "suffix": 96, "other": 96, "wide": 64, "ends": 0, "untied": 0, "all": 0, "listed": 0, "lora+reft": 0}
    expected = {}
    for key in reused:
        cold = make_reft_engine(reuse_prefixes=False)
        for name, count, seed in (("other", 1, 2), ("wide", 7, 3)):
            cold.register(name, at_end(make_reft, count, seed))
        expected[key] = one(cold, ask(adapter=key)).token_ids
    for first in (None, "suffix"):
        engine = make_reft_engine()
        engine.register("other", at_end(make_reft, 1, 2))
        engine.register("wide", at_end(make_reft, 7, 3))
        one(engine, ask(adapter=first, scope="alice"))
        for key, count in reused.items():
            warm = one(engine, ask(adapter=key, scope="alice"))
            assert (warm.num_reused_tokens, warm.token_ids) == (count, expected[key])
            again = one(engine, ask(adapter=key, scope="alice"))
            assert (again.num_reused_tokens, again.token_ids) == (96, expected[key])
        assert one(engine, ask(adapter="suffix", scope="bob")).num_reused_tokens == 0
        engine.check()


def test_adapters_that_share_a_beginning_compute_it_once_though_they_come_at_once(make_reft_engine: MakeEngine) -> None:
    """A beginning that somebody is about to know is waited for, whoever edits what follows it."""
    engine = make_reft_engine()
    keys = ("suffix", None, "parts", "suffix")
    done = engine.generate([ask(adapter=key) for key in keys])
    assert [c.num_reused_tokens for c in done] == [0, 96, 0, 96], "one of them edits the first page"
    assert engine.stats()["prefill_tokens"] == 100 + 4 + 100 + 4
    assert [c.token_ids for c in done] == [one(make_reft_engine(), ask(adapter=key)).token_ids for key in keys]


def test_a_prompt_that_begins_with_another_has_other_edited_places(make_reft_engine: MakeEngine, make_reft: Callable[..., Adapter]) -> None:
    """The last tokens of the shorter one are in the middle of the longer one, where nothing is edited: no page that holds them is taken."""
    adapter = at_end(make_reft, 40)
    longer = [*PROMPT, *range(40, 60)]
    for prompts in ((PROMPT, longer), (longer, PROMPT)):
        engine = make_reft_engine()
        engine.register("end", adapter)
        reused = []
        for prompt in prompts:
            cold = make_reft_engine(reuse_prefixes=False)
            cold.register("end", adapter)
            warm = one(engine, ask(prompt, adapter="end"))
            assert warm.token_ids == one(cold, ask(prompt, adapter="end")).token_ids
            reused.append(warm.num_reused_tokens)
        assert reused == [0, 32]  # tokens 60 to 99 of the shorter, 80 to 119 of the longer are edited
        assert one(engine, ask(longer)).num_reused_tokens == 64
        assert [one(engine, ask(prompt, adapter="end")).num_reused_tokens for prompt in (PROMPT, longer)] == [96, 96]
        engine.check()


def test_lora_beside_edits_has_pages_of_its_own_that_differ_where_edits_do(make_reft_engine: MakeEngine) -> None:
    """f2+l9: page 2 of the shorter prompt holds five edited tokens that the longer one does not edit."""
    engine = make_reft_engine()
    longer = [*PROMPT, *range(40, 60)]
    one(engine, ask(PROMPT))
    reused = [one(engine, ask(prompt, adapter="lora+reft")).num_reused_tokens for prompt in (PROMPT, longer, PROMPT, longer)]
    assert reused == [0, 64, 96, 96]
    assert one(engine, ask(longer, adapter="lora+reft")).token_ids == one(make_reft_engine(), ask(longer, adapter="lora+reft")).token_ids


@pytest.mark.parametrize("key", ["suffix", "ends", "all", "listed", "lora+reft", "parts"])
def test_every_turn_of_a_conversation_is_answered_as_if_it_were_the_first(
    make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter], reference_greedy: Callable[..., list[int]], key: str
) -> None:
    """With each turn the prompt is longer and its last tokens are others; an answer that is part of the prompt now was not edited when it came."""
    engine = make_reft_engine()
    talk, reused = PROMPT[:50], []
    for turn in range(4):
        answer = one(engine, ask(talk, adapter=key, max_new_tokens=25))
        assert list(answer.token_ids) == reference_greedy(talk, 25, reft_adapters[key])
        reused.append(answer.num_reused_tokens)
        talk = [*talk, *answer.token_ids, 40 + turn, 41]
    if key in ("suffix", "all", "lora+reft"):  # the last edits token 95 of the third prompt
        assert reused == [0, 32, 64, 64 if key == "lora+reft" else 96]
    engine.check()


def test_an_adapter_with_edits_registered_again_finds_the_bases_pages_only(make_reft_engine: MakeEngine, make_reft: Callable[..., Adapter]) -> None:
    """Its own are gone with it, even if somebody still held them when it went."""
    old, new = at_end(make_reft, 40, seed=21), at_end(make_reft, 40, seed=22)
    engine = make_reft_engine()
    engine.register("name", old)
    before = one(engine, ask(adapter="name"))
    assert engine.stats()["pages_cached"] == 3
    request_id = engine.add(ask(adapter="name"))
    engine.step()
    assert not engine.unregister("name", wait=True)
    while engine.has_work:
        engine.step()
    assert request_id not in engine._scheduler and not engine.is_registered("name")
    assert engine.stats()["pages_cached"] == 1
    engine.register("name", new)
    after = one(engine, ask(adapter="name"))
    fresh = make_reft_engine()
    fresh.register("name", new)
    assert after.num_reused_tokens == 32
    assert after.token_ids == one(fresh, ask(adapter="name")).token_ids != before.token_ids
    engine.check()


def test_scores_share_the_instruction_with_the_base_too(make_reft_engine: MakeEngine) -> None:
    """A prompt's options under an adapter that edits its end: the instruction is there already, and what scoring computes others find."""
    engine = make_reft_engine()
    items = {key: ScoreRequest(PROMPT, [[8, 9], [10]], key, scope="alice") for key in ("suffix", "ends")}
    cold = {key: make_reft_engine(reuse_prefixes=False).score([item])[0] for key, item in items.items()}
    widths: list[int] = []
    forward = engine._runner.forward
    engine._runner.forward = lambda rows: widths.append(sum(len(row.token_ids) for row in rows)) or forward(rows)  # type: ignore[method-assign, func-returns-value]
    one(engine, ask(scope="alice", max_new_tokens=1))
    for key, width in (("suffix", 4), ("ends", 100), ("ends", 4)):
        widths.clear()
        assert engine.score([items[key]])[0] == pytest.approx(cold[key], abs=1e-4)
        assert widths == [width, 1]
    engine.check()


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.usefixtures("built_kernels")
@pytest.mark.parametrize("rope", list(ROPES))
def test_where_angles_depend_on_the_length_only_equal_ones_are_shared(rope: str, forward: Literal["plain", "native"], tmp_path: Path) -> None:
    """A prompt below the trained length is rotated otherwise than one above it: their beginnings are equal in tokens alone."""
    folder = write_tiny_base(tmp_path / "base", rope_parameters={"rope_theta": 10_000.0, **ROPES[rope]})
    base = load_base(str(folder), dtype=DTYPES[forward], home=tmp_path / "home")
    engine = Engine(base, EngineConfig(max_rows=4, kernel=forward))
    prompts = [PROMPT[:50], PROMPT[:90], PROMPT[:60], PROMPT]
    settings = {"max_new_tokens": 20}  # the first answers cross the trained length
    for prompt in prompts:
        alone = one(Engine(base, EngineConfig(max_rows=4, reuse_prefixes=False, kernel=forward)), ask(prompt, **settings))
        assert one(engine, ask(prompt, **settings)).token_ids == alone.token_ids
    reused = [one(engine, ask(prompt, **settings)).num_reused_tokens for prompt in prompts]
    assert reused == [32, 64, 32, 96]
