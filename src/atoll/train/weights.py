"""The tensors of one training job, LoRA's, ReFT's or both, over one flat vector of float32 masters.

Used by train.loop; `Adapter` in, `Adapter` out. What the forward reads of them: model.apply.AdapterWeights (`update`) and model.batch.EditWeights
(the sides of `parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atoll.config import TrainerConfig
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.apply import Update
from atoll.model.apply_edits import EditedPart
from atoll.model.dora import BaseWeight
from atoll.model.sites import GROUPS, Site
from atoll.train.flat import FlatVector
from atoll.train.lora_masters import Groups, LoraMasters
from atoll.train.reft_masters import ReftMasters
from atoll.train.start import converted


class TrainableAdapter:
    """One adapter's masters. Implements model.apply.AdapterWeights.

    values and grads are flat float32 vectors [P]: LoRA's factors, DoRA's magnitudes, ReFT's W's, then its other tensors, then a classifier's.
    `values.grad` is `grads`, so an optimizer over `[values]` trains the adapter; after its step, `retract` is due. zero_grads and drop_grads are
    FlatVector's.

    groups are the targets of each fused linear. b_ratio: LoRA+'s (Hayou et al. 2024, arXiv 2402.12354), the learning rate of B over that of A; None
    for one rate. weight, which DoRA needs, and removed are those of LoraMasters.
    """

    def __init__(
        self,
        adapter: Adapter,
        linears: Mapping[str, tuple[int, int]],
        device: torch.device | str = "cpu",
        groups: Groups = GROUPS,
        *,
        b_ratio: float | None = None,
        weight: BaseWeight | None = None,
        removed: Mapping[Site, LoraModule] | None = None,
    ) -> None:
        self._b_ratio, self._removed = b_ratio, removed
        self.spec, self._manifest = adapter.spec, adapter.manifest
        self._flat = FlatVector(adapter.num_parameters, device)
        self.values = self._flat.values
        self.zero_grads, self.drop_grads = self._flat.zero_grads, self._flat.drop_grads
        self.dropout_seed: int | None = None  # set by the loop before each training forward; None: no dropout (evaluation)
        self.first_layer = min([site.layer for site in adapter.modules] + [site.layer for site in adapter.edits])
        apart = b_ratio is not None
        self._lora = LoraMasters(adapter, linears, self._flat, groups, apart=apart, weight=weight, removed=removed) if adapter.modules else None
        self._num_lora = self._flat.taken
        self._reft = ReftMasters(adapter, self._flat) if adapter.edits else None
        self._num_adapter = self._flat.taken
        self.head: dict[str, Tensor] = {}
        for name, tensor in adapter.head.items():
            leaf = self.head[name] = self._flat.leaf(*tensor.shape)
            with torch.no_grad():
                leaf.copy_(tensor)

    @property
    def grads(self) -> Tensor:
        """The gradients of `values`, [P] float32, where they exist."""
        return self._flat.grads

    @property
    def has_lora(self) -> bool:
        """Whether it changes any linear; without, `update` is None everywhere."""
        return self._lora is not None

    def update(self, layer: int, group: int) -> Update | None:
        """LoRA's factors at (layer, group); None where it changes nothing."""
        return None if self._lora is None else self._lora.update(layer, group, self.spec.dropout, self.dropout_seed)

    @property
    def parts(self) -> Sequence[EditedPart]:
        """ReFT's parts for one forward, fused from the masters at the time of asking: ask once a forward, and again after each step."""
        return () if self._reft is None else self._reft.parts(self.dropout_seed)

    def retract(self) -> None:
        """After an optimizer step: R's that must have orthonormal rows get them back."""
        if self._reft is not None:
            self._reft.retract()
        self.changed()

    def changed(self) -> None:
        """After `values` have been written, by whomever: what follows from them will be made again."""
        if self._lora is not None:
            self._lora.changed()

    def parameter_groups(self, config: TrainerConfig, *, by_tensor: bool = False) -> list[dict[str, object]]:
        """An optimizer's groups: slices of the vector, in its order, that differ in learning rate or weight decay.

        Only LoRA's factors, a classifier and ReFT's W decay. LoRA+'s rate is for B and for magnitudes, as in PEFT. Each group has its "lr" and its
        "share" of config.learning_rate, by which schedules scale. Beside a LoRA, ReFT has a rate of its own. by_tensor: each of the adapter's tensors
        in its own shape instead, A and B of every site apart.
        """
        size, share = self._num_adapter, 1.0
        wanted: list[tuple[int, int, float, float]] = []
        if self._lora is not None:
            of_b, first_b = self._b_ratio or 1.0, self._lora.first_b if self._b_ratio is not None else 0
            wanted += [(0, first_b, share, config.weight_decay), (first_b, self._lora.first_magnitude, of_b, config.weight_decay)]
            wanted += [(self._lora.first_magnitude, self._num_lora, of_b, 0.0)]
        if self._reft is not None:
            share = config.reft_learning_rate / config.learning_rate if self.has_lora else 1.0
            wanted += [(self._num_lora, self._reft.first_kept, share, config.reft_weight_decay), (self._reft.first_kept, size, share, 0.0)]
        wanted.append((size, self.values.numel(), 1.0, config.weight_decay))  # a classifier head learns as LoRA does
        merged: list[tuple[int, int, float, float]] = []
        for start, stop, *settings in wanted:
            if stop == start:
                continue
            if merged and merged[-1][2:] == tuple(settings):
                merged[-1] = (merged[-1][0], stop, *merged[-1][2:])
            else:
                merged.append((start, stop, settings[0], settings[1]))
        views = [*(self._lora.tensors() if self._lora else ()), *(self._reft.tensors() if self._reft else ())] if by_tensor else []

        def parameters(start: int, stop: int) -> list[torch.nn.Parameter]:
            return self._flat.parameters_of(views, start, stop) if by_tensor else [self._flat.part(start, stop)]

        return [
            {"params": parameters(start, stop), "lr": config.learning_rate * share, "share": share, "weight_decay": decay}
            for start, stop, share, decay in merged
        ]

    def adapter(self, values: Tensor | None = None) -> Adapter:
        """A copy of the tensors as they are now, or as they were in `values` [P] (the best step's)."""
        modules = {} if self._lora is None else self._lora.modules(values)
        edits = {} if self._reft is None else self._reft.edits(values)
        head = {name: self._flat.copy_of(leaf, values) for name, leaf in self.head.items()}
        found = Adapter(self.spec, modules, self._manifest, edits, head)
        return found if self._removed is None else converted(found, {site: self._removed[site] for site in modules})
