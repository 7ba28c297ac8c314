"""model/kernels/thin.py: one compiled call for the thin products of all segments gives what plain torch gives, forward and backward."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import decoder_of, random_adapter
from tests.conftest import tiny_model
from tests.families import family_model
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.apply import Part, Update, linear
from atoll.model.batch import AdapterBatch, Segment
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.kernels import build
from atoll.model.kernels.thin import fits
from atoll.model.kernels.training import ThinNumbers, TrainingOps, training_ops
from atoll.train.rows import adapter_batch, label_batch
from atoll.train.weights import TrainableAdapter

pytestmark = [
    pytest.mark.usefixtures("built_kernels"),
    pytest.mark.skipif(not build.usable_targets() or build.compiler_path() is None, reason="no compiler, or a processor without AVX2 or NEON"),
]

Members = tuple[tuple[int, int, int], ...]  # rank, first column, width


class Always:
    """AdapterWeights of one update."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def update(self, layer: int, group: int) -> Update:
        return self._update


def update_of(d_in: int, members: Members, *, dropout: float = 0.0, seed: int = 0) -> Update:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(rank for rank, _, _ in members), d_in, generator=draw) / d_in**0.5
    parts, row = [], 0
    for number, (rank, start, width) in enumerate(members):
        b = torch.randn(rank, width, generator=draw) / max(1, rank) ** 0.5
        parts.append(Part(row, row + rank, start, start + width, b.requires_grad_(), 0.7 + number))
        row += rank
    return Update(a.requires_grad_(), tuple(parts), dropout, 99 + seed)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def ops() -> TrainingOps:
    found = training_ops(torch.empty(0, dtype=torch.bfloat16))
    assert found is not None
    return found


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: list[tuple[int, int, Update]], compiled: bool, trains_x: bool = True
) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    x = x.clone().requires_grad_(trains_x)
    batch = AdapterBatch(tuple(Segment(start, stop, Always(update)) for start, stop, update in segments))
    if compiled:
        assert fits(x, segments)
    y = linear(x, weight, bias, 0, 0, batch, ops() if compiled else None)
    assert (type(y.grad_fn).__name__ == "ThinLinearBackward") == compiled
    factors = {f"{n} A": update.a for n, (_, _, update) in enumerate(segments)}
    factors |= {f"{n} B{m}": part.b for n, (_, _, update) in enumerate(segments) for m, part in enumerate(update.parts)}
    wanted = {"x": x, **factors}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))}


