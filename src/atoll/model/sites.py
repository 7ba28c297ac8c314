"""Where LoRA can act in a decoder, and what PEFT calls those places in its files.

The seven linears of a Llama-like block form four *groups* that share an input: q, k and v; o; gate and up; down. The base runs one fused product a
group, so an adapter's factors are fused the same way (`apply.Update`). In the families of families.py every linear is a group of its own.

Used by adapter.py (file names), bank.py, decoder.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from atoll.model.families import GENERIC

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # transformers model types with these blocks and names
TARGETS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MAGNITUDE = ".lora_magnitude_vector"  # how PEFT's names of DoRA's tensors end
QKV, OUT, GATE_UP, DOWN = range(4)  # indices into GROUPS

_PARENTS = {target: "self_attn" if target in GROUPS[QKV] + GROUPS[OUT] else "mlp" for target in TARGETS}
_LLAMA_PATHS = {f"model.layers.*.{_PARENTS[target]}.{target}": target for target in TARGETS}
# A linear's path with a star -> what it is called as a target, of every family.
_BY_PATH = _LLAMA_PATHS | {path: _LLAMA_PATHS.get(path, path) for family in GENERIC.values() for path in family.paths}
_ORDER = {target: place for place, target in enumerate(dict.fromkeys(_BY_PATH.values()))}
_NAMES = {_BY_PATH[path]: name for family in GENERIC.values() for path, name in zip(family.paths, family.names, strict=False)}
MODULE_NAMES = tuple(dict.fromkeys(path.rsplit(".", 1)[-1] for path in _BY_PATH))  # what target_modules may name: q_proj, …, c_attn, …
_KEY = re.compile(r"base_model\.model\.([a-z0-9_.]{1,60}?)\.(0|[1-9][0-9]{0,3})\.([A-Za-z0-9_.]{1,60})\.lora_([AB])\.weight")


class Site(NamedTuple):
    """One linear layer of the base: block number (from 0) and target, "q_proj" or "transformer.h.*.attn.c_attn"."""

    layer: int
    target: str


def module_path(site: Site) -> str:
    """The linear's name inside transformers' model, e.g. `model.layers.3.self_attn.q_proj`."""
    if "*" in site.target:
        return site.target.replace("*", str(site.layer))
    return f"model.layers.{site.layer}.{_PARENTS[site.target]}.{site.target}"


def family_targets(family: str) -> tuple[str, ...]:
    """The targets of a family of families.py, in the order of its block."""
    return tuple(_BY_PATH[path] for path in GENERIC[family].paths)


def module_name(target: str) -> str:
    """What target_modules call a target: the last part of its path, or as many as say which it is."""
    return _NAMES.get(target) or target.rsplit(".", 1)[-1]


def in_file_order(sites: Iterable[Site]) -> list[Site]:
    """By block, then by the place in the block."""
    return sorted(sites, key=lambda site: (site.layer, _ORDER[site.target]))


def in_block_order(targets: Iterable[str]) -> list[str]:
    """Targets by their place in a block, each once."""
    return sorted(set(targets), key=_ORDER.__getitem__)


def peft_key(site: Site, factor: str) -> str:
    """The name of factor "A" or "B" of a site in PEFT's adapter_model.safetensors."""
    return f"base_model.model.{module_path(site)}.lora_{factor}.weight"


def magnitude_key(site: Site) -> str:
    """The name of a DoRA magnitude there."""
    return f"base_model.model.{module_path(site)}{MAGNITUDE}"


def parse_peft_key(key: str) -> tuple[Site, str] | None:
    """The site and factor that a PEFT tensor name means, or None if it is not LoRA on a linear of a block that Atoll knows."""
    found = _KEY.fullmatch(key)
    target = _BY_PATH.get(f"{found[1]}.*.{found[3]}") if found is not None else None
    return None if found is None or target is None else (Site(int(found[2]), target), found[4])
