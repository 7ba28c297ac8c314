"""Adapters on disk: PEFT's two files, and the manifest beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, for LoRA exactly as PEFT writes and reads them, and `manifest.json` for what
PEFT has no field for. ReFT edits are in the same two files (reft_files.py). Files come from strangers: nothing here runs code, loads a pickle,
compiles a pattern from a file or trusts a header; an option that Atoll does not apply is refused by name, because applying the rest would be silently
wrong.

Used by the hub (check on publish and pull), train (write), engine and workflows (read); generic_adapter.py reads other families' adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterFormatError
from atoll.files import write_file
from atoll.model.adapter import Adapter, AdapterSpec, LoraModule
from atoll.model.families import HEADS
from atoll.model.peft_config import peft_config, read_config
from atoll.model.reft import EditSite, Intervention
from atoll.model.reft_files import LORA_REFT, REFT, check_edit_shapes, edit_tensors, edits_of, is_edit_key, last_layer, read_reft_config, reft_config
from atoll.model.safetensors_header import check_header, lora_sites
from atoll.model.sites import MAGNITUDE, TARGETS, Site, in_file_order, magnitude_key, peft_key

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

HEAD_TENSORS = tuple(name for names in HEADS.values() for name in names)

_PREFIX = "base_model.model."
_CONFIG_LIMIT = 1 << 20


def check_adapter_files(folder: Path) -> AdapterSpec:
    """Check everything that can be checked without a base: form, options, names, shapes, finite values. Returns the spec.

    Raises AdapterFormatError (damaged, hostile, incomplete) or UnsupportedAdapter (an option that Atoll does not apply).
    """
    return read_adapter(folder).spec


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; tensors keep their file's dtype. Raises as `check_adapter_files` does."""
    refuse_pickles(folder)
    config = read_object(folder / CONFIG_FILE)
    read = read_reft_config if config.get("peft_type") in (REFT, LORA_REFT) else read_config
    spec = read(config, folder / CONFIG_FILE)
    modules, edits, head = _read_tensors(folder / WEIGHTS_FILE, spec)
    return Adapter(spec, modules, read_manifest(folder), edits, head)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest beside the two files, or an empty dict for a folder that PEFT wrote."""
    path = folder / MANIFEST_FILE
    return read_object(path) if path.is_file() else {}


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write the folder's three files, each through a temporary file. Tensors are stored contiguous in their own dtype, factors in PEFT's names."""
    from safetensors.torch import save

    assert {site.part for site in adapter.edits} == set(range(len(adapter.spec.reft))), "an adapter lacks the edits of a part that its spec names"
    tensors = edit_tensors(adapter.spec, adapter.edits)
    for site, module in adapter.modules.items():
        tensors[peft_key(site, "A")], tensors[peft_key(site, "B")] = module.a.detach().contiguous(), module.b.detach().contiguous()
        assert (module.magnitude is not None) == adapter.spec.use_dora, "the spec and the modules differ on DoRA"
        if module.magnitude is not None:
            tensors[magnitude_key(site)] = module.magnitude.detach().contiguous()
    tensors |= {_PREFIX + name: tensor.detach().contiguous() for name, tensor in adapter.head.items()}
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    # Not sorted: PEFT takes the first entry of rank_pattern and alpha_pattern that names a module, so their order has a meaning.
    config = reft_config(adapter.spec) if adapter.spec.reft else peft_config(adapter.spec)
    write_file(folder / CONFIG_FILE, dump_json(config, sort=False))
    if adapter.manifest:
        write_file(folder / MANIFEST_FILE, dump_json(adapter.manifest, sort=True))


