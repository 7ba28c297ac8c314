"""DoRA adapters in the engine: rows of them stand beside plain ones and the base, in prefill and decode, and answer as they do alone."""

from __future__ import annotations

from dataclasses import replace

from tests import adapters as toys
from tests.engine.forwards import both_forwards

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams
from atoll.model.adapter import Adapter
from atoll.model.base import Base


@both_forwards
def test_rows_with_dora_beside_others_answer_as_alone(base: Base, forward: str, built_kernels: None) -> None:
    """More adapters than get a segment each: gathered rows add updates, and cannot scale the base's product."""
    found: dict[str, Adapter] = {f"dora{seed}": toys.random_adapter(base.decoder, 4 * seed, seed, use_dora=True) for seed in (1, 2)}
    for seed in (3, 4):
        found[f"lora{seed}"] = toys.random_adapter(base.decoder, 8, seed)
    half = found["dora1"]
    found["half"] = replace(half, modules={s: replace(m, magnitude=m.magnitude * 0.5) for s, m in half.modules.items() if m.magnitude is not None})
    engine = Engine(base, EngineConfig(max_rows=8, max_row_tokens=64, kernel=forward))
    for key, adapter in found.items():
        engine.register(key, adapter)
    requests = [Request((5, 9, 30 + i), key, SamplingParams(max_new_tokens=8, ignore_eos=True)) for i, key in enumerate((None, *found))]
    requests += [Request((5, 9, 30), key, SamplingParams(max_new_tokens=8, ignore_eos=True)) for key in ("dora1", "half")]
    together = engine.generate(requests)
    for request, completion in zip(requests, together, strict=True):
        assert completion.token_ids == engine.generate([request])[0].token_ids
    assert together[-1].token_ids != together[-2].token_ids, "magnitudes changed nothing, so nothing was tested"
    engine.check()
