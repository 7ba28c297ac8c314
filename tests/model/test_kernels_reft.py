"""ReFT in the compiled forward: every component, activation and method as near to float32 as bfloat16 allows, and the same bits however a row is run.

The rows of most tests use no adapter, LoRA, ReFT and both beside one another.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import decoder_of, random_adapter
from atoll.errors import BaseMismatch
from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
from atoll.model.apply_edits import activate, edit_rows
from atoll.model.bank import LoraBank
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder
from atoll.model.kernels import build
from atoll.model.kernels.bank import CompiledSlot
from atoll.model.kernels.decoder import CompiledDecoder, compiled
from atoll.model.kv_cache import PAGE_TOKENS
from atoll.model.positions import Positions
from atoll.model.reft import ACTIVATIONS, COMPONENTS, LEARNED, METHODS, Intervention, ReftSpec
from conftest import tiny_model

pytestmark = [
    pytest.mark.usefixtures("built_kernels"),
    pytest.mark.skipif(not build.usable_targets() or build.compiler_path() is None, reason="no compiler, or a processor without AVX2 or NEON"),
]

TARGETS = [target.name for target in build.TARGETS if target.needs <= build._processor_flags()]
ODD = {"hidden_size": 80, "intermediate_size": 72, "num_attention_heads": 5, "num_key_value_heads": 1}  # ends inside a panel
NARROW = {"hidden_size": 56, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # ends inside a vector; q, k and v narrower than it
ROWS = [list(range(5, 75)), [20, 21, 22], [30, 31, 32, 33] * 3, list(range(90, 130)), [40], list(range(200, 251)), list(range(60, 95)), [7] * 33]
PROMPTS = [70, 3, 12, 33, 1, 51, 30, 33]  # of each row; what follows is as if it had been generated


@pytest.fixture(params=[TARGETS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TARGETS[1:])] if TARGETS else [])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The best target in the quick tests, every other one in the slow ones."""
    monkeypatch.setenv("ATOLL_KERNEL", request.param)
    return str(request.param)


@functools.cache
def model_of(changes: tuple[tuple[str, Any], ...] = ()) -> Any:
    """tiny_model, made once for all targets."""
    return tiny_model("llama", **dict(changes))


def part(positions: str | Sequence[int] = "f7+l7", **options: Any) -> ReftSpec:
    return ReftSpec(positions=Positions.parse(positions), **options)


def edited(decoder: Decoder, *parts: ReftSpec, seed: int = 1, size: float = 0.3, lora: int = 0) -> Adapter:
    """An adapter whose edits are far from zero, over a LoRA of rank `lora`."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(spec.rank for spec in parts)
    fresh = new_adapter(AdapterSpec("tiny", rank, rank, (), reft=parts), decoder.shape.linears, decoder.shape.num_layers, generator)

    def filled(name: str, tensor: Tensor) -> Tensor:
        return tensor if name == "r" else torch.randn(tensor.shape, generator=generator) * size

    edits = {site: Intervention(**{name: filled(name, tensor) for name, tensor in found.tensors.items()}) for site, found in fresh.edits.items()}
    if not lora:
        return Adapter(fresh.spec, {}, edits=edits)
    below = random_adapter(decoder, rank=lora, seed=seed, reft=parts)
    return Adapter(below.spec, below.modules, edits=edits)


class Rows:
    """Rows with adapters over one compiled base, each with its pages."""

    def __init__(self, changes: dict[str, Any], adapters: Any = None) -> None:
        model = model_of(tuple(changes.items()))
        self.exact, self.rounded = decoder_of(model), decoder_of(model, torch.bfloat16)
        found = compiled(self.rounded)
        assert found is not None
        self.decoder: CompiledDecoder = found
        self.adapters: list[Adapter | None] = (adapters or mixed)(self.exact)
        bank = self.bank = self.decoder.new_bank()
        self.slots: list[CompiledSlot | None] = [bank.load(adapter) if adapter is not None else None for adapter in self.adapters]
        bounds = [0]
        for row in ROWS:
            bounds.append(bounds[-1] + -(-len(row) // PAGE_TOKENS))
        self.pages = [tuple(range(start, stop)) for start, stop in itertools.pairwise(bounds)]
        self.num_pages = bounds[-1]

    def hidden(self, which: Sequence[int], cache: Any = None, start: int = 0, stop: int | None = None, edits: bool = True) -> list[Tensor]:
        """The hidden states of tokens start to stop of some rows, computed in one batch behind what the cache has."""
        parts = [ROWS[i][start:stop] for i in which]
        batch = PackedBatch.of(parts, context=[start] * len(parts), pages=[self.pages[i] for i in which])
        used = [(k, i, slot) for k, i in enumerate(which) if (slot := self.slots[i]) is not None]
        segments = tuple(Segment(batch.row_starts[k], batch.row_starts[k + 1], slot) for k, _, slot in used)
        found = edit_rows((batch.row_starts[k], start, len(parts[k]), PROMPTS[i], slot.parts) for k, i, slot in used) if edits else ()
        cache = cache or self.decoder.new_cache(self.num_pages)
        return list(self.decoder.forward(batch, AdapterBatch(segments, edits=found), cache).split([len(part) for part in parts]))

    def plain(self, decoder: Decoder, index: int) -> Tensor:
        """A row's hidden states by the plain forward."""
        adapter, batch = self.adapters[index], PackedBatch.of([ROWS[index]])
        if adapter is None:
            return decoder.forward(batch).float()
        slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, decoder.dtype).load(adapter)
        edits = edit_rows([(0, 0, len(ROWS[index]), PROMPTS[index], slot.parts)])
        return decoder.forward(batch, AdapterBatch((Segment(0, len(ROWS[index]), slot),), edits=edits)).float()