def assert_close(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The compiled results are as near to float32's as plain bfloat16's are."""
    assert found.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        assert found[name].shape == truth.shape, name
        error, allowed = (float((value.float() - truth).norm() / truth.norm()) for value in (found[name], plain[name]))
        assert error <= 1.1 * allowed + 1e-4, (name, error, allowed)


QKV: Members = ((16, 0, 64), (16, 64, 32), (16, 96, 32))
CASES: dict[str, tuple[int, int, list[tuple[int, int, Members]]]] = {
    "fused, rank 16": (64, 128, [(0, 180, QKV)]),
    "one token": (64, 128, [(3, 4, QKV)]),
    "several segments with gaps, odd lengths": (64, 128, [(0, 25, QKV), (30, 77, QKV), (78, 79, QKV), (90, 180, QKV)]),
    "a member left out": (64, 128, [(0, 180, ((16, 0, 64), (16, 96, 32)))]),
    "ranks 1, 3 and 40": (64, 128, [(0, 70, ((1, 0, 64), (3, 64, 32), (40, 96, 32))), (70, 180, ((40, 64, 32),))]),
    "wide z": (64, 128, [(0, 180, ((64, 0, 64), (64, 64, 64)))]),
    "widths that are no multiples of 16": (38, 50, [(0, 61, ((8, 0, 18), (5, 18, 32))), (61, 180, ((16, 0, 50),))]),
    "many tokens": (64, 128, [(0, 1301, QKV)]),
    "many columns": (600, 1000, [(7, 100, ((16, 0, 600), (16, 600, 400)))]),
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_as_close_to_float32_as_plain_torchs(case: str) -> None:
    d_in, d_out, layout = CASES[case]
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(max(180, layout[-1][1]), d_in, generator=draw).to(torch.bfloat16)
    weight = (torch.randn(d_out, d_in, generator=draw) / d_in**0.5).to(torch.bfloat16)
    bias = torch.randn(d_out, generator=draw).to(torch.bfloat16)
    segments = [(start, stop, update_of(d_in, members, seed=number)) for number, (start, stop, members) in enumerate(layout)]
    exact = run(x.float(), weight.float(), bias.float(), segments, False)
    assert_close(run(x, weight, bias, segments, True), run(x, weight, bias, segments, False), exact)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    segments = [(0, 101, update_of(64, QKV, seed=1)), (101, 180, update_of(64, QKV, seed=2))]
    x, weight = torch.randn(180, 64).to(torch.bfloat16), torch.randn(128, 64).to(torch.bfloat16) / 8
    before = torch.get_num_threads()
    found = []
    try:
        for number in (2, threads):
            torch.set_num_threads(number)
            found.append(run(x, weight, None, segments, True))
    finally:
        torch.set_num_threads(before)
    factors = [name for name in found[0] if name not in ("x", "y")]  # those have the base's product, which is torch's
    assert all(torch.equal(found[0][name], found[1][name]) for name in factors)


def test_a_segments_result_does_not_depend_on_its_neighbours() -> None:
    mine, other = update_of(64, QKV, seed=1), update_of(64, QKV, seed=2)
    x, weight = torch.randn(180, 64).to(torch.bfloat16), torch.randn(128, 64).to(torch.bfloat16) / 8
    poisoned = x.clone()
    poisoned[120:] = float("nan")
    alone = run(x, weight, None, [(0, 120, mine)], True)
    beside = run(poisoned, weight, None, [(0, 120, mine), (120, 180, other)], True)
    assert torch.equal(alone["y"][:120], beside["y"][:120])
    assert torch.equal(alone["0 B1"], beside["0 B1"])
    assert torch.equal(alone["0 A"], beside["0 A"])


def test_dropout_hides_the_same_elements_both_ways() -> None:
    segments = [(0, 100, update_of(64, QKV, dropout=0.3, seed=1)), (100, 180, update_of(64, QKV, seed=2))]
    x, weight = torch.randn(180, 64).to(torch.bfloat16), (torch.randn(128, 64) / 8).to(torch.bfloat16)
    assert_close(run(x, weight, None, segments, True), run(x, weight, None, segments, False), run(x.float(), weight.float(), None, segments, False))


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_only_what_is_asked_for_is_computed(frozen: str) -> None:
    update = update_of(64, QKV)
    if frozen == "A":
        update.a.requires_grad_(False)
    if frozen == "B":
        update.parts[1].b.requires_grad_(False)
    x, weight = torch.randn(180, 64).to(torch.bfloat16), (torch.randn(128, 64) / 8).to(torch.bfloat16)
    segments, trains_x = [(0, 180, update)], frozen != "x"
    found = run(x, weight, None, segments, True, trains_x)
    assert {"x": "x", "A": "0 A", "B": "0 B1"}[frozen] not in found
    assert_close(found, run(x, weight, None, segments, False, trains_x), run(x.float(), weight.float(), None, segments, False, trains_x))


def test_what_does_not_fit_takes_the_plain_way() -> None:
    x, weight, update = torch.randn(20, 64).to(torch.bfloat16), torch.randn(128, 64).to(torch.bfloat16), update_of(64, QKV)
    magnitude = tuple(part._replace(magnitude=torch.ones(part.out_stop - part.out_start)) for part in update.parts)
    odd = update_of(64, ((4, 0, 33),))
    for unfit in (
        update._replace(mix=torch.ones(1, 48)),
        update._replace(beside=update_of(64, QKV, seed=3)),
        update._replace(parts=magnitude),
        update._replace(a=update.a.detach().to(torch.bfloat16)),
        update._replace(parts=update.parts[:2]),  # leaves rows of A out
        odd,
    ):
        assert fits(x, [(0, 20, update)])
        assert not fits(x.float(), [(0, 20, update)])
        assert not fits(x, [(0, 20, unfit)])
        y = linear(x.requires_grad_(), weight, None, 0, 0, AdapterBatch((Segment(0, 20, Always(unfit)),)), ops())
        assert type(y.grad_fn).__name__ == "_LoraLinearBackward"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_train_this_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear of a real step, native and generic: as many compiled calls as there are fused linears, and plain torch's gradients."""
    native = family == "llama"
    decoder = decoder_of(tiny_model(family), torch.bfloat16) if native else GenericDecoder(family_model(family).to(torch.bfloat16))
    targets = tuple(dict.fromkeys(target.rsplit(".", 1)[-1] for target in decoder.shape.linears))
    adapter, forward = random_adapter(decoder, 4, seed=1, target_modules=targets), TrainingOps.thin
    calls: list[int] = []
    found: dict[str, Tensor] = {}

    def counted(self: TrainingOps, call: ThinNumbers, y: Tensor) -> None:
        calls.append(len(y))
        forward(self, call, y)

    monkeypatch.setattr(TrainingOps, "thin", counted)
    for kernel in ("plain", "auto"):
        monkeypatch.setenv("ATOLL_KERNEL", kernel)
        weights = TrainableAdapter(adapter, decoder.shape.linears, groups=decoder.shape.groups)
        packed = label_batch([EncodedRow(list(range(5, 40)), 30, "row")], "cpu")
        decoder.label_losses(decoder.forward(packed.batch, adapter_batch(packed, [weights])), packed.labels).sum().backward()
        found[kernel] = weights.grads.clone()
        assert bool(calls) == (kernel == "auto")
    assert len(calls) == decoder.shape.num_layers * len(decoder.shape.groups)
    assert float((found["auto"] - found["plain"]).norm() / found["plain"].norm()) < 0.03


def test_a_long_or_wide_update_takes_the_plain_way() -> None:
    x = torch.empty(4096, 64, dtype=torch.bfloat16)
    assert fits(x, [(0, 2048, update_of(64, QKV))])
    assert not fits(x, [(0, 2049, update_of(64, QKV))])
    assert not fits(x, [(0, 10, update_of(64, ((65, 0, 64),)))])


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(20, 64).to(torch.bfloat16).requires_grad_(), torch.randn(128, 64).to(torch.bfloat16)
    y = linear(x, weight, None, 0, 0, AdapterBatch((Segment(0, 20, Always(update_of(64, QKV))),)), ops())
    (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.float().sum().backward()


@pytest.mark.parametrize("target", ["avx512", "avx2"])
def test_other_processors_kernels_agree(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target not in {found.name for found in build.usable_targets()}:
        pytest.skip(f"this processor has no {target}")
    monkeypatch.setenv("ATOLL_KERNEL", target)
    segments = [(0, 101, update_of(38, ((8, 0, 18), (5, 18, 32)), seed=1)), (101, 180, update_of(38, ((40, 0, 50),), seed=2))]
    x, weight = torch.randn(180, 38).to(torch.bfloat16), (torch.randn(50, 38) / 6).to(torch.bfloat16)
    assert_close(run(x, weight, None, segments, True), run(x, weight, None, segments, False), run(x.float(), weight.float(), None, segments, False))
