"""Atoll's trainer on LoRA, as a contestant of the training bench: one job, or several at once."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol import run_worker


class AtollTraining:
    """One epoch over given rows from fresh factors, whenever asked."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from atoll.model.base import load_base

        torch.set_num_threads(options["threads"])
        self._options, self._decoder = options, load_base(options["base"]).decoder

    def details(self) -> dict[str, Any]:
        from atoll.model.kernels.training import training_ops

        return {"dtype": str(self._decoder.dtype), "compiled": training_ops(self._decoder.embedding) is not None}

    def train(self, rows: list[dict[str, Any]], batch: int) -> dict[str, Any]:
        """Seconds of an epoch, and the loss of each step."""
        seconds, losses = self._run([rows], batch, at_once=1)
        return {"seconds": seconds, "losses": losses[0]}

    def jobs(self, rows: list[list[dict[str, Any]]], batch: int, at_once: int) -> dict[str, Any]:
        """Seconds of one epoch of every job, `at_once` of them together; and the most memory that this process has ever held, in bytes."""
        seconds, losses = self._run(rows, batch, at_once)
        return {"seconds": seconds, "losses": [job[-1] for job in losses], "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def _run(self, jobs: list[list[dict[str, Any]]], batch: int, at_once: int) -> tuple[float, list[list[float]]]:
        import torch

        from atoll.config import TrainerConfig
        from atoll.data.encode import EncodedRow
        from atoll.model.adapter import AdapterSpec, new_adapter
        from atoll.train.job import TrainingJob
        from atoll.train.log import LOG_FILE
        from atoll.train.loop import train_jobs

        options, shape = self._options, self._decoder.shape
        config = TrainerConfig(
            epochs=1, batch_size=batch, learning_rate=options["learning_rate"], schedule="constant", warmup_fraction=0, checkpoint_every=None
        )

        def job(rows: list[dict[str, Any]], folder: Path) -> TrainingJob:
            start = new_adapter(
                AdapterSpec("", options["rank"], 2.0 * options["rank"]), shape.linears, shape.num_layers, torch.Generator().manual_seed(0)
            )
            encoded = [EncodedRow(row["ids"], row["num_prompt"], "") for row in rows]
            return TrainingJob(self._decoder, start, encoded, [], config, folder, "bench")

        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(number) for number in range(len(jobs))]
            failed: list[Exception] = []  # of what ends well nothing is kept: whoever trains writes an adapter to its folder and lets go of it

            def ended(index: int, outcome: Any) -> None:
                if isinstance(outcome, Exception):
                    failed.append(outcome)

            started = time.perf_counter()
            train_jobs([lambda n=n: job(jobs[n], folders[n]) for n in range(len(jobs))], ended, at_once=at_once)
            seconds = time.perf_counter() - started
            if failed:
                raise failed[0]
            losses = [[line["loss"] for line in map(json.loads, (path / LOG_FILE).read_text().splitlines())] for path in folders]
        return seconds, losses


if __name__ == "__main__":
    run_worker(AtollTraining)