def mixed(decoder: Decoder) -> list[Adapter | None]:
    """One adapter a row: no adapter, LoRA, ReFT of several ranks, layers, components and parts, both."""
    return [
        edited(decoder, part(), seed=1),
        edited(decoder, part("f2+l2", rank=1, layers=(0, 2)), seed=2),
        None,
        edited(decoder, part("f3+l4", rank=5, component="mlp_output", tied=False), seed=3, lora=8),
        edited(decoder, part("l1", rank=2, component="block_input"), seed=4),
        random_adapter(decoder, rank=16, seed=5),
        edited(
            decoder,
            part("all_prompt", rank=7, method="noreft", activation="gelu", bias=True, rank_pattern={1: 19}, weight=0.5),
            part("f9+l2", rank=3, tied=False),
            part([0, 4, -1], rank=2, method="consreft", component="attention_input", layers=(1,)),
            part("all_prompt", rank=2, method="direft", component="attention_output"),
            part("f4", rank=4, method="lobireft", component="attention_output", layers=(2,)),
            seed=6,
        ),
        edited(
            decoder,
            part("all_prompt", rank=min(64, decoder.shape.hidden), method="direft", component="mlp_input", activation="silu"),
            seed=7,
            size=0.05,
        ),
    ]


def error_ratio(rows: Rows, which: Sequence[int]) -> float:
    """The compiled forward's mean error against float32, over the plain bfloat16 forward's."""
    ours, plain = 0.0, 0.0
    for index, found in zip(which, rows.hidden(which), strict=True):
        exact = rows.plain(rows.exact, index)
        ours += float((found.float() - exact).abs().sum())
        plain += float((rows.plain(rows.rounded, index) - exact).abs().sum())
    return ours / plain


@pytest.mark.parametrize("changes", [{}, ODD, NARROW], ids=["llama", "odd", "narrow"])
def test_rows_of_every_kind_are_as_near_to_float32_as_the_plain_forward_in_bfloat16(target: str, changes: dict[str, Any]) -> None:
    """A wrong layer, rank, side, order or token would be far outside rounding."""
    rows = Rows(changes)
    for index in range(len(ROWS)):
        assert error_ratio(rows, [index]) <= 1.5
    assert error_ratio(rows, range(len(ROWS))) <= 1.2


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("changes", [{}, NARROW], ids=["llama", "narrow"])
def test_every_component_is_edited_where_the_plain_forward_edits_it(target: str, changes: dict[str, Any], component: str) -> None:
    """Before or behind a norm, before or behind the residual sum: each is another function."""
    rows = Rows(changes, lambda decoder: [edited(decoder, part("f5+l9", rank=6, component=component), seed=seed) for seed in range(len(ROWS))])
    exact, (ours,), (base,) = rows.plain(rows.exact, 0), rows.hidden([0]), rows.hidden([0], edits=False)
    assert float((base - exact).abs().mean()) > 20 * float((ours - exact).abs().mean())
    assert error_ratio(rows, range(len(ROWS))) <= 1.2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_activation_is_computed(target: str, method: str) -> None:
    """Methods fuse into different factors, and an activation may act on some of the ranks only."""
    activations = [None, *ACTIVATIONS] if method in LEARNED else [None]

    def adapters(decoder: Decoder) -> list[Adapter | None]:
        kinds = itertools.cycle(activations)
        return [edited(decoder, part(rank=5, method=method, activation=next(kinds)), seed=seed) for seed in range(len(ROWS))]

    assert error_ratio(Rows({}, adapters), range(len(ROWS))) <= 1.2


