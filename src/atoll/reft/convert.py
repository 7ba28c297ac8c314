"""From PyReFT's folders and from a ReftModel to Atoll's Adapter, which is trained, stored and served natively, and back to a ReftModel.

All are lists of interventions, each a place and some tensors. An Adapter also says which positions are edited, which the others leave to whoever
calls the model, so they must be given. Formulas and tensors are the same on both sides (model.reft and interventions.py), so the conversion copies:
logits agree but for rounding. A folder becomes a ReftModel by ReftModel.load.

Used by callers of atoll.reft and by `atoll hub import-pyreft`.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atoll.errors import ConfigError, UnsupportedAdapter
from atoll.model.adapter import Adapter, AdapterSpec
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.positions import PREFIX, SUFFIX, Positions
from atoll.model.reft import ACTIVATIONS, COMPONENTS, LEARNED, ORTHONORMAL, PAPER_POSITIONS, SUBTRACTS, EditSite, Intervention, ReftSpec
from atoll.reft.importer import METHODS, read_pyreft

if TYPE_CHECKING:
    from atoll.reft.interventions import Intervention as Module
    from atoll.reft.model import ReftModel

_log = logging.getLogger(__name__)
_PATH = re.compile(r"(?:.*\.)?layers\[(\d{1,4})\](?:\.(self_attn|mlp))?\.(input|output)")
_ATTENTION_OR_MLP = {None: "block", "self_attn": "attention", "mlp": "mlp"}
_FREED = {"loreft": "noreft", "orthogonal_direft": "direft", "consreft": "noreft", "lobireft": "direft"}  # the same formula with any R
_DRIFT = 1e-3  # of max |R Rᵀ - I|, from which on R is not called orthonormal; PyReFT's own stays below 1e-5 unless its training was resumed


class Placed(NamedTuple):
    """One intervention and where it acts. shared: equal for interventions with the same tensors."""

    layer: int | None
    component: str
    method: str
    tensors: Intervention
    activation: str | None = None
    dropout: float = 0.0
    shared: object = None


def import_adapter(folder: str | Path, base: str, positions: str | Sequence[int] | None = None, *, act_fn: str | None = None) -> Adapter:
    """The Adapter of a folder that PyReFT saved, trained on `base` (a name) at `positions`; act_fn is the one it was made with.

    PyReFT's files do not say which positions were trained: without `positions` they are taken to be f7+l7, the paper's, and a warning says so. A
    folder with its layers listed twice has tensors for the first and for the last tokens. Raises as `read_pyreft` does, and UnsupportedAdapter for
    places that Atoll's own forward does not edit.
    """
    if positions is None:
        _log.warning("%s does not say which positions were trained; taken to be %s", folder, PAPER_POSITIONS)
    places = PAPER_POSITIONS if positions is None else Positions.parse(positions)
    activation = _activation(act_fn)
    placed = [
        Placed(saved.layer, saved.component, saved.method, saved.tensors, activation if saved.method in LEARNED else None, 0.0, saved.link)
        for saved in read_pyreft(Path(folder)).saved
    ]
    return adapter_of(placed, base, places)


def to_adapter(reft_model: ReftModel, base: str, positions: str | Sequence[int]) -> Adapter:
    """The Adapter of a ReftModel, with the factors of PEFT's LoRA where the base is wrapped in one; base is the base's name. Tensors are copies.

    Raises UnsupportedAdapter for interventions of a class of one's own, and for places that Atoll's own forward does not edit.
    """
    from atoll.reft.interventions import CLASSES, retract_layers

    placed = []
    for representation, module in zip(reft_model.config.representations, reft_model.interventions.values(), strict=True):
        name = type(module).__name__
        if CLASSES.get(name) is not type(module):
            raise UnsupportedAdapter(
                f"the intervention {name} is a class of its own, which has no form in Atoll's files", hint=f"use {', '.join(CLASSES)}"
            )
        if module.orthonormal and module.rotate_layer.stale:
            retract_layers([module.rotate_layer])
        act_fn = module.settings["act_fn"] if METHODS[name] in LEARNED else None
        layer = None if "." in representation.component else representation.layer
        tensors = tensors_of(METHODS[name], module)
        placed.append(Placed(layer, representation.component, METHODS[name], tensors, _activation(act_fn), module.dropout.p, id(module)))
    edits = adapter_of(placed, base, Positions.parse(positions))
    model: Any = reft_model.model
    if not hasattr(model, "peft_config"):
        return edits
    with tempfile.TemporaryDirectory(prefix="atoll-peft-") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks the hub for the base
        lora = read_adapter(Path(folder))
    return Adapter(replace(lora.spec, base=base, reft=edits.spec.reft), lora.modules, edits=edits.edits)


def from_adapter(adapter: Adapter, model: Any) -> ReftModel:
    """A ReftModel that edits as the adapter does, on a transformers model; LoRA factors are loaded by PEFT, which must be installed for them.

    Interventions stand in the order of `adapter.spec.reft`, for untied parts all prefix layers before all suffix layers; `locations` gives their
    places. Raises UnsupportedAdapter for a composed adapter with several edits of one token, which add up here but would follow each other there.
    """
    _check_apart(adapter)
    if adapter.modules:
        model = _with_lora(adapter, model)
    placed = []
    for site in _ordered(adapter):
        spec, tensors = adapter.spec.reft[site.part], adapter.edits[site]
        if spec.weight == 1:
            module = as_module(spec.method, tensors, spec.activation, spec.dropout)
        else:
            fused = tensors.edit(spec)
            if fused.activation is not None and fused.activated < len(fused.b):
                raise UnsupportedAdapter(f"a weighted {spec.method} with an activation has no form among PyReFT's interventions")
            module = as_module("direft", Intervention(fused.u, fused.a, fused.b), spec.activation, spec.dropout)
        placed.append((site.layer, site.component, module))
    return _reft_model(model, placed)


def locations(adapter: Adapter, num_prompts: Sequence[int]) -> list[list[list[int]]]:
    """[interventions of from_adapter][row][n] places for rows with so many prompt tokens, without padding; NO_EDIT fills up."""
    from atoll.reft.positions import NO_EDIT

    found: list[list[list[int]]] = []
    for site in _ordered(adapter):
        spec = adapter.spec.reft[site.part]
        sides = [spec.positions.resolve(num_prompt) for num_prompt in num_prompts]
        rows = [[*prefix, *suffix] if spec.sides == 1 else list((prefix, suffix)[site.side]) for prefix, suffix in sides]
        width = max(map(len, rows), default=0)
        found.append([row + [NO_EDIT] * (width - len(row)) for row in rows])
    return found


def adapter_of(placed: Iterable[Placed], base: str, positions: Positions) -> Adapter:
    """The Adapter with these edits. Interventions of one kind and component are one part; a layer that stands twice has two sides."""
    groups: dict[tuple[Any, ...], dict[int, list[Placed]]] = {}
    owners: dict[tuple[int, str], tuple[Any, ...]] = {}
    for found in map(_free_if_drifted, placed):
        layer, component = native_site(found.layer, found.component)
        biased = found.tensors.c is not None
        group = (found.method, component, found.activation, found.dropout, biased)
        if owners.setdefault((layer, component), group) != group:
            raise UnsupportedAdapter(
                f"layer {layer}'s {component} is edited by interventions of two kinds, which follow each other in PyReFT but add up in Atoll",
                hint="use one kind for a place",
            )
        groups.setdefault(group, {}).setdefault(layer, []).append(found)
    parts: list[ReftSpec] = []
    edits: dict[EditSite, Intervention] = {}
    for part, ((method, component, activation, dropout, biased), layers) in enumerate(groups.items()):
        sides = _sides(layers, positions)
        ranks = {layer: here[0].tensors.rank for layer, here in sorted(layers.items())}
        rank = max(ranks.values())
        pattern = {layer: own for layer, own in ranks.items() if own != rank}
        parts.append(ReftSpec(method, rank, tuple(ranks), component, positions, sides == 1, activation, dropout, bias=biased, rank_pattern=pattern))
        for layer, here in layers.items():
            edits |= {EditSite(part, layer, component, side): here[side].tensors for side in range(sides)}
    if not parts:
        raise UnsupportedAdapter("there is no intervention to convert")
    return Adapter(AdapterSpec.reft_only(base, parts), {}, edits=edits)


def native_site(layer: int | None, component: str) -> tuple[int, str]:
    """(layer, one of model.reft.COMPONENTS) of PyReFT's way to say it. Raises UnsupportedAdapter for places that Atoll's forward does not edit."""
    match = _PATH.fullmatch(component)
    if match is not None:
        layer, component = int(match[1]), f"{_ATTENTION_OR_MLP[match[2]]}_{match[3]}"
    if layer is None or component not in COMPONENTS:
        raise UnsupportedAdapter(
            f"the component {component!r} cannot be edited in Atoll's own forward", hint=f"that edits {', '.join(COMPONENTS)} of Llama-like bases"
        )
    return layer, component


def as_module(method: str, tensors: Intervention, activation: str | None = None, dropout: float = 0.0) -> Module:
    """A PyReFT intervention with copies of these tensors. R stays as it is, bit for bit."""
    import torch

    from atoll.reft.interventions import CLASSES

    kind = CLASSES[next(name for name, known in METHODS.items() if known == method)]
    rank, width = tensors.r.shape
    learned = tensors.w if tensors.w is not None else tensors.r
    module = kind(embed_dim=width, low_rank_dimension=rank, dtype=learned.dtype, dropout=dropout, act_fn=activation, add_bias=tensors.c is not None)
    with torch.no_grad():
        if module.orthonormal:
            module.rotate_layer.weight.copy_(tensors.r.T)
            module.rotate_layer.settle()
        else:
            module.proj_layer.weight.copy_(tensors.r)
            if tensors.c is not None:
                module.proj_layer.bias.copy_(tensors.c)
        if tensors.w is not None:
            module.learned_source.weight.copy_(tensors.w)
        if tensors.b is not None:
            (module.learned_source if tensors.w is None else module.learned_source.bias).copy_(tensors.b)
    return module


def tensors_of(method: str, module: Module) -> Intervention:
    """Copies of a module's tensors, by the names of model.reft."""

    def copy(tensor: Any) -> Any:
        return tensor.detach().cpu().clone().contiguous()

    r = copy(module.rotate_layer.weight.T) if module.orthonormal else copy(module.proj_layer.weight)
    second = copy(module.proj_layer.bias) if method == "noreft" and module.proj_layer.bias is not None else None
    if method not in LEARNED:
        return Intervention(r, None, copy(module.learned_source))
    return Intervention(r, copy(module.learned_source.weight), copy(module.learned_source.bias), second)


