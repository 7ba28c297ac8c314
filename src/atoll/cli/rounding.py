"""How a command's base is rounded: as the options say, or else as the base was on which its first adapter was trained.

Used by the commands that load a base and run adapters on it: generate, chat, eval, serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.output import say
from atoll.config_quantization import NAMES, PLAIN, QuantizationConfig
from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.hub.store import Hub

QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="FORMAT",
        help=f"Round the base's weights: {', '.join(NAMES)}, or {PLAIN}. Without it, as for the first adapter's training.",
        show_default=False,
    ),
]
BlocksOption = Annotated[
    bool,
    typer.Option("--quantized-memory", help="Hold rounded weights as blocks: a quarter of the memory, slower, the same answers."),
]
IgnoreOption = Annotated[bool, typer.Option("--ignore-quantization", help="Also take adapters that were trained on a base rounded otherwise.")]


@dataclass(frozen=True)
class Rounding:
    """The three options: a name of config_quantization, "none" or nothing; hold blocks; take every adapter."""

    name: str | None = None
    blocks: bool = False
    ignore: bool = False

    def of(self, hub: Hub | None, refs: Sequence[str] | None) -> QuantizationConfig | None:
        """What to load the base with; the adapters are references of the hub. Raises ConfigError for a wrong name."""
        name = self.name
        if name is None and hub is not None and refs:
            name = hub.quantization_of(refs[0])
            if name is not None:
                say(f"the base is rounded to {name}, as it was when {refs[0]} was trained (--quantization {PLAIN} takes it as it is)")
        if name is None or name == PLAIN:
            if self.blocks:
                raise ConfigError("--quantized-memory holds rounded weights, but the base is not rounded", hint="for example --quantization nf4")
            return None
        return QuantizationConfig.named(name, blocks=self.blocks)


AS_TRAINED = Rounding()
