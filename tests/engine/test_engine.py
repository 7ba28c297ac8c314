"""The engine's verbs: add, step, stream, cancel, generate; texts, stops, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams
from atoll.errors import ConfigError, EngineError, QueueFull, RequestRefused
from atoll.model.adapter import Adapter
from atoll.model.base import Base

MakeEngine = Callable[..., Engine]


def ask(prompt: list[int], adapter: str | None = None, request_id: str | None = None, **settings: Any) -> Request:
    return Request(prompt, adapter, SamplingParams(**{"max_new_tokens": 6, **settings}), request_id)


def token_of(base: Base, text: str) -> int:
    [token] = base.tokenizer.encode(text)
    return int(token)


def test_greedy_tokens_are_those_of_running_the_whole_text_every_time(
    make_engine: MakeEngine, adapters: dict[str, Adapter], reference_greedy: Callable[..., list[int]]
) -> None:
    """Cache, packing and batching are optimisations of one thing: the next token after this text."""
    keys = [None, *adapters]
    prompts = [[5 + (7 * i + j) % 300 for j in range(3 + 4 * i)] for i in range(len(keys))]
    done = make_engine().generate([ask(prompt, key, ignore_eos=True) for prompt, key in zip(prompts, keys, strict=True)])
    for completion, prompt, key in zip(done, prompts, keys, strict=True):
        assert list(completion.token_ids) == reference_greedy(prompt, 6, adapters[key] if key else None)
        assert (completion.finish_reason, completion.adapter, completion.num_prompt_tokens) == ("length", key, len(prompt))
    assert len({completion.token_ids for completion in done}) == len(done)


def test_an_unknown_adapter_is_refused_by_name(make_engine: MakeEngine) -> None:
    """The worst failure of a server is to answer from the base without saying so."""
    engine = make_engine()
    for call in (engine.add, engine.stream, lambda request: engine.generate([ask([5]), request])):
        with pytest.raises(RequestRefused, match="'nobody' is not registered"):
            call(ask([5, 6], "nobody"))
    assert not engine.has_work


def test_generate_starts_nothing_unless_every_request_is_good(make_engine: MakeEngine) -> None:
    """Half an evaluation is no use, and its cost would be paid before the mistake is told."""
    engine = make_engine()
    with pytest.raises(RequestRefused, match="no tokens"):
        engine.generate([ask([5]), ask([])])
    with pytest.raises(RequestRefused, match="two requests have the id 'x'"):
        engine.generate([ask([5], request_id="x"), ask([6], request_id="x")])
    assert engine.stats()["steps"] == 0


def test_a_stream_gives_the_same_tokens_and_text_as_generate(make_engine: MakeEngine) -> None:
    """Events joined are the completion."""
    request = ask([9, 10, 11], "r8", max_new_tokens=20, temperature=1.0, seed=4, logprobs=1)
    [completion] = make_engine().generate([request])
    events = list(make_engine().stream(request))
    assert tuple(e.token_id for e in events if e.token_id is not None) == completion.token_ids
    assert "".join(e.text for e in events) == completion.text
    assert tuple(e.logprob for e in events) == completion.logprobs
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1].completion
    assert last is not None
    assert (last.token_ids, last.text, last.seed) == (completion.token_ids, completion.text, 4)


def test_closing_a_stream_early_cancels_its_request(make_engine: MakeEngine) -> None:
    """A client that goes away must not cost a row until its answer is long enough."""
    engine = make_engine()
    stream = engine.stream(ask([5, 6], "r4", max_new_tokens=100))
    next(stream)
    assert engine.stats()["running"] == 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.stats()["running"] == 0
    engine.check()


def test_streams_taken_in_turns_share_the_steps(make_engine: MakeEngine) -> None:
    """Each step serves everybody: a second stream costs no steps of its own, and gets its tokens although the first one drives."""
    engine = make_engine()
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    first, second = engine.stream(ask([5, 6], **settings)), engine.stream(ask([7, 8], "r8", **settings))
    next(first)
    next(second)
    assert len(list(first)) == len(list(second)) == 7
    assert engine.stats()["steps"] <= 9


def test_events_of_others_are_kept_while_somebody_else_drives(make_engine: MakeEngine) -> None:
    """generate runs the whole engine; what it computes for requests made by add is delivered by the next step."""
    engine = make_engine()
    request_id = engine.add(ask([5, 6, 7], max_new_tokens=4, ignore_eos=True))
    engine.generate([ask([9], "r4", max_new_tokens=8, ignore_eos=True)])
    events = engine.step()
    assert [event.request_id for event in events] == [request_id] * 4
    assert events[-1].completion is not None
    assert not engine.has_work


def test_cancel_frees_everything_and_says_so(make_engine: MakeEngine) -> None:
    """Waiting and running requests alike; twice is harmless."""
    engine = make_engine(max_rows=1)
    running, waiting = engine.add(ask([5, 6], "r8", max_new_tokens=50)), engine.add(ask([7], "r4"))
    tokens = engine.step()
    assert engine.cancel(waiting)
    assert engine.cancel(running)
    assert not engine.cancel(running)
    events = engine.step()
    assert {(event.request_id, event.finish_reason) for event in events} == {(running, "cancelled"), (waiting, "cancelled")}
    by_id = {event.request_id: event.completion for event in events}
    assert by_id[running] is not None and len(by_id[running].token_ids) == len(tokens) == 1
    assert engine.stats()["adapters_in_use"] == 0
    engine.check()


def test_an_interrupt_in_the_middle_of_generate_leaves_a_clean_engine(make_engine: MakeEngine) -> None:
    """Ctrl-C comes anywhere; what was added is cancelled, what others added goes on."""
    engine = make_engine(max_rows=2)
    other = engine.add(ask([5, 6], max_new_tokens=40, ignore_eos=True))

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask([9, i + 5], "r4") for i in range(6)], interrupt)
    engine.check()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (1, 0)
    events = []
    while engine.has_work:
        events += engine.step()
    assert len(events) == 40 and {event.request_id for event in events} == {other}


def test_progress_counts_to_the_end_and_results_keep_their_order(make_engine: MakeEngine) -> None:
    """Requests finish out of order; a caller zips them with its rows."""
    engine = make_engine(max_rows=3, max_waiting=2)
    seen: list[tuple[str, int, int]] = []
    requests = [ask([5 + i], max_new_tokens=1 + (7 * i) % 5, ignore_eos=True, logit_bias={10 + i: 100.0}) for i in range(12)]
    done = engine.generate(requests, lambda *report: seen.append(report))
    assert [c.token_ids for c in done] == [(10 + i,) * (1 + (7 * i) % 5) for i in range(12)]
    assert seen[-1] == ("generating", 12, 12)
    assert [report[1] for report in seen] == sorted({report[1] for report in seen})


def test_the_queue_is_bounded(make_engine: MakeEngine) -> None:
    """Beyond max_waiting a request is refused at once, so that a server can say so."""
    engine = make_engine(max_waiting=2)
    engine.add(ask([5]))
    engine.add(ask([5]))
    with pytest.raises(QueueFull, match="2 requests wait already") as refused:
        engine.add(ask([5]))
    assert refused.value.retry_after_s >= 1


def test_request_ids_are_unique_while_they_live(make_engine: MakeEngine) -> None:
    """Two requests of one id would get each other's tokens; a finished id may come again."""
    engine = make_engine()
    engine.add(ask([5], request_id="request-1", max_new_tokens=1))
    with pytest.raises(RequestRefused, match="'request-1' is in use"):
        engine.add(ask([6], request_id="request-1"))
    assert engine.add(ask([6])) != "request-1"
    engine.step()
    engine.add(ask([5], request_id="request-1"))


