"""The ReFT half of an adapter's files: the parts in adapter_config.json, and the names of their tensors.

The config of an adapter with edits has a `peft_type` that PEFT does not know ("REFT", or "LORA_REFT" beside LoRA modules), so PEFT refuses it rather
than applying half. `reft` lists every field of every part; nothing is left to a default, and nothing unknown is accepted. A tensor is named
`reft.<part>.layers.<layer>.<component>.<side>.<r|w|b|c>`, its side "both" where prefix and suffix share it.

Used by adapter_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.adapter import AdapterSpec
from atoll.model.peft_config import finite_number, flag, peft_config, read_config, whole_rank
from atoll.model.positions import Positions
from atoll.model.reft import COMPONENTS, MAX_PARTS, ORTHONORMAL, TENSORS, EditSite, Intervention, ReftSpec, not_orthonormal, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

REFT, LORA_REFT = "REFT", "LORA_REFT"  # peft_type of an adapter with edits: alone, beside LoRA modules
_FORMAT = 1
_KEYS = {"peft_type", "base_model_name_or_path", "reft", "atoll_format"}
_FIELDS = {field.name for field in fields(ReftSpec)}
_MAX_LAYER = 9_999
_TOLERANCE = 1e-2  # of R Rᵀ - I; rounding to bfloat16 leaves about 1e-3
_SIDES = ("prefix", "suffix", "both")
_OTHER_CONFIG = "the file is incomplete or belongs to another config"
_KEY = re.compile(rf"reft\.(0|[1-9][0-9]?)\.layers\.(0|[1-9][0-9]{{0,3}})\.({'|'.join(COMPONENTS)})\.({'|'.join(_SIDES)})\.([{''.join(TENSORS)}])")


def reft_config(spec: AdapterSpec) -> dict[str, Any]:
    """The adapter_config.json of a spec with ReFT parts."""
    parts = {"reft": [part.to_json() for part in spec.reft], "atoll_format": _FORMAT}
    if spec.kind == "reft":
        return {"peft_type": REFT, "base_model_name_or_path": spec.base, **parts}
    return {**peft_config(spec), "peft_type": LORA_REFT, **parts}


def read_reft_config(config: Mapping[str, Any], path: Path) -> AdapterSpec:
    """The spec that an adapter_config.json of type REFT or LORA_REFT says; `path` is for messages.

    Raises AdapterFormatError (a key or value that is missing, unknown or out of range) or UnsupportedAdapter (another format, a LoRA option that
    would change the forward).
    """
    if type(form := config.get("atoll_format")) is not int or form != _FORMAT:
        raise UnsupportedAdapter(f"{path}: atoll_format is {form!r:.40}, but {_FORMAT} is what this version reads", hint="update Atoll")
    parts = _parts(config.get("reft"), path)
    if config["peft_type"] == LORA_REFT:
        lora = read_config({key: value for key, value in config.items() if key not in ("reft", "atoll_format")} | {"peft_type": "LORA"}, path)
        return replace(lora, reft=parts)
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        raise AdapterFormatError(f"{path} has a key {unknown[0]!r}, but a {REFT} config has only {', '.join(sorted(_KEYS))}")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterFormatError(f"{path}: base_model_name_or_path is {base!r:.40}, but a name was expected")
    return AdapterSpec.reft_only(base or "", parts)


def _parts(value: Any, path: Path) -> tuple[ReftSpec, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise AdapterFormatError(f"{path}: reft is {value!r:.60}, but a list of 1 to {MAX_PARTS} parts was expected")
    return tuple(_part(part, f"{path}: reft[{index}]") for index, part in enumerate(value))


def _part(value: Any, where: str) -> ReftSpec:
    if not isinstance(value, dict) or set(value) != _FIELDS:
        wrong = sorted(set(value) ^ _FIELDS) if isinstance(value, dict) else []
        found = f"{'lacks' if wrong[0] in _FIELDS else 'has'} {wrong[0]!r:.60}" if wrong else f"is {value!r:.60}"
        raise AdapterFormatError(f"{where} {found}, but an object with exactly {', '.join(sorted(_FIELDS))} was expected")
    pattern = value["rank_pattern"]
    if not isinstance(pattern, dict) or not all(re.fullmatch("0|[1-9][0-9]{0,3}", layer) for layer in pattern):
        raise AdapterFormatError(f"{where}: rank_pattern is {pattern!r:.60}, but an object of ranks by layer number was expected")
    positions = value["positions"]
    if not isinstance(positions, str | list):
        raise AdapterFormatError(f"{where}: positions is {positions!r:.60}, but text such as f7+l7 or a list of places was expected")
    try:
        return ReftSpec(
            method=value["method"],
            rank=whole_rank(value["rank"], "rank", where),
            layers=_layers(value["layers"], where),
            component=value["component"],
            positions=Positions.parse(positions),
            tied=flag(value["tied"], "tied", where),
            activation=value["activation"],
            dropout=finite_number(value["dropout"], "dropout", where),
            bias=flag(value["bias"], "bias", where),
            rank_pattern={int(layer): whole_rank(rank, f"rank_pattern.{layer}", where) for layer, rank in pattern.items()},
            weight=finite_number(value["weight"], "weight", where),
        )
    except AdapterFormatError as error:
        if error.message.startswith(where):
            raise
        raise AdapterFormatError(f"{where}: {error.message}", hint=error.hint) from None  # what ReftSpec and Positions refuse themselves


def _layers(value: Any, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(layer) is int and 0 <= layer <= _MAX_LAYER for layer in value):
        raise AdapterFormatError(f"{where}: layers is {value!r:.60}, but null or a list of layer numbers was expected")
    return tuple(value)


def is_edit_key(name: str) -> bool:
    """Whether a tensor's name is of the form that edits have."""
    return _KEY.fullmatch(name) is not None


