"""lorahub 0.1.0 as a contestant of the compose bench. Runs in an environment with lorahub, torch, transformers, peft and nevergrad.

lorahub is called as it is; its own loss and regulariser are passed to it inside functions that write down what they return, and when.
"""

from __future__ import annotations

import time
from typing import Any

from protocol import run_worker


class LorahubContestant:
    """One job (base, modules, examples), learned anew whenever asked."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from lorahub import algorithm

        torch.set_num_threads(options["threads"])
        self._options, self._lorahub = options, algorithm

    def details(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {name: version(name) for name in ("lorahub", "peft", "transformers", "torch", "nevergrad")}

    def learn(self, steps: int) -> dict[str, Any]:
        """seconds of the call; evaluation_s, of an evaluation after the first; the candidates with their losses; and the result's loss.

        Losses are means over all label tokens: lorahub's own loss, which is that mean divided by the number of examples, times their number.
        """
        options, lorahub = self._options, self._lorahub
        moments: list[float] = []
        losses: list[float] = []
        candidates: list[list[float]] = []

        def loss(dataset: Any, model: Any, batch_size: int | None) -> float:
            losses.append(lorahub.default_get_loss(dataset, model, batch_size))
            return losses[-1]

        def regular(weights: Any) -> float:
            candidates.append([float(weight) for weight in weights])
            moments.append(time.perf_counter())
            return float(lorahub.default_l1_regularization(weights))

        started = time.perf_counter()
        weights, model, tokenizer = lorahub.lorahub_learning(
            options["modules"], options["inputs"], options["outputs"], steps, get_loss=loss, get_regular=regular
        )
        seconds = time.perf_counter() - started
        dataset, count = lorahub.load_dataset(options["inputs"], options["outputs"], tokenizer), len(options["inputs"])
        return {
            "seconds": seconds,
            "evaluation_s": (moments[-1] - moments[0]) / max(1, len(moments) - 1),
            "losses": [count * value for value in losses],
            "candidates": candidates,
            "weights": [float(weight) for weight in weights],
            "loss": count * lorahub.default_get_loss(dataset, model, None),
        }


if __name__ == "__main__":
    run_worker(LorahubContestant)
