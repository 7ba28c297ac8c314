"""PyReFT's six interventions as ordinary modules: Δ(h) is computed in float32 and added, whatever dtype the base has.

R is a parameter of its own with orthonormal columns, not the result of a parametrization: an optimizer moves it freely, and `retract` brings it back
to the nearest orthonormal matrix. Trainers call that after every step (ReftModel.retract); a training loop that does not know of it is safe too,
because a forward sees what an optimizer has written and retracts. So weight decay cannot shrink R, and no d x d buffer is needed.

Formulas of Wu et al. 2024 (arXiv 2404.03592), with PyReFT's names, keywords and initial values. Used by model.py, config.py, importer.py, convert.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import AdapterFormatError, ConfigError, RequestRefused
from atoll.model.reft import retract

ORTHONORMAL_TOLERANCE = 1e-5  # of max |RᵀR - I|; float32 rounding of d = 8192 numbers stays below
_FORGOTTEN = ("device", "use_fast", "keep_last_dim", "intervention", "intervention_type")  # keywords that PyReFT's own calls pass and no class reads
Subspaces = Sequence[Sequence[int] | None]


class LowRankRotateLayer(nn.Module):
    """x R of R = `weight` [n, m], n the width and m the rank, with orthonormal columns: the transpose of the paper's R."""

    def __init__(self, n: int, m: int, init_orth: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, m))
        if init_orth:
            nn.init.orthogonal_(self.weight)
        self._settled = self.weight._version if init_orth else -1
        self.exposed = False  # whether a forward since has asked for gradients, so that a step may have followed

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] to [..., m], in the dtype of `weight`."""
        return x.to(self.weight.dtype) @ self.weight

    @property
    def stale(self) -> bool:
        """Whether `weight` must be retracted: something has written into it, or it is off after a forward that could have led to a step.

        The parameter's version counter tells of most writers, but torch's fused optimizers do not raise it. Between forwards without a step in
        between nothing is off, so nothing is written into tensors that a backward still needs.
        """
        weight = self._parameters.get("weight")  # absent where a user's class has put torch's own parametrization here
        if weight is None:
            return False
        return weight._version != self._settled or (self.exposed and self.deviation() > ORTHONORMAL_TOLERANCE)

    def deviation(self) -> float:
        """max |RᵀR - I|."""
        wide = self.weight.detach().double()
        return float((wide.T @ wide - torch.eye(wide.shape[1], device=wide.device, dtype=wide.dtype)).abs().max())

    def settle(self) -> None:
        """Say that `weight` is orthonormal as it stands."""
        self._settled, self.exposed = self.weight._version, False

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LowRankRotateLayer:
        settled = "weight" in self._parameters and self.weight._version == self._settled
        exposed = self.exposed
        super()._apply(fn, recurse)
        if settled:
            self.settle()  # a move between devices may make a new parameter, with a version counter of its own
            self.exposed = exposed
        return self

    def __getstate__(self) -> dict[str, Any]:
        clean = "weight" in self._parameters and self.weight._version == self._settled
        return {**self.__dict__, "_settled": clean}  # a copy's version counter starts again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settled = self.weight._version if state["_settled"] else -1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if "weight" in self._parameters and not self.weight.is_meta and self.deviation() <= ORTHONORMAL_TOLERANCE:
            self.settle()  # loaded bits stay as they are: a model read back gives the logits that it gave


def retract_layers(layers: Iterable[LowRankRotateLayer]) -> None:
    """Replace each layer's R by the orthonormal matrix nearest to it, layers of one shape together. Values only: no gradient goes through."""
    groups: dict[tuple[Any, ...], list[LowRankRotateLayer]] = {}
    for layer in layers:
        if "weight" in layer._parameters:
            groups.setdefault((layer.weight.shape, layer.weight.device, layer.weight.dtype), []).append(layer)
    with torch.no_grad():
        for group in groups.values():
            nearest = retract(torch.stack([layer.weight.mT for layer in group]))
            for layer, rows in zip(group, nearest, strict=True):
                layer.weight.copy_(rows.mT)
                layer.settle()


