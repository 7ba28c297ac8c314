"""model/reft.py: each method is the formula it is named after, fused without loss, and starts, retracts and stacks as documented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.written_reft import EVERY_FORM, moved_intervention, written
from torch import Tensor

from atoll.errors import AdapterFormatError, BaseMismatch
from atoll.model.adapter import AdapterSpec, new_adapter
from atoll.model.apply_edits import delta
from atoll.model.positions import Positions
from atoll.model.reft import (
    LEARNED,
    METHODS,
    ORTHONORMAL,
    EditSite,
    Intervention,
    ReftSpec,
    fused_bytes,
    new_intervention,
    not_orthonormal,
    retract,
    tensor_shapes,
)

D, R = 48, 5
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 edits of states of size about 1


def states(n: int = 7, seed: int = 4) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def moved(spec: ReftSpec, seed: int = 0) -> Intervention:
    return moved_intervention(spec, D, seed)


def change(spec: ReftSpec, found: Intervention, h: Tensor) -> Tensor:
    return delta(h, found.edit(spec))


# --- formulas -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_a_fused_edit_is_the_written_formula(form: dict[str, Any]) -> None:
    """Everything that runs reads the fused form: A = W - R, U = R, or W and R apart where f is not linear."""
    spec = ReftSpec(rank=R, **form)
    found, h = moved(spec), states()
    torch.testing.assert_close(change(spec, found, h).double(), written(spec, found, h), **CLOSE)
    assert change(spec, found, h).abs().max() > 0.1, "the test moves nothing"
    edit = found.edit(spec)
    assert fused_bytes(spec, found) == 4 * sum(tensor.numel() for tensor in edit[:3])


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_gradients_are_those_of_the_written_formula(form: dict[str, Any]) -> None:
    """Training goes through the fused form; each tensor of a method, and the state itself, must get the gradient that the formula gives."""
    spec = ReftSpec(rank=R, **form)
    seed = torch.randn(7, D, generator=torch.Generator().manual_seed(9))
    gradients: list[dict[str, Any]] = []
    for function in (change, written):
        found = Intervention(**{name: tensor.clone().requires_grad_() for name, tensor in moved(spec).tensors.items()})
        h = states().requires_grad_()
        (function(spec, found, h) * seed).sum().backward()
        gradients.append({"h": h.grad if h.grad is not None else torch.zeros_like(h), **{name: t.grad for name, t in found.tensors.items()}})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)
        assert name == "h" or gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_are_computed_in_float32_whatever_the_file_holds(dtype: torch.dtype) -> None:
    """A file in bfloat16 gives the edit of its rounded tensors, not a bfloat16 edit."""
    spec = ReftSpec(rank=R)
    narrow = Intervention(**{name: tensor.to(dtype) for name, tensor in moved(spec).tensors.items()})
    assert {tensor.dtype for tensor in narrow.edit(spec)[:3]} == {torch.float32}
    torch.testing.assert_close(change(spec, narrow, states()).double(), written(spec, narrow, states()), **CLOSE)


# --- identities of the paper's algebra ------------------------------------------------------------------------------------------------------------


def test_with_w_equal_to_r_nothing_changes() -> None:
    """Rᵀ(R h + 0 - R h) = 0, and exactly so: A = W - R has no bit set, so a fresh LoReFT is the base."""
    spec = ReftSpec(rank=R)
    r = moved(spec).r
    assert not change(spec, Intervention(r, r.clone(), torch.zeros(R)), states()).any()


def test_inside_the_subspace_the_state_becomes_its_target() -> None:
    """R Φ(h) = W h + b: what LoReFT says it does."""
    spec, h = ReftSpec(rank=R), states()
    found = moved(spec)
    assert found.w is not None
    assert found.b is not None
    torch.testing.assert_close((h + change(spec, found, h)) @ found.r.T, h @ found.w.T + found.b, **CLOSE)


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_outside_the_subspace_nothing_changes(method: str) -> None:
    """(I - RᵀR)(Φ(h) - h) = 0."""
    spec, h = ReftSpec(method, rank=R), states()
    found = moved(spec)
    moves = change(spec, found, h)
    torch.testing.assert_close(moves @ found.r.T @ found.r, moves, **CLOSE)


def test_loreft_is_a_direft_of_the_difference() -> None:
    """LoReFT(R, W, b) = DiReFT(R, W - R, b): why one fused form serves all methods."""
    found, h = moved(ReftSpec(rank=R)), states()
    assert found.w is not None
    difference = Intervention(found.r, found.w - found.r, found.b)
    assert torch.equal(change(ReftSpec(rank=R), found, h), change(ReftSpec("direft", rank=R), difference, h))


def test_a_rotation_of_the_subspace_is_the_same_edit() -> None:
    """(Q R, Q W, Q b) for orthogonal Q: entries of R and W mean nothing by themselves, so adapters are never averaged entry by entry."""
    spec, h = ReftSpec(rank=R), states()
    found = moved(spec)
    q = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(3)))[0]
    assert found.w is not None
    assert found.b is not None
    torch.testing.assert_close(change(spec, Intervention(q @ found.r, q @ found.w, q @ found.b), h), change(spec, found, h), **CLOSE)


def test_disjoint_subspaces_add_up_from_one_state_and_not_in_turn() -> None:
    """Δ of ranks 0 to 4 is Δ of 0, 1 plus Δ of 2 to 4, each from the same h. Applied in turn, the second reads what the first wrote."""
    whole, h = ReftSpec(rank=R), states()
    found = moved(whole)

    def part(rows: slice) -> tuple[ReftSpec, Intervention]:
        cut = Intervention(**{name: tensor[rows] for name, tensor in found.tensors.items()})
        return ReftSpec(rank=cut.rank), cut

    one, other = part(slice(0, 2)), part(slice(2, R))
    both = change(whole, found, h)
    torch.testing.assert_close(change(*one, h) + change(*other, h), both, **CLOSE)
    first = change(*one, h)
    assert (first + change(*other, h + first) - both).abs().max() > 0.01


def test_what_projects_is_idempotent() -> None:
    """W Rᵀ = 0 makes LoReFT a projection; ConsReFT always is one, LobiReFT (a shift) never."""
    h = states()
    found = moved(ReftSpec(rank=R))
    assert found.w is not None
    blind = Intervention(found.r, found.w - found.w @ found.r.T @ found.r, found.b)
    for spec, tensors in ((ReftSpec(rank=R), blind), (ReftSpec("consreft", rank=R), moved(ReftSpec("consreft", rank=R)))):
        once = h + change(spec, tensors, h)
        torch.testing.assert_close(once + change(spec, tensors, once), once, **CLOSE)
    lobi = ReftSpec("lobireft", rank=R)
    once = h + change(lobi, moved(lobi), h)
    torch.testing.assert_close(change(lobi, moved(lobi), once), change(lobi, moved(lobi), h))


@pytest.mark.parametrize("activation", [None, "silu", "sigmoid"])
def test_ranks_padded_with_zeros_change_nothing(activation: str | None) -> None:
    """How edits of different rank share one table; U is zero there, so even f(0) of sigmoid adds nothing."""
    spec, h = ReftSpec("direft", rank=R, activation=activation), states()
    found = moved(spec)
    padded = Intervention(**{name: torch.cat([tensor, torch.zeros(3, *tensor.shape[1:])]) for name, tensor in found.tensors.items()})
    torch.testing.assert_close(change(replace(spec, rank=R + 3), padded, h), change(spec, found, h), rtol=0, atol=1e-6)


# --- fresh tensors, retraction --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "consreft"])
def test_a_fresh_edit_is_none(method: str) -> None:
    """Training starts from the base, as a LoRA does. (ConsReFT replaces what is in its subspace, so it cannot.)"""
    for seed in range(3):
        fresh = new_intervention(ReftSpec(method, rank=R), 0, D, torch.Generator().manual_seed(seed))
        assert not change(ReftSpec(method, rank=R), fresh, states()).any()
        assert not_orthonormal(fresh.r) < 1e-6


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_fresh_tensors_are_those_of_the_method(form: dict[str, Any]) -> None:
    """2 d r + r parameters for a method with W, d r + r without, and r more for noreft's second bias."""
    spec = ReftSpec(rank=R, **form)
    fresh = new_intervention(spec, 0, D, torch.Generator().manual_seed(1))
    assert {name: tuple(tensor.shape) for name, tensor in fresh.tensors.items()} == tensor_shapes(spec, 0, D)
    count = sum(tensor.numel() for tensor in fresh.tensors.values())
    assert count == D * R + R + (D * R if spec.method in LEARNED else 0) + (R if spec.bias else 0)