def test_activations_are_torchs_to_a_millionth(target: str) -> None:
    """An approximation good enough for a gate would still be a function that no adapter was trained with."""
    size, scale = model_of().config.hidden_size, 3e4
    places = torch.cat([torch.linspace(-12, 12, size - 6), torch.tensor([-1e-4, 1e-4, -90.0, 90.0, 0.0, 0.5])])

    def adapters(decoder: Decoder) -> list[Adapter | None]:
        found: list[Adapter | None] = []
        for activation in ACTIVATIONS:  # Δ = scale * (f(places) - torch's f(places)), which vanishes
            pair = (part("l1", rank=size, method="direft", activation=activation, layers=(2,)), part("l1", rank=size, method="lobireft", layers=(2,)))
            blank = edited(decoder, *pair)
            factors: list[dict[str, Tensor]] = [{"w": torch.zeros(size, size), "b": places}, {"b": -activate(places, activation)}]
            edits = {site: Intervention(r=scale * torch.eye(size), **factors[site.part]) for site in blank.edits}
            found.append(Adapter(blank.spec, {}, edits=edits))
        return found + [None] * (len(ROWS) - len(found))

    rows = Rows({}, adapters)
    for index in range(len(ACTIVATIONS)):
        last, base = rows.hidden([index])[0][-1].float(), rows.hidden([index], edits=False)[0][-1].float()
        assert float((last - base).abs().max()) < 0.05 * float(base.abs().mean()), ACTIVATIONS[index]


@pytest.mark.parametrize("changes", [{}, ODD, NARROW], ids=["llama", "odd", "narrow"])
def test_a_row_has_the_same_bits_alone_in_a_batch_in_chunks_and_token_by_token(target: str, changes: dict[str, Any]) -> None:
    """Batching, chunked prefill, prefix reuse and preemption all rest on this, with edits on either side of a chunk's end as without."""
    rows = Rows(changes)
    together = rows.hidden(range(len(ROWS)))
    backwards = rows.hidden(range(len(ROWS) - 1, -1, -1))[::-1]
    for index, expected in enumerate(together):
        assert torch.equal(backwards[index], expected)
        assert torch.equal(rows.hidden([index])[0], expected)
        for width in (13, 31, 1):
            cache = rows.decoder.new_cache(rows.num_pages)
            parts = [rows.hidden([index], cache, start, start + width)[0] for start in range(0, len(ROWS[index]), width)]
            assert torch.equal(torch.cat(parts), expected)


def test_the_order_in_which_a_batch_meets_an_adapters_parts_changes_no_bit(target: str) -> None:
    """A later chunk of one row beside a whole row of the same adapter finds the parts in another order; sums must not follow it."""
    options: dict[str, Any] = {"rank": 3, "method": "direft", "layers": (1,)}
    parts = (part("l6", **options, weight=1e5), part("all_prompt", **options, weight=-1e5), part("l4", rank=4))

    def adapters(decoder: Decoder) -> list[Adapter | None]:
        blank = edited(decoder, *parts)
        # the first two cancel but for rounding, which is the larger for the weights
        edits = {site: blank.edits[site._replace(part=0)] if site.part == 1 else found for site, found in blank.edits.items()}
        return [Adapter(blank.spec, {}, edits=edits)] * len(ROWS)

    rows = Rows({}, adapters)
    rows.slots = [rows.slots[0]] * len(ROWS)
    expected = rows.hidden([3])[0]
    whole, chunk = ROWS[3], ROWS[0][:20]
    batch = PackedBatch.of([chunk, whole], pages=[rows.pages[0], rows.pages[3]])
    slot = rows.slots[0]
    assert slot is not None
    edits = edit_rows([(0, 0, 20, PROMPTS[0], slot.parts), (20, 0, len(whole), PROMPTS[3], slot.parts)])
    found = rows.decoder.forward(batch, AdapterBatch((Segment(0, batch.num_tokens, slot),), edits=edits), rows.decoder.new_cache(rows.num_pages))
    assert torch.equal(found[20:], expected)


