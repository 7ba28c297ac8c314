"""One adapter's failure is its own: neighbours, later tenants of its row and the engine go on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.conftest import write_tiny_base
from tests.engine.forwards import DTYPES, both_forwards, cache_memory, failing_forward

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import EmbedRequest, Request, SamplingParams, ScoreRequest
from atoll.errors import EngineError
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.base import load_base
from atoll.model.batch import PackedBatch
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec

pytestmark = both_forwards
MakeEngine = Callable[..., Engine]
SAMPLING = SamplingParams(max_new_tokens=6, ignore_eos=True)
PROMPT = [5 + (7 * i) % 300 for i in range(70)]


def with_nan(adapter: Adapter) -> Adapter:
    """The same adapter with one NaN in each factor A, as a diverged training leaves it."""
    modules = {}
    for site, module in adapter.modules.items():
        a = module.a.clone()
        a[0, 0] = torch.nan
        modules[site] = LoraModule(a, module.b, module.scaling)
    return Adapter(adapter.spec, modules)


def ask(first: int, key: str | None) -> Request:
    return Request([first, 21, 22, 23], key, SAMPLING)


def test_an_adapter_with_nan_weights_fails_its_own_requests_only(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """Its rows end with an error that names it; rows beside it are untouched."""
    engine = make_engine()
    engine.register("nan", with_nan(make_adapter(8)))
    keys = [None, "nan", "r4", "r8", "nan", "r16"]
    done = engine.generate([ask(30 + i, key) for i, key in enumerate(keys)])
    good = make_engine().generate([ask(30 + i, key) for i, key in enumerate(keys) if key != "nan"])
    assert [c.token_ids for c in done if c.adapter != "nan"] == [c.token_ids for c in good]
    for completion in done:
        if completion.adapter == "nan":
            assert completion.finish_reason == "error"
            assert "adapter 'nan' gave logits that are not finite" in completion.error
    assert engine.stats()["finished_error"] == 2


def test_the_next_tenant_of_a_failed_row_is_not_poisoned(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """Masked attention multiplies old values by zero, and zero times NaN is NaN: a failed row has to be cleaned.

    A short answer beside a long one reads the places behind its own end, masked: there stand the former tenant's values.
    """
    tenants = [ask(31, "r4"), Request([32] * 60, None, SAMPLING)]
    expected = [c.token_ids for c in make_engine().generate(tenants)]
    failing = Request([30] * 50, "nan", SAMPLING)
    engine = make_engine(max_rows=2, max_step_tokens=100)
    engine.register("nan", with_nan(make_adapter(8)))
    assert [c.finish_reason for c in engine.generate([failing, failing])] == ["error", "error"]
    assert [c.token_ids for c in engine.generate(tenants)] == expected

    chunks = make_engine(max_rows=2, max_step_tokens=30)
    chunks.register("nan", with_nan(make_adapter(8)))
    chunks.cancel(_step_with(chunks, failing))  # in the middle of its prompt, before anybody could see the NaN
    assert [c.token_ids for c in chunks.generate(tenants)] == expected

    with pytest.raises(EngineError, match="adapter 'nan'"):
        engine.score([ScoreRequest([30] * 40, [[8, 9]], "nan"), ScoreRequest([5, 6, 7], [[8, 9]], "r4")])
    engine.check()
    assert [c.token_ids for c in engine.generate(tenants)] == expected


def test_a_score_that_is_not_finite_leaves_nothing_behind(make_engine: MakeEngine, make_adapter: Callable[..., Adapter]) -> None:
    """Pages of continuations go back while their prompt is still held: what they hold must be known to be good before, or be cleaned."""
    tenants = [Request([40 + i, 41, 42], None, SAMPLING) for i in range(6)] + [Request([32] * 50, None, SAMPLING)]
    expected = [c.token_ids for c in make_engine().generate(tenants)]
    for options in ([[8, 9], [10, 11], [12, 13]], [[8], [9]], [[8, 9, *[10] * 70]]):
        engine = make_engine()
        engine.register("nan", with_nan(make_adapter(8)))
        with pytest.raises(EngineError, match="adapter 'nan'"):
            engine.score([ScoreRequest([30] * 60, options, "nan")])
        engine.check()
        assert not cache_memory(engine).any(), "pages that nobody knows are clean"
        assert [c.token_ids for c in engine.generate(tenants)] == expected


def test_a_forward_that_fails_between_continuations_leaves_nothing_behind(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While continuations are held, a page that they share with their prompt has two holders; it has to be cleaned all the same."""
    engine = make_engine()
    decoder = engine._runner._decoder
    forward, calls = decoder.forward, []

    def second_fails(batch: PackedBatch, *others: Any) -> Any:
        hidden = forward(batch, *others)
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("lost power")
        return hidden

    monkeypatch.setattr(decoder, "forward", second_fails)
    with pytest.raises(RuntimeError, match="lost power"):
        engine.score([ScoreRequest([30] * 60, [[8, 9], [10, 11], [12, 13]], "r8")])
    monkeypatch.undo()
    engine.check()
    assert not cache_memory(engine).any()


