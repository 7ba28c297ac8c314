"""A training job's whole state in one file, replaced in one rename.

One file, because two files can be torn apart by a kill between them. It holds the masters, the optimizer's state, the best step's values and, as text
in the safetensors header, the counters; the digest says which job it belongs to, so a changed config or data set never resumes from it. The
optimizer's parameters are slices of the masters, and each kind of its state (AdamW has two moments) is stored end to end in their order.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.errors import TrainingError
from atoll.files import write_file_by

FILE = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a job is. step counts finished optimizer steps, stale evaluations since the best; what was used (cost.py) adds up over resumed runs."""

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    stopped_early: bool = False
    train_loss: float | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    energy_joules: float | None = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read: its tensors on the CPU, and what the header says of the optimizer's."""

    progress: Progress
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]

    def restore(self, values: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Progress, Tensor | None]:
        """Put the state into `values` and `optimizer`; returns the progress and the best values."""
        with torch.no_grad():
            values.copy_(self.tensors["values"])
        parameters, states = _parameters(optimizer), dict[int, dict[str, Any]]()
        for name in self.tensors.keys() - {"values", "best"}:
            places = self.optimizer.get("shapes", {}).get(name) or [[index, *parameter.shape] for index, parameter in enumerate(parameters)]
            pieces = self.tensors[name].to(values.device).split([math.prod(shape) for _, *shape in places])
            for (index, *shape), piece in zip(places, pieces, strict=True):
                states.setdefault(index, {})[name] = piece.view(shape).clone()
        if (step := self.optimizer.get("step", "tensor")) is not None:
            for state in states.values():
                state["step"] = torch.tensor(float(self.progress.step)) if step == "tensor" else self.progress.step
        if states:  # torch's own way in, which puts a fused optimizer's step count where its parameters are
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        best = self.tensors.get("best")
        return self.progress, None if best is None else best.to(values.device)


def save_checkpoint(folder: Path, job_digest: str, progress: Progress, values: Tensor, optimizer: torch.optim.Optimizer, best: Tensor | None) -> None:
    """Write the state atomically. values [P] float32; best [P] or None. Raises StorageError."""
    parameters = _parameters(optimizer)
    states = [optimizer.state[parameter] for parameter in parameters]
    tensors, shapes = {"values": values.detach()}, {}
    for name in sorted({name for state in states for name, value in state.items() if isinstance(value, Tensor) and name != "step"}):
        found = [(index, state[name]) for index, state in enumerate(states) if name in state]
        tensors[name] = torch.cat([value.flatten() for _, value in found]) if len(found) > 1 else found[0][1].flatten()
        if [value.shape for _, value in found] != [parameter.shape for parameter in parameters]:
            shapes[name] = [[index, *value.shape] for index, value in found]
    if best is not None:
        tensors["best"] = best
    steps = [state["step"] for state in states if "step" in state]
    kept = {"shapes": shapes, "step": None if not steps else "tensor" if isinstance(steps[0], Tensor) else "number"}
    header = {"job": job_digest, "progress": json.dumps(asdict(progress)), "optimizer": json.dumps(kept)}
    write_file_by(folder / FILE, functools.partial(_save, tensors, header))


def read_checkpoint(folder: Path, job_digest: str, num_values: int) -> Saved | None:
    """The state that a folder holds, or None where there is no checkpoint. Raises TrainingError if it belongs to another job or does not fit."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    for left_over in folder.glob(f".{FILE}.*"):  # of a kill in the middle of a write; each is as large as the checkpoint
        shutil.rmtree(left_over, ignore_errors=True)
        if left_over.is_file():  # of versions that wrote no folder
            left_over.unlink(missing_ok=True)
    if not path.is_file():
        return None
    hint = f"choose another --out folder, or delete {folder} to start again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise TrainingError(f"{path} is damaged: {error}", hint=hint) from error
    if header.get("job") != job_digest:
        raise TrainingError(f"{folder} holds a checkpoint of another job: its config, data or base differ from this one's", hint=hint)
    if tensors["values"].numel() != num_values:
        raise TrainingError(f"{path} holds {tensors['values'].numel()} parameters, but the job trains {num_values}", hint=hint)
    progress = Progress(**json.loads(header["progress"]))
    progress.evaluations = [(int(step), float(loss)) for step, loss in progress.evaluations]
    return Saved(progress, tensors, json.loads(header.get("optimizer", "{}")))


def _save(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    """Straight from the tensors' memory. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
