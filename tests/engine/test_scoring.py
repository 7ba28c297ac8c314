"""Log-probabilities of continuations: those of the whole text, however prompts and options are packed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from atoll.engine import scoring
from atoll.engine.engine import Engine
from atoll.engine.request import EmbedRequest, Request, SamplingParams, ScoreRequest
from atoll.errors import RequestRefused
from atoll.model.adapter import Adapter

MakeEngine = Callable[..., Engine]


def items() -> list[ScoreRequest]:
    source = random.Random(3)
    keys = (None, "r4", "r8", "r16", "r8-too")

    def tokens(count: int) -> list[int]:
        return [source.randrange(5, 320) for _ in range(count)]

    return [
        ScoreRequest(
            tokens(source.choice((1, 3, 20, 45))), [tokens(source.choice((1, 1, 2, 5))) for _ in range(source.choice((0, 1, 4)))], keys[i % 5]
        )
        for i in range(17)
    ]


def reference(item: ScoreRequest, adapters: dict[str, Adapter], logits: Callable[..., torch.Tensor]) -> list[float]:
    """Each prompt + continuation as a text of its own."""
    sums = []
    for continuation in item.continuations:
        text = [*item.prompt_ids, *continuation]
        log_probs = torch.log_softmax(logits(text, adapters[item.adapter] if item.adapter else None), -1)
        first = len(item.prompt_ids) - 1
        sums.append(sum(float(log_probs[first + i, token]) for i, token in enumerate(continuation)))
    return sums


@pytest.mark.parametrize("settings", [{}, {"max_rows": 2, "max_step_tokens": 12}, {"max_rows": 5, "max_step_tokens": 60}], ids=str)
def test_scores_are_those_of_the_whole_text(
    make_engine: MakeEngine, adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor], settings: dict[str, int]
) -> None:
    """Shared prompts, chunks and packing save work only; every option's sum is what prompt + option alone gives."""
    engine = make_engine(**settings)
    seen: list[tuple[str, int, int]] = []
    found = engine.score(items(), lambda *report: seen.append(report))
    for item, sums in zip(items(), found, strict=True):
        assert sums == pytest.approx(reference(item, adapters, reference_logits), abs=1e-3)
    assert seen[-1] == ("scoring", 17, 17)
    engine.check()


def test_scoring_works_beside_running_requests(
    make_engine: MakeEngine, adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor]
) -> None:
    """With every row taken it lets the others get on, loses none of their events, and changes none of their tokens."""
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
    requests = [Request([9, 10 + i], key, sampling, str(i)) for i, key in enumerate((None, "r4", "r8"))]
    expected = {c.request_id: c.token_ids for c in make_engine().generate(requests)}
    engine = make_engine(max_rows=3, max_step_tokens=20)
    for request in requests:
        engine.add(request)
    events = engine.step()
    item = items()[3]
    [sums] = engine.score([item])
    assert sums == pytest.approx(reference(item, adapters, reference_logits), abs=1e-3)
    while engine.has_work:
        events += engine.step()
    assert {event.request_id: event.completion.token_ids for event in events if event.completion} == expected


def test_scoring_leaves_no_trace_in_the_cache(make_engine: MakeEngine) -> None:
    """Options read the prompt's row and store nothing: scoring them twice, or in another order, gives the same."""
    engine = make_engine()
    options = [[8, 9], [10], [11, 12, 13]]
    [forward] = engine.score([ScoreRequest([5, 6, 7], options)])
    [backward] = engine.score([ScoreRequest([5, 6, 7], options[::-1])])
    assert forward == pytest.approx(backward[::-1], abs=1e-5)


