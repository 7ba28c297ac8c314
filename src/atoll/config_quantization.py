"""The quantization section: the form in which a base's linears are rounded and held (QLoRA).

The one idea: rounding belongs to the base, not to a run. `name` says it in a word ("nf4"), and that word is in the base's fingerprint, so scores,
caches and adapters of a rounded base are never taken for those of the plain one. How the rounded weights lie in memory changes no number.

Used by config.py, model/quant.py and the command line (`--quantization nf4`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from atoll.config_section import Section
from atoll.errors import ConfigError
from atoll.yaml_file import nearest

_SINGLE = "-single"  # behind a 4-bit format whose scales are kept as float32
NAMES = ("nf4", "nf4-single", "fp4", "fp4-single", "int8")
PLAIN = "none"  # on a command line: the base as it is


class QuantizationConfig(Section):
    """The form in which the base's weights are rounded (QLoRA): its linears, never embedding, norms or head. Needs the package bitsandbytes."""

    bits: Literal[4, 8] = Field(default=4, description="Bits a weight.")
    quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="Number format of 4-bit weights.")
    double_quant: bool = Field(default=True, description="Quantise the scales of 4-bit blocks as well.")
    resident: Literal["bf16", "nf4", "fp4", "int8"] = Field(
        default="bf16",
        description="How the rounded weights lie in memory. bf16: whole, in the base's number format, at full speed. nf4, fp4 or int8 (that of the "
        "rounding): as the blocks themselves, for a quarter or half of the memory; each use expands them again. Both compute the same.",
    )

    @model_validator(mode="before")
    @classmethod
    def _only_four_bits_have_types(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("bits") == 8:
            for key in ("quant_type", "double_quant"):
                if key in values:
                    raise ValueError(f"{key} is about 4-bit weights, but bits is 8; leave it out")
        return values

    @model_validator(mode="after")
    def _resident_is_the_format(self) -> QuantizationConfig:
        if self.resident not in ("bf16", self.format):
            raise ValueError(f"resident is {self.resident}, but weights rounded to {self.format} can lie in memory as bf16 or {self.format}")
        return self

    @property
    def format(self) -> Literal["nf4", "fp4", "int8"]:
        """The number format of the rounded weights."""
        return self.quant_type if self.bits == 4 else "int8"

    @property
    def name(self) -> str:
        """All that decides the rounded numbers, in a word: one of NAMES."""
        return self.format + (_SINGLE if self.bits == 4 and not self.double_quant else "")

    @property
    def holds_blocks(self) -> bool:
        """Whether the weights stay quantised in memory."""
        return self.resident != "bf16"

    def record(self) -> dict[str, Any]:
        """What a manifest keeps: the rounding, without how it lay in memory."""
        return {"bits": self.bits, **({"quant_type": self.quant_type, "double_quant": self.double_quant} if self.bits == 4 else {})}

    @classmethod
    def named(cls, name: str, *, blocks: bool = False) -> QuantizationConfig:
        """The rounding of that name; blocks: hold it quantised. Raises ConfigError for a name that is none of NAMES."""
        if name not in NAMES:
            guess = nearest(name, NAMES)
            raise ConfigError(
                f"quantization {name!r} is none of {', '.join(NAMES)}" + (f"; did you mean {guess}?" if guess else ""),
                hint=f"{PLAIN} takes the base as it is",
            )
        form = name.removesuffix(_SINGLE)
        resident = {"resident": form} if blocks else {}
        if form == "int8":
            return cls(bits=8, **resident)  # type: ignore[arg-type]
        return cls(quant_type=form, double_quant=not name.endswith(_SINGLE), **resident)  # type: ignore[arg-type]
