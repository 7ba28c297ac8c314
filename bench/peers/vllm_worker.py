"""vLLM's offline engine, without adapters or with all of them ("lora": true), as a contestant of the serving bench.

Prompts go in as token ids and no text is made of the answers, so nothing but the engine is timed. What its processes need from the environment
(thread binding, size of the KV cache, preloaded libraries) is set by contestants.py before it starts.
"""

from __future__ import annotations

import time
from typing import Any

from protocol import run_worker, stream_times, timed_batch


class VllmContestant:
    """One LLM: bfloat16, room for 64 rows, the whole of W's prompts in one step, no prefix cache (every prompt is new)."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._lora_ids = {folder: number for number, folder in enumerate(options["adapters"], 1)} if options["lora"] else {}
        lora = {"enable_lora": True, "max_loras": len(self._lora_ids), "max_lora_rank": 16, "max_cpu_loras": len(self._lora_ids)}
        self._eager = options["eager"]
        self._llm = LLM(
            options["base"],
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=64,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            enforce_eager=self._eager,
            **(lora if self._lora_ids else {}),
        )
        self._num_streams = 0

    def details(self) -> dict[str, Any]:
        import vllm

        return {"vllm": vllm.__version__, "mode": "eager" if self._eager else "torch.compile", "loras": len(self._lora_ids)}

    def batch(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        loras = [None if folder is None else LoRARequest(folder, self._lora_ids[folder], folder) for folder in adapters] if self._lora_ids else None

        def answer() -> list[list[int]]:
            found = self._llm.generate(inputs, self._sampling(new_tokens), use_tqdm=False, lora_request=loras)
            return [list(output.outputs[0].token_ids) for output in found]

        return timed_batch(answer, new_tokens)

    def stream(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        self._num_streams += 1
        engine, moments, seen = self._llm.llm_engine, [], 0
        started = time.perf_counter()
        engine.add_request(f"stream-{self._num_streams}", {"prompt_token_ids": prompt}, self._sampling(new_tokens))
        while engine.has_unfinished_requests():
            for output in engine.step():
                length = len(output.outputs[0].token_ids)
                moments += [time.perf_counter()] * (length - seen)
                seen = length
        return stream_times(started, moments)

    @staticmethod
    def _sampling(new_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    run_worker(VllmContestant)
