"""Texts to vectors: the hidden states of the whole text alone, however texts are packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from atoll.engine.engine import Engine
from atoll.engine.request import EmbedRequest, Request, SamplingParams
from atoll.errors import EngineError, RequestRefused
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.bank import LoraBank
from atoll.model.base import Base
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch

MakeEngine = Callable[..., Engine]
KEYS = (None, "r4", "r8", "r16")


def items() -> list[EmbedRequest]:
    lengths = (1, 3, 32, 33, 70, 20, 64, 5)
    texts = [[5 + (i * 17 + 7 * j) % 300 for j in range(length)] for i, length in enumerate(lengths)]
    return [EmbedRequest(text, KEYS[i % 4], "last" if i % 3 == 0 else "mean") for i, text in enumerate(texts)]


@torch.inference_mode()
def reference(base: Base, item: EmbedRequest, adapters: dict[str, Adapter]) -> torch.Tensor:
    """One text, no cache, no engine."""
    decoder = base.decoder
    use = BASE_ONLY
    if item.adapter is not None:
        bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, decoder.dtype)
        use = AdapterBatch.single(bank.load(adapters[item.adapter]), len(item.prompt_ids))
    hidden = decoder.forward(PackedBatch.of([item.prompt_ids]), use).float()
    return hidden[-1] if item.pooling == "last" else hidden.mean(0)


@pytest.mark.parametrize("settings", [{}, {"max_rows": 2, "max_step_tokens": 23, "num_pages": 5}], ids=str)
def test_vectors_are_those_of_each_text_alone(make_engine: MakeEngine, base: Base, adapters: dict[str, Adapter], settings: dict[str, int]) -> None:
    """Chunks and neighbours must not move a vector: it is compared with others that were made on another day."""
    engine = make_engine(**settings)
    seen: list[tuple[str, int, int]] = []
    found = engine.embed(items(), lambda *report: seen.append(report))
    for item, vector in zip(items(), found, strict=True):
        torch.testing.assert_close(torch.tensor(vector), reference(base, item, adapters), rtol=0, atol=1e-4)
        assert len(vector) == base.decoder.shape.hidden
    assert seen[-1] == ("embedding", 8, 8)
    assert engine.embed([]) == []


def test_bad_texts_are_refused_before_anything_runs(make_engine: MakeEngine) -> None:
    """With a sentence that says what is wrong."""
    engine = make_engine(max_row_tokens=20)
    for bad, match in (
        (EmbedRequest([]), "the text has no tokens"),
        (EmbedRequest([5], "nobody"), "'nobody' is not registered"),
        (EmbedRequest([5] * 21), "21 tokens, but a row holds 20"),
        (EmbedRequest([999]), "999"),
    ):
        with pytest.raises(RequestRefused, match=match):
            engine.embed([EmbedRequest([5]), bad])
    engine.check()
    assert not engine.has_work


def test_a_text_that_is_not_finite_fails_its_job_and_nobody_else(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """A vector of NaN compares with nothing; and its pages must not poison the next owner."""
    broken = make_adapter(8)
    modules = {site: LoraModule(torch.full_like(m.a, torch.nan), m.b, m.scaling) for site, m in broken.modules.items()}
    engine = make_engine(num_pages=8)
    engine.register("nan", Adapter(broken.spec, modules))
    with pytest.raises(EngineError, match="adapter 'nan' gave logits that are not finite"):
        engine.embed([EmbedRequest([5] * 60, "nan"), EmbedRequest([6, 7], "r4")])
    engine.check()
    request = Request([9, 10, 11], "r4", SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert engine.generate([request])[0].token_ids == make_engine().generate([request])[0].token_ids


def test_jobs_and_requests_go_on_side_by_side(make_engine: MakeEngine) -> None:
    """A thousand texts to embed are no reason for a stream to stand still, nor the other way round; batches of several jobs take turns."""
    engine = make_engine(max_rows=2, max_step_tokens=40)
    request_id = engine.add(Request([5, 6], "r4", SamplingParams(max_new_tokens=30, ignore_eos=True)))
    first, second = engine.begin_embed(items() * 3), engine.begin_embed([EmbedRequest([5] * 30)])
    tokens = 0
    while not first.finished:
        tokens += sum(event.request_id == request_id for event in engine.step())
        engine.check()
    assert tokens > 5
    assert second.finished and len(second.result()) == 1
    assert first.result() == engine.embed(items() * 3)


def test_a_job_that_is_cancelled_holds_nothing(make_engine: MakeEngine) -> None:
    """Its client went away: adapters are free to go, and no more of it is computed."""
    engine = make_engine(max_step_tokens=70)
    job = engine.begin_embed(items())
    engine.step()
    with pytest.raises(EngineError, match="in use"):
        engine.unregister("r16")
    engine.cancel_job(job)
    engine.cancel_job(job)
    assert not engine.has_work
    assert engine.unregister("r16")
    engine.check()


def test_a_job_finds_pages_even_if_requests_want_them_all(make_engine: MakeEngine) -> None:
    """With requests queued for every page that comes free, a long text would otherwise wait until the queue is empty."""
    engine = make_engine(num_pages=6, max_rows=6, max_overtakes=2)
    for i in range(60):
        engine.add(Request([5 + i, 6], None, SamplingParams(max_new_tokens=20 + i % 7, ignore_eos=True)))
    engine.step()
    job = engine.begin_embed([EmbedRequest([7] * 180)])
    while not job.finished:
        engine.step()
        engine.check()
    assert engine.stats()["waiting"] > 30
    while engine.has_work:
        engine.step()
    assert engine.stats()["finished_length"] == 60
