"""A training job's whole state in one file, replaced in one rename.

One file, because two files can be torn apart by a kill between them. It holds the masters, both AdamW moments, the best step's values and, as text in
the safetensors header, the counters; the digest says which job it belongs to, so a changed config or data set never resumes from it. The optimizer's
parameters are slices of the masters, end to end; its moments are stored end to end too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from atoll.errors import TrainingError
from atoll.files import write_file

FILE = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def save_checkpoint(folder: Path, job_digest: str, progress: Progress, values: Tensor, optimizer: torch.optim.AdamW, best: Tensor | None) -> None:
    """Write the state atomically. values [P] float32; best [P] or None. Raises StorageError."""
    from safetensors.torch import save

    states = [optimizer.state[parameter] for parameter in _parameters(optimizer)]
    tensors = {"values": values.detach()}
    if all(states):
        tensors |= {name: torch.cat([state[name] for state in states]) for name in _MOMENTS}
    if best is not None:
        tensors["best"] = best
    header = {"job": job_digest, "progress": json.dumps(asdict(progress))}
    write_file(folder / FILE, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header))


def load_checkpoint(folder: Path, job_digest: str, values: Tensor, optimizer: torch.optim.AdamW) -> tuple[Progress, Tensor | None] | None:
    """Restore the state into `values` and `optimizer`; returns the progress and the best values, or None where there is no checkpoint.

    Raises TrainingError if the checkpoint belongs to another job or does not fit.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    for left_over in folder.glob(f".{FILE}.*"):  # of a kill in the middle of a write; each is as large as the checkpoint
        left_over.unlink(missing_ok=True)
    if not path.is_file():
        return None
    hint = f"choose another --out folder, or delete {folder} to start again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(values.device) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise TrainingError(f"{path} is damaged: {error}", hint=hint) from error
    if header.get("job") != job_digest:
        raise TrainingError(f"{folder} holds a checkpoint of another job: its config, data or base differ from this one's", hint=hint)
    if tensors["values"].shape != values.shape:
        raise TrainingError(f"{path} holds {tensors['values'].numel()} parameters, but the job trains {values.numel()}", hint=hint)
    progress = Progress(**json.loads(header["progress"]))
    progress.evaluations = [(int(step), float(loss)) for step, loss in progress.evaluations]
    with torch.no_grad():
        values.copy_(tensors["values"])
    if "exp_avg" in tensors:
        parameters = _parameters(optimizer)
        pieces = {name: tensors[name].split([parameter.numel() for parameter in parameters]) for name in _MOMENTS}
        for index, parameter in enumerate(parameters):
            step = torch.tensor(float(progress.step), dtype=torch.float32)
            optimizer.state[parameter] = {"step": step, **{name: piece[index].clone() for name, piece in pieces.items()}}
    return progress, tensors.get("best")


def _parameters(optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
