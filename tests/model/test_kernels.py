"""The compiled forward: as close to float32 as bfloat16 allows, and the same bits whatever stands beside a row or however its prompt was cut.

Every target that this processor can run is held to the same tests; AMX is there as loops in place of its tile instructions.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import ROWS, decoder_of, random_adapter
from atoll.engine import sampler
from atoll.engine.request import SamplingParams
from atoll.errors import BaseMismatch
from atoll.model.adapter import Adapter
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder
from atoll.model.kernels import build
from atoll.model.kernels.decoder import CompiledDecoder, compiled
from atoll.model.kv_cache import PAGE_TOKENS
from conftest import tiny_model

pytestmark = [
    pytest.mark.usefixtures("built_kernels"),
    pytest.mark.skipif(not build.usable_targets() or build.compiler_path() is None, reason="no compiler, or a processor without AVX2 or NEON"),
]

TARGETS = [target.name for target in build.TARGETS if target.needs <= build._processor_flags()]
# Sizes that fill no panel of 32 columns, with one key head; sizes of Llama's own shape; a window; biases; norms on heads.
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"hidden_size": 80, "intermediate_size": 72, "num_attention_heads": 5, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("qwen3", {}),
]
LONG_ROWS = [*ROWS, list(range(5, 75))]


@pytest.fixture(params=[TARGETS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TARGETS[1:])] if TARGETS else [])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The best target in the quick tests, every other one in the slow ones."""
    monkeypatch.setenv("ATOLL_KERNEL", request.param)
    return str(request.param)


@functools.cache
def model_of(family: str, changes: tuple[tuple[str, Any], ...] = ()) -> Any:
    """tiny_model, made once for all targets."""
    return tiny_model(family, **dict(changes))


class Rows:
    """Rows with adapters over one compiled base, each with its pages."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]] = LONG_ROWS, **spec: Any) -> None:
        self.exact, rounded = decoder_of(model), decoder_of(model, torch.bfloat16)
        found = compiled(rounded)
        assert found is not None
        self.decoder: CompiledDecoder = found
        self.rounded = rounded
        self.rows = [list(row) for row in rows]
        self.adapters: list[Adapter | None] = [
            random_adapter(self.exact, rank=rank, seed=rank, **spec) if rank else None for rank in (8, 5, 0, 20, 16)
        ]
        bank = self.bank = self.decoder.new_bank()
        self.slots = [bank.load(adapter) if adapter is not None else None for adapter in self.adapters]
        bounds = [0]
        for row in self.rows:
            bounds.append(bounds[-1] + -(-len(row) // PAGE_TOKENS))
        self.pages = [tuple(range(start, stop)) for start, stop in itertools.pairwise(bounds)]
        self.num_pages = bounds[-1]

    def hidden(self, which: Sequence[int], cache: Any = None, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """The hidden states of tokens start to stop of some rows, computed in one batch behind what the cache has."""
        cache = cache or self.decoder.new_cache(self.num_pages)
        parts = [self.rows[i][start:stop] for i in which]
        batch = PackedBatch.of(parts, context=[start] * len(parts), pages=[self.pages[i] for i in which])
        segments = [Segment(batch.row_starts[k], batch.row_starts[k + 1], slot) for k, i in enumerate(which) if (slot := self.slots[i]) is not None]
        return list(self.decoder.forward(batch, AdapterBatch(tuple(segments)), cache).split([len(part) for part in parts]))

    def plain(self, decoder: Decoder, index: int) -> Tensor:
        """A row's logits by the plain forward."""
        adapter, row = self.adapters[index], self.rows[index]
        bank = decoder.new_bank()
        batch = AdapterBatch((Segment(0, len(row), bank.load(adapter)),)) if adapter is not None else AdapterBatch()
        return decoder.logits(decoder.forward(PackedBatch.of([row]), batch))


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_its_logits_are_as_near_to_float32_as_the_plain_forward_in_bfloat16(target: str, family: str, changes: dict[str, Any]) -> None:
    """A wrong layout, angle, bias, scaling or head would be far outside rounding; a rounding too many would double the error."""
    rows = Rows(model_of(family, tuple(changes.items())))
    found = rows.hidden(range(len(rows.rows)))
    errors, plain_errors = [], []
    for index, hidden in enumerate(found):
        exact = rows.plain(rows.exact, index)
        errors.append(float((rows.decoder.logits(hidden) - exact).abs().mean()))
        plain_errors.append(float((rows.plain(rows.rounded, index) - exact).abs().mean()))
    assert sum(errors) <= 1.2 * sum(plain_errors)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_a_row_has_the_same_bits_alone_in_a_batch_in_chunks_and_token_by_token(target: str, family: str, changes: dict[str, Any]) -> None:
    """Batching, chunked prefill, prefix reuse and preemption all rest on this: with it, none of them can change an answer."""
    rows = Rows(model_of(family, tuple(changes.items())))
    together = rows.hidden(range(len(rows.rows)))
    backwards = rows.hidden(range(len(rows.rows) - 1, -1, -1))[::-1]
    for index, expected in enumerate(together):
        assert torch.equal(backwards[index], expected)
        assert torch.equal(rows.hidden([index])[0], expected)
        cache, parts, done = rows.decoder.new_cache(rows.num_pages), [], 0
        while done < len(rows.rows[index]):
            stop = done + (13 if done < 30 else 1)
            parts += rows.hidden([index], cache, done, stop)
            done = stop
        assert torch.equal(torch.cat(parts), expected)


