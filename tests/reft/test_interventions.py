"""The six interventions as modules: formulas, R on its manifold, dtypes, dropout, subspaces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.errors import AdapterFormatError, ConfigError, RequestRefused
from atoll.reft import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
)
from atoll.reft.interventions import CLASSES, LowRankRotateLayer, class_name, class_named, retract_layers

D, R = 24, 4
ROTATING = (LoreftIntervention, DireftIntervention, ConsreftIntervention, LobireftIntervention)
CLOSE = {"rtol": 0, "atol": 1e-5}


def made(cls: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return cls(**{"embed_dim": D, "low_rank_dimension": R, "dtype": torch.float32, **kwargs})


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def off_manifold(intervention: Any) -> float:
    deviation: float = intervention.rotate_layer.deviation()
    return deviation


def trained(intervention: Any, steps: int = 20, optimizer: Any = None, seed: int = 5) -> Any:
    """A hand-written loop that knows nothing of retractions."""
    optimizer = optimizer or torch.optim.AdamW(intervention.parameters(), lr=0.1, weight_decay=0.5)
    h, goal = states(6, 2, seed=seed), states(6, 2, seed=seed + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        (intervention(h) - goal).square().mean().backward()
        optimizer.step()
    return intervention


FORMULAS = {
    "LoreftIntervention": lambda i, h: (torch.relu(h @ i.learned_source.weight.T + i.learned_source.bias) - h @ rt(i)) @ rt(i).T,
    "NoreftIntervention": lambda i, h: (torch.relu(h @ i.learned_source.weight.T + i.learned_source.bias) - h @ w2(i).T - i.proj_layer.bias) @ w2(i),
    "ConsreftIntervention": lambda i, h: (i.learned_source - h @ rt(i)) @ rt(i).T,
    "LobireftIntervention": lambda i, h: (i.learned_source @ rt(i).T).expand_as(h),
    "DireftIntervention": lambda i, h: torch.relu(h @ i.learned_source.weight.T + i.learned_source.bias) @ rt(i).T,
    "NodireftIntervention": lambda i, h: torch.relu(h @ i.learned_source.weight.T + i.learned_source.bias) @ w2(i),
}


def rt(intervention: Any) -> Tensor:
    """The paper's Rᵀ [d, r]."""
    weight: Tensor = intervention.rotate_layer.weight
    return weight


def w2(intervention: Any) -> Tensor:
    weight: Tensor = intervention.proj_layer.weight
    return weight


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_its_formula(name: str) -> None:
    """PyReFT's six classes, written out."""
    intervention = made(CLASSES[name], act_fn="relu", add_bias=True)
    h = states(2, 3)
    torch.testing.assert_close(intervention(h), h + FORMULAS[name](intervention, h), **CLOSE)


def test_parameters_are_as_many_as_in_pyreft() -> None:
    """The published counts: 32,772 for d = 4096 and rank 4."""
    count = {name: sum(p.numel() for p in cls(embed_dim=4096, low_rank_dimension=4).parameters()) for name, cls in CLASSES.items()}
    assert count == {
        "LoreftIntervention": 32772,
        "NoreftIntervention": 32772,
        "ConsreftIntervention": 16388,
        "LobireftIntervention": 16388,
        "DireftIntervention": 32772,
        "NodireftIntervention": 32772,
    }
    assert not list(LoreftIntervention(embed_dim=64, low_rank_dimension=4).buffers())  # PyReFT holds a d x d buffer an intervention


def test_initial_values_are_drawn_as_pyreft_draws_them() -> None:
    """R with orthonormal columns, W and b uniform within 1/√d, the constants from [0, 1): the edit is not zero at the start."""
    intervention = made(LoreftIntervention)
    assert off_manifold(intervention) < 1e-6
    bound = D**-0.5
    assert 0.5 * bound < float(intervention.learned_source.weight.detach().abs().max()) <= bound
    constant = made(ConsreftIntervention, low_rank_dimension=24).learned_source.detach()
    assert 0 <= float(constant.min()) < 0.3 < 0.7 < float(constant.max()) < 1


def test_w_equal_to_r_edits_nothing() -> None:
    """Identity 1 of the formula."""
    intervention = made(LoreftIntervention)
    with torch.no_grad():
        intervention.learned_source.weight.copy_(rt(intervention).T)
        intervention.learned_source.bias.zero_()
    torch.testing.assert_close(intervention(states(3)), states(3), rtol=0, atol=1e-6)


def test_loreft_sets_the_coordinates_of_its_subspace_and_nothing_beside_them() -> None:
    """R Φ(h) = W h + b, and Φ(h) - h lies in the span of R's rows."""
    intervention, h = made(LoreftIntervention), states(5)
    after = intervention(h)
    torch.testing.assert_close(after @ rt(intervention), intervention.learned_source(h), **CLOSE)
    delta = after - h
    torch.testing.assert_close(delta, delta @ rt(intervention) @ rt(intervention).T, **CLOSE)


