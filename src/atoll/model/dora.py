"""DoRA (Liu et al. 2024, arXiv 2402.09353): a LoRA whose rows are scaled to trained lengths, W' = m (W + s B A) / ‖W + s B A‖ by rows of the output.

The one idea: at inference m / ‖W + s B A‖ is one number an output, made once when the adapter is loaded (`gains`); the forward multiplies by it.
While training the lengths change at every step; `NormsOfJob` has them from the lengths of W's rows and two thin products, without the sum W + s B A.

Used by the banks (serving) and train/lora_masters.py. Where it is applied: apply.py and kernels/adapter.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoll.errors import RequestRefused
from atoll.model.sites import Site

if TYPE_CHECKING:
    from atoll.model.adapter import Adapter

BaseWeight = Callable[[Site], Tensor]  # a linear's frozen weight [d_out, d_in]
_CHUNK = 1 << 22  # elements of W + s B A that are made at a time


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ by rows, [d_out] float32. weight [d_out, d_in], a [r, d_in], b [d_out, r], of any dtypes."""
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    rows = max(1, _CHUNK // weight.shape[1])
    pieces = zip(weight.split(rows), b.split(rows), strict=True)
    return torch.cat([torch.addmm(w.float(), piece, a, alpha=scaling).norm(dim=1) for w, piece in pieces])


def gains(adapter: Adapter, weight: BaseWeight | None) -> dict[Site, Tensor]:
    """m / ‖W + s B A‖ [d_out] float32 of every site with a magnitude; 0 where the row is all zeros, and nothing comes out of it anyway."""
    found = {}
    for site, module in adapter.modules.items():
        if module.magnitude is not None:
            assert weight is not None, "a bank that knows no weights was given a DoRA adapter"
            norms = row_norms(weight(site), module.a, module.b, module.scaling).cpu()
            found[site] = torch.where(norms > 0, module.magnitude.detach().float().cpu() / norms, 0.0)
    return found


def refuse_dora(adapters: Sequence[Adapter], what: str, names: Sequence[str] = ()) -> None:
    """Raise RequestRefused where an adapter is DoRA's, whose updates do not add up. names: what to call the adapters."""
    for index, adapter in enumerate(adapters):
        if adapter.spec.use_dora:
            name = repr(names[index]) if names else str(index + 1)
            raise RequestRefused(
                f"{what} cannot take adapter {name}, which is DoRA's: its magnitudes belong to one update alone",
                hint="leave it out, or train that adapter as a plain LoRA",
            )


class NormsOfJob:
    """The lengths of one linear's rows while its A and B are trained.

    ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ for each row w of W and b of B: two products of a few rows instead of one of d_out.
    """

    def __init__(self, weight: Tensor) -> None:
        self._squares = weight.float().square().sum(1)

    @torch.no_grad()
    def of(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """[d_out] float32. a [r, d_in] and b [r, d_out] (B transposed), float32."""
        crossed = (a.to(weight.dtype) @ weight.T).float()  # [r, d_out]
        square = self._squares + (2 * scaling) * (crossed * b).sum(0) + scaling**2 * (b * ((a @ a.T) @ b)).sum(0)
        return square.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()