def broken(adapter: Adapter, value: float = math.nan) -> Adapter:
    """The same edits with one such number in each bias."""
    edits = {}
    for site, found in adapter.edits.items():
        assert found.b is not None
        b = found.b.clone()
        b[0] = value
        edits[site] = replace(found, b=b)
    return replace(adapter, edits=edits)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_edit_that_is_not_finite_fails_its_own_requests_only(
    make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter], value: float
) -> None:
    """Rows beside it are untouched, those too that share the beginning of its prompt, and what it computed is gone."""
    keys = [None, "suffix", "broken end", "r4", "broken all", "ends", "broken lora+reft"]
    prompts = [[9 + i % 2, *PROMPT] for i in range(len(keys))]
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True)
    engine = make_reft_engine()
    for name in ("all", "lora+reft"):
        engine.register(f"broken {name}", broken(reft_adapters[name], value))
    engine.register("broken end", broken(reft_adapters["suffix"], value))
    done = engine.generate([Request(prompt, key, sampling) for prompt, key in zip(prompts, keys, strict=True)])
    for completion, prompt in zip(done, prompts, strict=True):
        if str(completion.adapter).startswith("broken"):
            assert (completion.finish_reason, completion.token_ids) == ("error", ())
            assert f"adapter {completion.adapter!r} gave logits that are not finite" in completion.error
        else:
            [alone] = make_reft_engine().generate([Request(prompt, completion.adapter, sampling)])
            assert completion.token_ids == alone.token_ids
    assert torch.isfinite(cache_memory(engine).view(torch.bfloat16) if engine.kernel != "plain" else cache_memory(engine)).all()
    cached = engine.stats()["pages_cached"]
    [failed] = engine.generate([Request(PROMPT, "broken end", sampling)])
    assert failed.finish_reason == "error" and engine.stats()["pages_cached"] == cached, "not even the base's part of it is known"
    engine.check()


def test_the_next_tenant_of_broken_edits_is_not_poisoned(make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter]) -> None:
    """In the middle of a prompt, at its end, or in a score or vector: its pages are clean before somebody else has them."""
    tenants = [ask(31, "r4"), Request([32] * 60, None, SAMPLING)]
    expected = [c.token_ids for c in make_reft_engine().generate(tenants)]
    failing = Request([30] * 50, "broken", SAMPLING)
    for name in ("all", "ends", "listed"):
        engine = make_reft_engine(max_rows=2, max_step_tokens=30)
        engine.register("broken", broken(reft_adapters[name]))
        engine.add(failing)
        events = engine.step()
        assert [event.completion.finish_reason for event in events if event.completion] == ["error"], "seen at once, not at the prompt's end"
        assert not cache_memory(engine).any()
        with pytest.raises(EngineError, match="adapter 'broken'"):
            engine.score([ScoreRequest([30] * 40, [[8, 9]], "broken"), ScoreRequest([5, 6, 7], [[8, 9]], "r4")])
        assert not cache_memory(engine).any()
        with pytest.raises(EngineError, match="adapter 'broken'"):
            engine.embed([EmbedRequest([30] * 40, "broken", "last")])
        assert not cache_memory(engine).any()
        assert [c.token_ids for c in engine.generate(tenants)] == expected
        engine.check()


@pytest.mark.usefixtures("built_kernels")
def test_a_broken_edit_that_the_last_token_does_not_see_is_found_all_the_same(
    forward: Literal["plain", "native"], make_reft: Callable[..., Adapter], tmp_path: Path
) -> None:
    """A window ends before it: the answer would be finite, and the page with the NaN would be kept for reuse and later given to somebody else."""
    folder = write_tiny_base(tmp_path / "base", "mistral", sliding_window=8)
    base = load_base(str(folder), dtype=DTYPES[forward], home=tmp_path / "home")
    engine = Engine(base, EngineConfig(max_rows=4, kernel=forward))
    for layer in (0, 2):  # behind the last block there is no key nor value that it could reach
        spec = ReftSpec(rank=2, layers=(layer,), positions=Positions.parse([0]))
        engine.register(f"broken {layer}", broken(make_reft(spec)))
        [completion] = engine.generate([Request([30] * 100, f"broken {layer}", SAMPLING)])
        assert completion.finish_reason == "error" and "not finite" in completion.error
        assert not cache_memory(engine).any()
    assert engine.stats()["pages_cached"] == 0
    engine.check()


