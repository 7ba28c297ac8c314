"""PEFT's adapter_config.json to an AdapterSpec and back.

Every key that PEFT writes is either in the spec, known to change nothing, or refused by name, because an option that is ignored gives silently wrong
answers. Patterns are never run: a stranger's regular expression is a program.

Used by adapter_files.py, by reft_files.py for the LoRA half of an adapter with edits, and by generic_adapter.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.config_adapter import MAX_RANK
from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.adapter import CLASSIFIES, AdapterSpec
from atoll.model.sites import MODULE_NAMES

_MAX_PATTERNS = 10_000  # entries of one; the deepest bases have about a thousand linears
_HEADS = ("classifier", "score")  # what PEFT saves of its own accord for that task type
_LITERAL = re.compile(r"[A-Za-z0-9_.]+")

# What PEFT's config may hold beside the fields of AdapterSpec, and the values that change nothing. Any other value is refused by name.
_INERT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "exclude_modules": (None, []),
    "layers_pattern": (None, "layers", []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    "ensure_weight_tying": (False, None),
    "init_lora_weights": (True, False, "gaussian", "eva", None),  # the others (pissa, olora, loftq, …) also change the base weights
}
_WITHOUT = "merge or retrain the adapter without that option"
_CONVERTED = ("pissa", "olora", "corda")  # starts inside the base's weights, which PEFT can turn into an ordinary LoRA while the start is at hand
_CONVERT = (
    "save it again as an ordinary LoRA: PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=START), where START is the adapter "
    "as it was saved before training; or retrain it without that option"
)
# Keys that say nothing about the forward.
_SILENT = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    }
)


def peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """The LoRA of a spec as PEFT's adapter_config.json says it; keys left out have PEFT's defaults."""
    return {
        "alpha_pattern": dict(spec.alpha_pattern),
        "base_model_name_or_path": spec.base,
        "bias": "none",
        "fan_in_fan_out": spec.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if spec.layers_to_transform is None else list(spec.layers_to_transform),
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": list(_HEADS) if spec.classifies else None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "target_modules": list(spec.target_modules),
        "task_type": spec.task_type,
        "use_rslora": spec.use_rslora,
        **({"use_dora": True} if spec.use_dora else {}),
    }


def read_config(config: Mapping[str, Any], path: Path, known: Sequence[str] | None = MODULE_NAMES) -> AdapterSpec:
    """The spec that an adapter_config.json says; `path` is for messages. known: the linears that may be targets, None for any name.

    Raises AdapterFormatError (a value of the wrong type or out of range) or UnsupportedAdapter (an option that would change the forward).
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"{path}: peft_type is {kind!r}, but LORA, REFT and LORA_REFT are what can be applied")
    for key, value in config.items():
        if key in _INERT:
            if not any(value is inert or (type(value) is type(inert) and value == inert) for inert in _INERT[key]):
                converts = key == "init_lora_weights" and str(value).lower().startswith(_CONVERTED)
                raise UnsupportedAdapter(f"{path}: {key} is {value!r}, which Atoll does not apply", hint=_CONVERT if converts else _WITHOUT)
        elif key not in _SILENT and value not in (None, False, [], {}, ""):
            raise UnsupportedAdapter(
                f"{path}: {key} is {value!r}, an option that Atoll does not know", hint="retrain the adapter without that option"
            )
    dropout = finite_number(config.get("lora_dropout", 0.0), "lora_dropout", path)
    if not 0 <= dropout < 1:
        raise AdapterFormatError(f"{path}: lora_dropout is {dropout}, but a number from 0 up to 1 was expected")
    return AdapterSpec(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=whole_rank(config.get("r", 8), "r", path),
        alpha=finite_number(config.get("lora_alpha", 8.0), "lora_alpha", path),
        target_modules=_targets(config.get("target_modules"), path, known),
        dropout=dropout,
        task_type=_task_type(config, path),
        fan_in_fan_out=flag(config.get("fan_in_fan_out") or False, "fan_in_fan_out", path),
        use_rslora=flag(config.get("use_rslora") or False, "use_rslora", path),
        rank_pattern={
            _literal(k, "rank_pattern", path): whole_rank(v, f"rank_pattern.{k}", path) for k, v in _mapping(config, "rank_pattern", path).items()
        },
        alpha_pattern={_literal(k, "alpha_pattern", path): finite_number(v, k, path) for k, v in _mapping(config, "alpha_pattern", path).items()},
        layers_to_transform=_layers(config.get("layers_to_transform"), path),
        use_dora=flag(config.get("use_dora") or False, "use_dora", path),
    )


def _task_type(config: Mapping[str, Any], path: Path) -> str:
    """CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION, or SEQ_CLS with a classifier head.

    Raises UnsupportedAdapter for other modules that were saved whole.
    """
    saved = config.get("modules_to_save") or []
    if saved and not (config.get("task_type") == CLASSIFIES and isinstance(saved, list) and all(name in _HEADS for name in saved)):
        raise UnsupportedAdapter(f"{path}: modules_to_save is {saved!r}, which Atoll does not apply", hint=_WITHOUT)
    own = config.get("task_type")
    return CLASSIFIES if saved else own if own in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION") else "CAUSAL_LM"


def _mapping(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path}: {key} is {value!r:.60}, but an object was expected")
    if len(value) > _MAX_PATTERNS:
        raise AdapterFormatError(f"{path}: {key} has {len(value)} entries, but at most {_MAX_PATTERNS} are read")
    return value


def finite_number(value: Any, key: str, path: Path | str) -> float:
    """A number that a config may hold. Raises AdapterFormatError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AdapterFormatError(f"{path}: {key} is {value!r:.40}, but a finite number was expected")
    return float(value)


def flag(value: Any, key: str, path: Path | str) -> bool:
    """True or false. Raises AdapterFormatError."""
    if not isinstance(value, bool):
        raise AdapterFormatError(f"{path}: {key} is {value!r:.40}, but true or false was expected")
    return value


def whole_rank(value: Any, key: str, path: Path | str) -> int:
    """A rank that a file may have. Raises AdapterFormatError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterFormatError(f"{path}: {key} is {value!r}, but a whole number from 1 to {MAX_RANK} was expected")
    return value


def _literal(key: str, field: str, path: Path) -> str:
    if not _LITERAL.fullmatch(key):
        raise UnsupportedAdapter(f"{path}: {field} names {key!r}, a pattern; only literal module names are read from files")
    return key


def _targets(value: Any, path: Path, known: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(value, str):
        raise UnsupportedAdapter(
            f"{path}: target_modules is the pattern {value!r}; patterns from files are never run",
            hint="list the module names instead, such as q_proj, v_proj",
        )
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise AdapterFormatError(f"{path}: target_modules is {value!r}, but a list of module names was expected")
    for item in value:
        if _last(_literal(item, "target_modules", path)) not in (known or (_last(item),)):
            raise UnsupportedAdapter(f"{path}: target_modules names {item!r}, but LoRA is applied to {', '.join(known or ())} only")
    order = {name: place for place, name in enumerate(known or ())}
    return tuple(sorted(value, key=lambda item: (order.get(_last(item), 0), item)))


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _layers(value: Any, path: Path) -> tuple[int, ...] | None:
    if value is None or value == []:  # PEFT reads an empty list as all layers
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 10_000 for item in layers):
        raise AdapterFormatError(f"{path}: layers_to_transform is {value!r}, but a list of layer numbers was expected")
    return tuple(sorted(set(layers)))
