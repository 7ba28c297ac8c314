"""PyReFT's folders: `config.json` and one pickle of tensors an intervention, read without trusting either.

Pickles are opened in a process of their own (unpickle.py), by torch's weights-only loader and under limits of memory, time and file size; here only
safetensors are read. The class names of the config are looked up in a closed list, never imported. Folders of PyReFT's versions before 2025, with
dots in the file names, are read too. What the files do not say, the caller says: the positions, the activation, and whether sides are tied.

Used by folder.py (ReftModel.load, load_intervention) and convert.py (an adapter of ours).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.reft import Intervention

if TYPE_CHECKING:
    from torch import Tensor

# PyReFT's class names and the methods of model.reft that they are.
METHODS = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "orthogonal_direft",
    "NodireftIntervention": "direft",
}
MODEL_FILE = "pytorch_model.bin"  # trained tensors of the base itself: LoRA factors, a classification head

_CLASS = re.compile(r"<class '(?:[A-Za-z_][\w]*\.)*([A-Za-z_]\w*)'>")
_CONFIG_LIMIT, _MOST_INTERVENTIONS = 1 << 20, 4096
_HINT = "a folder of PyReFT's has config.json and one intkey_*.bin for each intervention; ReftModel.save writes both"


@dataclass(frozen=True)
class ImportLimits:
    """What reading one folder may use: bytes of memory beyond four times its files, seconds of computing, seconds on the clock."""

    memory_bytes: int = 512 * 1024 * 1024
    cpu_s: int = 120
    wall_s: float = 300.0


@dataclass(frozen=True)
class Saved:
    """One intervention of a folder. component: PyReFT's name or a path in the model, with `layer` or None; link: equal where tensors are shared."""

    layer: int | None
    component: str
    method: str
    tensors: Intervention
    link: str | None = None


@dataclass(frozen=True)
class PyreftFolder:
    """The interventions in the order in which PyReFT's unit_locations count them, and the base's own tensors where they were saved."""

    saved: tuple[Saved, ...]
    base_tensors: Mapping[str, Tensor]


def is_pyreft_folder(folder: Path) -> bool:
    """Whether a folder looks like one that PyReFT wrote, with a config or, as its trainer's checkpoints are, without."""
    return any(folder.glob("intkey_*.bin"))


def read_pyreft(
    folder: Path, *, include_model: bool = False, built: Mapping[str, str] | None = None, limits: ImportLimits | None = None
) -> PyreftFolder:
    """Read all of a folder; tensors keep their dtype, R is given as [r, d] with the rows that PyReFT's rotation stands for.

    include_model: also MODEL_FILE, which must be there. built: the key and class name of each intervention of a model built as the saved one was, for
    a folder without a config. Raises AdapterFormatError for what is missing, damaged or hostile, UnsupportedAdapter for interventions that are not
    PyReFT's six.
    """
    if built is not None and not (folder / "config.json").is_file():
        representations: list[list[Any]] = [[None, key] for key in built]
        types = [_method(f"<class '{name}'>", folder) for name in built.values()]
        files = [_present(folder, [f"intkey_{key}.bin"]) for key in built]
    else:
        representations, types = _read_config(folder / "config.json")
        files = _files(folder, representations)
    paths = [*files, folder / MODEL_FILE] if include_model else files
    if include_model and not paths[-1].is_file():
        raise AdapterFormatError(f"{folder} has no {MODEL_FILE}", hint="it was saved without the base's own tensors: leave include_model out")
    loaded = _unpickled(list(dict.fromkeys(paths)), limits or ImportLimits())
    saved = []
    for path, entry, method in zip(files, representations, types, strict=True):
        layer, component = entry[0], entry[1]
        link = entry[9] if len(entry) > 9 and entry[9] is not None else None
        tensors = _intervention(method, loaded[path], path)
        saved.append(Saved(None if "." in component else layer, component, method, tensors, None if link is None else str(link)))
    return PyreftFolder(tuple(saved), loaded[paths[-1]] if include_model else {})


def _read_config(path: Path) -> tuple[list[list[Any]], list[str]]:
    """The representations (layer, component, unit, …), and the method of each."""
    if not path.is_file():
        raise AdapterFormatError(
            f"{path.parent} has no config.json", hint="PyReFT's trainer leaves it out: build the model as it was built, then call load_intervention"
        )
    if path.stat().st_size > _CONFIG_LIMIT:
        raise AdapterFormatError(f"{path} is larger than {_CONFIG_LIMIT} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not JSON: {error}") from error
    entries = config.get("representations") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_INTERVENTIONS or not all(map(_is_representation, entries)):
        raise AdapterFormatError(f"{path} has no list of representations [layer, component, unit, …]", hint=_HINT)
    if config.get("mode", "parallel") != "parallel":
        raise UnsupportedAdapter(f"{path}: mode is {config['mode']!r:.60}, but only 'parallel' interventions edit a prompt on their own")
    for entry in entries:
        if entry[2] != "pos":
            raise UnsupportedAdapter(f"{path}: unit is {entry[2]!r:.60}, but only 'pos', whole hidden states by place, is read")
    types = config.get("intervention_types")
    names = types if isinstance(types, list) else [types] * len(entries)
    if len(names) != len(entries):
        raise AdapterFormatError(f"{path} has {len(entries)} representations, but {len(names)} intervention types")
    return entries, [_method(name, path) for name in names]


def _is_representation(entry: Any) -> bool:
    if not isinstance(entry, list) or not 4 <= len(entry) <= 32:
        return False
    layer, component, unit, units = entry[:4]
    return isinstance(layer, int) and isinstance(component, str) and isinstance(unit, str) and isinstance(units, int) and len(component) < 300