def test_loreft_is_direft_with_w_less_r() -> None:
    """What serving fuses: LoReFT(R, W, b) = DiReFT(W₂ = R, W₁ = W - R, b)."""
    loreft, direft = made(LoreftIntervention), made(NodireftIntervention)
    with torch.no_grad():
        direft.proj_layer.weight.copy_(rt(loreft).T)
        direft.learned_source.weight.copy_(loreft.learned_source.weight - rt(loreft).T)
        direft.learned_source.bias.copy_(loreft.learned_source.bias)
    torch.testing.assert_close(loreft(states(5)), direft(states(5)), **CLOSE)


def test_a_rotation_of_the_subspace_changes_nothing() -> None:
    """(Q R, Q W, Q b) is the same edit: averages of R and W element by element would be meaningless."""
    intervention, h = made(LoreftIntervention), states(5)
    before = intervention(h)
    q = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(3))).Q
    with torch.no_grad():
        intervention.rotate_layer.weight.copy_(rt(intervention) @ q.T)
        intervention.learned_source.weight.copy_(q @ intervention.learned_source.weight)
        intervention.learned_source.bias.copy_(q @ intervention.learned_source.bias)
    torch.testing.assert_close(intervention(h), before, **CLOSE)


def test_consreft_is_idempotent_and_lobireft_is_not() -> None:
    """A constant in a subspace stays; a bias adds up."""
    cons, lobi, h = made(ConsreftIntervention), made(LobireftIntervention), states(5)
    torch.testing.assert_close(cons(cons(h)), cons(h), **CLOSE)
    assert not torch.allclose(lobi(lobi(h)), lobi(h), atol=1e-3)


@pytest.mark.parametrize("cls", ROTATING)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_r_stays_orthonormal_under_weight_decay_without_anyone_asking(cls: Any, options: dict[str, Any]) -> None:
    """PyReFT's R becomes zero after one step with weight decay. Here a plain loop is enough, in every implementation of the optimizer."""
    intervention = made(cls)
    start = rt(intervention).detach().clone()
    trained(intervention, optimizer=torch.optim.AdamW(intervention.parameters(), lr=0.1, weight_decay=0.5, **options))
    intervention(states(1))
    assert off_manifold(intervention) < 1e-6
    assert float((rt(intervention).detach() - start).abs().max()) > 0.01  # and it was trained


class Behind(torch.optim.SGD):
    """Writes as old optimizers do, past the parameter's version counter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.data.add_(tensor.grad, alpha=-group["lr"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, Behind])
def test_other_optimizers_are_noticed_too(optimizer: Any) -> None:
    """torch's version counter tells of most writes; after a forward with gradients R is looked at, for the others."""
    intervention = made(LoreftIntervention)
    trained(intervention, optimizer=optimizer(intervention.parameters(), lr=0.1))
    assert intervention.rotate_layer.stale
    for _ in range(2):
        intervention(states(1))
        assert off_manifold(intervention) < 1e-6


def test_nothing_is_retracted_between_two_forwards_of_one_step() -> None:
    """A retraction in place between a forward and its backward would break autograd; accumulated gradients must add up."""
    intervention, h = made(LoreftIntervention), states(4)
    first, second = intervention(h).square().sum(), intervention(2 * h).square().sum()
    first.backward()
    third = intervention(h).square().sum()
    second.backward()
    together = rt(intervention).grad.clone()
    third.backward()
    intervention.zero_grad()
    for scale in (1, 2):
        intervention(scale * h).square().sum().backward()
    torch.testing.assert_close(rt(intervention).grad, together, rtol=1e-5, atol=1e-4)