def test_the_end_of_text_token_ends_the_answer_and_is_not_in_the_text(make_engine: MakeEngine, base: Base) -> None:
    """It is among the tokens, as every token that was paid for; ignore_eos goes on."""
    engine, letter = make_engine(), token_of(base, "a")
    eos = base.eos_ids[0]
    prompt = [5, 6]
    stopped, going_on, kept, other = engine.generate(
        [
            ask(prompt, logit_bias={eos: 100.0}),
            ask(prompt, logit_bias={eos: 100.0}, ignore_eos=True, max_new_tokens=3),
            ask(prompt, logit_bias={eos: 100.0, letter: 60.0}, min_new_tokens=2),
            ask(prompt, logit_bias={letter: 100.0}, stop_token_ids=(letter,)),
        ]
    )
    assert (stopped.token_ids, stopped.text, stopped.finish_reason, stopped.stopped_by) == ((eos,), "", "stop", eos)
    assert (going_on.token_ids, going_on.text, going_on.finish_reason) == ((eos,) * 3, "", "length")
    assert (kept.token_ids, kept.text, kept.stopped_by) == ((letter, letter, eos), "aa", eos)
    assert (other.token_ids, other.text, other.stopped_by) == ((letter,), "", letter)


def test_a_stop_string_ends_the_answer_and_is_not_in_the_text(make_engine: MakeEngine, base: Base) -> None:
    """It may span tokens, and its beginning is never streamed."""
    letter = token_of(base, "a")
    [completion] = make_engine().generate([ask([5], logit_bias={letter: 100.0}, stop=("aaa",), max_new_tokens=20)])
    assert (completion.text, completion.finish_reason, completion.stopped_by, len(completion.token_ids)) == ("", "stop", "aaa", 3)
    events = list(make_engine().stream(ask([5], logit_bias={letter: 100.0}, stop=("aab",), max_new_tokens=5)))
    assert [event.text for event in events] == ["", "", "a", "a", "aaa"]
    assert events[-1].finish_reason == "length"