def _method(name: Any, path: Path) -> str:
    found = _CLASS.fullmatch(name) if isinstance(name, str) else None
    if found is None or found[1] not in METHODS:
        raise UnsupportedAdapter(
            f"{path} names the intervention type {name!r:.100}, which is none of PyReFT's six",
            hint=f"types that are read: {', '.join(METHODS)}",
        )
    return METHODS[found[1]]


def _files(folder: Path, representations: Sequence[Sequence[Any]]) -> list[Path]:
    """The file of each representation, under the name that any version of PyReFT gives it: `layer_3_comp_…#0`, `layer.3.comp.…#0`."""
    seen: Counter[tuple[Any, ...]] = Counter()
    files = []
    for layer, component, unit, units, *_ in representations:
        place = (component,) if "." in component else (layer, component)
        count = seen[*place, unit, units]
        seen[*place, unit, units] += 1
        names = []
        for joint, word in (("_", "comp"), (".", "comp"), (".", "repr")):
            where = [] if "." in component else ["layer", str(layer)]
            parts = [*where, word, component.replace(".", joint), "unit", unit, "nunit", str(units)]
            names.append(f"intkey_{joint.join(parts)}#{count}.bin")
        files.append(_present(folder, names))
    return files


def _present(folder: Path, names: Sequence[str]) -> Path:
    """The first of the names that is a file of the folder."""
    file = next((folder / name for name in names if "/" not in name and (folder / name).is_file()), None)
    if file is None:
        raise AdapterFormatError(f"{folder} has no {names[0]}", hint=_HINT)
    return file


def _intervention(method: str, tensors: Mapping[str, Tensor], path: Path) -> Intervention:
    """PyReFT's tensors by the names of model.reft, R transposed. Raises AdapterFormatError unless they are the method's and fit each other."""
    named = dict(tensors)
    if "rotate_layer" in named:
        rotation = named["rotate_layer"]
        named["rotate_layer"] = rotation.T.contiguous() if rotation.dim() == 2 else rotation
    names = {
        "loreft": {"r": "rotate_layer", "w": "weight", "b": "bias"},
        "orthogonal_direft": {"r": "rotate_layer", "w": "learned_source.weight", "b": "learned_source.bias"},
        "consreft": {"r": "rotate_layer", "b": "learned_source"},
        "lobireft": {"r": "rotate_layer", "b": "learned_source"},
    }.get(method, {"r": "proj_layer.weight", "w": "learned_source.weight", "b": "learned_source.bias", "c": "proj_layer.bias"})
    missing = [name for short, name in names.items() if name not in named and short != "c"]
    strange = sorted(set(named) - set(names.values()))
    if missing or strange:
        raise AdapterFormatError(f"{path} has tensors {sorted(named)!r:.200}, but a {method} needs {', '.join(names.values())}", hint=_HINT)
    found = {short: named[name] for short, name in names.items() if name in named}
    rank, hidden = found["r"].shape if found["r"].dim() == 2 else (0, 0)
    for short, tensor in found.items():
        if not rank or tuple(tensor.shape) != ((rank, hidden) if short in "rw" else (rank,)):
            raise AdapterFormatError(f"{path}: {names[short]} has shape {tuple(tensor.shape)}, which does not fit a rank of {rank} and {hidden} wide")
        if not bool(tensor.isfinite().all()):
            raise AdapterFormatError(f"{path}: {names[short]} has values that are not finite (NaN or infinity)", hint="train the adapter again")
    return Intervention(**found)


def _unpickled(files: Sequence[Path], limits: ImportLimits) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each file, read by unpickle.py in a process of its own."""
    from safetensors.torch import load_file

    total = sum(path.stat().st_size for path in files)
    with tempfile.TemporaryDirectory(prefix="atoll-pyreft-") as name:
        out = Path(name) / "tensors.safetensors"
        job = {
            "files": [str(path.resolve()) for path in files],
            "out": str(out),
            "memory_bytes": limits.memory_bytes + 4 * total,
            "file_bytes": total + (1 << 20) + 1024 * len(files),
            "cpu_s": limits.cpu_s,
        }
        said = _in_a_process(job, Path(name), limits.wall_s)
        if said is None:
            raise AdapterFormatError(
                f"{files[0].parent} could not be read within {limits.memory_bytes >> 20} MB beyond four times its size, {limits.cpu_s} s of "
                f"computing and {limits.wall_s:g} s on the clock",
                hint="its files are damaged, or are not what PyReFT writes",
            )
        if said:
            hint = "only tensors are read from a pickle, never code"
            raise AdapterFormatError(f"{said['file']} is no file of plain tensors: {said['error']}", hint=hint)
        loaded = load_file(out)
    tensors: dict[Path, dict[str, Tensor]] = {path: {} for path in files}
    for key, tensor in loaded.items():
        number, _, label = key.partition("/")
        tensors[files[int(number)]][label] = tensor
    return tensors


def _in_a_process(job: Mapping[str, Any], folder: Path, wall_s: float) -> dict[str, str] | None:
    """What unpickle.py answers to a job, or None if it came to no answer: killed by a limit, or by the clock here."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # Files, not pipes: the limit on file sizes bounds what the child prints.
    with (folder / "job.json").open("rb") as stdin, (folder / "answer.json").open("wb") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py"))],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a process group of its own, so that one kill reaches all of it
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wall_s)
        with contextlib.suppress(ProcessLookupError):  # everything in the group has ended
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    try:
        said: dict[str, str] = json.loads((folder / "answer.json").read_bytes())
    except ValueError:
        return None
    return said
