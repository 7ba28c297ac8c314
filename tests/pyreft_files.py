"""Folders as PyReFT writes them, made without PyReFT: its config.json, and pickles with its names of tensors.

Used by tests/reft and tests/cli. That PyReFT's own files are the same is checked by bench/compare_pyreft.py, which has the real thing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TYPES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
    "orthogonal_direft": "DireftIntervention",
    "direft": "NodireftIntervention",
}
METHODS = tuple(TYPES)


def saved_state(method: str, hidden: int = 64, rank: int = 4, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(PyReFT's state dict of an intervention, its tensors by the names of model.reft), with torch's own parametrization where PyReFT keeps that."""
    torch.manual_seed(seed)
    w, b, c = nn.init.normal_(torch.empty(rank, hidden), std=0.2), torch.randn(rank), torch.randn(rank)
    counts = {"embed_dim": torch.tensor(hidden), "interchange_dim": torch.tensor(hidden)}
    learned = {"learned_source.weight": w, "learned_source.bias": b}
    if method in ("noreft", "direft"):
        r = nn.init.normal_(torch.empty(rank, hidden), std=0.2)
        tensors = {"r": r, "w": w, "b": b, "c": c}
        return {**counts, "proj_layer.weight": r, "proj_layer.bias": c, **learned}, tensors
    rotation = nn.Module()
    rotation.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, rank)))
    torch.nn.utils.parametrizations.orthogonal(rotation)
    with torch.no_grad():  # away from where the reflections are none, as after training
        rotation.parametrizations.weight.original.tril_(-1).add_(torch.randn(hidden, rank).tril(-1) * 0.1)
        rotation.parametrizations.weight.original.diagonal().fill_(-1)
    r = rotation.weight.detach().T.contiguous()
    parts = {f"rotate_layer.{name}": tensor for name, tensor in rotation.state_dict().items()}
    if method == "loreft":
        return {"weight": w, "bias": b, "rotate_layer": r.T.contiguous()}, {"r": r, "w": w, "b": b}
    if method == "orthogonal_direft":
        return {**counts, **parts, **learned}, {"r": r, "w": w, "b": b}
    return {"learned_source": b, **counts, **parts}, {"r": r, "b": b}


def write_folder(folder: Path, places: Sequence[tuple[Any, ...]], joint: str = "_", word: str = "comp", **config: Any) -> list[dict[str, Tensor]]:
    """Write a folder with one intervention for each (method, layer, component); returns their tensors. joint, word: of older versions' file names."""
    folder.mkdir(parents=True, exist_ok=True)
    representations, types, keys, found = [], [], [], []
    for seed, (method, layer, component) in enumerate(places):
        state, tensors = saved_state(method, seed=seed)
        where = [] if "." in component else ["layer", str(layer)]
        stem = joint.join([*where, word, component.replace(".", joint), "unit", "pos", "nunit", "1"])
        keys.append(f"{stem}#{sum(key.rpartition('#')[0] == stem for key in keys)}")
        torch.save(state, folder / f"intkey_{keys[-1]}.bin")
        representations.append([layer, component, "pos", 1, 4, *[None] * 9])
        types.append(f"<class 'pyreft.interventions.{TYPES[method]}'>")
        found.append(tensors)
    written = {"representations": representations, "intervention_types": types, "mode": "parallel", "sorted_keys": keys, **config}
    (folder / "config.json").write_text(json.dumps(written))
    return found
