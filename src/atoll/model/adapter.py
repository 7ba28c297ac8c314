"""What an adapter is: its frozen description (AdapterSpec) and its tensors by site (Adapter): LoRA factors, ReFT edits (reft.py), or both.

Everything that trains, composes, serves or stores adapters passes these two. Scaling is computed once, when an adapter is made or loaded, and kept
with its module, so alpha, rank patterns and rsLoRA mean the same everywhere. Files are in adapter_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterFormatError, BaseMismatch
from atoll.model.families import HEADS
from atoll.model.reft import EditSite, Intervention, ReftSpec, new_intervention, tensor_shapes
from atoll.model.sites import TARGETS, Site, module_name, module_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASSIFIES = "SEQ_CLS"


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter's description: what PEFT's adapter_config.json says of LoRA, and its ReFT parts.

    rank and alpha hold for every target module unless rank_pattern or alpha_pattern names the module. layers_to_transform of None means all layers.
    target_modules holds names of linears ("q_proj") or dotted ends of their paths ("layers.3.self_attn.q_proj"); none of them: no LoRA, and rank is
    the largest of the ReFT parts (`reft_only`). fan_in_fan_out: what PEFT notes of linears that store their weight transposed (GPT-2's); factors are
    the same either way. task_type: what the base does, in PEFT's words; SEQ_CLS means that the adapter has a classifier
    head of its own.
    """

    base: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    use_dora: bool = False
    reft: tuple[ReftSpec, ...] = ()
    fan_in_fan_out: bool = False
    task_type: str = "CAUSAL_LM"

    @classmethod
    def reft_only(cls, base: str, parts: Iterable[ReftSpec]) -> AdapterSpec:
        """The spec of an adapter without LoRA modules: no target modules, and the largest rank of its parts as rank and alpha."""
        reft = tuple(parts)
        rank = max(part.max_rank for part in reft)
        return cls(base, rank, float(rank), (), reft=reft)

    @property
    def classifies(self) -> bool:
        """Whether a classifier head belongs to it."""
        return self.task_type == CLASSIFIES

    @property
    def kind(self) -> str:
        """ "lora", "reft", or "lora+reft"."""
        return "+".join(kind for kind, there in (("lora", bool(self.target_modules) or not self.reft), ("reft", bool(self.reft))) if there)

    def edit_sites(self, num_layers: int) -> list[EditSite]:
        """Every place that the ReFT parts edit in a base of `num_layers` blocks, in file order."""
        return [site for part, spec in enumerate(self.reft) for site in spec.sites(part, num_layers)]

    def sites(self, num_layers: int, targets: Iterable[str] = TARGETS) -> list[Site]:
        """Every (layer, target) that this adapter changes in a base of `num_layers` blocks with these linears, in file order."""
        layers = range(num_layers) if self.layers_to_transform is None else sorted(set(self.layers_to_transform))
        outside = [layer for layer in layers if not 0 <= layer < num_layers]
        if outside:
            raise BaseMismatch(
                f"layers_to_transform names layer {outside[0]}, but the base has {num_layers} layers (0 to {num_layers - 1})",
                hint="leave the layer out, or use the base that the adapter was made for",
            )
        wanted = frozenset(self.target_modules)
        known = tuple(targets)
        return [site for layer in layers for target in known if not wanted.isdisjoint(_ends(site := Site(layer, target)))]

    def rank_at(self, site: Site | str) -> int:
        """The rank at a site or at a linear's path: rank_pattern's entry that names it best, else `rank`."""
        return int(_by_pattern(self.rank_pattern, site, self.rank))

    def scaling_at(self, site: Site | str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        alpha, rank = float(_by_pattern(self.alpha_pattern, site, self.alpha)), self.rank_at(site)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def names(keys: Iterable[str], site: Site | str) -> str | None:
    """PEFT's lookup: the first key that equals the site's module path or is a dotted suffix of it ("q_proj", "layers.3.self_attn.q_proj").

    A site of another family than the decoder's is given as its module path.

    Keys are literal here; PEFT also reads them as regular expressions, which adapter_files.py refuses.
    """
    ends = _ends(site)
    return next((key for key in keys if key in ends), None)


def _ends(site: Site | str) -> set[str]:
    """All that a key may call a site by: its path and the dotted ends of it."""
    parts = (site if isinstance(site, str) else module_path(site)).split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _by_pattern(pattern: Mapping[str, Any], site: Site | str, default: Any) -> Any:
    found = [end for end in _ends(site) if end in pattern] if pattern else []
    key = names(pattern, site) if len(found) > 1 else found[0] if found else None  # a stranger's pattern may be long: walked where it must be
    return default if key is None else pattern[key]


@dataclass(frozen=True)
class LoraModule:
    """The factors of one site: a [r, d_in], b [d_out, r], and the scaling that the update s (x Aᵀ) Bᵀ is multiplied by.

    magnitude [d_out]: DoRA's trained lengths of the rows of W + s B A (model.dora).
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Adapter:
    """A spec, the factors of every linear it changes and the tensors of every place it edits.

    `manifest` is what PEFT's config has no field for (prompt, base fingerprint, training). head: the tensors of its classifier by their names in the
    model ("classifier.weight"), where the base is an encoder.
    """

    spec: AdapterSpec
    modules: Mapping[Site, LoraModule]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    edits: Mapping[EditSite, Intervention] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank of its LoRA modules; 0 without any."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def num_classes(self) -> int:
        """How many classes its classifier tells apart; 0 without one."""
        return next((int(tensor.shape[0]) for name, tensor in self.head.items() if name in ("classifier.weight", "classifier.out_proj.weight")), 0)

    @property
    def num_parameters(self) -> int:
        lora = sum(tensor.numel() for module in self.modules.values() for tensor in module.tensors)
        edits = sum(tensor.numel() for found in self.edits.values() for tensor in found.tensors.values())
        return lora + edits + sum(tensor.numel() for tensor in self.head.values())

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> None:
        """Raise BaseMismatch at the first site that does not fit a base, or that the base has and the adapter lacks.

        shapes maps a target to its linear's (d_out, d_in).
        """
        hint = "use the base that the adapter was made for" + (f": {self.spec.base}" if self.spec.base else "")
        self._check_head_fits(shapes, hint)
        for site in self.spec.sites(num_layers, shapes):
            if site not in self.modules:
                raise BaseMismatch(
                    f"the adapter's config covers {module_path(site)}, but its file has no factors for it (the base has {num_layers} layers)",
                    hint=hint,
                )
        for site, module in self.modules.items():
            if site.layer >= num_layers:
                raise BaseMismatch(f"the adapter changes layer {site.layer}, but the base has {num_layers} layers", hint=hint)
            if site.target not in shapes:
                raise BaseMismatch(f"the adapter changes {module_path(site)}, which the base does not have", hint=hint)
            d_out, d_in = shapes[site.target]
            if module.a.shape[1] != d_in or module.b.shape[0] != d_out:
                raise BaseMismatch(
                    f"layer {site.layer} {site.target}: the adapter's factors are for a {module.b.shape[0]} x {module.a.shape[1]} linear, "
                    f"the base has {d_out} x {d_in}",
                    hint=hint,
                )
            if module.magnitude is not None and tuple(module.magnitude.shape) != (d_out,):
                found = list(module.magnitude.shape)
                raise BaseMismatch(
                    f"layer {site.layer} {site.target}: the adapter's magnitude has shape {found}, the base needs [{d_out}]", hint=hint
                )
        self._check_edits_fit(hidden_size(shapes), num_layers, hint)

    def _check_head_fits(self, shapes: Mapping[str, tuple[int, int]], hint: str) -> None:
        if not self.head:
            return
        expected = next((names for family, names in HEADS.items() if next(iter(shapes)).startswith(f"{family}.")), None)
        if expected is None:
            raise BaseMismatch("the adapter has a classifier head, but the base writes text", hint=hint)
        if set(expected) != set(self.head):
            raise BaseMismatch(f"the adapter's classifier has {', '.join(sorted(self.head))}; the base's family has {', '.join(expected)}", hint=hint)
        hidden, classes = hidden_size(shapes), self.num_classes
        for name, tensor in self.head.items():
            rows = hidden if ".dense." in name else classes
            wanted = (rows, hidden) if name.endswith("weight") else (rows,)
            if tuple(tensor.shape) != wanted:
                raise BaseMismatch(f"{name} has shape {list(tensor.shape)}, but the base needs {list(wanted)}", hint=hint)

    def _check_edits_fit(self, hidden: int, num_layers: int, hint: str) -> None:
        expected = self.spec.edit_sites(num_layers)
        if set(expected) != set(self.edits):
            site = min(set(expected) ^ set(self.edits))
            what = "has no tensors for" if site in expected else "has tensors, which its config does not cover, for"
            raise BaseMismatch(f"the adapter {what} the edit of layer {site.layer}'s {site.component} (the base has {num_layers} layers)", hint=hint)
        for site, found in self.edits.items():
            shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
            wanted = tensor_shapes(self.spec.reft[site.part], site.layer, hidden)
            if shapes != wanted:
                raise BaseMismatch(f"layer {site.layer} {site.component}: the edit has tensors {shapes}, but the base needs {wanted}", hint=hint)


def hidden_size(shapes: Mapping[str, tuple[int, int]]) -> int:
    """D of a base whose linears have these (d_out, d_in): what its first linear reads."""
    return shapes["q_proj" if "q_proj" in shapes else next(iter(shapes))][1]


def new_adapter(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]], num_layers: int, generator: torch.Generator) -> Adapter:
    """A fresh adapter in float32; DoRA's magnitudes, which depend on the base, are the caller's to add.

    LoRA: A uniform in ±sqrt(1 / d_in) (Kaiming with a = sqrt(5), as PEFT does), B zero, so the update starts at zero.

    ReFT: see reft.new_intervention. shapes maps a target to its linear's (d_out, d_in). Raises AdapterFormatError when the spec reaches no site.
    """
    import torch

    modules: dict[Site, LoraModule] = {}
    for site in spec.sites(num_layers, shapes):
        d_out, d_in = shapes[site.target]
        rank, bound = spec.rank_at(site), 1 / math.sqrt(d_in)
        a = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
        modules[site] = LoraModule(a, torch.zeros(d_out, rank), spec.scaling_at(site))
    hidden = hidden_size(shapes)
    edits = {site: new_intervention(spec.reft[site.part], site.layer, hidden, generator) for site in spec.edit_sites(num_layers)}
    if not modules and not edits:
        raise AdapterFormatError(
            "the adapter changes no module",
            hint=f"name at least one target module of {', '.join(dict.fromkeys(map(module_name, shapes)))} and one layer",
        )
    return Adapter(spec, modules, edits=edits)
