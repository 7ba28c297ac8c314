"""The resident adapters: preallocated stacks by rank bucket, read in place by every step.

An adapter of rank 12 stands in the bucket of 16, padded with zeros, scaling folded into B in float32 before rounding. Each bucket holds one stack a
site group: A [slots, R, d_in] and, a member, B [slots, r, d_out]. Prefill takes views of one slot (no copy); decode gathers the rows' slots for one
batched product. A stack grows by doubling; a slot is freed by forgetting it. ReFT edits are small: a slot has its own, fused, beside the stacks, and
an adapter without LoRA modules stands in no stack at all.

Used by the engine's pool, which decides who stays. Buckets are powers of two from 8, so padding costs at most a factor of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.model.adapter import Adapter
from atoll.model.apply import BankRows, Part, Update
from atoll.model.apply_edits import EditedPart, edited_parts
from atoll.model.dora import BaseWeight, gains
from atoll.model.reft import fused_bytes
from atoll.model.sites import GROUPS, Site

_SMALLEST_BUCKET = 8
_NO_BUCKET = 0  # of an adapter without LoRA modules


def bucket_of(rank: int) -> int:
    """The padded rank: the next power of two, at least 8."""
    return max(_SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Slot:
    """One resident adapter's place. As AdapterWeights it gives views into the bank for a segment of tokens; `parts` are its fused ReFT edits."""

    bank: LoraBank
    bucket: int
    index: int
    groups: frozenset[int]
    parts: tuple[EditedPart, ...] = field(default=(), compare=False, repr=False)
    gains: Mapping[Site, Tensor] = field(default_factory=dict, compare=False, repr=False)  # DoRA's, see model.dora
    head: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def gathers(self) -> bool:
        """Whether its rows may stand among those of `LoraBank.rows`, which add updates and scale nothing."""
        return not self.gains

    def update(self, layer: int, group: int) -> Update | None:
        if group not in self.groups:
            return None
        stack = self.bank.stack(self.bucket)
        known = stack.updates.get((self.index, layer, group))
        if known is not None:
            return known
        parts = tuple(
            Part(i * self.bucket, (i + 1) * self.bucket, start, stop, b[self.index], 1.0, self.gains.get(Site(layer, self.bank.groups[group][i])))
            for i, (start, stop, b) in enumerate(stack.members(layer, group))
        )
        update = stack.updates[self.index, layer, group] = Update(stack.a[layer][group][self.index], parts)
        return update


@dataclass
class _Stack:
    """One bucket's tensors. targets[group] are a group's members; a[layer][group] is [capacity, members * rank, d_in]; b[layer][target] is

    [capacity, rank, d_out].
    """

    rank: int
    capacity: int
    targets: Sequence[Sequence[str]]
    a: list[list[Tensor]]
    b: list[dict[str, Tensor]]
    free: list[int] = field(default_factory=list)
    groups: dict[int, frozenset[int]] = field(default_factory=dict)
    updates: dict[tuple[int, int, int], Update] = field(default_factory=dict)  # views by (slot, layer, group); dropped when the stack grows

    def members(self, layer: int, group: int) -> list[tuple[int, int, Tensor]]:
        """(out_start, out_stop, b) of each member of a group, in fused order."""
        out, start = [], 0
        for target in self.targets[group]:
            b = self.b[layer][target]
            out.append((start, start + b.shape[2], b))
            start += b.shape[2]
        return out


