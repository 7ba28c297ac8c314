"""Atoll's trainer on LoReFT, as a contestant of the ReFT bench."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol import run_worker, step_times


class AtollTraining:
    """One epoch over the rows from fresh tensors, whenever asked."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from atoll.config import TrainerConfig
        from atoll.data.encode import EncodedRow
        from atoll.model.adapter import AdapterSpec
        from atoll.model.base import load_base
        from atoll.model.positions import Positions
        from atoll.model.reft import ReftSpec

        torch.set_num_threads(options["threads"])
        self._decoder = load_base(options["base"]).decoder
        self._rows = [EncodedRow(row["ids"], row["num_prompt"], "") for row in options["rows"]]
        self._batch = options["batch"]
        part = ReftSpec(rank=options["rank"], positions=Positions.parse(options["positions"]))
        self._spec = AdapterSpec("", part.rank, float(part.rank), target_modules=(), reft=(part,))
        self._config = TrainerConfig(
            epochs=1, batch_size=options["batch"], learning_rate=options["learning_rate"], checkpoint_every=None, logging_every=1
        )

    def details(self) -> dict[str, Any]:
        return {"dtype": str(self._decoder.dtype), "rows": len(self._rows), "tokens": sum(len(row.token_ids) for row in self._rows)}

    def train(self) -> dict[str, Any]:
        import torch

        from atoll.model.adapter import new_adapter
        from atoll.train.job import TrainingJob
        from atoll.train.log import LOG_FILE

        shape, moments = self._decoder.shape, [time.perf_counter()]
        adapter = new_adapter(self._spec, shape.linears, shape.num_layers, torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(self._decoder, adapter, self._rows, [], self._config, Path(folder), "bench")
            job.run(lambda headline, step, total: moments.append(time.perf_counter()))
            losses = [float(line["loss"]) for line in map(json.loads, (Path(folder) / LOG_FILE).read_text().splitlines()) if "loss" in line]
        return step_times(moments, self._batch, losses)


if __name__ == "__main__":
    run_worker(AtollTraining)
