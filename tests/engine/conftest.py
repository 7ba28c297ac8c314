"""What the engine's tests share: a tiny base, adapters of several ranks and targets, a reference without cache or batch.

The base is in float32, unless a module runs for both forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import adapters as toys
from tests.engine.forwards import DTYPES

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.bank import LoraBank
from atoll.model.base import Base, load_base
from atoll.model.batch import BASE_ONLY, AdapterBatch, EditRows, PackedBatch
from atoll.model.kernels.decoder import compiled
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.sites import TARGETS, Site

MakeAdapter = Callable[..., Adapter]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These products are too small to share: threads that wait for one another cost more than they bring, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bases(tiny_base_dir: Path, kernel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny Llama as a forward ("plain", "native") needs it, loaded and compiled once."""

    @functools.cache
    def get(forward: str) -> Base:
        found = load_base(str(tiny_base_dir), dtype=DTYPES[forward], home=tmp_path_factory.mktemp("engine-home"))
        if forward == "native":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ATOLL_HOME", str(kernel_folder.parent))
                assert compiled(found.decoder) is not None
        return found

    return get


@pytest.fixture(scope="module")
def forward(request: pytest.FixtureRequest) -> str:
    """Which forward the engines of this module run on: see forwards.py."""
    return str(getattr(request, "param", "plain"))


@pytest.fixture(scope="module")
def base(bases: Callable[[str], Base], forward: str) -> Base:
    """The tiny Llama."""
    return bases(forward)


def random_adapter(base: Base, rank: int, targets: Sequence[str] = TARGETS, seed: int = 0, size: float = 0.3) -> Adapter:
    """A LoRA with both factors random, strong enough to change what the base says."""
    generator = torch.Generator().manual_seed(seed)
    spec = AdapterSpec(base=base.name, rank=rank, alpha=2.0 * rank, target_modules=tuple(targets))
    shapes = base.decoder.shape.linears
    modules = {}
    for layer in range(base.decoder.shape.num_layers):
        for target in targets:
            d_out, d_in = shapes[target]
            a = torch.randn(rank, d_in, generator=generator) * size
            b = torch.randn(d_out, rank, generator=generator) * size / rank
            modules[Site(layer, target)] = LoraModule(a, b, 2.0)
    return Adapter(spec, modules)


@pytest.fixture(scope="session")
def make_adapter(bases: Callable[[str], Base]) -> MakeAdapter:
    """random_adapter over the tiny base."""
    base = bases("plain")

    def make(rank: int, targets: Sequence[str] = TARGETS, seed: int = 0, size: float = 0.3) -> Adapter:
        return random_adapter(base, rank, targets, seed, size)

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: MakeAdapter) -> dict[str, Adapter]:
    """Ranks 4, 8 and 16 at different targets: the mixture that every batching test uses."""
    return {
        "r4": make_adapter(4, ("q_proj", "v_proj"), seed=1),
        "r8": make_adapter(8, TARGETS, seed=2, size=0.2),
        "r16": make_adapter(16, ("o_proj", "gate_proj", "down_proj"), seed=3),
        "r8-too": make_adapter(8, ("k_proj", "up_proj"), seed=4),
    }


@pytest.fixture(scope="session")
def make_reft(bases: Callable[[str], Base]) -> Callable[..., Adapter]:
    """A ReFT adapter over the tiny base, one part a spec, strong enough to change what the base says; with targets, LoRA modules of that rank too."""
    decoder = bases("plain").decoder

    def make(*parts: ReftSpec, targets: Sequence[str] = (), rank: int = 4, seed: int = 0) -> Adapter:
        rank = rank if targets else max(part.rank for part in parts)
        return toys.random_adapter(decoder, rank, seed, alpha=float(rank), target_modules=tuple(targets), reft=parts)

    return make