def _reft_model(model: Any, placed: Sequence[tuple[int | None, str, Module]]) -> ReftModel:
    from atoll.reft.config import ReftConfig
    from atoll.reft.model import get_reft_model

    representations = [
        {"layer": layer or 0, "component": component, "low_rank_dimension": module.low_rank_dimension, "intervention": module}
        for layer, component, module in placed
    ]
    return get_reft_model(model, ReftConfig(representations=representations))


def _check_apart(adapter: Adapter) -> None:
    """No token may be edited by two parts at one place."""
    for site in adapter.edits:
        for other in adapter.edits:
            if other.part <= site.part or (other.layer, other.component) != (site.layer, site.component):
                continue
            one, two = (adapter.spec.reft[part].positions for part in (site.part, other.part))
            whole = one.all_prompt or two.all_prompt or one.listed or two.listed
            if whole or (one.first and two.first) or (one.last and two.last):
                raise UnsupportedAdapter(
                    f"parts {site.part} and {other.part} of the adapter edit the same tokens at layer {site.layer}'s {site.component}"
                )


def _ordered(adapter: Adapter) -> list[EditSite]:
    return sorted(adapter.edits, key=lambda site: (site.part, site.side, site.layer))


def _sides(layers: dict[int, list[Placed]], positions: Positions) -> int:
    """1 where one set of tensors edits all positions, 2 where first and last tokens have their own."""
    counts = {len(found) for found in layers.values()}
    if counts == {1} or all(len({found.shared for found in group} - {None}) == 1 and len(group) <= 2 for group in layers.values()):
        return 1
    if counts != {2}:
        listed = ", ".join(f"{layer}: {len(found)}" for layer, found in sorted(layers.items()))
        raise UnsupportedAdapter(
            f"every layer must have one intervention, or one for the first and one for the last tokens, but they have ({listed})",
            hint="convert them one kind at a time, as adapters of their own",
        )
    if not positions.has_sides:
        raise ConfigError(
            f"the layers have two interventions each, for first and for last tokens, but the positions {positions} have one side",
            hint="give positions such as f7+l7",
        )
    for layer, found in layers.items():
        if found[PREFIX].tensors.rank != found[SUFFIX].tensors.rank:
            raise UnsupportedAdapter(f"layer {layer} has rank {found[0].tensors.rank} for first and {found[1].tensors.rank} for last tokens")
    return 2


