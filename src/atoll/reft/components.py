"""Where an intervention acts: from `layer` and `component` to the module of a transformers model whose input or output is edited.

There is no table of architectures. Blocks are the one list that has as many members as the model has layers; attention and MLP are found in a block
by the names that model authors give them. Whatever is not found so can be said as a path: `model.layers[15].output`,
`roberta.encoder.layer[3].output`. A path written for a plain model also works on one that PEFT has wrapped, and the other way round.

Used by model.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from atoll.errors import ConfigError, UnsupportedAdapter

_PEFT = "base_model.model."
_ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_TWO_LINEARS = (("intermediate", "output"), ("fc1", "fc2"), ("lin1", "lin2"))  # blocks whose MLP is two modules of the block
_ACTIVATION = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "activation_func")
_PROJECTIONS = {
    "query": ("q_proj", "query", "q_lin", "wq"),
    "key": ("k_proj", "key", "k_lin", "wk"),
    "value": ("v_proj", "value", "v_lin", "wv"),
    "joined": ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo"),
}
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
ABSTRACT = (
    "block_input",
    "block_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
    "attention_input",
    "attention_value_output",
    "attention_output",
    "query_output",
    "key_output",
    "value_output",
)
_HEADS = ("head_attention_value_output", "head_query_output", "head_key_output", "head_value_output")
_STEP = re.compile(r"([A-Za-z_]\w*|\d+)((?:\[\d+\])*)")


@dataclass(frozen=True)
class Site:
    """One boundary of one module. width: how many numbers a position has there, if that is known; path: the module's name in the model."""

    module: nn.Module
    is_input: bool
    path: str
    width: int | None


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's, torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = model
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            inner = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is model:
            return model
        model = inner


def find_site(model: nn.Module, component: str, layer: int) -> Site:
    """The site of a configuration's entry.

    Raises ConfigError for names and layers that there are not, UnsupportedAdapter for a component that this architecture does not compute in a module
    of its own, or that is narrower than a position.
    """
    if "." in component:
        return _by_path(model, component)
    if component in _HEADS or (component not in ABSTRACT and component.startswith("head_")):
        raise UnsupportedAdapter(
            f"the component {component!r} is one attention head, but ReFT edits whole positions",
            hint="edit attention_value_output or query_output, key_output, value_output with an intervention as wide as all heads",
        )
    if component not in ABSTRACT:
        raise ConfigError(f"there is no component {component!r}; known are {', '.join(ABSTRACT)}", hint="or write a path, as model.layers[15].output")
    inner = unwrapped(model)
    prefix, blocks = find_blocks(inner)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(blocks):
        raise ConfigError(f"the configuration names layer {layer!r}, but the base has {len(blocks)} (0 to {len(blocks) - 1})")
    block = blocks[layer]
    module, is_input = _within(block, component)
    names = {id(found): name for name, found in block.named_modules()}
    return Site(module, is_input, f"{prefix}.{layer}.{names[id(module)]}".rstrip("."), _width(inner, module, is_input, component))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its name. Raises UnsupportedAdapter if there is none or if there are several."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    number = getattr(text, "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == number]
    lists = [found for found in lists if not any(found[0].startswith(f"{outer}.") for outer, _ in lists)]
    for narrower in (lambda blocks: _child(blocks[0], _ATTENTION) is not None, _in_decoder(model)):
        if len(lists) > 1:
            lists = [found for found in lists if narrower(found[1])] or lists
    if len(lists) == 1:
        return lists[0]
    found = "no list" if not lists else " and ".join(name for name, _ in lists) + ", lists"
    raise UnsupportedAdapter(
        f"{type(model).__name__} has {found} of {number} blocks, so 'layer' and a component's name do not say where to edit",
        hint="name the place by its path, as encoder.layers[3].output",
    )


def _in_decoder(model: Any) -> Callable[[nn.ModuleList], bool]:
    """Whether a list belongs to the part that writes text: models for images or sound have another list for these."""

    def belongs(blocks: nn.ModuleList) -> bool:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") and not getattr(model.config, "is_encoder_decoder", False) else None
        return isinstance(decoder, nn.Module) and any(module is blocks for module in decoder.modules())

    return belongs


