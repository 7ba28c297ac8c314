"""From the adapter section of a config to the AdapterSpec over one base: layers counted from the end become numbers, names are checked.

Used by plan.py, and by job.py and the dry run to know which tokens a spec edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from atoll.config_adapter import AdapterConfig, LoraAdapterConfig, ReftAdapterConfig
from atoll.errors import ConfigError, TrainingError
from atoll.model.adapter import AdapterSpec, names
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.sites import TARGETS, Site, module_name

if TYPE_CHECKING:
    from atoll.data.encode import EncodedRow
    from atoll.model.decoder import Decoder

_BEHIND_KEYS = ("attention_output", "mlp_input", "mlp_output", "block_output")  # components behind what other tokens of the block see


def adapter_spec(
    base_name: str, config: AdapterConfig, num_layers: int, hidden: int, targets: Sequence[str] = TARGETS, *, fan_in_fan_out: bool = False
) -> AdapterSpec:
    """The AdapterSpec that a config asks for over a base of num_layers blocks, hidden states of that size and a block's linears `targets`.

    Raises ConfigError for what this base does not have: layers, modules that a pattern names, as many dimensions as a ReFT rank; BaseMismatch for
    layers_to_transform.
    """
    spec = _spec(base_name, config, num_layers, targets, fan_in_fan_out)
    _check_patterns(spec, spec.sites(num_layers, targets))
    for part in spec.reft:
        if part.max_rank > hidden:  # no more rows of that length can be orthonormal, and no method's edit would be low in rank
            raise ConfigError(f"the ReFT rank is {part.max_rank}, but the base's hidden states have {hidden} dimensions", hint="4 is a good start")
    return spec


def spec_over(base_name: str, config: AdapterConfig, decoder: Decoder) -> AdapterSpec:
    """adapter_spec over a base that is loaded, with what PEFT notes of it."""
    shape = decoder.shape
    spec = adapter_spec(base_name, config, shape.num_layers, shape.hidden, tuple(shape.linears), fan_in_fan_out=shape.fan_in_fan_out)
    return replace(spec, task_type=decoder.task_type)


def _spec(base_name: str, config: AdapterConfig, num_layers: int, targets: Sequence[str], fan_in_fan_out: bool) -> AdapterSpec:
    if isinstance(config, ReftAdapterConfig):
        return AdapterSpec.reft_only(base_name, [reft_spec(config, num_layers)])
    return AdapterSpec(
        base=base_name,
        rank=config.r,
        alpha=config.scaling_alpha,
        target_modules=_target_modules(config, targets),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        layers_to_transform=config.layers_to_transform,
        use_dora=config.use_dora,
        reft=() if config.reft is None else (reft_spec(config.reft, num_layers),),
        fan_in_fan_out=fan_in_fan_out,
    )


def _target_modules(config: LoraAdapterConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """The names of linears that a config asks for, in the order of a block. Raises ConfigError for one that the base's blocks do not have."""
    known = tuple(dict.fromkeys(module_name(target) for target in targets))
    if config.target_modules == "all-linear":
        return known
    for name in config.target_modules:
        if name not in known:
            raise ConfigError(
                f"adapter.target_modules names {name!r}, but a block of this base has {', '.join(known)}", hint="name some of these, or all-linear"
            )
    return tuple(name for name in known if name in config.target_modules)


def reft_spec(config: ReftAdapterConfig, num_layers: int) -> ReftSpec:
    """The ReftSpec that a config asks for: layers counted from the end become numbers. Raises ConfigError for layers that the base does not have."""
    listed = [num_layers - 1] if config.layers == "last" else None if config.layers == "all" else [_layer(n, num_layers) for n in config.layers]
    pattern = {_layer(number, num_layers): rank for number, rank in config.rank_pattern.items()}
    if listed is not None and len(set(listed)) < len(listed):
        raise ConfigError(f"the ReFT layers name a block twice: {list(config.layers)} of {num_layers} blocks are {listed}")
    if len(pattern) < len(config.rank_pattern):
        raise ConfigError(f"the ReFT rank_pattern names a block twice: {list(config.rank_pattern)} of {num_layers} blocks")
    outside = sorted(set(pattern) - set(listed)) if listed is not None else []
    if outside:
        raise ConfigError(f"the ReFT rank_pattern names block {outside[0]}, which is not edited", hint=f"edited: {', '.join(map(str, listed or []))}")
    return ReftSpec(
        method=config.type,
        rank=config.rank,
        layers=None if listed is None else tuple(sorted(listed)),
        component=config.component,
        positions=Positions.parse(config.positions),
        tied=config.tied,
        activation=None if config.activation == "none" else config.activation,
        dropout=config.dropout,
        bias=config.bias,
        rank_pattern=pattern,
    )


def _layer(number: int, num_layers: int) -> int:
    """A block's number from 0; negative ones count from the end."""
    if not -num_layers <= number < num_layers:
        raise ConfigError(f"the ReFT part names block {number}, but the base has {num_layers} (0 to {num_layers - 1}, or -{num_layers} to -1)")
    return number % num_layers


def _check_patterns(spec: AdapterSpec, sites: list[Site]) -> None:
    """A pattern key that names no site would be ignored, and the adapter would have another rank than its author thinks."""
    for field, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for key in pattern:
            if not any(names((key,), site) for site in sites):
                raise ConfigError(
                    f"adapter.{field} names {key!r}, which is no module that this adapter changes",
                    hint="name a linear (q_proj) or the end of its path (layers.3.self_attn.q_proj)",
                )


def first_layer(spec: AdapterSpec, num_layers: int, targets: Iterable[str] = TARGETS) -> int:
    """The first block that an adapter changes."""
    return min([site.layer for site in spec.sites(num_layers, targets)] + [site.layer for site in spec.edit_sites(num_layers)])


def edited_places(row: EncodedRow, spec: AdapterSpec) -> list[int]:
    """The places of a row's prompt that the ReFT parts of a spec edit, ascending."""
    return sorted({place for part in spec.reft for side in part.positions.resolve(row.num_prompt) for place in side})


def nothing_taught(rows: Sequence[EncodedRow], spec: AdapterSpec, num_layers: int) -> TrainingError | None:
    """Why none of the rows could teach an adapter that is edits alone anything: what TrainingJob raises and the dry run shows."""
    if spec.target_modules or not rows:
        return None
    part = spec.reft[0]
    if not any(edited_places(row, spec) for row in rows):
        return TrainingError(
            f"no prompt of the {len(rows)} training rows has a token at {part.positions}, so nothing would be trained",
            hint="choose other positions, such as l1",
        )
    if not any(_is_taught(row, spec, num_layers) for row in rows):
        return TrainingError(
            f"no answer depends on the tokens at {part.positions} behind the last block's {part.component}, so nothing would be trained",
            hint="edit a block below it, or the last prompt token too, such as l1",
        )
    return None


def _is_taught(row: EncodedRow, spec: AdapterSpec, num_layers: int) -> bool:
    """Whether any edit of a row's prompt changes what one of its labels is predicted from.

    All do, but those of the last block that stand behind its keys and values: there a token's edit changes what follows that token alone.
    """
    for part in spec.reft:
        is_last = min(part.layers or (0,)) == num_layers - 1 and part.component in _BEHIND_KEYS
        first = row.first_label - 1 if is_last else 0
        if any(side and side[-1] >= first for side in part.positions.resolve(row.num_prompt)):
            return True
    return False