def settle_layers(layers: Iterable[LowRankRotateLayer]) -> None:
    """For the start of a forward: retract what is stale, and note whether a step may follow."""
    found = list(layers)
    retract_layers([layer for layer in found if layer.stale])
    for layer in found:
        weight = layer._parameters.get("weight")
        layer.exposed = torch.is_grad_enabled() and weight is not None and weight.requires_grad


class _Linear(nn.Linear):
    """nn.Linear that takes an input of any dtype and answers in its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Intervention(nn.Module):
    """Base class: h + Δ(h), Δ = z(h) D, with coordinates z [..., r] and directions D [r, d] of the subclass.

    Keywords are PyReFT's. dtype is remembered and saved, but the parameters are float32 (or float64 if asked by `.double()`); casts of the model that
    holds them leave them so. dropout acts on Δ, where PyReFT applies it to the whole hidden state. act_fn is a name of transformers' ACT2FN. add_bias
    is NoReFT's second bias. subspace_partition lists [start, end) ranges of coordinates; without it `subspaces` names coordinates.

    Raises ConfigError for a rank, a name or a number that cannot be.
    """

    orthonormal = True  # whether the directions are rotate_layer.weight
    learned_source: Any  # Linear, or for Cons and Lobi a Parameter [r]

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dtype: torch.dtype | str = torch.bfloat16,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        subspace_partition: Sequence[Sequence[int]] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.embed_dim, self.low_rank_dimension = int(embed_dim), int(low_rank_dimension)
        if not 0 < self.low_rank_dimension <= self.embed_dim:
            raise ConfigError(f"low_rank_dimension is {low_rank_dimension}, but must be between 1 and embed_dim ({embed_dim})")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout}, but must be at least 0 and below 1")
        self.dtype = _dtype(dtype)
        self.act_fn = _activation(act_fn)
        self.dropout = nn.Dropout(dropout)
        self.add_bias = bool(add_bias)
        self.subspace_partition = subspace_partition
        self.settings: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "low_rank_dimension": self.low_rank_dimension,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dropout": float(dropout),
            "act_fn": act_fn,
            "add_bias": self.add_bias,
            "subspace_partition": None if subspace_partition is None else [list(part) for part in subspace_partition],
            **{name: value for name, value in others.items() if value is not None and name not in _FORGOTTEN},
        }
        width, rank = self.embed_dim, self.low_rank_dimension
        if self.orthonormal:
            self.rotate_layer = LowRankRotateLayer(width, rank)
        else:
            self.proj_layer = _Linear(width, rank, bias=self.add_bias)

    def coordinates(self, h: Tensor) -> Tensor:
        """z [..., r] of hidden states h [..., d]."""
        raise NotImplementedError

    @property
    def directions(self) -> Tensor:
        """D [r, d]: along what the coordinates are added."""
        return self.rotate_layer.weight.T if self.orthonormal else self.proj_layer.weight

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces | None = None) -> Tensor:
        """base + Δ(base), in base's dtype and shape [B, n, d] (or any [B, ..., d]).

        subspaces: for each of B rows the coordinates (or, with a partition, the ranges) that may act; None for all of them. Differently from PyReFT,
        whose six classes do not look at it, all classes here do.
        """
        if self.orthonormal:
            settle_layers([self.rotate_layer])
        with torch.autocast(base.device.type, enabled=False):
            h = base.to(torch.promote_types(base.dtype, torch.float32))
            z = self.coordinates(h)
            if subspaces is not None:
                z = z * self._chosen(subspaces, z)
            changed: Tensor = h + self.dropout(z @ self.directions)
        return changed.to(base.dtype)

    def _chosen(self, subspaces: Subspaces, z: Tensor) -> Tensor:
        """1 for the coordinates that may act and 0 for others, [B, 1, ..., r]."""
        if len(subspaces) != z.shape[0]:
            raise RequestRefused(f"subspaces are given for {len(subspaces)} rows, but the batch has {z.shape[0]}")
        parts = self.subspace_partition
        mask = z.new_zeros(z.shape[0], z.shape[-1])
        for row, named in enumerate(subspaces):
            known = range(z.shape[-1] if parts is None else len(parts))
            numbers = known if named is None else [int(number) for number in named]
            if any(number not in known for number in numbers):
                raise RequestRefused(f"row {row} names the subspaces {list(numbers)}, but there are {len(known)}, counted from 0")
            for number in numbers:
                start, end = (number, number + 1) if parts is None else parts[number]
                mask[row, start:end] = 1
        return mask.view(z.shape[0], *[1] * (z.dim() - 2), z.shape[-1])

    def __getitem__(self, index: int) -> Intervention:
        """`intervention[0]` is the intervention: programs for early PyReFT write `reft_model.interventions[key][0]`."""
        if index != 0:
            raise IndexError(index)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Intervention:
        def keeping_float32(tensor: Tensor) -> Tensor:
            moved = cast(Tensor, fn(tensor))
            narrower = tensor.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrower else moved

        super()._apply(keeping_float32, recurse)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if value not in (None, 0.0, False))


class _Learned(Intervention):
    """Interventions whose coordinates come of `learned_source` W h + b, through act_fn."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.learned_source = _Linear(self.embed_dim, self.low_rank_dimension)

    def coordinates(self, h: Tensor) -> Tensor:
        z: Tensor = self.act_fn(self.learned_source(h))
        return z


