"""Adapters come and go by bytes, and never under somebody who uses them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from atoll.engine.pool import AdapterPool
from atoll.errors import BaseMismatch, EngineError, PoolFull, RequestRefused
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.bank import LoraBank
from atoll.model.base import Base
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.sites import Site

RANK_8_BYTES = 8 * (64 + 32 + 32 + 64 + 96 + 96 + 64 + 3 * 64 + 64 + 2 * 64 + 96) * 3 * 4  # rank x (outputs + fused inputs) x layers x float32


@pytest.fixture
def make_pool(base: Base) -> Callable[[int], AdapterPool]:
    shape = base.decoder.shape
    return lambda budget: AdapterPool(LoraBank(shape.linears, shape.num_layers, torch.float32), budget)


@pytest.fixture
def pool(make_pool: Callable[[int], AdapterPool], make_adapter: Callable[..., Adapter]) -> AdapterPool:
    """Room for two of rank 8; a, b, c of rank 8 and wide (rank 16: both places) registered."""
    pool = make_pool(2 * RANK_8_BYTES)
    for seed, key in enumerate("abc"):
        pool.register(key, make_adapter(8, seed=seed))
    pool.register("wide", make_adapter(16))
    return pool


def test_the_idle_adapter_that_was_used_least_recently_leaves(pool: AdapterPool) -> None:
    """Eviction keeps what is likely needed again."""
    for key in ("a", "b", "a"):
        assert pool.hold(key)
        pool.release(key)
    assert pool.hold("c")
    assert pool.resident() == ("a", "c")
    pool.check({"c": 1})


def test_an_adapter_in_use_or_pinned_never_leaves(pool: AdapterPool) -> None:
    """Its rows would be answered by another adapter's factors."""
    pool.pin("a")
    assert pool.hold("b")
    assert not pool.hold("c")
    assert pool.resident() == ("a", "b")
    pool.release("b")
    assert pool.hold("c")
    assert pool.resident() == ("a", "c")
    pool.unpin("a")
    pool.release("c")
    assert pool.hold("wide")
    assert pool.resident() == ("wide",)
    pool.check({"wide": 1})


def test_nothing_leaves_unless_that_makes_enough_room(pool: AdapterPool) -> None:
    """Evicting in vain would only cost reloads."""
    assert pool.hold("a")
    assert pool.hold("b")
    pool.release("b")
    assert not pool.hold("wide")
    assert pool.resident() == ("a", "b")


def test_pinned_adapters_that_leave_too_little_room_are_said_so(pool: AdapterPool) -> None:
    """Waiting would never end, so the request is told instead."""
    pool.pin("a")
    with pytest.raises(PoolFull, match="pinned adapters leave"):
        pool.hold("wide")


def test_pinning_fails_while_others_use_the_places(pool: AdapterPool) -> None:
    """A pin is a promise about now."""
    assert pool.hold("a")
    assert pool.hold("b")
    with pytest.raises(PoolFull, match="are in use"):
        pool.pin("c")
    pool.check({"a": 1, "b": 1})


def test_an_adapter_larger_than_the_budget_is_refused_when_it_is_registered(
    make_pool: Callable[[int], AdapterPool], make_adapter: Callable[..., Adapter]
) -> None:
    """Better at once than at the first request."""
    pool = make_pool(RANK_8_BYTES - 1)
    with pytest.raises(PoolFull, match="keeps"):
        pool.register("a", make_adapter(8))
    assert "a" not in pool


def test_a_key_means_one_adapter_for_good(pool: AdapterPool, make_adapter: Callable[..., Adapter]) -> None:
    """A key that changed its meaning would make running and cached answers lie."""
    with pytest.raises(RequestRefused, match="registered for another adapter"):
        pool.register("a", make_adapter(8, seed=9))
    with pytest.raises(RequestRefused, match="empty"):
        pool.register("", make_adapter(8))


def test_the_same_content_read_again_is_the_same_adapter(pool: AdapterPool, make_adapter: Callable[..., Adapter]) -> None:
    """A registry reads a digest's file anew after it has let go of the tensors, while the engine still waits for the last request of the old ones."""
    pool.use("a")
    assert not pool.unregister("a", wait=True)
    pool.register("a", make_adapter(8, seed=0))
    pool.check_known("a")
    assert not pool.unuse("a")
    assert "a" in pool
    broken = make_adapter(8, seed=1)
    next(iter(broken.modules.values())).a[0, 0] = torch.nan
    pool.register("nan", broken)
    pool.register("nan", Adapter(broken.spec, {site: LoraModule(m.a.clone(), m.b.clone(), m.scaling) for site, m in broken.modules.items()}))


