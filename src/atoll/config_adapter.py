"""The adapter section of a training file: LoRA, ReFT, or LoRA with a ReFT part trained beside it.

The one idea: `type` says which of two sections it is. LoRA's keys are PEFT's, ReFT's are its own; a key of the one under the other is refused with a
sentence, because PEFT calls the rank `r` and ReFT papers call it `rank`, and half of what a user wrote must not be dropped.

Used by config.py. Names that model/ defines are listed here too, since configuration stands below all of it but positions.py; tests/test_config.py
holds them equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from atoll.config_section import Section, empty_as_mapping
from atoll.errors import AdapterFormatError
from atoll.model.positions import Positions
from atoll.yaml_file import kind_of, nearest

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER_MODULES = (  # of GPT-2, GPT-NeoX, Phi-3; BERT; T5
    *("c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "qkv_proj", "gate_up_proj"),
    *("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    *("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
)
MAX_RANK = 1024  # of an adapter: trained, read from a file, or what a composition is compressed to

ReftType: TypeAlias = Literal["loreft", "noreft", "direft", "orthogonal_direft", "consreft", "lobireft"]
Component: TypeAlias = Literal["block_input", "attention_input", "attention_output", "mlp_input", "mlp_output", "block_output"]
Activation: TypeAlias = Literal["none", "relu", "gelu", "silu", "tanh", "sigmoid"]
REFT_TYPES: tuple[str, ...] = get_args(ReftType)
WITHOUT_ACTIVATION = ("consreft", "lobireft")  # they have no W, so there is nothing to put through one
_LAYERS = r"^-?\d+(;-?\d+)*$"  # as PyReFT's scripts write them
_LayersText: TypeAlias = Annotated[str, Field(pattern=_LAYERS)]
_LORA, _REFT = "lora", "reft"
_INIT = r"^(default|gaussian|olora|pissa|pissa_niter_[1-9][0-9]{0,2})$"
_REFT_UNDER_LORA = f"is a key of ReFT, but the type is lora; set type to one of {', '.join(REFT_TYPES)}, or put it under reft to train both"


def _checked_type(value: Any) -> Any:
    """Any type is known here, or refused with the list of all of them."""
    known = (_LORA, *REFT_TYPES)
    if value in known:
        return value
    guess = nearest(value, known) if isinstance(value, str) else None
    raise ValueError(f"must be one of {', '.join(known)}" + (f"; did you mean {guess}?" if guess else ""))


class ReftAdapterConfig(Section):
    """Representation fine-tuning: small learned edits of hidden states at some layers and prompt positions."""

    type: ReftType = Field(
        default="loreft",
        description="The edit's formula. loreft: a learned projection replaces a low-rank part of the state; noreft: the same without orthonormal "
        "rows; direft: the paper's DiReFT, one is added; orthogonal_direft: added along orthonormal rows; consreft, lobireft: a constant instead.",
    )
    rank: int = Field(default=4, ge=1, le=MAX_RANK, description="Dimensions of the state that each edit can change.")
    layers: Literal["all", "last"] | tuple[int, ...] = Field(
        default="all",
        description='Blocks that are edited: all, last, a list of numbers from 0 (-1 is the last block), or such a list as text, "2;10;18".',
    )
    positions: str | tuple[int, ...] = Field(
        default="f7+l7",
        description="Prompt tokens that are edited: f7+l7 (first and last seven), f3, l1, all_prompt, or a list such as [0, -1]; never the answer's.",
        json_schema_extra={"examples": ["f7+l7", "l1", "all_prompt", [0, -1]]},
    )
    component: Component = Field(default="block_output", description="Which state of a block is edited.")
    tied: bool = Field(default=True, description="First and last tokens share their tensors; false gives each side its own.")
    activation: Activation = Field(default="none", description="Function between the two projections; consreft and lobireft have none.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the edit's elements set to zero while training.")
    bias: bool = Field(default=False, description="A second bias, which noreft can have.")
    rank_pattern: dict[int, int] = Field(
        default_factory=dict, description="Other ranks for some blocks, by number: {3: 8}. Negative numbers count from the end."
    )

    @field_validator("type", mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        return _checked_type(value)

    @field_validator("layers", mode="before", json_schema_input_type=Literal["all", "last"] | _LayersText | list[int])
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(_LAYERS, value):
            value = tuple(int(number) for number in value.split(";"))
        if value in ("all", "last"):
            return value
        if not isinstance(value, (list, tuple)) or not value or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in value):
            raise ValueError('must be all, last, a list of block numbers such as [0, 5, -1], or "2;10;18"')
        if len(set(value)) < len(value):
            raise ValueError("names a block twice")
        return tuple(value)

    @field_validator("positions", mode="before")
    @classmethod
    def _check_positions(cls, value: Any) -> Any:
        if not isinstance(value, (str, list, tuple)):
            raise ValueError("must be text such as f7+l7, or a list of places")
        try:
            Positions.parse(value)
        except AdapterFormatError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        return value if isinstance(value, str) else tuple(value)

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_of_lora(cls, values: Any) -> Any:
        _refuse_foreign(values, cls, LoraAdapterConfig, "is a key of LoRA, but the type is {type}; ReFT's rank is called rank")
        return values

    @model_validator(mode="after")
    def _check_method(self) -> ReftAdapterConfig:
        if self.activation != "none" and self.type in WITHOUT_ACTIVATION:
            raise ValueError(f"activation is {self.activation}, but {self.type} has no projection of the state that could go through one")
        if self.bias and self.type != "noreft":
            raise ValueError(f"bias is true, but {self.type} has no second bias; only noreft has")
        for layer, rank in self.rank_pattern.items():
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"rank_pattern gives block {layer} the rank {rank}; must be from 1 to {MAX_RANK}")
        return self


class LoraAdapterConfig(Section):
    """What is trained: LoRA's rank, scaling and places, and perhaps a ReFT part beside it."""

    type: Literal["lora"] = Field(default="lora", description="Kind of adapter: lora, or one of ReFT's, which have keys of their own.")
    r: int = Field(default=16, ge=1, le=MAX_RANK, description="Rank: the inner width of the adapter.")
    alpha: float | None = Field(default=None, gt=0, description="LoRA's numerator: the update is scaled by alpha / r. Without it, twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs set to zero while training.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description=f"Linear layers that get an adapter: all-linear, or a list from {', '.join(TARGET_MODULES)}; in other families than Llama's "
        f"from {', '.join(OTHER_MODULES)}, too.",
        json_schema_extra={"examples": ["all-linear", list(TARGET_MODULES)]},
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = Field(default=False, description="DoRA: also train the length of each row of the adapted weights. Served by the Llama family.")
    init_lora_weights: str = Field(
        default="default",
        pattern=_INIT,
        description="How the factors start. default: A random, B zero; gaussian: A normal; pissa: the weight's largest singular directions "
        "(pissa_niter_16: nearly those, faster); olora: the first of its QR decomposition. From the last two, an adapter of twice the rank is saved, "
        "which fits the unchanged base.",
        json_schema_extra={"examples": ["default", "gaussian", "pissa", "pissa_niter_16", "olora"]},
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        ge=1,
        description="LoRA+: B's learning rate over A's, which is trainer.learning_rate; 16 is usual. Without it, one rate.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Other ranks for some modules, by name (q_proj) or by end of path (layers.3.self_attn.q_proj)."
    )
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="Other alphas for some modules, named as in rank_pattern.")
    layers_to_transform: tuple[int, ...] | None = Field(default=None, min_length=1, description="Only these blocks, counted from 0; without it, all.")
    reft: ReftAdapterConfig | None = Field(default=None, description="A ReFT part that is trained together with the LoRA: one adapter with both.")

    @field_validator("type", mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        return _checked_type(value)

    @field_validator("init_lora_weights", mode="before", json_schema_input_type=str | bool)
    @classmethod
    def _check_init(cls, value: Any) -> Any:
        if value is True:
            return "default"  # PEFT's word for it
        if not isinstance(value, str) or not re.fullmatch(_INIT, value):
            raise ValueError("must be default, gaussian, pissa, pissa_niter_N (N power iterations, such as 16), or olora")
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_targets(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, (list, tuple)):
            hint = "; write all-linear" if isinstance(value, str) and nearest(value, ("all-linear",)) else ""
            raise ValueError(f"must be all-linear or a list such as [q_proj, v_proj], but this is {kind_of(value)}{hint}")
        if not value:
            raise ValueError("must not be empty; name linear layers of the base's blocks, or all-linear for all of them")
        for name in value:
            if not isinstance(name, str) or not name:
                raise ValueError(f"must hold names of linear layers, but this is {kind_of(name)}")
            guess = None if name in TARGET_MODULES + OTHER_MODULES else nearest(name, TARGET_MODULES + OTHER_MODULES)
            if guess is not None:  # what is like no name is left to the base, which knows its own (train.spec)
                raise ValueError(f"{name!r} is not a linear layer of a block; did you mean {guess}?")
        if len(set(value)) < len(value):
            raise ValueError("names a layer twice")
        return tuple(value)

    @field_validator("layers_to_transform")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("must be block numbers from 0, each once")
        return layers

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_of_reft(cls, values: Any) -> Any:
        _refuse_foreign(values, cls, ReftAdapterConfig, _REFT_UNDER_LORA)
        return values

    @model_validator(mode="after")
    def _check_patterns(self) -> LoraAdapterConfig:
        for field, pattern, most in (("rank_pattern", self.rank_pattern, MAX_RANK), ("alpha_pattern", self.alpha_pattern, None)):
            for name, value in pattern.items():
                if not name.endswith(TARGET_MODULES + OTHER_MODULES if self.target_modules == "all-linear" else self.targets):
                    hint = "; a layer number is ReFT's: give its type too, such as loreft" if name.isdigit() else ""
                    raise ValueError(f"{field} names {name!r}, which is none of the target modules {', '.join(self.targets)}{hint}")
                if value <= 0 or (most is not None and value > most):
                    raise ValueError(f"{field} gives {name!r} the value {value:g}; must be {'above 0' if most is None else f'from 1 to {most}'}")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> LoraAdapterConfig:
        if self.starts_in_base:
            if self.use_dora:
                start = self.init_lora_weights
                raise ValueError(
                    f"use_dora cannot start with init_lora_weights {start}: DoRA learns the lengths of the rows of the base's own weights, and "
                    f"{start} begins by taking a part out of these weights; leave one of the two out"
                )
            most = max((self.r, *self.rank_pattern.values()))
            if most > MAX_RANK // 2:
                raise ValueError(f"init_lora_weights {self.init_lora_weights} saves twice the rank {most}, and {MAX_RANK} is the most")
        return self

    @property
    def starts_in_base(self) -> bool:
        """Whether the start is taken out of the base's weights (PiSSA, OLoRA), so that what is saved has twice the rank."""
        return self.init_lora_weights not in ("default", "gaussian")

    @property
    def scaling_alpha(self) -> float:
        """alpha, or 2r where it is not given."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def targets(self) -> tuple[str, ...]:
        """The target modules by name, in the order of a block; `all-linear` written out for a Llama-like base."""
        if self.target_modules == "all-linear":
            return TARGET_MODULES
        known = TARGET_MODULES + OTHER_MODULES
        return tuple(sorted(self.target_modules, key=lambda name: known.index(name) if name in known else len(known)))


AdapterConfig: TypeAlias = LoraAdapterConfig | ReftAdapterConfig


def require_type(section: Any) -> None:
    """Raise ValueError for a mapping that has keys of ReFT and no type: LoRA is what no type means."""
    if isinstance(section, Mapping) and section.get("type") is None and family_of(section) == _REFT:
        _refuse_foreign(section, LoraAdapterConfig, ReftAdapterConfig, _REFT_UNDER_LORA)


def _refuse_foreign(values: Any, own: type[Section], other: type[Section], sentence: str) -> None:
    if isinstance(values, Mapping):
        for key in values:
            if key in other.model_fields and key not in own.model_fields:
                raise ValueError(f"{key} {sentence.format(type=values.get('type', own.model_fields['type'].default))}")


def family_of(section: Any) -> str:
    """ "lora" or "reft": which section a mapping (or one of the two) is. Without a type, keys that only ReFT has decide."""
    if isinstance(section, ReftAdapterConfig):
        return _REFT
    if not isinstance(section, Mapping):
        return _LORA
    kind = section.get("type")
    if kind is not None:
        return _REFT if kind in REFT_TYPES else _LORA
    only_lora, only_reft = _only(LoraAdapterConfig, ReftAdapterConfig), _only(ReftAdapterConfig, LoraAdapterConfig)
    return _REFT if any(key in only_reft for key in section) and not any(key in only_lora for key in section) else _LORA


def _only(one: type[Section], other: type[Section]) -> Sequence[str]:
    return [key for key in one.model_fields if key not in other.model_fields]


AdapterSection: TypeAlias = Annotated[
    Annotated[LoraAdapterConfig, Tag(_LORA)] | Annotated[ReftAdapterConfig, Tag(_REFT)],
    Discriminator(family_of),
    BeforeValidator(empty_as_mapping, json_schema_input_type=LoraAdapterConfig | ReftAdapterConfig | None),
]