def test_the_number_of_threads_changes_no_bit(target: str) -> None:
    """Answers must not depend on the machine's number of cores."""
    rows, before = Rows(model_of("llama")), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat(rows.hidden(range(len(rows.rows)))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_best_token_is_the_first_of_the_largest_logits(target: str) -> None:
    """Greedy decoding takes this shortcut; a tie decided by thread would make answers differ from run to run."""
    decoder = Rows(model_of("llama")).decoder
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(70, decoder.shape.hidden, generator=generator).to(torch.bfloat16)
    hidden[5] = 0  # all logits equal
    logits = decoder.logits(hidden)
    values, tokens = decoder.best(hidden)
    assert torch.equal(values, logits.max(-1).values)
    assert torch.equal(tokens, (logits == logits.max(-1, keepdim=True).values).int().argmax(-1))
    hidden[7, 3] = float("nan")
    values, _ = decoder.best(hidden)
    assert torch.isnan(values[7])
    assert torch.isfinite(values[[6, 8]]).all()


LIMITS: list[dict[str, float]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_k": 50, "top_p": 0.8},
    {"min_p": 0.1},
    {"top_p": 0.5, "min_p": 0.2},
    {"top_k": 1},
]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_it_draws_the_tokens_that_the_plain_sampler_draws(target: str, limits: dict[str, Any], spread: float) -> None:
    """The same limits, the same order of lookup, the same random number: a seed gives one answer, with or without a compiler."""
    decoder = Rows(model_of("llama")).decoder
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(200, decoder.shape.vocabulary, generator=generator) * spread
    logits[3, 20:200] = -torch.inf
    randoms = torch.rand(200, generator=generator, dtype=torch.float64).tolist()
    settings = [SamplingParams(temperature=0.3 + i % 3 * 0.7, **limits) for i in range(200)]
    expected = sampler._sample(logits.clone(), settings, randoms)
    wants = [(s.temperature, s.top_k, s.top_p, s.min_p, random) for s, random in zip(settings, randoms, strict=True)]
    found = decoder.draw(logits, wants)
    assert int((found != expected).sum()) <= 1  # sums in another order may move a limit between two nearly equal tokens
    assert torch.isfinite(logits.gather(1, found.unsqueeze(1))).all()


def test_pages_may_lie_anywhere_and_can_be_copied(target: str) -> None:
    """A row whose pages are scattered, or copied to fork it, reads what it wrote."""
    rows = Rows(model_of("llama"), [list(range(5, 75))] * 2)
    expected = rows.hidden([0])[0]
    rows.pages[0] = (5, 1, 4)
    cache = rows.decoder.new_cache(8)
    first = rows.hidden([0], cache, 0, 40)[0]
    for source, copy in ((5, 0), (1, 7)):
        cache.copy_page(source, copy)
    rows.pages[0] = (0, 7, 2)
    assert torch.equal(torch.cat([first, *rows.hidden([0], cache, 40)]), expected)
    cache.zero_pages([0, 7, 2])
    assert not cache.memory[[0, 7, 2]].any()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj", "up_proj"), ("k_proj", "o_proj", "gate_proj")])
@pytest.mark.parametrize(("family", "changes"), [SHAPES[1], SHAPES[3]])
def test_dora_adapters_scale_base_and_update_but_not_the_bias(target: str, family: str, changes: dict[str, Any], targets: tuple[str, ...]) -> None:
    """As near to float32 as the plain forward, for some of the linears that share an input, and the same bits alone as beside others."""
    rows = Rows(model_of(family, tuple(changes.items())), use_dora=True, target_modules=targets)
    rows.adapters[0] = random_adapter(rows.exact, rank=8, seed=8)  # a plain one beside them
    rows.slots[0] = rows.bank.load(rows.adapters[0])
    found = rows.hidden(range(len(rows.rows)))
    errors, plain_errors = [], []
    for index, hidden in enumerate(found):
        exact = rows.plain(rows.exact, index)
        errors.append(float((rows.decoder.logits(hidden) - exact).abs().mean()))
        plain_errors.append(float((rows.plain(rows.rounded, index) - exact).abs().mean()))
        assert torch.equal(rows.hidden([index])[0], hidden)
    assert sum(errors) <= 1.2 * sum(plain_errors)
    adapter = rows.adapters[1]
    assert adapter is not None
    widths = sum(len(module.magnitude) for module in adapter.modules.values() if module.magnitude is not None)
    assert rows.bank.slot_bytes(adapter) > 4 * widths > 0


def test_an_adapter_that_does_not_fit_is_refused_and_a_slot_is_freed_once(target: str) -> None:
    """Factors of another base would be read beyond their end."""
    small, large = Rows(model_of("llama")), Rows(tiny_model("llama", hidden_size=128))
    adapter = large.adapters[0]
    assert adapter is not None
    with pytest.raises(BaseMismatch, match="factors"):
        small.bank.load(adapter)
    slot = small.slots[0]
    assert slot is not None
    small.bank.unload(slot)
    with pytest.raises(AssertionError, match="twice"):
        small.bank.unload(slot)


def test_float32_runs_on_the_plain_forward() -> None:
    """The exact mode is the plain one."""
    assert compiled(decoder_of(model_of("llama"))) is None


def test_plain_torch_is_used_where_it_is_asked_for_or_nothing_can_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiled part is optional: without it Atoll is slower, never broken, and says why."""
    monkeypatch.setenv("ATOLL_KERNEL", "plain")
    assert compiled(decoder_of(model_of("llama"), torch.bfloat16)) is None
    monkeypatch.setenv("ATOLL_KERNEL", "auto")
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path))
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build, "compiler_path", lambda: str(broken))
    with caplog.at_level(logging.WARNING):
        assert compiled(decoder_of(model_of("llama"), torch.bfloat16)) is None
        monkeypatch.setattr(build, "compiler_path", lambda: None)
        monkeypatch.setattr("atoll.model.kernels.decoder.compiler_path", lambda: None)
        assert compiled(decoder_of(model_of("llama"), torch.bfloat16)) is None
    assert "no space left" in caplog.text
    assert "no C++ compiler" in caplog.text
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_a_target_that_cannot_be_built_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler too old for AMX still knows AVX2: falling to plain torch at once would throw away most of the speed."""
    names = [target.name for target in build.usable_targets()]
    if len(names) < 2:
        pytest.skip("this processor has one target")
    load = build.load_library
    monkeypatch.setattr("atoll.model.kernels.decoder.load_library", lambda target, source: None if target.name == names[0] else load(target, source))
    found = compiled(decoder_of(model_of("llama"), torch.bfloat16))
    assert found is not None
    assert found.kernel == names[1]


def test_factors_that_overflow_give_no_finite_answer(target: str) -> None:
    """Scores that are not numbers must not become an even average of the values: the engine could not tell that the answer is worthless."""
    rows = Rows(model_of("llama"))
    broken = random_adapter(rows.exact, rank=4, seed=9, target_modules=("q_proj",))
    for module in broken.modules.values():
        module.a.mul_(1e30)
        module.b.mul_(1e30)
    rows.slots[0] = rows.bank.load(broken)
    assert not torch.isfinite(rows.hidden([0])[0][-1].float()).all()
    values, _ = rows.decoder.best(rows.hidden([0])[0][-1:])
    assert not torch.isfinite(values).any()


ODD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1}),  # more queries of a key head than go together
    ("llama", {"vocab_size": 331, "intermediate_size": 50}),  # a head and an MLP that end inside a vector
]