def last_layer(names: Iterable[str]) -> int:
    """The highest layer that these tensors of edits name; -1 without any."""
    return max((int(found[2]) for name in names if (found := _KEY.fullmatch(name)) is not None), default=-1)


def edit_key(spec: AdapterSpec, site: EditSite, tensor: str) -> str:
    """The name of one of reft.TENSORS of a site in adapter_model.safetensors."""
    side = _SIDES[site.side if spec.reft[site.part].sides == 2 else 2]
    return f"reft.{site.part}.layers.{site.layer}.{site.component}.{side}.{tensor}"


def check_edit_shapes(shapes: Mapping[str, tuple[int, ...]], spec: AdapterSpec, num_layers: int, path: Path) -> None:
    """Raise AdapterFormatError unless these tensors of edits are those that the spec means in a base of `num_layers` blocks, and of their shapes."""
    hidden = next((shape[1] for name, shape in shapes.items() if name.endswith(".r") and len(shape) == 2), 0)
    expected: set[str] = set()
    for place in (place for part, own in enumerate(spec.reft) for place in own.sites(part, num_layers)):  # ends at the first tensor that is not there
        for tensor, shape in tensor_shapes(spec.reft[place.part], place.layer, hidden).items():
            name = edit_key(spec, place, tensor)
            if name not in shapes:
                raise AdapterFormatError(f"{path} has no tensor {name}", hint=_OTHER_CONFIG)
            if shapes[name] != shape or 0 in shape:
                raise AdapterFormatError(f"{path}: {name} has shape {shapes[name]}, but the config and the other tensors say {shape}")
            expected.add(name)
    for name in sorted(shapes.keys() - expected):
        raise AdapterFormatError(f"{path} has a tensor that its config does not cover: {name}", hint=_OTHER_CONFIG)


def edits_of(tensors: Mapping[str, Tensor], spec: AdapterSpec, num_layers: int, path: Path) -> dict[EditSite, Intervention]:
    """The interventions of a file whose names and shapes were checked.

    Raises AdapterFormatError where a value is not finite, or R lacks the orthonormal rows that its method is defined with.
    """
    edits: dict[EditSite, Intervention] = {}
    for site in spec.edit_sites(num_layers):
        part = spec.reft[site.part]
        found = {name: tensors[edit_key(spec, site, name)] for name in TENSORS if edit_key(spec, site, name) in tensors}
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise AdapterFormatError(
                    f"{path}: {edit_key(spec, site, name)} has values that are not finite (NaN or infinity)", hint="retrain the adapter"
                )
        if part.method in ORTHONORMAL and (far := not_orthonormal(found["r"])) > _TOLERANCE:
            raise AdapterFormatError(
                f"{path}: the rows of {edit_key(spec, site, 'r')} are not orthonormal (R Rᵀ - I reaches {far:.2g}), but {part.method} needs that",
                hint="where the rows are meant to be free, the method is noreft (for loreft) or direft (for orthogonal_direft)",
            )
        edits[site] = Intervention(**found)
    return edits


def edit_tensors(spec: AdapterSpec, edits: Mapping[EditSite, Intervention]) -> dict[str, Tensor]:
    """Every tensor of the edits under its name in the file, contiguous, in its own dtype."""
    return {edit_key(spec, site, name): tensor.detach().contiguous() for site, found in edits.items() for name, tensor in found.tensors.items()}