def _by_path(model: nn.Module, component: str) -> Site:
    path, _, side = component.rpartition(".")
    if side not in ("input", "output"):
        raise ConfigError(f"the component {component!r} ends in {side!r}, but must end in .input or .output", hint="as in model.layers[15].output")
    inner = unwrapped(model)
    for start, rest in ((model, path), (inner, path), (inner, path.removeprefix(_PEFT))):
        module = _follow(start, rest)
        if module is not None:
            return Site(module, side == "input", rest, _width(inner, module, side == "input", None))
    raise ConfigError(f"{type(inner).__name__} has no module {path!r}, which the component {component!r} names", hint=_nearest(inner, path))


def _follow(module: nn.Module, path: str) -> nn.Module | None:
    for step in path.split("."):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        for name in (match[1], *re.findall(r"\d+", match[2])):
            child: Any = module[int(name)] if isinstance(module, nn.ModuleList) and name.isdigit() and int(name) < len(module) else None
            child = getattr(module, name, None) if child is None else child
            if not isinstance(child, nn.Module):
                return None
            module = child
    return module


def _nearest(model: nn.Module, path: str) -> str:
    from difflib import get_close_matches

    names = [re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name) for name, _ in model.named_modules() if name]
    near = get_close_matches(path, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "print(model) shows the names"


def _within(block: nn.Module, component: str) -> tuple[nn.Module, bool]:
    """The module of a block that an abstract name means, and whether its input is meant."""
    if component in ("block_input", "block_output"):
        return block, component == "block_input"
    if component.startswith("mlp"):
        return _in_mlp(block, component)
    attention = _child(block, _ATTENTION)
    if attention is None:
        raise _missing(block, component, "attention")
    if component == "attention_input":
        return attention, True
    # What attention adds to the residual stream: some modules add it themselves and return the sum.
    whole = component == "attention_output" and not _adds_residual(attention) and not _has(attention, "output")
    if whole:
        return attention, False
    kind = "joined" if component.startswith("attention") else component.removesuffix("_output")
    scope = getattr(attention, "output", attention) if kind == "joined" else attention
    projection = _child(scope, _PROJECTIONS[kind]) or next(_deeper(scope, _PROJECTIONS[kind]), None)
    if projection is None:
        fused = _child(attention, _FUSED) or next(_deeper(attention, _FUSED), None)
        raise _missing(block, component, "a projection" if fused is None else "a projection apart from the others, which it computes in one product,")
    return projection, component == "attention_value_output"


def _in_mlp(block: nn.Module, component: str) -> tuple[nn.Module, bool]:
    mlp = _child(block, _MLP)
    pair = next(((first, last) for first, last in _TWO_LINEARS if _has(block, first) and _has(block, last)), None)
    if mlp is None and pair is None:
        raise _missing(block, component, "MLP")
    if component == "mlp_activation":
        scopes = [mlp] if mlp is not None else [block, getattr(block, pair[0])] if pair else []
        activation = next((found for scope in scopes if (found := _child(scope, _ACTIVATION)) is not None), None)
        if activation is None:
            raise _missing(block, component, "an activation")
        return activation, False
    is_input = component == "mlp_input"
    if mlp is None and pair is not None:
        module = getattr(block, pair[0] if is_input else pair[1])
        return (module, True) if is_input else (getattr(module, "dense", module), False)
    assert mlp is not None
    last = _child(mlp, ("dense_4h_to_h",))
    return (last, False) if not is_input and last is not None and _adds_residual(mlp) else (mlp, is_input)


def _missing(block: nn.Module, component: str, what: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"the component {component!r} cannot be edited in a {type(block).__name__}: it has no module for {what}",
        hint="name a module by its path, as model.layers[15].mlp.output; print(model) shows the names",
    )


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _deeper(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    return (found for name, found in module.named_modules() if name.rpartition(".")[2] in names)


def _adds_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(module.forward).parameters


def _width(model: Any, module: Any, is_input: bool, component: str | None) -> int | None:
    """How wide a position is at a site: a linear layer says it, attention, MLP and blocks have the base's hidden size; else None."""
    features = getattr(module, "in_features" if is_input else "out_features", None)
    if isinstance(features, int):
        return features
    if component is not None and component not in ("mlp_activation", "attention_value_output", *(f"{kind}_output" for kind in _PROJECTIONS)):
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        return int(config.hidden_size)
    return None