def _free_if_drifted(found: Placed) -> Placed:
    """The same edit by a method that needs no orthonormal R, if R is not: PyReFT's training leaves them so when it is resumed. Direft has no c."""
    import torch

    tensors = found.tensors if found.method == "noreft" else replace(found.tensors, c=None)
    found = found._replace(tensors=tensors)
    if found.method not in ORTHONORMAL:
        return found
    r = tensors.r.double()
    if float((r @ r.T - torch.eye(len(r), dtype=r.dtype)).abs().max()) <= _DRIFT:
        return found
    method = _FREED[found.method]
    assert (method in SUBTRACTS) == (found.method in SUBTRACTS)
    w = tensors.w if tensors.w is not None else torch.zeros_like(tensors.r)
    return found._replace(method=method, tensors=replace(tensors, w=w))


def _activation(act_fn: str | None) -> str | None:
    if act_fn in (None, "linear"):
        return None
    known = {"swish": "silu"}.get(str(act_fn), str(act_fn))
    if known not in ACTIVATIONS:
        raise UnsupportedAdapter(f"act_fn is {act_fn!r}, but Atoll's own forward has {', '.join(ACTIVATIONS)}")
    return known


def _with_lora(adapter: Adapter, model: Any) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("the adapter has LoRA factors, which need the peft package here", hint="pip install peft") from error
    with tempfile.TemporaryDirectory(prefix="atoll-peft-") as folder:
        write_adapter(Path(folder), Adapter(replace(adapter.spec, reft=()), adapter.modules))
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
