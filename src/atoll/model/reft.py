"""Representation fine-tuning: small learned edits Δ(h) of hidden states at chosen layers and prompt positions, instead of updates of weights.

Every method is one of six formulas over two thin matrices (Wu et al. 2024, arXiv 2404.03592; h [d], R and W [r, d], b and c [r]):

    loreft             Δ = Rᵀ(f(W h + b) - R h)         R's rows orthonormal       equation 2
    noreft             Δ = Rᵀ(f(W h + b) - R h - c)     R free                     the ablation without orthonormal rows
    direft             Δ = Rᵀ f(W h + b)                R free                     equation 3, the paper's DiReFT; PyReFT calls it Nodireft
    orthogonal_direft  Δ = Rᵀ f(W h + b)                R's rows orthonormal       what PyReFT calls Direft
    consreft           Δ = Rᵀ(b - R h)                  R's rows orthonormal       a constant in the subspace
    lobireft           Δ = Rᵀ b                         R's rows orthonormal       a low-rank bias

with f the identity unless the spec names an activation. All of them fuse into one form that forwards read (`Edit`): Δ = Uᵀ f(A h + b), A = W - R.
An edit is computed in float32 and added to the edited tokens alone: all other tokens keep their bits.

Used by adapter.py (an adapter may have LoRA modules, edits, or both), apply_edits.py (the plain forward), train (masters and `retract`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from atoll.errors import AdapterFormatError, BaseMismatch
from atoll.model.positions import Positions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHODS = ("loreft", "noreft", "direft", "orthogonal_direft", "consreft", "lobireft")
ORTHONORMAL = ("loreft", "orthogonal_direft", "consreft", "lobireft")  # methods whose R has orthonormal rows
SUBTRACTS = ("loreft", "noreft", "consreft")  # methods with - R h
LEARNED = ("loreft", "noreft", "direft", "orthogonal_direft")  # methods with W
COMPONENTS = ("block_input", "attention_input", "attention_output", "mlp_input", "mlp_output", "block_output")
BLOCK_INPUT, ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT, BLOCK_OUTPUT = range(6)  # indices into COMPONENTS, in the order they are met
PAPER_POSITIONS = Positions(first=7, last=7)  # the paper's for commonsense and arithmetic
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid")
TENSORS = ("r", "w", "b", "c")
MAX_PARTS = 16  # of one adapter


class EditSite(NamedTuple):
    """One place of one part of an adapter: parts count its ReftSpecs, side is positions.PREFIX or SUFFIX (always PREFIX where the part is tied)."""

    part: int
    layer: int
    component: str
    side: int


@dataclass(frozen=True)
class ReftSpec:
    """One ReFT part of an adapter. layers None: all blocks. weight multiplies Δ (composition sets it); dropout acts on Δ while training.

    rank_pattern gives some layers another rank. tied: prefix and suffix positions share their tensors. bias: noreft's c.
    """

    method: str = "loreft"
    rank: int = 4
    layers: tuple[int, ...] | None = None
    component: str = "block_output"
    positions: Positions = PAPER_POSITIONS
    tied: bool = True
    activation: str | None = None
    dropout: float = 0.0
    bias: bool = False
    rank_pattern: Mapping[int, int] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("component", self.component, COMPONENTS)):
            if value not in known:
                raise AdapterFormatError(f"the ReFT {name} is {value!r}, but must be one of {', '.join(known)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise AdapterFormatError(f"the ReFT activation is {self.activation!r}, but must be one of {', '.join(ACTIVATIONS)}, or none")
        if self.activation is not None and self.method not in LEARNED:
            raise AdapterFormatError(f"{self.method} has no activation", hint=f"methods with one are {', '.join(LEARNED)}")
        if self.bias and self.method != "noreft":
            raise AdapterFormatError(f"{self.method} has no second bias", hint="only noreft has")
        if not 0 <= self.dropout < 1:
            raise AdapterFormatError(f"the ReFT dropout is {self.dropout}, but must be from 0 up to 1")
        if not math.isfinite(self.weight):
            raise AdapterFormatError(f"the ReFT weight is {self.weight}, but must be finite")
        for where, rank in (("", self.rank), *((f" of layer {layer}", rank) for layer, rank in self.rank_pattern.items())):
            if rank < 1:
                raise AdapterFormatError(f"the ReFT rank{where} is {rank}, but must be at least 1")
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise AdapterFormatError(f"the ReFT layers are {list(self.layers)}, but must be different ones, and at least one", hint="none means all")
        outside = sorted(set(self.rank_pattern) - set(self.layers))
        if outside:
            raise AdapterFormatError(
                f"rank_pattern names layer {outside[0]}, but the ReFT layers are {list(self.layers)}", hint="give ranks for edited layers only"
            )

    @property
    def sides(self) -> int:
        """How many sides have tensors of their own."""
        return 1 if self.tied or not self.positions.has_sides else 2

    def rank_at(self, layer: int) -> int:
        """The rank at a layer."""
        return self.rank_pattern.get(layer, self.rank)

    @property
    def max_rank(self) -> int:
        """The largest rank at any layer."""
        everywhere = (self.rank, *self.rank_pattern.values())
        return max(everywhere if self.layers is None else map(self.rank_at, self.layers))

    def sites(self, part: int, num_layers: int) -> Iterator[EditSite]:
        """Every place of this part in a base of `num_layers` blocks, in file order. Raises BaseMismatch where it names a layer the base lacks."""
        layers = range(num_layers) if self.layers is None else sorted(self.layers)
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise BaseMismatch(
                    f"the adapter edits layer {layer}, but the base has {num_layers} layers (0 to {num_layers - 1})",
                    hint="leave the layer out, or use the base that the adapter was made for",
                )
            for side in range(self.sides):
                yield EditSite(part, layer, self.component, side)

    def to_json(self) -> dict[str, Any]:
        """All fields, as adapter_config.json has them."""
        return {
            "method": self.method,
            "rank": self.rank,
            "layers": None if self.layers is None else list(self.layers),
            "component": self.component,
            "positions": self.positions.to_json(),
            "tied": self.tied,
            "activation": self.activation,
            "dropout": self.dropout,
            "bias": self.bias,
            "rank_pattern": {str(layer): rank for layer, rank in sorted(self.rank_pattern.items())},
            "weight": self.weight,
        }


class Edit(NamedTuple):
    """What a forward reads: Δ = Uᵀ f(A h + b), a and u [R, d], b [R], float32, contiguous; the first `activated` ranks go through `activation`."""

    a: Tensor
    b: Tensor
    u: Tensor
    activation: str | None = None
    activated: int = 0
    dropout: float = 0.0
    dropout_seed: int = 0


@dataclass(frozen=True)
class Intervention:
    """The tensors of one site: r [r, d]; w [r, d] and b [r] or None where the method has none; c [r] is noreft's second bias.

    r is the transpose of PyReFT's rotate_layer.weight. Tensors keep their file's dtype.
    """

    r: Tensor
    w: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.r.shape[0])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def edit(self, spec: ReftSpec) -> Edit:
        """Fuse for a forward, in float32 and differentiable. With a nonlinear f and - R h, W and R stay apart: the rank doubles.

        The tensors may be those of many sites, stacked along leading dimensions (training fuses all layers at once); then the Edit's are too.
        """
        import torch

        r = self.r.float()
        rank, zeros = r.shape[-2], torch.zeros(r.shape[:-1], device=r.device)
        b = self.b.float() if self.b is not None else zeros
        weight = spec.weight
        if self.w is None:
            a = -r if spec.method in SUBTRACTS else torch.zeros_like(r)
            return Edit(a, b, r * weight if weight != 1 else r)
        w, subtracts = self.w.float(), spec.method in SUBTRACTS
        u = r * weight if weight != 1 else r
        if spec.activation is None or not subtracts:
            a = w - r if subtracts else w
            b = b - self.c.float() if self.c is not None and spec.activation is None else b
            return Edit(a, b, u, spec.activation, rank if spec.activation else 0)
        c = -self.c.float() if self.c is not None else zeros
        return Edit(torch.cat([w, -r], -2), torch.cat([b, c], -1), torch.cat([u, u], -2), spec.activation, rank)


def tensor_shapes(spec: ReftSpec, layer: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a site of this spec has, and their shapes."""
    rank = spec.rank_at(layer)
    shapes: dict[str, tuple[int, ...]] = {"r": (rank, hidden)}
    if spec.method in LEARNED:
        shapes["w"] = (rank, hidden)
    shapes["b"] = (rank,)
    if spec.bias:
        shapes["c"] = (rank,)
    return shapes