@pytest.mark.parametrize(("family", "changes"), ODD)
def test_odd_sizes_and_adapters_on_some_linears(target: str, family: str, changes: dict[str, Any]) -> None:
    """Blocks of columns over q, k and v of which one has no factors, ranks that are odd, sizes that end inside a vector."""
    rows = Rows(model_of(family, tuple(changes.items())))
    for index, targets in enumerate([("k_proj", "up_proj"), ("v_proj",), None, ("q_proj", "v_proj", "down_proj"), ("gate_proj", "o_proj")]):
        if targets is not None:
            rows.adapters[index] = random_adapter(rows.exact, rank=3 + 7 * index, seed=index, target_modules=targets)
            rows.slots[index] = rows.bank.load(rows.adapters[index])
    together = rows.hidden(range(len(rows.rows)))
    for index, hidden in enumerate(together):
        exact, rounded = rows.plain(rows.exact, index), rows.plain(rows.rounded, index)
        assert float((rows.decoder.logits(hidden) - exact).abs().mean()) <= 1.5 * float((rounded - exact).abs().mean()) + 1e-3
        assert torch.equal(rows.hidden([index])[0], hidden)


def test_two_threads_may_use_one_base(target: str) -> None:
    """Engines over one base share its packed weights and its scratch memory: they take turns."""
    rows = Rows(model_of("llama"))
    expected = rows.hidden([4])[0]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: rows.hidden([4])[0], range(20)))
    assert all(torch.equal(hidden, expected) for hidden in found)


def test_a_child_of_fork_can_go_on(target: str) -> None:
    """Its threads are gone; waiting for them would hang for ever."""
    rows = Rows(model_of("llama"))
    expected = rows.hidden([0])[0]
    torch.set_num_threads(2)
    try:
        rows.hidden([0])
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rows.hidden([0])[0], expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(1)