def dump_json(value: Mapping[str, Any], sort: bool) -> bytes:
    """An object as the files hold it."""
    return (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()


def refuse_pickles(folder: Path) -> None:
    """Raise AdapterFormatError unless the folder holds its weights as safetensors, saying so where they are a pickle."""
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


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter, read under a limit. Raises AdapterFormatError."""
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


def _read_tensors(path: Path, spec: AdapterSpec) -> tuple[dict[Site, LoraModule], dict[EditSite, Intervention], dict[str, Tensor]]:
    from safetensors.torch import load_file

    shapes = check_header(path)
    edits = {name: shape for name, shape in shapes.items() if is_edit_key(name)}
    magnitudes = {name: shape for name, shape in shapes.items() if name.endswith(MAGNITUDE)}
    heads = {_PREFIX + name for name in HEAD_TENSORS} & set(shapes) if spec.classifies else set()
    if spec.classifies and not heads:
        raise AdapterFormatError(f"{path} has no classifier head, but its config says that one was saved", hint="the file is incomplete")
    sites = lora_sites({name: shape for name, shape in shapes.items() if name not in edits and name not in magnitudes and name not in heads}, path)
    _check_magnitudes(magnitudes, {magnitude_key(site): shapes[peft_key(site, "B")][0] for site in sites}, spec, path)
    named = (*(site.layer for site in sites), *(spec.layers_to_transform or ()), *(layer for part in spec.reft for layer in part.layers or ()))
    num_layers = 1 + max((last_layer(edits), *named))
    check_edit_shapes(edits, spec, num_layers, path)
    if spec.kind == "reft" and sites:
        raise AdapterFormatError(f"{path} has LoRA factors, but its config says {REFT}", hint="the file belongs to another config")
    tensors = load_file(path)
    modules = _modules_of(tensors, sites, spec, num_layers, path)
    head = {name.removeprefix(_PREFIX): tensors[name] for name in sorted(heads)}
    for name, tensor in head.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterFormatError(f"{path}: {name} has values that are not finite (NaN or infinity)", hint="retrain the adapter")
    return modules, edits_of(tensors, spec, num_layers, path), head


def _check_magnitudes(found: Mapping[str, tuple[int, ...]], widths: Mapping[str, int], spec: AdapterSpec, path: Path) -> None:
    """A magnitude for every linear of a DoRA adapter, as long as the linear is wide, and none without DoRA."""
    wanted = {key: (width,) for key, width in widths.items()} if spec.use_dora else {}
    for key in sorted({*wanted, *found}):
        if key not in found:
            raise AdapterFormatError(f"{path} lacks {key}, but its config says use_dora", hint="the file is incomplete or belongs to another config")
        if key not in wanted:
            why = "which belongs to no factors of it" if spec.use_dora else "but its config does not say use_dora"
            raise AdapterFormatError(f"{path} has a tensor {key!r}, {why}", hint="the file belongs to another config")
        if found[key] != wanted[key]:
            raise AdapterFormatError(f"{path}: {key} has shape {found[key]}, but the factors beside it need {wanted[key]}")


def _modules_of(tensors: Mapping[str, Tensor], sites: set[Site], spec: AdapterSpec, num_layers: int, path: Path) -> dict[Site, LoraModule]:
    modules: dict[Site, LoraModule] = {}
    for site in in_file_order(sites):
        a, b = tensors[peft_key(site, "A")], tensors[peft_key(site, "B")]
        rank = spec.rank_at(site)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterFormatError(
                f"{path}: layer {site.layer} {site.target} has factors {tuple(a.shape)} and {tuple(b.shape)}, but the config says rank {rank}"
            )
        magnitude = tensors[magnitude_key(site)] if spec.use_dora else None
        for name, tensor in ((peft_key(site, "A"), a), (peft_key(site, "B"), b), (magnitude_key(site), magnitude)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise AdapterFormatError(f"{path}: {name} has values that are not finite (NaN or infinity)", hint="retrain the adapter")
        modules[site] = LoraModule(a, b, spec.scaling_at(site), magnitude)
    expected = set(spec.sites(num_layers, {site.target for site in modules} | set(TARGETS)))
    if expected != set(modules):
        site = min(expected ^ set(modules))
        what = "has no factors for" if site in expected else "has factors, which its config does not cover, for"
        raise AdapterFormatError(f"{path} {what} layer {site.layer} {site.target}", hint="the file is incomplete or belongs to another config")
    return modules
