"""ReFT as the papers write it, and hooks that put it into a transformers model: the reference that the forward with edits is held to.

Used by tests/model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atoll.model.adapter import Adapter
from atoll.model.reft import COMPONENTS, METHODS, Intervention, ReftSpec

FUNCTIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), None: nn.Identity()}
EVERY_FORM: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"method": "noreft", "bias": True},
    {"method": "loreft", "activation": "silu"},
    {"method": "noreft", "activation": "gelu", "bias": True},
    {"method": "direft", "activation": "relu"},
    {"method": "orthogonal_direft", "activation": "tanh"},
    {"method": "direft", "activation": "sigmoid", "weight": -0.5},
    {"method": "loreft", "weight": 0.75},
]


def written(spec: ReftSpec, found: Intervention, h: Tensor) -> Tensor:
    """Δ [n, D] of states h [n, D], from the formula of each method, in float64."""
    f = FUNCTIONS[spec.activation]
    h = h.double()
    r, w, b, c = (None if tensor is None else tensor.double() for tensor in (found.r, found.w, found.b, found.c))
    assert r is not None
    assert b is not None
    if spec.method == "lobireft":
        inside = b.expand(len(h), -1)
    elif spec.method == "consreft":
        inside = b - h @ r.T
    else:
        assert w is not None
        inside = f(h @ w.T + b)
        if spec.method in ("loreft", "noreft"):
            inside = inside - h @ r.T
        if c is not None:
            inside = inside - c
    return spec.weight * (inside @ r)


def moved_intervention(spec: ReftSpec, hidden: int, seed: int = 0, layer: int = 0) -> Intervention:
    """An intervention with nothing zero in it: R with orthonormal rows where the method has them, else any."""
    generator = torch.Generator().manual_seed(seed)
    rank = spec.rank_at(layer)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    free = spec.method in ("noreft", "direft")
    r = drawn(rank, hidden) * hidden**-0.5 if free else torch.linalg.qr(drawn(hidden, rank))[0].T.contiguous()
    w = None if spec.method in ("consreft", "lobireft") else drawn(rank, hidden) * hidden**-0.5
    return Intervention(r, w, drawn(rank), drawn(rank) if spec.bias else None)


@contextmanager
def hooked(model: Any, adapter: Adapter, num_prompt: int) -> Iterator[None]:
    """Hooks on a transformers Llama that edit rows of `num_prompt` prompt tokens; differentiable in the adapter's tensors."""
    handles = []
    for index, layer in enumerate(model.model.layers):
        places = {
            "block_input": (layer, True),
            "attention_input": (layer.input_layernorm, False),
            "attention_output": (layer.self_attn.o_proj, False),
            "mlp_input": (layer.post_attention_layernorm, False),
            "mlp_output": (layer.mlp, False),
            "block_output": (layer, False),
        }
        assert tuple(places) == COMPONENTS
        for component, (module, before) in places.items():
            found = {site: edit for site, edit in adapter.edits.items() if (site.layer, site.component) == (index, component)}
            if found:
                handles.append(_hook(module, before, adapter, found, num_prompt))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: Any, before: bool, adapter: Adapter, found: dict[Any, Intervention], num_prompt: int) -> Any:
    def edited(states: Tensor) -> Tensor:
        out = states.clone()
        for site, edit in found.items():
            spec = adapter.spec.reft[site.part]
            prefix, suffix = (list(side) for side in spec.positions.resolve(num_prompt))
            tokens = prefix + suffix if spec.sides == 1 else (prefix, suffix)[site.side]
            for row in range(len(states)):
                out[row, tokens] = out[row, tokens] + written(spec, edit, states[row, tokens]).to(states.dtype)
        return out

    if before:
        return module.register_forward_pre_hook(lambda _, args: (edited(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, args, out: edited(out))