def test_rows_and_tokens_that_are_not_edited_keep_the_bases_bits(target: str) -> None:
    """ReFT rows beside it cost a row nothing, and tokens before an adapter's first place may share pages with the base."""
    rows = Rows({})
    with_edits, without = rows.hidden(range(len(ROWS))), rows.hidden(range(len(ROWS)), edits=False)
    for index in (2, 5):
        assert torch.equal(with_edits[index], without[index])
    late = Rows({}, lambda decoder: [edited(decoder, part("l4", component=COMPONENTS[seed % 6]), seed=seed) for seed in range(len(ROWS))])
    changed, base = late.hidden(range(len(ROWS))), late.hidden(range(len(ROWS)), edits=False)
    for index, prompt in enumerate(PROMPTS):
        first = max(prompt // 2, prompt - 4)
        assert torch.equal(changed[index][:first], base[index][:first])
        assert not torch.equal(changed[index][first:], base[index][first:])


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_edit_of_nothing_changes_no_bit(target: str, component: str) -> None:
    """W = R and b = 0, where training starts: a linear's output that waited for its edit must still be the same number."""

    def adapters(decoder: Decoder) -> list[Adapter | None]:
        fresh = edited(decoder, part("f7+l7", component=component))
        return [Adapter(fresh.spec, {}, edits={site: Intervention(e.r, e.r, torch.zeros(e.rank)) for site, e in fresh.edits.items()})] * len(ROWS)

    rows = Rows({}, adapters)
    for found, base in zip(rows.hidden(range(len(ROWS))), rows.hidden(range(len(ROWS)), edits=False), strict=True):
        assert torch.equal(found, base)


def test_the_number_of_threads_changes_no_bit(target: str) -> None:
    """Each edited token has one thread, whichever it is."""
    rows, before = Rows({}), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat([*rows.hidden(range(len(ROWS))), *rows.hidden([7, 0, 6, 0, 7])]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_token_that_is_wanted_twice_or_not_at_all_is_edited_once(target: str) -> None:
    """The last block's edits are made where hidden states are handed out, by as many threads as ask for them."""
    rows, before = Rows({}), torch.get_num_threads()
    expected, slot = rows.hidden([0])[0], rows.slots[0]
    assert slot is not None
    torch.set_num_threads(2)
    try:
        batch = PackedBatch.of([ROWS[0]], pages=[rows.pages[0]], outputs=[69, 69, 0, 3, 69, 0, 20] * 9)
        edits = edit_rows([(0, 0, len(ROWS[0]), PROMPTS[0], slot.parts)])
        found = rows.decoder.forward(batch, AdapterBatch(edits=edits), rows.decoder.new_cache(rows.num_pages))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected[batch.output_index])


def test_a_slot_counts_its_edits_and_no_lora_that_is_not_there(target: str) -> None:
    """Hundreds of ReFT adapters fit where a dozen LoRAs do, if the budget counts what they take."""
    rows = Rows({})
    lora, both, reft = (rows.adapters[index] for index in (5, 3, 0))
    assert lora is not None and both is not None and reft is not None
    hidden, layers = rows.decoder.shape.hidden, rows.decoder.shape.num_layers
    assert rows.bank.slot_bytes(reft) == layers * 4 * (2 * 4 * hidden + 4)
    assert rows.bank.slot_bytes(both) == rows.bank.slot_bytes(Adapter(lora.spec, both.modules)) + 2 * layers * 4 * (2 * 5 * hidden + 5)
    tied, untied, plain = rows.slots[0], rows.slots[3], rows.slots[5]
    assert tied is not None and untied is not None and plain is not None
    assert tied.packed.handle is None and plain.parts == ()
    assert tied.parts[0].sides[0] is tied.parts[0].sides[1]
    assert untied.parts[0].sides[0] is not untied.parts[0].sides[1]


def test_edits_of_another_base_are_refused(target: str) -> None:
    """They would be read beyond their end."""
    rows, large = Rows({}), decoder_of(tiny_model("llama", hidden_size=128))
    with pytest.raises(BaseMismatch, match="edit has tensors"):
        rows.bank.load(edited(large, part()))


def test_edits_that_overflow_give_no_finite_answer(target: str) -> None:
    """The engine recognises a worthless answer by it; other rows, and what runs in the same memory next, have theirs."""
    rows = Rows(NARROW)
    expected = rows.hidden([6])[0]
    broken = edited(rows.exact, part(component="attention_output", activation="relu"), size=float("inf"))
    rows.slots[0] = rows.bank.load(broken)
    assert not torch.isfinite(rows.hidden([0])[0][-1].float()).all()
    assert torch.isfinite(rows.hidden([0, 2])[1].float()).all()
    assert torch.equal(rows.hidden([6])[0], expected)
