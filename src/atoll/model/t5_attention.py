"""T5's attention when labels are scored: what transformers' modules compute, for fewer products. Equal in float32 but for the order of sums.

A decoder that scores labels asks with few tokens (8, say) what the encoder says of many (100). Keys and values of all those states are then most of
what its cross attention costs; and q · (W_k s) = (W_kᵀ q) · s, Σ p (W_v s) = W_v Σ p s. So the weights act on the few: a query of every head is
brought to the width of the states, which are read as they are (how DeepSeek-V2 decodes over its latent states, arXiv 2405.04434).

The encoder's own attention is two batched products and a softmax: torch's fused kernel is slow where scores have a bias. What its first layer reads
is the same for all candidates, so the base's part of its products is made once for all. In bfloat16 scores are rounded before the softmax, as in
transformers' own plain attention and not in the fused kernel.

Used by generic.py for the time of a forward. Everything that is not known here stays transformers': modules of other classes or with other linears
than plain ones, linears that somebody else has hooks on, calls with a cache, masks that are no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from atoll.model.generic import Change

_CLASSES = ("T5Attention", "MT5Attention")  # no scaling, one bias by distance for all of a stack's layers, no other bias
_WORTH = 2.0  # times fewer FLOPs that absorbing must take: its products are thinner


def attentions_of(model: Any) -> dict[str, nn.Module]:
    """The attention modules that `scoring` knows, by their paths: cross attention, and the encoder's own."""
    return {place: module for place, module in model.named_modules() if type(module).__name__ in _CLASSES and _is_known(module)}


def _is_known(module: Any) -> bool:
    """Not causal (a module that does not say so is of another version of transformers), and with plain linears."""
    linears = (module.q, module.k, module.v)
    return getattr(module, "is_causal", None) is False and all(type(linear) is nn.Linear and linear.bias is None for linear in linears)


@contextmanager
def scoring(attentions: Mapping[str, nn.Module], changes: Mapping[str, Change], num: int) -> Iterator[None]:
    """Within, these modules compute as this file says. To be entered before the changes are hooked on: who has hooks already is left alone.

    changes: by the paths of the linears. num: how many candidates there are, whose rows are the same ones.
    """
    taken = {place: module for place, module in attentions.items() if _is_free(module)}
    try:
        for place, module in taken.items():
            module.forward = _Cross(module, place, changes) if module.is_decoder else _Own(module, place, changes, num)
        yield
    finally:
        for module in taken.values():
            module.__dict__.pop("forward", None)


def _is_free(module: Any) -> bool:
    """Whether nobody else changes what the module or its linears compute."""
    hooked = any(linear._forward_hooks or linear._forward_pre_hooks for linear in (module.q, module.k, module.v))
    return not hooked and "forward" not in vars(module)


class _Own:
    """Attention among the states [n, T, D] themselves."""

    def __init__(self, module: Any, place: str, changes: Mapping[str, Change], num: int) -> None:
        self._module, self._plain, self._num = module, type(module).forward, num
        self._changes = {name: changes.get(f"{place}.{name}") for name in ("q", "k", "v")}

    def __call__(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **named: Any) -> Any:
        module, (rows, length, _), heads = self._module, hidden_states.shape, self._module.n_heads
        if not _is_readable(mask):
            return self._plain(module, hidden_states, mask=mask, position_bias=position_bias, **named)
        if position_bias is None:  # the first layer, whose bias is handed on to the others
            position_bias = module.compute_bias(length, length, device=hidden_states.device).contiguous()
            made = [self._of_same_rows(name, hidden_states) for name in ("q", "k", "v")]
        else:
            made = [linear(hidden_states) for linear in (module.q, module.k, module.v)]
        q, k, v = (x.view(rows, length, heads, -1).transpose(1, 2).flatten(0, 1) for x in made)
        scores = torch.bmm(q, k.mT).view(rows, heads, length, length)
        scores = _masked(scores + position_bias if scores.requires_grad else scores.add_(position_bias), mask)
        attended = torch.bmm(torch.softmax(scores, -1).flatten(0, 1), v).view(rows, heads, length, -1)
        return module.o(attended.transpose(1, 2).flatten(2)), position_bias, None

    def _of_same_rows(self, name: str, x: Tensor) -> Tensor:
        """A linear's output where all candidates' rows are the first one's."""
        base, change = F.linear(x[: len(x) // self._num], getattr(self._module, name).weight).repeat(self._num, 1, 1), self._changes[name]
        return base if change is None else change(x, base)


class _Cross:
    """Attention of [n, U, D] to states [n, T, D], with no key and no value of them made, unless LoRA changes them and it pays to."""

    def __init__(self, module: Any, place: str, changes: Mapping[str, Change]) -> None:
        self._module, self._plain = module, type(module).forward
        self._has_own_keys, self._change_of_values = f"{place}.k" in changes, changes.get(f"{place}.v")

    def __call__(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **named: Any) -> Any:
        module, states = self._module, named["key_value_states"]
        pays = self._pays(hidden_states.shape[1], *states.shape[1:])
        if named.get("past_key_values") is not None or not _is_readable(mask) or not pays:
            return self._plain(module, hidden_states, mask=mask, position_bias=position_bias, **named)
        (rows, count, width), heads, length = hidden_states.shape, module.n_heads, states.shape[1]
        queries = module.q(hidden_states).view(rows, count, heads, -1).transpose(1, 2)
        if self._has_own_keys:
            scores = queries @ module.k(states).view(rows, length, heads, -1).permute(0, 2, 3, 1)
        else:
            wide = _by_head(queries, module.k.weight.view(heads, -1, width))
            scores = torch.bmm(wide.flatten(1, 2), states.mT).view(rows, heads, count, length)
        weights = torch.softmax(_masked(scores, mask), -1)
        if self._change_of_values is not None and heads * count > length:  # the update would be made at more places than there are states
            attended = weights @ module.v(states).view(rows, length, heads, -1).transpose(1, 2)
        else:
            attended = self._by_mixing(weights, states)
        return module.o(attended.transpose(1, 2).flatten(2)), position_bias, None

    def _pays(self, count: int, length: int, width: int) -> bool:
        """Whether `count` queries are few enough. Of one head and side: products with the weights, and with the states or what is made of them."""
        size: int = self._module.key_value_proj_dim
        return _WORTH * count * width * (size + length) <= length * size * (width + count)

    def _by_mixing(self, weights: Tensor, states: Tensor) -> Tensor:
        """Values of the mixed states. LoRA says of all heads' mixtures what it adds to all heads' outputs, of which each head has its own."""
        rows, heads, count, _ = weights.shape
        mixed = torch.bmm(weights.flatten(1, 2), states)
        attended = _by_head(mixed.view(rows, heads, count, -1), self._module.v.weight.view(heads, -1, states.shape[2]).mT)
        if self._change_of_values is None:
            return attended
        every = self._change_of_values(mixed, mixed.new_zeros(rows, heads * count, self._module.inner_dim)).view(rows, heads, count, heads, -1)
        return attended + torch.diagonal(every, dim1=1, dim2=3).permute(0, 3, 1, 2)


def _is_readable(mask: Tensor | None) -> bool:
    return mask is None or isinstance(mask, Tensor)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, H, U, I] times each head's own weight [H, I, O], in one batched product a head; returns [n, H, U, O]."""
    rows, heads, count, _ = x.shape
    return torch.bmm(x.transpose(0, 1).flatten(1, 2), weights).view(heads, rows, count, -1).transpose(0, 1)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [n, H, U, T] with transformers' mask, of booleans (True: is seen) or of numbers to add."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