class _Constant(Intervention):
    """Interventions with a learned constant b in place of W h + b; PyReFT draws it from [0, 1)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.learned_source = nn.Parameter(torch.rand(self.low_rank_dimension))


class LoreftIntervention(_Learned):
    """h + Rᵀ(f(W h + b) - R h), R orthonormal: LoReFT, equation 2 of the paper."""

    def coordinates(self, h: Tensor) -> Tensor:
        z: Tensor = super().coordinates(h) - self.rotate_layer(h)
        return z


class NoreftIntervention(_Learned):
    """h + W₂ᵀ(f(W₁ h + b) - W₂ h - c), c only with add_bias: LoReFT without the orthonormal rows."""

    orthonormal = False

    def coordinates(self, h: Tensor) -> Tensor:
        z: Tensor = super().coordinates(h) - self.proj_layer(h)
        return z


class ConsreftIntervention(_Constant):
    """h + Rᵀ(b - R h), R orthonormal: a constant in the subspace."""

    def coordinates(self, h: Tensor) -> Tensor:
        z: Tensor = self.learned_source - self.rotate_layer(h)
        return z


class LobireftIntervention(_Constant):
    """h + Rᵀ b, R orthonormal: a low-rank bias."""

    def coordinates(self, h: Tensor) -> Tensor:
        constant: Tensor = self.learned_source
        return constant.expand(*h.shape[:-1], -1)


class DireftIntervention(_Learned):
    """h + Rᵀ f(W h + b), R orthonormal. The paper's DiReFT has no such constraint: that is NodireftIntervention."""


class NodireftIntervention(_Learned):
    """h + W₂ᵀ f(W₁ h + b): DiReFT, equation 3 of the paper. With add_bias proj_layer has a bias that the formula does not use, as in PyReFT."""

    orthonormal = False


CLASSES: Mapping[str, type[Intervention]] = {
    cls.__name__: cls
    for cls in (LoreftIntervention, NoreftIntervention, ConsreftIntervention, LobireftIntervention, DireftIntervention, NodireftIntervention)
}


def class_name(cls: type) -> str:
    """What a saved configuration calls a class: one of CLASSES by its plain name, a user's own as module:name."""
    return cls.__name__ if CLASSES.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"


def class_named(name: str) -> type[Intervention]:
    """The class of a saved name. A user's own class must have been imported already: a file is never a reason to import code.

    Raises AdapterFormatError if there is none, or if it is not an Intervention.
    """
    module, _, qualified = name.rpartition(":")
    found: Any = CLASSES.get(name) if not module else sys.modules.get(module)
    for part in qualified.split(".") if module else ():
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, Intervention):
        return found
    raise AdapterFormatError(
        f"the saved intervention is a {name!r}, which is neither a class of Atoll's nor an Intervention that this program has imported",
        hint="import or define the class first; or build the model with get_reft_model and read the weights with load_intervention",
    )


def _activation(name: str | None) -> Any:
    from transformers.activations import ACT2FN

    if name is not None and name not in ACT2FN:
        raise ConfigError(f"act_fn is {name!r}, but must be one of {', '.join(sorted(ACT2FN))}, or None")
    return ACT2FN["linear" if name is None else name]


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}, but must be a floating point type of torch, as torch.bfloat16 or 'bfloat16'")
    return found
