"""Log-probabilities of continuations: those of the whole text, however prompts and options are packed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams, ScoreRequest
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