def fused_bytes(spec: ReftSpec, found: Intervention) -> int:
    """Bytes of a site's `Edit`: a and u [R, d] and b [R] in float32, where R is twice the rank if W and R stay apart."""
    apart = spec.activation is not None and spec.method in SUBTRACTS
    return 4 * (2 if apart else 1) * found.rank * (2 * int(found.r.shape[1]) + 1)


def new_intervention(spec: ReftSpec, layer: int, hidden: int, generator: torch.Generator) -> Intervention:
    """Fresh float32 tensors. Δ is zero at the start wherever the formula allows it: then training starts from the base.

    R has random orthonormal rows. loreft and noreft: W = R, b = 0; direft and orthogonal_direft: W = 0, b = 0, and R alone is random, as B's mirror
    image in LoRA (a zero W still gets a gradient, through R). lobireft: b = 0. consreft replaces the subspace, so nothing makes it zero: b = 0.
    PyReFT starts W and b as torch's Linear does, with an edit that is not zero; `atoll.reft` does so too.
    """
    import torch

    rank = spec.rank_at(layer)
    if rank > hidden:
        raise AdapterFormatError(f"the ReFT rank of layer {layer} is {rank}, but the base's hidden states have {hidden} dimensions")
    r = retract(torch.randn(rank, hidden, generator=generator))
    w = None
    if spec.method in LEARNED:
        # An activation other than the identity has f(0) = 0 for all but sigmoid, but no W makes f(W h) = R h: those start at torch's Linear.
        if spec.activation is not None and spec.method in SUBTRACTS:
            w = torch.empty(rank, hidden).uniform_(-1 / math.sqrt(hidden), 1 / math.sqrt(hidden), generator=generator)
        else:
            w = r.clone() if spec.method in SUBTRACTS else torch.zeros(rank, hidden)
    return Intervention(r, w, torch.zeros(rank), torch.zeros(rank) if spec.bias else None)


def retract(r: Tensor) -> Tensor:
    """The orthonormal rows nearest to r [..., r, d] float32, its polar factor (r rᵀ)^(-1/2) r: no d x d matrix, no sign or order lost.

    Absil, Mahony and Sepulchre 2008, Optimization Algorithms on Matrix Manifolds, section 4.1.1. In float64 within, so that a row already
    orthonormal moves by rounding only. The rows must be finite and independent, as those one optimizer step away from orthonormal ones are.
    """
    import torch

    wide = r.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    root = vectors @ (values.clamp(min=1e-12).rsqrt().unsqueeze(-1) * vectors.mT)
    nearest: Tensor = (root @ wide).to(r.dtype)
    return nearest


def not_orthonormal(r: Tensor) -> float:
    """How far the rows of r [r, d] are from orthonormal: the largest entry of |R Rᵀ - I|."""
    import torch

    wide = r.double()
    return float((wide @ wide.mT - torch.eye(r.shape[0], dtype=torch.float64, device=r.device)).abs().max())


def side_of(spec: ReftSpec, side: int) -> int:
    """Which side's tensors edit the positions of a side."""
    return side if spec.sides == 2 else 0