def test_bad_scoring_requests_are_refused_before_anything_runs(make_engine: MakeEngine) -> None:
    """An unknown adapter or an empty option would be a score of something else."""
    engine = make_engine()
    for bad, match in (
        (ScoreRequest([5], [[6]], "nobody"), "'nobody' is not registered"),
        (ScoreRequest([5], [[]]), "a continuation has no tokens"),
        (ScoreRequest([], [[5]]), "the prompt has no tokens"),
        (ScoreRequest([5], [[999]]), "999"),
    ):
        with pytest.raises(RequestRefused, match=match):
            engine.score([ScoreRequest([5], [[6]]), bad])
    assert engine.score([]) == []
    engine.check()


def test_an_interrupt_while_scoring_gives_everything_back(make_engine: MakeEngine) -> None:
    """Ctrl-C between batches leaves no row and no adapter held."""
    engine = make_engine(max_rows=2, max_step_tokens=10)

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.score(items(), interrupt)
    engine.check()
    assert engine.stats()["adapters_in_use"] == 0


@pytest.mark.parametrize("reuse", [True, False])
def test_many_continuations_take_many_steps(
    make_engine: MakeEngine, adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    """A client's thousand options must not be one step of minutes, in which nobody else gets a token, nor a table of logits without end."""
    monkeypatch.setattr(scoring, "LOGIT_ROWS", 2)
    source = random.Random(4)
    many = [[source.randrange(5, 320) for _ in range(source.choice((1, 4, 9)))] for _ in range(150)]
    asked = [ScoreRequest([9] * 40, many, "r8"), *(ScoreRequest([5 + i], [[8], [9, 10, 11]], "r4") for i in range(5))]
    engine = make_engine(max_rows=2, max_step_tokens=50, reuse_prefixes=reuse)
    request_id = engine.add(Request([5, 6], "r16", SamplingParams(max_new_tokens=200, ignore_eos=True)))
    widths: list[int] = []
    forward = engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda rows: widths.append(sum(len(row.token_ids) for row in rows)) or forward(rows))
    job, tokens = engine.begin_score(asked), 0
    while not job.finished:
        tokens += sum(event.request_id == request_id for event in engine.step())
        engine.check()
    assert tokens > 5
    assert max(widths) <= 50
    for item, sums in zip(asked, job.result(), strict=True):
        assert sums == pytest.approx(reference(item, adapters, reference_logits), abs=1e-3)


def test_scopes_take_turns_however_many_jobs_one_has(make_engine: MakeEngine) -> None:
    """One key's hundred jobs are no reason for another's to wait for all of them."""
    engine = make_engine(max_rows=2, max_step_tokens=40)
    alice = [engine.begin_score([ScoreRequest([5 + i] * 30, [[8, 9]], scope="alice")]) for i in range(10)]
    bob = engine.begin_score([ScoreRequest([7] * 30, [[8, 9]], scope="bob")])
    carol = engine.begin_embed([EmbedRequest([7] * 30, scope="carol")])
    for _ in range(3):
        engine.step()
    assert bob.finished
    assert carol.finished
    assert [job.finished for job in alice] == [True] + [False] * 9
    engine.cancel_job(alice[1])
    while engine.has_work:
        engine.step()
    assert [job.finished for job in alice].count(True) == 9
    engine.check()


def test_a_job_that_waits_for_its_adapter_stops_nobody_who_takes_no_place(make_engine: MakeEngine, adapters: dict[str, Adapter]) -> None:
    """The places are taken by long answers: requests of the base still start, and when a place comes free it is the job's before a newcomer's."""
    size = make_engine()._pool._bank.slot_bytes(adapters["r16"])
    engine = make_engine(adapter_bytes=size, max_overtakes=2)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine.add(Request([5, 6], "r16", sampling))
    engine.step()
    job = engine.begin_score([ScoreRequest([7, 8], [[9]], "r8")])
    for _ in range(4):
        engine.step()
    engine.add(Request([9, 10], None, sampling, "base"))
    later = engine.add(Request([9, 10], "r16", sampling))
    engine.step()
    assert "base" in engine._scheduler.running
    while not job.finished:
        assert later in engine._scheduler.waiting
        engine.step()
        engine.check()
    while engine.has_work:
        engine.step()
    assert engine.stats()["finished_length"] == 3