def test_prompt_log_probabilities_are_the_same_in_chunks(
    make_engine: MakeEngine, adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor]
) -> None:
    """Echoing a prompt's log-probabilities is how evaluation harnesses score; chunked prefill must not lose or shift one."""
    prompt = [5 + (11 * i) % 300 for i in range(40)]
    expected = torch.log_softmax(reference_logits(prompt, adapters["r16"]), -1)
    request = ask(prompt, "r16", prompt_logprobs=1, max_new_tokens=1)
    for engine in (make_engine(), make_engine(max_rows=2, max_step_tokens=7)):
        [completion] = engine.generate([request])
        found = completion.prompt_logprobs
        assert found is not None and len(found) == 40 and found[0] is None
        for place, entry in enumerate(found[1:], 1):
            assert entry is not None
            assert entry.token_id == prompt[place]
            assert entry.logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-4)
            assert entry.top[0][1] == pytest.approx(float(expected[place - 1].max()), abs=1e-4)


def test_a_prompt_of_one_token_and_a_full_row_work(make_engine: MakeEngine) -> None:
    """The smallest prompt is a decode-shaped prefill; the longest answer fills the row's last place but one (the last token is never fed)."""
    engine = make_engine(max_rows=2, max_row_tokens=16)
    short, full = engine.generate([ask([5], "r4", max_new_tokens=15, ignore_eos=True), ask([6], ignore_eos=True, max_new_tokens=None)])
    assert len(short.token_ids) == len(full.token_ids) == 15
    with pytest.raises(RequestRefused, match="a row holds 16"):
        engine.add(ask([5] * 10, max_new_tokens=7))


def test_adapters_change_places_when_there_is_room_for_one_only(make_engine: MakeEngine, base: Base, adapters: dict[str, Adapter]) -> None:
    """Reloading an adapter gives the same answers, and requests for different adapters take turns without being mixed up."""
    plenty = make_engine()
    needed = max(plenty._pool._bank.slot_bytes(adapter) for adapter in adapters.values())
    scarce = make_engine(adapter_bytes=needed, max_overtakes=2)
    requests = [ask([5 + i, 9], list(adapters)[i % 4], ignore_eos=True) for i in range(16)]
    assert [c.token_ids for c in scarce.generate(requests)] == [c.token_ids for c in plenty.generate(requests)]
    stats = scarce.stats()
    assert stats["adapter_evictions"] >= 3 and stats["adapter_bytes"] <= needed
    assert plenty.stats()["adapter_evictions"] == 0


def test_an_adapter_named_by_waiting_requests_cannot_be_unregistered(make_engine: MakeEngine) -> None:
    """An accepted request must not lose its adapter."""
    engine = make_engine()
    engine.add(ask([5], "r4", max_new_tokens=1))
    with pytest.raises(EngineError, match="waiting"):
        engine.unregister("r4")
    engine.step()
    engine.unregister("r4")
    assert not engine.is_registered("r4")


def test_stats_count_what_happened(make_engine: MakeEngine) -> None:
    """The numbers that metrics and benchmarks stand on."""
    engine = make_engine()
    engine.generate([ask([5] * 10, max_new_tokens=4, ignore_eos=True), ask([6] * 7, "r8", max_new_tokens=2, ignore_eos=True)])
    stats = engine.stats()
    assert {key: stats[key] for key in ("steps", "prefill_tokens", "generated_tokens", "finished_length", "running", "waiting")} == {
        "steps": 4,
        "prefill_tokens": 17,
        "generated_tokens": 6,
        "finished_length": 2,
        "running": 0,
        "waiting": 0,
    }
    assert (stats["adapters_registered"], stats["adapters_resident"], stats["adapters_in_use"]) == (4, 1, 0)


def test_the_check_finds_a_page_that_nobody_holds(make_engine: MakeEngine) -> None:
    """The integrity check is only worth running if it can fail."""
    engine = make_engine()
    engine._pages.take(1)
    with pytest.raises(AssertionError, match="leak"):
        engine.check()


def test_a_step_must_leave_room_for_prompts(base: Base) -> None:
    """With all rows decoding, a budget of exactly that many tokens would starve every prompt."""
    with pytest.raises(ConfigError, match="max_step_tokens"):
        EngineConfig(max_rows=64, max_step_tokens=64)
    assert EngineConfig(max_row_tokens=99_999).row_tokens(base.context_length) == 512