def test_pages_of_the_base_that_a_failed_request_used_stay(make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter]) -> None:
    """They were there before it, and others read them."""
    engine = make_reft_engine()
    engine.register("broken", broken(reft_adapters["suffix"]))
    first, failed, again = (engine.generate([Request(PROMPT, key, SAMPLING)])[0] for key in (None, "broken", None))
    assert (failed.finish_reason, failed.num_reused_tokens, again.num_reused_tokens) == ("error", 64, 64)
    assert first.token_ids == again.token_ids


def test_a_forward_that_raises_on_edits_is_tried_again_adapter_by_adapter(make_reft_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other adapters, with edits and without, get what they would have got."""
    keys = [None, "ends", "suffix", "r4", "lora+reft", "ends"]
    requests = [Request([30 + i, *PROMPT], key, SAMPLING) for i, key in enumerate(keys)]
    expected = make_reft_engine().generate(requests)
    engine = make_reft_engine()
    monkeypatch.setattr(engine._runner._decoder, "forward", failing_forward(engine, "ends"))
    for completion, wanted in zip(engine.generate(requests), expected, strict=True):
        if completion.adapter == "ends":
            assert (completion.finish_reason, completion.error) == ("error", "kernel refused")
        else:
            assert completion.token_ids == wanted.token_ids


def _step_with(engine: Engine, request: Request) -> str:
    request_id = engine.add(request)
    engine.step()
    return request_id


def test_a_forward_that_raises_is_tried_again_adapter_by_adapter(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that dies on one adapter's shapes must not end everybody's answers; sampled rows keep their random numbers."""
    sampled = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0, seed=7)
    keys = [None, "r4", "r8", "r16", "r8", None]
    requests = [Request([30 + i, 21, 22], key, sampled if i % 2 else SAMPLING) for i, key in enumerate(keys)]
    expected = make_engine().generate(requests)
    engine = make_engine()
    monkeypatch.setattr(engine._runner._decoder, "forward", failing_forward(engine, "r8"))
    with caplog.at_level(logging.WARNING):
        done = engine.generate(requests)
    for completion, wanted in zip(done, expected, strict=True):
        if completion.adapter == "r8":
            assert (completion.finish_reason, completion.error) == ("error", "kernel refused")
        else:
            assert completion.token_ids == wanted.token_ids
    assert "tried again" in caplog.text


def test_a_forward_that_raises_later_fails_those_only_who_cause_it(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the middle of decoding: what the row had so far is returned with the error."""
    engine = make_engine()
    ids = {key: engine.add(ask(40, key)) for key in ("r4", "r8", "r16")}
    first = engine.step()
    assert len(first) == 3
    monkeypatch.setattr(engine._runner._decoder, "forward", failing_forward(engine, "r16"))
    completions = {}
    while engine.has_work:
        completions.update({event.request_id: event.completion for event in engine.step() if event.completion is not None})
    engine.check()
    assert {key: completions[name].finish_reason for key, name in ids.items()} == {"r4": "length", "r8": "length", "r16": "error"}
    assert len(completions[ids["r16"]].token_ids) == 1


def test_a_tokenizer_that_cannot_decode_ends_one_request_only(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is made per request; an error there is that request's."""
    engine = make_engine()
    decode = engine._intake.decode

    def picky(ids: list[int]) -> str:
        if 77 in ids:
            raise ValueError("id 77 has no text")
        return decode(ids)

    monkeypatch.setattr(engine._intake, "decode", picky)
    forced = Request([5], None, SamplingParams(max_new_tokens=3, logit_bias={77: 100.0}))
    bad, good = engine.generate([forced, ask(31, "r4")])
    assert (bad.finish_reason, bad.error) == ("error", "id 77 has no text")
    assert good.finish_reason == "length"


def test_pinned_adapters_that_fill_the_budget_fail_the_others_at_once(make_engine: MakeEngine, adapters: dict[str, Adapter]) -> None:
    """Waiting would never end: the request says why instead."""
    sizes = {key: make_engine()._pool._bank.slot_bytes(adapter) for key, adapter in adapters.items()}
    largest = max(sizes, key=lambda key: sizes[key])
    engine = make_engine(adapter_bytes=sizes[largest])
    engine.pin("r4")
    pinned, other, base = engine.generate([ask(30, "r4"), ask(31, largest), ask(32, None)])
    assert (pinned.finish_reason, base.finish_reason) == ("length", "length")
    assert other.finish_reason == "error" and "pinned adapters leave" in other.error
    engine.unpin("r4")
    assert engine.generate([ask(31, largest)])[0].finish_reason == "length"
