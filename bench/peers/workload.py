"""What the serving bench asks: 32 requests at once, 128 random prompt tokens each, greedy, over N adapters.

A cell is one kind of measurement. Prompts come from a seed made of round and cell, so they are the same for every contestant in a round and never
asked twice: nobody's prefix cache helps. Adapters are random rank-16 LoRAs on all seven linears in PEFT's file form, written once for all.

Used by serve.py. Figures stand in tokens per second of output, a whole batch from the first prompt to the last token.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REQUESTS, PROMPT_TOKENS, RANK, COLD_RANK = 32, 128, 16, 32
SHORT, LONG = 32, 128  # output tokens
REGISTERED = 256
_FIRST_ORDINARY_TOKEN = 100  # below it stand the special tokens of the bases in use

Action = Literal["batch", "stream", "cold_load"]


@dataclass(frozen=True)
class Cell:
    """One kind of measurement: `num_adapters` adapters over the rows (0: the base), drawn by zipf's law when `zipf`, else in turn."""

    name: str
    new_tokens: int
    num_adapters: int = 0
    zipf: bool = False
    action: Action = "batch"

    def choose_adapters(self, seed: str) -> list[int | None]:
        """The adapter's number for each of the requests."""
        if self.num_adapters == 0:
            return [None] * REQUESTS
        if not self.zipf:
            return [row % self.num_adapters for row in range(REQUESTS)]
        weights = [1 / rank for rank in range(1, self.num_adapters + 1)]
        return list(random.Random(seed).choices(range(self.num_adapters), weights, k=REQUESTS))


def make_cells(*, quick: bool) -> list[Cell]:
    """All cells in the order of a round: those that a ratio compares are neighbours. quick: few tokens, to try the bench itself."""
    short, long, registered = (2, 4, 40) if quick else (SHORT, LONG, REGISTERED)
    cells = [Cell("single", long, action="stream"), Cell("cold_load", 1, action="cold_load")]
    for label, tokens in (("32", short), ("128", long)):
        cells += [
            Cell(f"mixed8_{label}", tokens, 8),
            Cell(f"base_{label}", tokens),
            Cell(f"mixed32_{label}", tokens, 32),
            Cell(f"mixed1_{label}", tokens, 1),
            Cell(f"registered256_{label}", tokens, registered, zipf=True),
        ]
    return cells


def make_prompts(seed: str, vocabulary: int, count: int = REQUESTS) -> list[list[int]]:
    """`count` prompts of random ordinary tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(_FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def make_order(cell: Cell, round_number: int, vocabulary: int, adapters: list[str], cold_adapter: str, attempt: int = 0) -> dict[str, Any]:
    """The JSON order that has a worker measure this cell. adapters: their folders, by number. A repeated attempt gets new prompts."""
    seed = f"{cell.name} {round_number}"
    prompts = make_prompts(f"{seed} {attempt}", vocabulary)
    if cell.action == "stream":
        return {"do": "stream", "prompt": prompts[0], "new_tokens": cell.new_tokens}
    if cell.action == "cold_load":
        return {"do": "cold_load", "prompts": prompts[:3], "folder": cold_adapter}
    chosen = [None if number is None else adapters[number] for number in cell.choose_adapters(seed)]
    return {"do": "batch", "prompts": prompts, "adapters": chosen, "new_tokens": cell.new_tokens}


def write_adapters(folder: Path, base: Path, count: int, rank: int) -> list[str]:
    """Write `count` random adapters for the base in `base` (those already there are kept); returns their folders.

    A is uniform as in training, B normal and small: the answers differ from the base's, and logits stay finite.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    shapes = linear_shapes(config)
    made = []
    for number in range(count):
        target = folder / f"r{rank}-{number:03d}"
        made.append(str(target))
        if (target / "adapter_config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(1000 * rank + number)
        tensors = {}
        for layer, (module, (d_in, d_out)) in itertools.product(range(config["num_hidden_layers"]), shapes.items()):
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = (2 * torch.rand((rank, d_in), generator=generator) - 1) / d_in**0.5
            b = 0.02 * torch.randn((d_out, rank), generator=generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(peft_config(str(base), rank, list(shapes))))
    return made


def peft_config(base: str, rank: int, modules: list[str]) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [module.split(".")[1] for module in modules],
    }


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of a Llama block's seven linears."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    query, key = heads * head, (config.get("num_key_value_heads") or heads) * head
    return {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