def test_training_goes_on_orthonormally_after_loading() -> None:
    """PyReFT drifts off by 0.13 in 50 steps after a resume, for half of its state was rebuilt from random numbers."""
    first = trained(made(LoreftIntervention), 10)
    first(states(1))
    second = made(LoreftIntervention, seed=9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(rt(second), rt(first))
    assert torch.equal(second(states(4)), first(states(4)))  # loading does not move a bit
    trained(second, 50)
    second(states(1))
    assert off_manifold(second) < 1e-6


def test_layers_retracted_together_are_as_retracted_alone() -> None:
    """Batches of equal shapes are only faster."""
    layers = [LowRankRotateLayer(D, rank) for rank in (2, 4, 4)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(0.3 * torch.randn_like(layer.weight))
    alone = copy.deepcopy(layers)
    retract_layers(layers)
    for together, single in zip(layers, alone, strict=True):
        retract_layers([single])
        torch.testing.assert_close(together.weight, single.weight, rtol=0, atol=1e-7)
        assert together.deviation() < 1e-6
        assert not together.stale


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_stay_float32_whatever_dtype_is_asked(name: str) -> None:
    """bfloat16 cannot hold an orthonormal R, and casts of the model that holds an intervention must not reach it; double precision may."""
    intervention = made(CLASSES[name], dtype=torch.bfloat16)
    for cast in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        assert {tensor.dtype for tensor in cast(intervention).parameters()} == {torch.float32}
    assert intervention.dtype == torch.bfloat16
    assert intervention.settings["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in intervention.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_is_edited_in_float32_and_cast_once(name: str, dtype: torch.dtype) -> None:
    """In PyReFT a base and an intervention of different dtypes fail in the forward."""
    intervention, h = made(CLASSES[name], dtype=torch.bfloat16), states(2, 3).to(dtype)
    after = intervention(h)
    assert after.dtype == dtype
    assert torch.equal(after, intervention(h.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(intervention(h.float()), intervention(h.float()))
        inside = intervention(h.float())
    assert torch.equal(inside, intervention(h.float()))


def test_dropout_acts_on_the_edit_and_eval_turns_it_off() -> None:
    """PyReFT drops out the whole hidden state."""
    intervention, h = made(LoreftIntervention, dropout=0.5), states(4, 3)
    torch.manual_seed(0)
    noisy = intervention(h) - h
    clean = intervention.eval()(h) - h
    dropped = noisy.abs() < 1e-7
    assert 0.3 < float(dropped.float().mean()) < 0.7
    torch.testing.assert_close(noisy[~dropped], 2 * clean[~dropped], **CLOSE)


def test_disjoint_subspaces_of_one_r_add_up() -> None:
    """Δ over S ∪ T = Δ over S + Δ over T, read from the same state; every row may name its own."""
    for cls in CLASSES.values():
        intervention, h = made(cls), states(2, 3)
        first, second, both = (intervention(h, None, [chosen] * 2) - h for chosen in ([0, 2], [1], [0, 1, 2]))
        torch.testing.assert_close(first + second, both, **CLOSE)
        torch.testing.assert_close(intervention(h, subspaces=[None, []])[0], intervention(h)[0], **CLOSE)
        assert torch.equal(intervention(h, subspaces=[None, []])[1], h[1])


def test_a_partition_names_ranges_of_coordinates() -> None:
    """subspace_partition gives subspaces their extent, as in pyvene."""
    parted, plain, h = made(LoreftIntervention, subspace_partition=[[0, 3], [3, 4]]), made(LoreftIntervention), states(2, 3)
    assert torch.equal(parted(h, None, [[0], [1]]), plain(h, None, [[0, 1, 2], [3]]))


@pytest.mark.parametrize(("subspaces", "named"), [([[0]], "1 rows"), ([[0], [4]], "row 1"), ([[-1], [0]], "row 0")])
def test_wrong_subspaces_are_named(subspaces: Any, named: str) -> None:
    with pytest.raises(RequestRefused, match=named):
        made(LoreftIntervention)(states(2, 3), None, subspaces)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"low_rank_dimension": 0}, "low_rank_dimension"),
        ({"low_rank_dimension": D + 1}, "low_rank_dimension"),
        ({"dropout": 1.0}, "dropout"),
        ({"act_fn": "rulu"}, "rulu"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_wrong_keywords_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        made(LoreftIntervention, **wrong)


def test_programs_for_early_pyreft_find_the_intervention_at_index_0() -> None:
    """Its published notebooks end with `for k, v in reft_model.interventions.items(): v[0].eval()`."""
    intervention = made(LoreftIntervention)
    assert intervention[0] is intervention
    assert not intervention[0].eval().training
    with pytest.raises(IndexError):
        intervention[1]


class Doubled(LoreftIntervention):
    """A user's own class, as in PyReFT's notebook on subspaces."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        diff = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        output = base + 2 * torch.matmul(diff, self.rotate_layer.weight.T)
        result: Tensor = self.dropout(output.to(base.dtype))
        return result


def test_a_users_class_on_a_bfloat16_base_needs_no_casts_of_its_own() -> None:
    """learned_source and rotate_layer take an input of any dtype."""
    h = states(2, 3).bfloat16()
    assert made(Doubled)(h).dtype == torch.bfloat16


def test_saved_class_names_never_import_code() -> None:
    """A configuration from elsewhere may name anything; only interventions that the program already has are taken."""
    import sys

    assert class_named(class_name(LoreftIntervention)) is LoreftIntervention
    assert class_named(class_name(Doubled)) is Doubled
    for name in ("antigravity:Flight", "os:system", "torch.nn:Linear", "Loreft", "", ":", "atoll.reft.interventions:_activation"):
        with pytest.raises(AdapterFormatError, match="saved intervention"):
            class_named(name)
    assert "antigravity" not in sys.modules
