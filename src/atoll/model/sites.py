"""Where LoRA can act in a Llama-like decoder, and what PEFT calls those places in its files.

The seven linears of a block form four *groups* that share an input: q, k and v; o; gate and up; down. The base runs one fused product a group, so an
adapter's factors are fused the same way (`apply.Update`). Used by adapter.py (file names), bank.py, decoder.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # transformers model types with these blocks and names
TARGETS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MAGNITUDE = ".lora_magnitude_vector"  # how PEFT's names of DoRA's tensors end
QKV, OUT, GATE_UP, DOWN = range(4)  # indices into GROUPS

_PARENTS = {target: "self_attn" if target in GROUPS[QKV] + GROUPS[OUT] else "mlp" for target in TARGETS}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,3})\.(self_attn|mlp)\.([a-z_]+)\.lora_([AB])\.weight")


class Site(NamedTuple):
    """One linear layer of the base: block number (from 0) and target module."""

    layer: int
    target: str


def module_path(site: Site) -> str:
    """The linear's name inside transformers' model, e.g. `model.layers.3.self_attn.q_proj`."""
    return f"model.layers.{site.layer}.{_PARENTS[site.target]}.{site.target}"


def peft_key(site: Site, factor: str) -> str:
    """The name of factor "A" or "B" of a site in PEFT's adapter_model.safetensors."""
    return f"base_model.model.{module_path(site)}.lora_{factor}.weight"


def magnitude_key(site: Site) -> str:
    """The name of a DoRA magnitude there."""
    return f"base_model.model.{module_path(site)}{MAGNITUDE}"


def parse_peft_key(key: str) -> tuple[Site, str] | None:
    """The site and factor that a PEFT tensor name means, or None if it is not LoRA on one of the seven linears."""
    found = _KEY.fullmatch(key)
    if found is None or _PARENTS.get(found[3]) != found[2]:
        return None
    return Site(int(found[1]), found[3]), found[4]
