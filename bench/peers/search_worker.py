"""Atoll's LoraHub functions on an encoder-decoder base, as a contestant of the compose bench."""

from __future__ import annotations

import time
from typing import Any

from protocol import run_worker

ROUNDING = 0.005  # of a loss of ten nats, between a bfloat16 search and its result in float32


class _Watched:
    """Scores that know the lowest mean over all examples that any candidate had."""

    def __init__(self, scores: Any) -> None:
        self._scores, self._seen, self.lowest = scores, dict[int, float](), float("inf")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scores, name)

    def scores(self, weights: Any, examples: Any) -> Any:
        """One candidate's examples may come in portions."""
        found = self._scores.scores(weights, examples)
        self._seen |= dict(zip(examples, found.detach()[0].tolist(), strict=True))
        if len(self._seen) == self._scores.num_examples:
            self.lowest = min(self.lowest, sum(self._seen.values()) / len(self._seen))
            self._seen.clear()
        return found


class SearchContestant:
    """One job (base, modules, examples). Losses are means over all label tokens, as lorahub's worker gives them."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from atoll.model.memory import keep_freed_memory

        torch.set_num_threads(options["threads"])
        keep_freed_memory()  # as every search does
        self._options = options

    def details(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {name: version(name) for name in ("atoll", "transformers", "torch")}

    def evaluate(self, candidates: list[list[float]], form: str, dtype: str) -> dict[str, Any]:
        """evaluation_s of the candidates [P, N] scored together, with the base and the modules in memory already; and their losses."""
        import torch

        learner = self._learner(form, dtype)
        scores, weights = learner.scores(None), torch.tensor(candidates)
        scores.scores(weights[:1], range(scores.num_examples))  # what is kept for all candidates is made
        started = time.perf_counter()
        found = scores.scores(weights, range(scores.num_examples))
        seconds = time.perf_counter() - started
        share = torch.tensor([float(sum(label != -100 for label in row["labels"])) for row in learner.dataset])
        return {"evaluation_s": seconds / len(weights), "losses": (found @ (share / share.sum())).tolist()}

    def learn(self, steps: int, form: str, dtype: str) -> dict[str, Any]:
        """seconds of lorahub_learning with its default method, and the result's loss."""
        from atoll.lorahub import lorahub_learning

        options = self._options
        started = time.perf_counter()
        weights, model, tokenizer = lorahub_learning(options["modules"], options["inputs"], options["outputs"], steps, form=form, dtype=dtype)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "weights": [float(weight) for weight in weights], "loss": self._loss(model, tokenizer)}

    def reach(self, target: float, steps: int, form: str, dtype: str) -> dict[str, Any]:
        """seconds from the modules' names to the merged model, the search ended as soon as a candidate's loss is at or below target.

        The same stages as lorahub_learning with its default method and so many steps; loading base and modules is part of it. reached: whether the
        model that it ends with, the best by loss and regulariser, has that loss.
        """
        from atoll.compose.objective import Objective, l1
        from atoll.compose.run import GRADIENT_COST, Settings
        from atoll.compose.search import search
        from atoll.lorahub.algorithm import BOUNDS
        from atoll.lorahub.objective import STRENGTH

        started = time.perf_counter()
        learner = self._learner(form, dtype)
        scores = _Watched(learner.scores(None))
        found = search(
            Objective(scores, l1(STRENGTH)),
            learner.num,
            "gradient",
            budget=GRADIENT_COST * steps,
            seed=42,
            settings=Settings(bounds=BOUNDS),
            stop_asked=lambda: scores.lowest <= target,
        )
        model, tokenizer = learner.finish(learner.composed(found.weights), {}, None)
        seconds = time.perf_counter() - started
        loss = self._loss(model, tokenizer)
        return {"seconds": seconds, "search_s": found.seconds, "evaluations": found.evaluations, "reached": loss <= target + ROUNDING, "loss": loss}

    def _learner(self, form: str, dtype: str) -> Any:
        """What lorahub_learning makes before it searches."""
        from atoll.lorahub.modules import base_of, find_modules
        from atoll.lorahub.pairs import PairLearner
        from atoll.model.generic import load_encoder_decoder

        options = self._options
        modules = find_modules(options["modules"])
        base = load_encoder_decoder(base_of(modules), dtype=dtype)
        return PairLearner(base, modules, options["inputs"], options["outputs"], form)

    def _loss(self, model: Any, tokenizer: Any) -> float:
        """A merged model's loss, in float32, by lorahub's definition."""
        from atoll.lorahub import default_get_loss
        from atoll.lorahub.examples import encode_pairs

        dataset = encode_pairs(tokenizer, self._options["inputs"], self._options["outputs"])
        return len(dataset) * default_get_loss(dataset, model.float(), None)


if __name__ == "__main__":
    run_worker(SearchContestant)
