"""Runs in a process of its own: read PyReFT's pickled tensors under limits and write them as safetensors.

Started by importer.py as a script. It reads one JSON object from standard input, {"files": [paths], "out": path, "memory_bytes",
"file_bytes", "cpu_s"}, and writes one to standard output: {} or {"error": sentence, "file": path}. torch's weights-only loader refuses everything but
tensors and plain containers; the limits bound what a file can still cost: memory, time, and the size of what is written. Only `out` is written.
"""

from __future__ import annotations

import json
import resource
import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

_ROTATION = "rotate_layer.parametrizations.weight."
_COUNTS = ("embed_dim", "interchange_dim")  # numbers that PyReFT keeps among the tensors


def main() -> None:
    job = json.load(sys.stdin)
    out = sys.stdout
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    # After torch is there: its libraries take gigabytes of address space.
    limits = [(resource.RLIMIT_AS, _address_space() + job["memory_bytes"]), (resource.RLIMIT_FSIZE, job["file_bytes"])]
    for limit, value in [*limits, (resource.RLIMIT_CPU, job["cpu_s"]), (resource.RLIMIT_CORE, 0)]:
        resource.setrlimit(limit, (value, value))
    json.dump(convert(job["files"], job["out"]), out)


def convert(files: list[str], out: str) -> dict[str, str]:
    """Write the tensors of all files to `out`, as "<number of the file>/<name>"; returns {} or what is wrong with one of them."""
    tensors: dict[str, Tensor] = {}
    for number, path in enumerate(files):
        try:
            found = _compact(_plain_tensors(torch.load(path, map_location="cpu", weights_only=True)))
        except MemoryError:
            return {"error": "needs more memory than is allowed for its size", "file": path}
        except Exception as error:  # whatever a hostile file raises is an answer about that file
            return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300], "file": path}
        tensors |= {f"{number}/{name}": tensor for name, tensor in found.items()}
    save_file(tensors, out)
    return {}


def _plain_tensors(loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, but a dict of tensors was expected")
    tensors = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its entry {name!r:.60} is a {type(value).__name__}, but a tensor was expected")
        if name in _COUNTS:
            continue
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            raise ValueError(f"its tensor {name!r:.60} is {value.dtype} on {value.device}, but a dense float tensor was expected")
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the matrix [d, r] that torch's orthogonal parametrization stands for in place of its two parts [d, r] and [d, d].

    torch.nn.utils.parametrizations.orthogonal, Householder map: base · H₁ … H_r · diag, the reflections below the diagonal of `original`.
    """
    original, base = tensors.pop(_ROTATION + "original", None), tensors.pop(_ROTATION + "0.base", None)
    if original is None:
        return tensors
    below = original.float().tril(-1)
    rotation = torch.linalg.householder_product(below, 2 / (1 + (below * below).sum(0))) * original.diagonal().int()
    return {**tensors, "rotate_layer": rotation if base is None else base.float() @ rotation}


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (one line, before anything else may be imported)
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
