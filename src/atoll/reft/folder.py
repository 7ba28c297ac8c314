"""A ReFT model on disk: `config.json` with every setting and `reft.safetensors` with every tensor, in float32 as they were trained.

Tensors are named interventions/<key>/<name>, and model/<name> for trained tensors of the base (LoRA factors, a classification head) if they are asked
for. The reader is strict: a missing, further, misshapen or non-finite tensor is an error, and nothing in a file makes code run. Folders that PyReFT
wrote are read through importer.py.

Used by model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.errors import AdapterFormatError
from atoll.files import write_file
from atoll.model.reft import LEARNED
from atoll.reft.config import CONFIG_FILE, ReftConfig
from atoll.reft.importer import MODEL_FILE, PyreftFolder, is_pyreft_folder, read_pyreft
from atoll.reft.interventions import LowRankRotateLayer

WEIGHTS_FILE = "reft.safetensors"
_OURS, _BASE = "interventions", "model"


def write_folder(folder: Path, config: ReftConfig | None, interventions: Mapping[str, nn.Module], base: Mapping[str, Tensor]) -> None:
    """Write both files (or, without a config, the tensors alone), each whole or not at all. Raises ConfigError, StorageError."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for key, intervention in interventions.items():
        if id(intervention) not in written:  # linked ones are written once, under the first key
            written.add(id(intervention))
            tensors |= {f"{_OURS}/{key}/{name}": tensor for name, tensor in intervention.state_dict().items()}
    tensors |= {f"{_BASE}/{name}": tensor for name, tensor in base.items()}
    text = None if config is None else config.to_json_string()
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_file(folder / WEIGHTS_FILE, save(plain, metadata={"format": "pt"}))
    if text is not None:
        write_file(folder / CONFIG_FILE, text)


def read_pyreft_folder(folder: Path, *, include_model: bool, act_fn: str | None) -> tuple[ReftConfig, Mapping[str, Tensor]]:
    """The configuration of a folder that PyReFT wrote, with its interventions, and the base's tensors ({} unless include_model).

    act_fn is the activation they were trained with, which its files do not say; dropout, which they do not say either, is 0. Raises as read_pyreft.
    """
    from atoll.reft.convert import as_module

    found = read_pyreft(folder, include_model=include_model)
    modules: dict[object, nn.Module] = {}
    representations = []
    for number, saved in enumerate(found.saved):
        key = number if saved.link is None else saved.link
        if key not in modules:
            modules[key] = as_module(saved.method, saved.tensors, act_fn if saved.method in LEARNED else None)
        entry = {"layer": saved.layer or 0, "component": saved.component, "intervention_link_key": saved.link, "intervention": modules[key]}
        representations.append(entry)
    return ReftConfig(representations=representations), found.base_tensors


def read_weights(folder: Path, interventions: Mapping[str, nn.Module], *, include_model: bool) -> Mapping[str, Tensor]:
    """Load a folder's tensors into the interventions of the same keys; returns those of the base, {} unless include_model.

    All are checked before the first is written. Raises AdapterFormatError.
    """
    if is_pyreft_folder(folder):
        built = {key: type(intervention).__name__ for key, intervention in interventions.items()}
        found = read_pyreft(folder, include_model=include_model and (folder / MODEL_FILE).is_file(), built=built)
        _load_pyreft(found, interventions)
        _as_saved(interventions)
        return found.base_tensors
    file = folder / WEIGHTS_FILE
    tensors = _tensors(file)
    states: list[tuple[nn.Module, dict[str, Tensor]]] = []
    written: set[int] = set()
    expected: set[str] = set()
    for key, intervention in interventions.items():
        if id(intervention) in written:
            continue
        written.add(id(intervention))
        state = {}
        for name, old in intervention.state_dict().items():
            stored = f"{_OURS}/{key}/{name}"
            expected.add(stored)
            if stored not in tensors:
                raise AdapterFormatError(f"{file} has no tensor {stored!r}", hint="the folder belongs to a model with other interventions")
            if tensors[stored].shape != old.shape:
                raise AdapterFormatError(f"{file}: {stored!r} has shape {tuple(tensors[stored].shape)}, but the model's has {tuple(old.shape)}")
            state[name] = tensors[stored]
        states.append((intervention, state))
    base = {name.removeprefix(f"{_BASE}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{_BASE}/")}
    strange = sorted(set(tensors) - expected - {f"{_BASE}/{name}" for name in base})
    if strange:
        raise AdapterFormatError(f"{file} has a tensor {strange[0]!r} that the model has no place for")
    for intervention, state in states:
        intervention.load_state_dict(state)
    _as_saved(interventions)
    return base if include_model else {}


def load_into_base(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write saved tensors of the base into it. Raises AdapterFormatError for a name or a shape that it does not have."""
    own: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = "none of that name" if name not in own else f"one of shape {tuple(own[name].shape)}"
            raise AdapterFormatError(
                f"{folder} has a trained tensor {name!r} {tuple(tensor.shape)} of the base, but this base has {found}",
                hint="wrap the base as it was wrapped when the folder was saved (same PEFT configuration, same number of labels)",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFormatError(f"{file} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterFormatError(f"{file}: {name!r} has values that are not finite (NaN or infinity)")
    return tensors


def _as_saved(interventions: Mapping[str, nn.Module]) -> None:
    """Leave R as the file has it, also one that PyReFT's training let drift, until an optimizer writes into it."""
    for intervention in interventions.values():
        for module in intervention.modules():
            if isinstance(module, LowRankRotateLayer):
                module.settle()


def _load_pyreft(found: PyreftFolder, interventions: Mapping[str, nn.Module]) -> None:
    from atoll.reft.convert import as_module

    if len(found.saved) != len(interventions):
        raise AdapterFormatError(f"PyReFT's folder has {len(found.saved)} interventions, but the model has {len(interventions)}")
    states = [as_module(saved.method, saved.tensors).state_dict() for saved in found.saved]
    for saved, state, (key, intervention) in zip(found.saved, states, interventions.items(), strict=True):
        shapes, own = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (state, intervention.state_dict()))
        if shapes != own:
            raise AdapterFormatError(f"PyReFT's {saved.method} has tensors {shapes}, which does not fit {key} with {own}")
    for state, intervention in zip(states, interventions.values(), strict=True):
        intervention.load_state_dict(state)
