"""Adapters on disk: PEFT's two files, and the manifest beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, exactly as PEFT writes and reads them, and `manifest.json` for what PEFT has no
field for. Files come from strangers: nothing here runs code, loads a pickle, compiles a pattern from a file or trusts a header; an option that Atoll
does not apply is refused by name, because applying the rest would be silently wrong.

Used by the hub (check on publish and pull), train (write), engine and workflows (read).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from atoll.errors import AdapterFormatError, StorageError, UnsupportedAdapter
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.sites import TARGETS, Site, parse_peft_key, peft_key

CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_HEADER_LIMIT = 1 << 20  # bytes; a 7-target adapter of an 80-layer base needs about 170 KB
_CONFIG_LIMIT = 1 << 20
_MAX_RANK = 1024
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LITERAL = re.compile(r"[A-Za-z0-9_.]+")

# What PEFT's config may hold beside the fields of AdapterSpec, and the values that change nothing. Any other value is refused by name.
_INERT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
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
        "use_rslora",
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


def check_adapter_files(folder: Path) -> AdapterSpec:
    """Check everything that can be checked without a base: form, options, names, shapes, finite values. Returns the spec.

    Raises AdapterFormatError (damaged, hostile, incomplete) or UnsupportedAdapter (an option that Atoll does not apply).
    """
    return read_adapter(folder).spec


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; factors keep their file's dtype. Raises as `check_adapter_files` does."""
    _refuse_pickles(folder)
    spec = _read_spec(folder / CONFIG_FILE)
    modules = _read_modules(folder / WEIGHTS_FILE, spec)
    return Adapter(spec, modules, read_manifest(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest beside the two files, or an empty dict for a folder that PEFT wrote."""
    path = folder / MANIFEST_FILE
    return _read_json(path) if path.is_file() else {}


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write the folder's three files, each through a temporary file. The factors are stored contiguous in their own dtype, in PEFT's names."""
    import torch
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for site, module in adapter.modules.items():
        tensors[peft_key(site, "A")], tensors[peft_key(site, "B")] = module.a.detach().contiguous(), module.b.detach().contiguous()
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    # Not sorted: PEFT takes the first entry of rank_pattern and alpha_pattern that names a module, so their order has a meaning.
    write_file(folder / CONFIG_FILE, _dump(peft_config(adapter.spec), sort=False))
    if adapter.manifest:
        write_file(folder / MANIFEST_FILE, _dump(adapter.manifest, sort=True))


def peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """The spec as PEFT's adapter_config.json says it; keys left out have PEFT's defaults."""
    return {
        "alpha_pattern": dict(spec.alpha_pattern),
        "base_model_name_or_path": spec.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if spec.layers_to_transform is None else list(spec.layers_to_transform),
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "target_modules": list(spec.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": spec.use_rslora,
    }


def write_file(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, fsync, rename: a reader sees the old file or the new one. Raises StorageError."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}", hint="free some space or choose another folder") from error


def _dump(value: Mapping[str, Any], sort: bool) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder} is not a folder", hint=f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if (folder / WEIGHTS_FILE).is_file():
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise AdapterFormatError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read",
            hint=f"save the adapter as {WEIGHTS_FILE} (PEFT: save_pretrained(..., safe_serialization=True))",
        )
    raise AdapterFormatError(f"{folder} has no {WEIGHTS_FILE}", hint=f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise AdapterFormatError(f"{path} is larger than {_CONFIG_LIMIT} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFormatError(f"{path.parent} has no {path.name}", hint=f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of more digits than Python converts
        raise AdapterFormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path} holds a {type(value).__name__}, but a JSON object was expected")
    return value


def _read_spec(path: Path) -> AdapterSpec:
    config = _read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"{path}: peft_type is {kind!r}, but only LORA adapters can be applied")
    for key, value in config.items():
        if key in _INERT:
            if not any(value is inert or (type(value) is type(inert) and value == inert) for inert in _INERT[key]):
                raise UnsupportedAdapter(
                    f"{path}: {key} is {value!r}, which Atoll does not apply", hint="merge or retrain the adapter without that option"
                )
        elif key not in _SILENT and value not in (None, False, [], {}, ""):
            raise UnsupportedAdapter(
                f"{path}: {key} is {value!r}, an option that Atoll does not know", hint="retrain the adapter without that option"
            )
    dropout = _number(config, "lora_dropout", path, 0.0)
    if not 0 <= dropout < 1:
        raise AdapterFormatError(f"{path}: lora_dropout is {dropout}, but a number from 0 up to 1 was expected")
    return AdapterSpec(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=_rank(config.get("r", 8), "r", path),
        alpha=_number(config, "lora_alpha", path, 8.0),
        target_modules=_targets(config.get("target_modules"), path),
        dropout=dropout,
        use_rslora=_flag(config, "use_rslora", path),
        rank_pattern={
            _literal(k, "rank_pattern", path): _rank(v, f"rank_pattern.{k}", path) for k, v in _mapping(config, "rank_pattern", path).items()
        },
        alpha_pattern={_literal(k, "alpha_pattern", path): _number({k: v}, k, path, 0.0) for k, v in _mapping(config, "alpha_pattern", path).items()},
        layers_to_transform=_layers(config.get("layers_to_transform"), path),
    )


def _mapping(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path}: {key} is {value!r}, but an object was expected")
    return value


def _number(config: Mapping[str, Any], key: str, path: Path, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AdapterFormatError(f"{path}: {key} is {value!r:.40}, but a finite number was expected")
    return float(value)


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise AdapterFormatError(f"{path}: {key} is {value!r:.40}, but true or false was expected")
    return value


def _rank(value: Any, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise AdapterFormatError(f"{path}: {key} is {value!r}, but a whole number from 1 to {_MAX_RANK} was expected")
    return value


def _literal(key: str, field: str, path: Path) -> str:
    if not _LITERAL.fullmatch(key):
        raise UnsupportedAdapter(f"{path}: {field} names {key!r}, a pattern; only literal module names are read from files")
    return key


def _targets(value: Any, path: Path) -> tuple[str, ...]:
    if isinstance(value, str):
        raise UnsupportedAdapter(
            f"{path}: target_modules is the pattern {value!r}; patterns from files are never run",
            hint="list the module names instead, such as q_proj, v_proj",
        )
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise AdapterFormatError(f"{path}: target_modules is {value!r}, but a list of module names was expected")
    for item in value:
        if _literal(item, "target_modules", path).rsplit(".", 1)[-1] not in TARGETS:
            raise UnsupportedAdapter(f"{path}: target_modules names {item!r}, but LoRA is applied to {', '.join(TARGETS)} only")
    return tuple(sorted(value, key=lambda item: (TARGETS.index(item.rsplit(".", 1)[-1]), item)))


def _layers(value: Any, path: Path) -> tuple[int, ...] | None:
    if value is None or value == []:  # PEFT reads an empty list as all layers
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 10_000 for item in layers):
        raise AdapterFormatError(f"{path}: layers_to_transform is {value!r}, but a list of layer numbers was expected")
    return tuple(sorted(set(layers)))


def _read_modules(path: Path, spec: AdapterSpec) -> dict[Site, LoraModule]:
    import torch
    from safetensors.torch import load_file

    factors = check_header(path)
    tensors = load_file(path)
    modules: dict[Site, LoraModule] = {}
    for site in sorted(factors, key=lambda s: (s.layer, TARGETS.index(s.target))):
        a, b = tensors[peft_key(site, "A")], tensors[peft_key(site, "B")]
        rank = spec.rank_at(site)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterFormatError(
                f"{path}: layer {site.layer} {site.target} has factors {tuple(a.shape)} and {tuple(b.shape)}, but the config says rank {rank}"
            )
        for name, tensor in (("A", a), ("B", b)):
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterFormatError(
                    f"{path}: {peft_key(site, name)} has values that are not finite (NaN or infinity)", hint="retrain the adapter"
                )
        modules[site] = LoraModule(a, b, spec.scaling_at(site))
    expected = set(spec.sites(1 + max(*(site.layer for site in modules), *(spec.layers_to_transform or (0,)))))
    if expected != set(modules):
        site = min(expected ^ set(modules))
        what = "has no factors for" if site in expected else "has factors, which its config does not cover, for"
        raise AdapterFormatError(f"{path} {what} layer {site.layer} {site.target}", hint="the file is incomplete or belongs to another config")
    return modules


def check_header(path: Path) -> dict[Site, tuple[int, int]]:
    """Check a safetensors header without mapping a tensor; returns {site: (d_out, d_in)}.

    Refuses: a header over 1 MB, repeated names, tensors that overlap, leave gaps or end elsewhere than the file, other dtypes, names that are not
    LoRA factors of the seven linears, a site with only one factor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    with path.open("rb") as file:
        header, data_start = _read_header(file, path)
        size = os.fstat(file.fileno()).st_size - data_start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, span, item_bytes = _entry(name, entry, path)
        if span[1] - span[0] != math.prod(shape) * item_bytes:
            raise AdapterFormatError(f"{path}: {name} says shape {shape} but spans {span[1] - span[0]} bytes")
        shapes[name] = shape
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise AdapterFormatError(f"{path}: {name} starts at byte {start} of the data, but the one before ends at {end}")
        end = stop
    if end != size:
        raise AdapterFormatError(
            f"{path} has {size} bytes of data, but its header describes {end}: the file is {'truncated' if size < end else 'padded'}"
        )
    return _pair_factors(shapes, path)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterFormatError(f"{path} is {len(prefix)} bytes long, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > _HEADER_LIMIT:
        raise AdapterFormatError(f"{path}: the safetensors header claims {length} bytes, more than the limit of {_HEADER_LIMIT}")
    raw = file.read(length)
    if len(raw) < length:
        raise AdapterFormatError(f"{path} ends inside its header: the file is truncated")

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise AdapterFormatError(f"{path}: the header names a tensor twice")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{path}: the safetensors header is not an object")
    return header, 8 + length


def _entry(name: str, entry: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, int], int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and stop >= start
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise AdapterFormatError(f"{path}: the header's entry for {name!r} is malformed")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise AdapterFormatError(f"{path}: {name} is stored as {dtype}, but {', '.join(_DTYPE_BYTES)} were expected")
    return shape, (start, stop), _DTYPE_BYTES[dtype]


def _pair_factors(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[Site, tuple[int, int]]:
    factors: dict[Site, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = parse_peft_key(name)
        if found is None:
            raise UnsupportedAdapter(f"{path} has a tensor {name!r}, which is not a LoRA factor of {', '.join(TARGETS)}")
        if len(shape) != 2 or 0 in shape:
            raise AdapterFormatError(f"{path}: {name} has shape {shape}, but a matrix was expected")
        factors.setdefault(found[0], {})[found[1]] = shape
    if not factors:
        raise AdapterFormatError(f"{path} holds no tensors")
    out: dict[Site, tuple[int, int]] = {}
    for site, pair in factors.items():
        if len(pair) != 2:
            raise AdapterFormatError(f"{path}: layer {site.layer} {site.target} has only factor {next(iter(pair))}; A and B are both needed")
        (rank_a, d_in), (d_out, rank_b) = pair["A"], pair["B"]
        if rank_a != rank_b:
            raise AdapterFormatError(f"{path}: layer {site.layer} {site.target} has A of rank {rank_a} and B of rank {rank_b}")
        out[site] = (d_out, d_in)
    return out
