"""LoRA adapters of other families than the native decoder's: factors by the path of a linear in transformers' model.

The two files are PEFT's, the rules are those of adapter_files.py: no pickle is loaded, no pattern is run, and an option that is not applied is
refused by name. What is known of a base comes from its model (generic.py), so whether an adapter fits is asked there.

Used by lorahub, for encoder-decoder bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import AdapterFormatError, BaseMismatch, UnsupportedAdapter
from atoll.files import write_file
from atoll.model.adapter import AdapterSpec, LoraModule, names
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, dump_json, read_manifest, read_object, refuse_pickles
from atoll.model.peft_config import peft_config, read_config
from atoll.model.safetensors_header import check_header, lora_paths


@dataclass(frozen=True)
class GenericAdapter:
    """A spec, and the factors of every linear it changes, by the linear's path ("encoder.block.0.layer.0.SelfAttention.q").

    task_type: PEFT's word for what the base does. `manifest` is what PEFT's config has no field for.
    """

    spec: AdapterSpec
    modules: Mapping[str, LoraModule]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    task_type: str = "SEQ_2_SEQ_LM"

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())

    def check_fits(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raise BaseMismatch at the first linear that does not fit a base, or that the base has and the adapter lacks.

        linears maps a path to the linear's (d_out, d_in).
        """
        hint = "use the base that the adapter was made for" + (f": {self.spec.base}" if self.spec.base else "")
        for path, module in self.modules.items():
            if path not in linears:
                raise BaseMismatch(f"the adapter changes {path}, which the base does not have", hint=hint)
            found, wanted = (module.b.shape[0], module.a.shape[1]), linears[path]
            if found != wanted:
                raise BaseMismatch(
                    f"{path}: the adapter's factors are for a {found[0]} x {found[1]} linear, the base has {wanted[0]} x {wanted[1]}", hint=hint
                )
        if self.spec.layers_to_transform is not None:
            return  # which layers PEFT means by that depends on the family; the file says which it wrote
        missing = next((path for path in linears if path not in self.modules and names(self.spec.target_modules, path)), None)
        if missing is not None:
            raise BaseMismatch(f"the adapter's config covers {missing}, but its file has no factors for it", hint=hint)


def read_generic_adapter(folder: Path) -> GenericAdapter:
    """Read an adapter folder of any family; tensors keep their file's dtype.

    Raises AdapterFormatError (damaged, hostile, incomplete) or UnsupportedAdapter (an option that Atoll does not apply).
    """
    from safetensors.torch import load_file

    refuse_pickles(folder)
    config, weights = read_object(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    spec = read_config(config, folder / CONFIG_FILE, known=None)
    if spec.use_dora:
        raise UnsupportedAdapter(
            f"{folder / CONFIG_FILE}: use_dora is true, which Atoll applies to bases of the Llama family only",
            hint="retrain the adapter without that option",
        )
    paths = lora_paths(check_header(weights), weights)
    tensors = load_file(weights)
    modules = {}
    for path in sorted(paths, key=_natural):
        a, b = tensors[_key(path, "A")], tensors[_key(path, "B")]
        if names(spec.target_modules, path) is None:
            raise AdapterFormatError(f"{weights} has factors, which its config does not cover, for {path}", hint="it belongs to another config")
        rank = spec.rank_at(path)
        if a.shape[0] != rank:
            raise AdapterFormatError(f"{weights}: {path} has factors {tuple(a.shape)} and {tuple(b.shape)}, but the config says rank {rank}")
        for tensor in (a, b):
            if not bool(tensor.isfinite().all()):
                raise AdapterFormatError(f"{weights}: {path} has values that are not finite (NaN or infinity)", hint="retrain the adapter")
        modules[path] = LoraModule(a, b, spec.scaling_at(path))
    return GenericAdapter(spec, modules, read_manifest(folder), str(config.get("task_type") or "SEQ_2_SEQ_LM"))


def write_generic_adapter(folder: Path, adapter: GenericAdapter) -> None:
    """Write the folder as PEFT reads it, and the manifest beside. The modules' scalings must be what the spec says."""
    from safetensors.torch import save

    assert all(module.scaling == adapter.spec.scaling_at(path) for path, module in adapter.modules.items()), "the spec says another scaling"
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[_key(path, "A")], tensors[_key(path, "B")] = module.a.detach().contiguous(), module.b.detach().contiguous()
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG_FILE, dump_json({**peft_config(adapter.spec), "task_type": adapter.task_type}, sort=False))
    if adapter.manifest:
        write_file(folder / MANIFEST_FILE, dump_json(adapter.manifest, sort=True))


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