def test_a_fresh_adapter_has_the_papers_parameter_count() -> None:
    """32 layers of a 7B base at rank 8, tied: 2,097,408, the paper's 0.031 %. Untied has twice as many; layers and ranks count as given."""

    def count(hidden: int, num_layers: int, **part: Any) -> int:
        shapes = {"q_proj": (hidden, hidden)}
        generator = torch.Generator().manual_seed(0)
        return new_adapter(AdapterSpec.reft_only("b", [ReftSpec(**part)]), shapes, num_layers, generator).num_parameters

    assert count(4096, 32, rank=8) == 2_097_408
    assert count(64, 3, rank=4) == 3 * (2 * 64 * 4 + 4)
    assert count(64, 3, rank=4, tied=False) == 2 * 3 * (2 * 64 * 4 + 4)
    assert count(64, 3, rank=4, tied=False, positions=Positions(last=1)) == 3 * (2 * 64 * 4 + 4), "one side needs tensors for one"
    assert count(64, 3, rank=4, layers=(2, 0), rank_pattern={0: 6}) == (2 * 64 * 4 + 4) + (2 * 64 * 6 + 6)


def test_the_retraction_gives_the_nearest_orthonormal_rows() -> None:
    """The polar factor: U Vᵀ of the singular value decomposition. For a stack of layers at once, and still once it is there."""
    r = torch.randn(3, R, D, generator=torch.Generator().manual_seed(2))
    found = retract(r)
    u, _, v = torch.linalg.svd(r.double(), full_matrices=False)
    torch.testing.assert_close(found.double(), u @ v, **CLOSE)
    assert all(not_orthonormal(rows) < 1e-6 for rows in found)
    torch.testing.assert_close(retract(found), found, rtol=0, atol=2e-7)


