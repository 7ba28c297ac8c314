"""Atoll's batched search on a decoder base, and beside it the loop that everybody would write first, as a contestant of the compose bench."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import run_worker

LABELS = 8  # tokens of a completion; the rest of an example is its prompt


class CandidatesContestant:
    """A base, a pool of adapters and some examples of random tokens in memory."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from atoll.compose.pool import Pool
        from atoll.data.encode import EncodedRow
        from atoll.model.adapter_files import read_adapter
        from atoll.model.base import load_base
        from atoll.model.memory import keep_freed_memory

        torch.set_num_threads(options["threads"])
        keep_freed_memory()  # as every search does
        self._decoder = load_base(options["base"]).decoder
        self._adapters = [read_adapter(Path(folder)) for folder in options["adapters"]]
        self._pool = Pool.of(self._adapters, self._decoder)
        self._rows = [EncodedRow(ids, len(ids) - LABELS, "") for ids in options["rows"]]

    def details(self) -> dict[str, Any]:
        return {"dtype": str(self._decoder.dtype), "adapters": self._pool.num, "pool_mb": self._pool.num_bytes >> 20, "rows": len(self._rows)}

    def batched(self, candidates: list[list[float]], form: str) -> dict[str, Any]:
        """evaluation_s of all candidates [P, N] together, logits at label tokens alone; and each one's mean loss over all label tokens."""
        import torch

        from atoll.compose.losses import losses

        started = time.perf_counter()
        found = losses(self._decoder, self._pool, torch.tensor(candidates), self._rows, form=form)
        seconds = time.perf_counter() - started
        return {"evaluation_s": seconds / len(candidates), "losses": found.mean(1).tolist()}

    def naive(self, candidates: list[list[float]], form: str) -> dict[str, Any]:
        """The same one by one: merge the adapters, load the result into the model, run it, make the logits of every token."""
        import torch
        import torch.nn.functional as F

        from atoll.model import composed
        from atoll.model.batch import AdapterBatch, PackedBatch

        merge = composed.cat if form == "cat" else composed.product
        batch = PackedBatch.of([row.token_ids[:-1] for row in self._rows])
        labels = torch.tensor([token for row in self._rows for token in [*[-100] * (row.first_label - 1), *row.token_ids[row.first_label :]]])
        found = []
        started = time.perf_counter()
        for candidate in candidates:
            slot = self._decoder.new_bank().load(merge(self._adapters, candidate))
            with torch.no_grad():
                hidden = self._decoder.forward(batch, AdapterBatch.single(slot, batch.num_tokens))
                found.append(float(F.cross_entropy(self._decoder.logits(hidden), labels)))
        return {"evaluation_s": (time.perf_counter() - started) / len(candidates), "losses": found}

    def gradient(self) -> dict[str, Any]:
        """step_s of one forward with its backward: the gradient of the loss by all weights."""
        import torch

        from atoll.compose.losses import LabelLosses

        scores, weights = LabelLosses(self._decoder, self._pool, self._rows), torch.full((1, self._pool.num), 1 / self._pool.num, requires_grad=True)
        started = time.perf_counter()
        for portion in scores.portions(range(len(self._rows)), 1):
            scores.scores(weights, portion).sum().backward()
        return {"step_s": time.perf_counter() - started}


if __name__ == "__main__":
    run_worker(CandidatesContestant)