class LoraBank:
    """Stacks for every rank bucket in use. shapes maps a target to its linear's (d_out, d_in); groups are the targets that share an input; weight

    gives the base's linears, which DoRA needs.

    gathers: single-token rows of several adapters are best given as `rows`; a bank that says False wants a segment for every group of neighbours.
    """

    gathers = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        groups: Sequence[Sequence[str]] = GROUPS,
        weight: BaseWeight | None = None,
    ) -> None:
        self.groups, self._weight = groups, weight
        self.shapes, self.num_layers, self.dtype, self.device = dict(shapes), num_layers, dtype, device
        self._stacks: dict[int, _Stack] = {}
        self._stackless: set[int] = set()  # indices of the slots without LoRA modules
        self._next_stackless = 0

    def stack(self, bucket: int) -> _Stack:
        return self._stacks[bucket]

    def slot_bytes(self, adapter: Adapter) -> int:
        """Bytes that an adapter takes in the bank: its bucket's padded factors at every site of the base, its fused edits and its classifier."""
        edits = sum(fused_bytes(adapter.spec.reft[site.part], found) for site, found in adapter.edits.items())
        edits += sum(tensor.numel() for tensor in adapter.head.values()) * self.dtype.itemsize
        if not adapter.modules:
            return edits
        per_layer = sum(d_out for d_out, _ in self.shapes.values()) + sum(len(g) * self.shapes[g[0]][1] for g in self.groups)
        scales = sum(4 * module.b.shape[0] for module in adapter.modules.values() if module.magnitude is not None)
        return bucket_of(adapter.max_rank) * per_layer * self.num_layers * self.dtype.itemsize + edits + scales

    def pack(self, adapter: Adapter) -> None:
        """None: copying into a stack is all that there is to do, and no other thread may do it."""
        return None

    def load(self, adapter: Adapter, packed: None = None) -> Slot:
        """Copy an adapter's factors into a free slot and fuse its edits. Raises BaseMismatch where they do not fit the base."""
        adapter.check_fits(self.shapes, self.num_layers)
        parts = edited_parts(adapter, self.device)
        if not adapter.modules:
            self._next_stackless += 1
            self._stackless.add(self._next_stackless)
            return Slot(self, _NO_BUCKET, self._next_stackless, frozenset(), parts)
        bucket = bucket_of(adapter.max_rank)
        if bucket not in self._stacks:
            self._stacks[bucket] = self._new_stack(bucket)
        stack = self._stacks[bucket]
        if not stack.free:
            self._grow(stack)
        index = stack.free.pop()
        used: set[int] = set()
        for layer in range(self.num_layers):
            for group, targets in enumerate(self.groups):
                for member, target in enumerate(targets):
                    a = stack.a[layer][group][index, member * bucket : (member + 1) * bucket]
                    b = stack.b[layer][target][index]
                    a.zero_()
                    b.zero_()
                    module = adapter.modules.get(Site(layer, target))
                    if module is not None:
                        a[: module.rank].copy_(module.a)
                        b[: module.rank].copy_((module.b.float() * module.scaling).T)
                        used.add(group)
        found = {site: gain.to(self.device) for site, gain in gains(adapter, self._weight).items()}
        head = {name: tensor.to(self.device, self.dtype) for name, tensor in adapter.head.items()}
        slot = Slot(self, bucket, index, frozenset(used), parts, found, head)
        stack.groups[index] = slot.groups
        return slot

    def unload(self, slot: Slot) -> None:
        """Free a slot. The caller makes sure that no running row uses it."""
        if slot.bucket == _NO_BUCKET and slot.index in self._stackless:
            self._stackless.remove(slot.index)
            return
        stack = self._stacks.get(slot.bucket)
        if stack is None or slot.index not in stack.groups:
            raise AssertionError(f"slot {slot.index} of bucket {slot.bucket} is freed twice")
        del stack.groups[slot.index]
        stack.free.append(slot.index)
        if not stack.groups:
            del self._stacks[slot.bucket]  # an empty bucket gives its memory back

    def rows(self, tokens: Sequence[int], slots: Sequence[Slot]) -> BankRows:
        """Decode rows for `AdapterBatch.bank_rows`: token tokens[i] of the packed batch uses slots[i]; grouped by bucket here.

        Slots without LoRA modules have nothing to add and are left out.
        """
        by_bucket: dict[int, list[tuple[int, Slot]]] = {}
        for token, slot in zip(tokens, slots, strict=True):
            if slot.bucket != _NO_BUCKET:
                by_bucket.setdefault(slot.bucket, []).append((token, slot))
        return BankRows(tuple(_Rows(self._stacks[bucket], pairs, self.device) for bucket, pairs in sorted(by_bucket.items())))

    def _new_stack(self, bucket: int) -> _Stack:
        a = [
            [torch.zeros(0, len(g) * bucket, self.shapes[g[0]][1], dtype=self.dtype, device=self.device) for g in self.groups]
            for _ in range(self.num_layers)
        ]
        b = [
            {t: torch.zeros(0, bucket, d_out, dtype=self.dtype, device=self.device) for t, (d_out, _) in self.shapes.items()}
            for _ in range(self.num_layers)
        ]
        return _Stack(bucket, 0, self.groups, a, b)

    def _grow(self, stack: _Stack) -> None:
        """Double a stack (from 0 to 4). Old slots keep their index; views handed out for a step are not kept beyond it."""
        capacity = max(4, 2 * stack.capacity)

        def larger(old: Tensor) -> Tensor:
            new = torch.zeros(capacity, *old.shape[1:], dtype=old.dtype, device=old.device)
            new[: stack.capacity] = old
            return new

        for layer in range(self.num_layers):
            stack.a[layer] = [larger(a) for a in stack.a[layer]]
            stack.b[layer] = {target: larger(b) for target, b in stack.b[layer].items()}
        stack.updates.clear()
        stack.free.extend(range(capacity - 1, stack.capacity - 1, -1))
        stack.capacity = capacity


class _Rows:
    """One bucket's decode rows: gathers their factors for a site. Implements apply.BucketRows."""

    def __init__(self, stack: _Stack, pairs: list[tuple[int, Slot]], device: torch.device | str) -> None:
        self._stack = stack
        self.tokens = torch.tensor([token for token, _ in pairs], dtype=torch.int64, device=device)
        self._index = torch.tensor([slot.index for _, slot in pairs], dtype=torch.int64, device=device)
        self._groups = frozenset().union(*(slot.groups for _, slot in pairs))

    def gathered(self, layer: int, group: int) -> tuple[Tensor, tuple[tuple[int, int, int, int, Tensor], ...]] | None:
        if group not in self._groups:
            return None
        rank = self._stack.rank
        parts = tuple(
            (i * rank, (i + 1) * rank, start, stop, b.index_select(0, self._index))
            for i, (start, stop, b) in enumerate(self._stack.members(layer, group))
        )
        return self._stack.a[layer][group].index_select(0, self._index), parts
