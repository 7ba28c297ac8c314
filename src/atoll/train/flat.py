"""One flat float32 vector for everything a job trains, and one for its gradients, cut into leaves.

Every tensor that is trained is a leaf whose storage is a slice of the one vector, and its gradient a slice of the other, so the optimizer, clipping
and checkpoints are single operations on two vectors instead of a walk over hundreds of small tensors. Between steps the gradients need not exist.

Used by weights.py and the two kinds of masters, lora_masters.py and reft_masters.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FlatVector:
    """`values` and `grads`, both [P] float32. `values.grad` is `grads`, so an optimizer over `[values]` trains every leaf.

    drop_grads gives the memory of `grads` back, zero_grads takes it again; every view of it, a leaf's too, stays one.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.values = torch.nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self._grads = torch.zeros_like(self.values)
        self.values.grad = self._grads
        self.taken = 0

    @property
    def grads(self) -> Tensor:
        """The gradients, where they exist."""
        assert self._grads.untyped_storage().nbytes(), "the gradients were dropped"
        return self._grads

    def zero_grads(self) -> None:
        """Gradients that exist, and are zero."""
        if not self._grads.untyped_storage().nbytes():
            self._grads.untyped_storage().resize_(self._grads.numel() * self._grads.element_size())
        self._grads.zero_()

    def drop_grads(self) -> None:
        """No gradients, until the next zero_grads; on a device whose storages torch cannot resize (MPS) they stay."""
        if self._grads.device.type in ("cpu", "cuda"):
            self._grads.untyped_storage().resize_(0)

    def leaf(self, *shape: int) -> Tensor:
        """The next `shape` elements, as a leaf that accumulates into its slice of `grads`."""
        start, self.taken = self.taken, self.taken + int(torch.Size(shape).numel())
        assert self.taken <= self.values.numel(), "the vector is shorter than its leaves"
        leaf = self.values.detach()[start : self.taken].view(shape).requires_grad_()
        leaf.grad = self.grads[start : self.taken].view(shape)
        return leaf

    def part(self, start: int, stop: int) -> torch.nn.Parameter:
        """Elements start to stop as a parameter of an optimizer, with their slice of `grads`; all of them: `values` itself."""
        if (start, stop) == (0, self.values.numel()):
            return self.values
        part = torch.nn.Parameter(self.values.detach()[start:stop])
        part.grad = self.grads[start:stop]
        return part

    def parameters_of(self, views: Iterable[Tensor], start: int, stop: int) -> list[torch.nn.Parameter]:
        """The views of leaves that lie in elements start to stop, in order and in their shapes, as an optimizer's parameters; together the slice."""
        found = []
        for view in sorted(views, key=lambda view: view.storage_offset()):
            first = view.storage_offset() - self.values.storage_offset()
            if start <= first < stop:
                found.append(torch.nn.Parameter(view.detach()))
                found[-1].grad = self.grads[first : first + view.numel()].view(view.shape)
        assert sum(parameter.numel() for parameter in found) == stop - start, "the views are not all of the slice"
        return found

    def copy_of(self, leaf: Tensor, values: Tensor | None = None) -> Tensor:
        """A copy of what a leaf, or a view of one, holds now, or held when `values` [P] (the best step's) was copied."""
        if values is None:
            return leaf.detach().clone()
        start = leaf.storage_offset() - self.values.storage_offset()
        return values.as_strided(leaf.shape, leaf.stride(), values.storage_offset() + start).clone()
