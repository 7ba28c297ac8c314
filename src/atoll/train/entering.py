"""What the base makes of each row below the first block that a job changes: made once, kept from epoch to epoch.

No step moves it, so a job that changes only the upper blocks need not run the lower ones again. A row is always run alone, because in a packed batch
its last bits depend on the rows beside it: whether a row was kept, or made again because the memory was full, the job ends with the same bits.

Used by job.py, by plan.py, which measures, and by workflows.many, whose jobs share the room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.data.encode import EncodedRow
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder


class Room:
    """What the jobs of a process keep in all, in bytes."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, num_bytes: int, most: int) -> bool:
        """Take some, where all jobs together then hold no more than `most`; whether that was so."""
        if self.taken + num_bytes > most:
            return False
        self.taken += num_bytes
        return True


class EnteringStates:
    """The residual streams [t, D] float32 that enter block `layer`, first come, first kept.

    They are kept while all that share the room hold up to budget_bytes together; without a room, these alone.
    """

    def __init__(self, decoder: Decoder, layer: int, budget_bytes: int, room: Room | None = None) -> None:
        self._decoder, self._layer = decoder, layer
        self._budget, self._room = budget_bytes, room or Room()
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def of(self, rows: Sequence[EncodedRow], shared: int = 0) -> tuple[int, Tensor]:
        """(layer, [T, D]) of rows packed as train.rows does with a shared beginning, for `Decoder.forward`."""
        states = [self._row(tuple(row.token_ids[:-1])) for row in rows]
        return self._layer, torch.cat([states[0][:shared], *(state[shared:] for state in states)])

    def _row(self, token_ids: tuple[int, ...]) -> Tensor:
        found = self._kept.get(token_ids)
        if found is None:
            found = self._decoder.residual_before(self._layer, PackedBatch.of([token_ids], device=self._decoder.device))
            if self._room.take(found.nbytes, self._budget):
                self._kept[token_ids] = found
        return found

    def forget(self) -> None:
        """Make room for others."""
        self._room.taken -= sum(state.nbytes for state in self._kept.values())
        self._kept.clear()