@pytest.fixture(scope="session")
def reft_adapters(make_reft: Callable[..., Adapter]) -> dict[str, Adapter]:
    """Every kind of positions; ranks, methods, layers and components that differ; LoRA beside edits; several parts."""
    return {
        "ends": make_reft(ReftSpec(rank=4), seed=11),
        "untied": make_reft(ReftSpec("noreft", 8, positions=Positions.parse("f3+l5"), tied=False, bias=True, rank_pattern={1: 2}), seed=12),
        "suffix": make_reft(ReftSpec("direft", 2, layers=(0, 2), positions=Positions.parse("l4")), seed=13),
        "all": make_reft(ReftSpec("direft", 4, positions=Positions.parse("all_prompt"), component="mlp_output", activation="silu"), seed=14),
        "listed": make_reft(ReftSpec("orthogonal_direft", 4, positions=Positions.parse([0, 7, 33, -1, -36]), component="block_input"), seed=15),
        "lora+reft": make_reft(ReftSpec(rank=4, positions=Positions.parse("f2+l9")), targets=("q_proj", "v_proj", "down_proj"), rank=8, seed=16),
        "parts": make_reft(
            ReftSpec(rank=4, positions=Positions.parse("l3")),
            ReftSpec("lobireft", 2, layers=(1,), positions=Positions.parse([1, -2]), component="attention_output"),
            seed=17,
        ),
    }


@pytest.fixture
def make_reft_engine(make_engine: Callable[..., Engine], reft_adapters: dict[str, Adapter]) -> Callable[..., Engine]:
    """make_engine with those adapters registered too."""

    def make(**settings: Any) -> Engine:
        engine = make_engine(**settings)
        for key, adapter in reft_adapters.items():
            engine.register(key, adapter)
        return engine

    return make


@pytest.fixture
def make_engine(base: Base, forward: str, adapters: dict[str, Adapter]) -> Callable[..., Engine]:
    """An engine over the tiny base with the four adapters registered; keywords are EngineConfig's."""

    def make(**settings: Any) -> Engine:
        engine = Engine(base, EngineConfig(**{"kernel": forward, **settings}))
        for key, adapter in adapters.items():
            engine.register(key, adapter)
        return engine

    return make


@pytest.fixture(scope="module")
def reference_logits(base: Base) -> Callable[..., torch.Tensor]:
    """Logits [T, V] of one token list with one adapter: one row, no cache, no engine. Of its tokens num_prompt are the prompt (None: all)."""

    def logits(tokens: Sequence[int], adapter: Adapter | None = None, num_prompt: int | None = None) -> torch.Tensor:
        decoder = base.decoder
        with torch.inference_mode():
            use = used_by(base, adapter, len(tokens), num_prompt if num_prompt is not None else len(tokens))
            return decoder.logits(decoder.forward(PackedBatch.of([tokens]), use))

    return logits


def used_by(base: Base, adapter: Adapter | None, num_tokens: int, num_prompt: int) -> AdapterBatch:
    """The adapter of a batch of one row without a cache."""
    if adapter is None:
        return BASE_ONLY
    slot = LoraBank(base.decoder.shape.linears, base.decoder.shape.num_layers, base.decoder.dtype).load(adapter)
    edits = [
        EditRows(torch.tensor(list(places)), weights)
        for part in slot.parts
        for places, weights in zip(part.positions.resolve(num_prompt), part.sides, strict=True)
        if places
    ]
    return replace(AdapterBatch.single(slot, num_tokens), edits=tuple(edits))


@pytest.fixture(scope="module")
def reference_greedy(base: Base, forward: str, reference_logits: Callable[..., torch.Tensor]) -> Callable[..., list[int]]:
    """Greedy tokens by running the whole text again for every token; of the compiled forward, by running the request alone."""

    def alone(prompt: Sequence[int], num_tokens: int, adapter: Adapter | None = None) -> list[int]:
        engine = Engine(base, EngineConfig(kernel="native", reuse_prefixes=False))
        if adapter is not None:
            engine.register("alone", adapter)
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        [completion] = engine.generate([Request(prompt, "alone" if adapter is not None else None, sampling)])
        return list(completion.token_ids)

    def greedy(prompt: Sequence[int], num_tokens: int, adapter: Adapter | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(reference_logits(tokens, adapter, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]

    return greedy if forward == "plain" else alone
