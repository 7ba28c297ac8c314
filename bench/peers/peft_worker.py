"""transformers' generate, alone ("peft": false) or with PEFT's mixed batch over every adapter, as a contestant of the serving bench."""

from __future__ import annotations

import time
from typing import Any

from protocol import run_worker, stream_times, timed_batch


class PeftContestant:
    """The base in bfloat16, eager, with scaled-dot-product attention: transformers' defaults on a CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(options["base"], dtype=torch.bfloat16)
        self._names: dict[str | None, str] = {None: "__base__"}  # PEFT's own word for a row without an adapter
        if options["peft"]:
            self._add_adapters(options["adapters"])
        self._model.eval()

    def details(self) -> dict[str, Any]:
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}

    def batch(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]:
        names = {"adapter_names": [self._names[adapter] for adapter in adapters]} if len(self._names) > 1 else {}
        return timed_batch(lambda: self._generate(prompts, new_tokens, **names), new_tokens)

    def stream(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        clock = _Clock()
        started = time.perf_counter()
        self._generate([prompt], new_tokens, streamer=clock)
        return stream_times(started, clock.moments[1:])  # the first call brings the prompt

    def _add_adapters(self, folders: list[str]) -> None:
        from peft import PeftModel

        self._names |= {folder: f"a{number}" for number, folder in enumerate(folders)}
        self._model = PeftModel.from_pretrained(self._model, folders[0], adapter_name=self._names[folders[0]])
        for folder in folders[1:]:
            self._model.load_adapter(folder, adapter_name=self._names[folder])

    def _generate(self, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers


class _Clock:
    """A streamer that only notes when tokens come."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None: ...


if __name__ == "__main__":
    run_worker(PeftContestant)