def test_what_was_packed_ahead_is_taken_by_the_first_load_only(
    pool: AdapterPool, make_adapter: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing takes long and is done by a worker; but the packed form is memory outside the budget, so it goes when it is taken."""
    adapter, ready = make_adapter(8, seed=7), Ready()
    alive, taken = weakref.ref(ready), []
    load = pool._bank.load
    monkeypatch.setattr(pool._bank, "load", lambda adapter, packed=None: taken.append(packed is not None) or load(adapter))
    pool.register("packed", adapter, ready)
    del ready
    for key in ("packed", "wide", "packed"):
        assert alive() is None or not taken
        assert pool.hold(key)
        pool.release(key)
    assert taken == [True, False, False]
    assert alive() is None
    ready = Ready()
    alive = weakref.ref(ready)
    pool.register("never asked for", make_adapter(8), ready)
    del ready
    pool.unregister("never asked for")
    assert alive() is None
    assert pool.pack(adapter) is None, "the plain bank has nothing to do ahead"


def test_adapters_with_edits_are_the_same_only_if_they_edit_the_same(pool: AdapterPool, make_reft: Callable[..., Adapter]) -> None:
    """A digest's file read again is; other tensors, places, formulas or weights under that key are not."""
    spec = ReftSpec(rank=4, positions=Positions.parse("f2+l2"), dropout=0.1)
    pool.register("reft", make_reft(spec))
    pool.register("reft", make_reft(replace(spec, dropout=0.0)))
    for other in (
        make_reft(spec, seed=1),
        make_reft(replace(spec, positions=Positions.parse("f2+l3"))),
        make_reft(replace(spec, activation="relu")),
        make_reft(replace(spec, weight=0.5)),
        make_reft(replace(spec, layers=(0, 1))),
        make_reft(replace(spec, tied=False)),
        make_reft(spec, targets=("q_proj",)),
        make_reft(spec, spec),
    ):
        with pytest.raises(RequestRefused, match="registered for another adapter"):
            pool.register("reft", other)


def test_adapters_with_edits_take_few_bytes_and_places_of_their_own(
    make_pool: Callable[[int], AdapterPool], make_adapter: Callable[..., Adapter], make_reft: Callable[..., Adapter]
) -> None:
    """No factors of zeros for the linears that they do not change: a hundred of them stand beside two LoRA adapters."""
    each = 3 * 4 * (4 * 64 + 4 * 64 + 4)  # layers x float32 x (A and U [4, 64], b [4])
    pool = make_pool(2 * RANK_8_BYTES + 100 * each)
    for key in "ab":
        pool.register(key, make_adapter(8, seed=ord(key)))
    for i in range(101):
        pool.register(f"reft {i}", make_reft(ReftSpec(rank=4), seed=i))
    held = ["a", "b", *(f"reft {i}" for i in range(100))]
    assert all(pool.hold(key) for key in held)
    assert pool.resident_bytes == 2 * RANK_8_BYTES + 100 * each
    assert not pool.hold("reft 100")
    pool.check(dict.fromkeys(held, 1))
    assert len(pool.slot("reft 3").parts) == 1 and not pool.slot("a").parts
    pool.release("reft 3")
    assert pool.hold("reft 100")
    assert "reft 3" not in pool.resident()
    assert (pool.changes_linears("a"), pool.changes_linears("reft 4")) == (True, False)


def test_edits_for_another_base_are_refused(pool: AdapterPool, make_reft: Callable[..., Adapter]) -> None:
    """Before they edit a state of another width or in a layer that is not there."""
    good = make_reft(ReftSpec(rank=4, layers=(0,)))
    wide = {site: replace(found, r=torch.zeros(4, 65)) for site, found in good.edits.items()}
    with pytest.raises(BaseMismatch, match="layer 0 block_output"):
        pool.register("wider", replace(good, edits=wide))
    with pytest.raises(BaseMismatch, match="edits layer 7"):
        pool.register("deep", replace(good, spec=replace(good.spec, reft=(ReftSpec(rank=4, layers=(7,)),))))
    with pytest.raises(BaseMismatch, match="edit of layer 0"):
        pool.register("empty", replace(good, edits={}))


class Ready:
    """A packed adapter."""


def test_an_adapter_for_another_base_is_refused(pool: AdapterPool) -> None:
    """Wrong widths are found before they crash a forward."""
    spec = AdapterSpec(base="other", rank=4, alpha=8.0, target_modules=("q_proj",), layers_to_transform=(0,))
    with pytest.raises(BaseMismatch, match="q_proj"):
        pool.register("wrong", Adapter(spec, {Site(0, "q_proj"): LoraModule(torch.zeros(4, 63), torch.zeros(64, 4), 2.0)}))
    assert "wrong" not in pool


def test_an_adapter_in_use_cannot_be_unregistered(pool: AdapterPool) -> None:
    """And one that is not frees its bytes."""
    assert pool.hold("a")
    with pytest.raises(EngineError, match="in use by 1"):
        pool.unregister("a")
    pool.release("a")
    pool.unregister("a")
    assert pool.resident_bytes == 0
    with pytest.raises(RequestRefused, match="'a' is not registered"):
        pool.hold("a")
    pool.check({})


def test_adapters_in_training_can_be_served_without_gradients(make_pool: Callable[[int], AdapterPool], base: Base) -> None:
    """Composition serves candidates whose tensors may ask for gradients; the bank must not be drawn into their graph."""
    a, b = torch.ones(4, 64, requires_grad=True), torch.ones(64, 4, requires_grad=True)
    pool = make_pool(1 << 30)
    spec = AdapterSpec(base=base.name, rank=4, alpha=4.0, target_modules=("o_proj",), layers_to_transform=(0,))
    pool.register("t", Adapter(spec, {Site(0, "o_proj"): LoraModule(a, b, 1.0)}))
    assert pool.hold("t")
    update = pool.slot("t").update(0, 1)
    assert update is not None
    assert not update.a.requires_grad


def test_the_check_finds_a_leak(pool: AdapterPool) -> None:
    """The integrity check is only worth running if it can fail."""
    assert pool.hold("a")
    with pytest.raises(AssertionError, match="leak"):
        pool.check({})


def test_adapters_registered_by_the_hundred_are_not_all_kept_packed(
    make_pool: Callable[[int], AdapterPool], make_adapter: Callable[..., Adapter]
) -> None:
    """A thousand packed forms that nobody uses yet would be gigabytes beyond the budget."""

    class Form:
        """Stands for packed factors."""

    pool, adapter = make_pool(2 * RANK_8_BYTES), make_adapter(8)
    forms = []
    for index in range(30):
        form = Form()
        forms.append(weakref.ref(form))
        pool.register(f"key {index}", adapter, form)
        del form
    assert sum(form() is not None for form in forms) <= 8
    assert forms[-1]() is not None
