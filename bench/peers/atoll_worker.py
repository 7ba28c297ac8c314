"""Atoll's engine in this process, as a contestant of the serving bench."""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path
from typing import Any

from protocol import run_worker, stream_times, timed_batch


class AtollContestant:
    """One engine with its default settings and every adapter registered under its folder's name."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from atoll.engine.engine import Engine
        from atoll.model.adapter_files import read_adapter
        from atoll.model.base import load_base

        torch.set_num_threads(options["threads"])
        self._engine = Engine(load_base(options["base"]))
        for folder in options["adapters"]:
            self._engine.register(folder, read_adapter(Path(folder)))
        self._num_cold_loads = 0
        gc.collect()
        gc.freeze()  # as `atoll serve` does: with hundreds of adapters a collection looks at their hundred thousand objects again and again

    def details(self) -> dict[str, Any]:
        return {"kernel": str(getattr(self._engine, "kernel", "plain"))}

    def batch(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]:
        requests = [self._request(prompt, adapter, new_tokens) for prompt, adapter in zip(prompts, adapters, strict=True)]
        completions: list[Any] = []
        for adapter in set(adapters) - {None}:  # resident before the clock starts, as a peer's are after its warm-up; cold_load measures coming in
            self._engine.pin(str(adapter))
            self._engine.unpin(str(adapter))

        def answer() -> list[list[int]]:
            completions.extend(self._engine.generate(requests))
            return [list(completion.token_ids) for completion in completions]

        result = timed_batch(answer, new_tokens)
        if any(completion.num_reused_tokens for completion in completions):
            raise RuntimeError("prompt tokens were reused although every prompt is new")
        return {**result, "texts": [completion.text for completion in completions]}

    def stream(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        request, started = self._request(prompt, None, new_tokens), time.perf_counter()
        return stream_times(started, [time.perf_counter() for event in self._engine.stream(request) if event.token_id is not None])

    def cold_load(self, prompts: list[list[int]], folder: str) -> dict[str, Any]:
        """Milliseconds from an adapter's folder in the page cache to the first token of a prompt for it, and of the next one, with it resident."""
        from atoll.model.adapter_files import read_adapter

        for file in Path(folder).iterdir():
            file.read_bytes()  # into the page cache
        self._first_token(prompts[0], None)  # the processor and the engine are awake, as in a server that has other work
        self._num_cold_loads += 1
        key = f"{folder} {self._num_cold_loads}"  # never seen before
        moments = [time.perf_counter()]
        adapter = read_adapter(Path(folder))
        moments.append(time.perf_counter())
        self._engine.register(key, adapter)
        moments.append(time.perf_counter())
        self._first_token(prompts[1], key)
        moments.append(time.perf_counter())
        self._first_token(prompts[2], key)
        moments.append(time.perf_counter())
        self._engine.unregister(key)
        read, register, first, warm = (1000 * (after - before) for before, after in itertools.pairwise(moments))
        return {"ms": read + register + first, "read_ms": read, "register_ms": register, "first_token_ms": first, "warm_first_token_ms": warm}

    def _first_token(self, prompt: list[int], adapter: str | None) -> None:
        self._engine.generate([self._request(prompt, adapter, 1)])

    @staticmethod
    def _request(prompt: list[int], adapter: str | None, new_tokens: int) -> Any:
        from atoll.engine.request import Request, SamplingParams

        return Request(prompt, adapter=adapter, sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))


if __name__ == "__main__":
    run_worker(AtollContestant)