def test_a_rank_wider_than_the_state_is_refused() -> None:
    """More orthonormal rows than dimensions do not exist."""
    with pytest.raises(AdapterFormatError, match="rank of layer 2 is 9, but the base's hidden states have 8"):
        new_intervention(ReftSpec(rank=4, rank_pattern={2: 9}), 2, 8, torch.Generator())


# --- specs ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "reft"}, "method is 'reft', but must be one of loreft,"),
        ({"component": "mlp"}, "component is 'mlp'"),
        ({"activation": "softmax"}, "activation is 'softmax'"),
        ({"method": "lobireft", "activation": "relu"}, "lobireft has no activation"),
        ({"bias": True}, "loreft has no second bias"),
        ({"rank": 0}, "rank is 0"),
        ({"rank_pattern": {3: 0}}, "rank of layer 3 is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"layers": ()}, r"layers are \[\]"),
        ({"layers": (1, 1)}, r"layers are \[1, 1\]"),
        ({"layers": (1, 2), "rank_pattern": {3: 8}}, "rank_pattern names layer 3"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    """From Python, from YAML and from a file alike."""
    with pytest.raises(AdapterFormatError, match=words):
        ReftSpec(**fields)


def test_sites_are_the_edited_places_in_file_order() -> None:
    """Side 0 alone where prefix and suffix share their tensors, or where there is only one of them."""
    assert list(ReftSpec(layers=(2, 0)).sites(1, 3)) == [EditSite(1, 0, "block_output", 0), EditSite(1, 2, "block_output", 0)]
    assert [site.side for site in ReftSpec(tied=False).sites(0, 2)] == [0, 1, 0, 1]
    assert [site.side for site in ReftSpec(tied=False, positions=Positions(all_prompt=True)).sites(0, 2)] == [0, 0]
    with pytest.raises(BaseMismatch, match="edits layer 3, but the base has 3 layers"):
        list(ReftSpec(layers=(3,)).sites(0, 3))


def test_the_kind_says_what_an_adapter_has() -> None:
    """What the hub files it under and the bank gives it memory for."""
    part = ReftSpec(rank=2, rank_pattern={1: 6})
    alone = AdapterSpec.reft_only("b", [part, ReftSpec(rank=3, layers=(1,), rank_pattern={1: 5})])
    assert (alone.kind, alone.rank, alone.alpha, alone.target_modules) == ("reft", 6, 6.0, ())
    assert AdapterSpec("b", 8, 16.0).kind == "lora"
    assert AdapterSpec("b", 8, 16.0, reft=(part,)).kind == "lora+reft"
