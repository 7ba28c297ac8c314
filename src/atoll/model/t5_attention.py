"""T5's attention when labels are scored: the same numbers as transformers' modules give, for fewer products.

A decoder that scores labels asks with few tokens (8, say) what the encoder says of many (100). Keys and values of all those states are then most of
what its cross attention costs; and q · (W_k s) = (W_kᵀ q) · s, Σ p (W_v s) = W_v Σ p s. So the weights act on the few: a query of every head is
brought to the width of the states, which are read as they are (how DeepSeek-V2 decodes over its latent states, arXiv 2405.04434).

The encoder's own attention is two batched products and a softmax: torch's fused kernel is slow where scores have a bias. What its first layer reads
is the same for all candidates, so the base's part of its products is made once for all.

Used by generic.py for the time of a forward. Modules of other classes, and calls with a cache, stay transformers'.
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
    found = {place: module for place, module in model.named_modules() if type(module).__name__ in _CLASSES}
    return {place: module for place, module in found.items() if not (module.is_decoder and module.is_causal)}


@contextmanager
def scoring(attentions: Mapping[str, nn.Module], changes: Mapping[str, Change], num: int) -> Iterator[None]:
    """Within, these modules compute as this file says. changes: by the paths of the linears, as the model's hooks have them.

    num: how many candidates there are, whose rows are the same ones.
    """
    try:
        for place, module in attentions.items():
            module.forward = _Cross(module, place, changes) if module.is_decoder else _Own(module, place, changes, num)
        yield
    finally:
        for module in attentions.values():
            module.__dict__.pop("forward", None)


class _Own:
    """Attention among the states [n, T, D] themselves."""

    def __init__(self, module: Any, place: str, changes: Mapping[str, Change], num: int) -> None:
        self._module, self._num = module, num
        self._changes = {name: changes.get(f"{place}.{name}") for name in ("q", "k", "v")}

    def __call__(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any) -> Any:
        module, (rows, length, _width) = self._module, hidden_states.shape
        heads, is_first = module.n_heads, position_bias is None  # layers hand their bias on
        if position_bias is None:
            position_bias = module.compute_bias(length, length, device=hidden_states.device).contiguous()
        made = (self._of_same_rows(name, hidden_states) if is_first else getattr(module, name)(hidden_states) for name in ("q", "k", "v"))
        q, k, v = (x.view(rows, length, heads, -1).transpose(1, 2).flatten(0, 1) for x in made)
        scores = torch.bmm(q, k.mT).view(rows, heads, length, length)
        scores = _hidden(scores + position_bias if scores.requires_grad else scores.add_(position_bias), mask)
        attended = torch.bmm(torch.softmax(scores, -1).flatten(0, 1), v).view(rows, heads, length, -1)
        return module.o(attended.transpose(1, 2).flatten(2)), position_bias, None

    def _of_same_rows(self, name: str, x: Tensor) -> Tensor:
        """A linear's output where all candidates' rows are the first one's."""
        base, change = F.linear(x[: len(x) // self._num], getattr(self._module, name).weight).repeat(self._num, 1, 1), self._changes[name]
        return base if change is None else change(x, base)


class _Cross:
    """Attention of [n, U, D] to states [n, T, D], with no key and no value of them made, unless LoRA changes how keys are."""

    def __init__(self, module: Any, place: str, changes: Mapping[str, Change]) -> None:
        self._module, self._plain = module, type(module).forward
        self._has_own_keys, self._values = f"{place}.k" in changes, changes.get(f"{place}.v")

    def __call__(self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **named: Any) -> Any:
        module, states = self._module, named["key_value_states"]
        if named.get("past_key_values") is not None or not self._pays(hidden_states.shape[1], *states.shape[1:]):
            return self._plain(module, hidden_states, mask=mask, position_bias=position_bias, **named)
        (rows, count, width), heads = hidden_states.shape, module.n_heads
        queries = module.q(hidden_states).view(rows, count, heads, -1).transpose(1, 2)
        if self._has_own_keys:
            keys = module.k(states).view(rows, states.shape[1], heads, -1).transpose(1, 2)
            scores = queries @ keys.mT
        else:
            wide = _by_head(queries, module.k.weight.view(heads, -1, width))
            scores = torch.bmm(wide.flatten(1, 2), states.mT).view(rows, heads, count, -1)
        weights = torch.softmax(_hidden(scores, mask), -1)
        mixed = torch.bmm(weights.flatten(1, 2), states).view(rows, heads, count, width)
        attended = _by_head(mixed, module.v.weight.view(heads, -1, width).mT)
        if self._values is not None:
            attended = attended + self._changed(mixed, heads)
        return module.o(attended.transpose(1, 2).flatten(2)), position_bias, None

    def _pays(self, count: int, length: int, width: int) -> bool:
        """Whether `count` queries are few enough. Of one head and side: products with the weights, and with the states or what is made of them."""
        size: int = self._module.key_value_proj_dim
        return _WORTH * count * width * (size + length) <= length * size * (width + count)

    def _changed(self, mixed: Tensor, heads: int) -> Tensor:
        """What LoRA adds to the values: said of all heads' inputs for all heads' outputs, of which each head has its own. [n, H, U, K]."""
        assert self._values is not None
        rows, _, count, width = mixed.shape
        flat = mixed.view(rows, heads * count, width)
        every = self._values(flat, flat.new_zeros(rows, heads * count, self._module.inner_dim)).view(rows, heads, count, heads, -1)
        return torch.diagonal(every, dim1=1, dim2=3).permute(0, 3, 1, 2)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, H, U, I] times each head's own weight [H, I, O], in one batched product a head; returns [n, H, U, O]."""
    rows, heads, count, _ = x.shape
    return torch.bmm(x.transpose(0, 1).flatten(1, 2), weights).view(heads, rows, count, -1).transpose(0, 1)


def _hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [n, H, U, T] with transformers' mask, of booleans (True: is seen) or of numbers to add."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
