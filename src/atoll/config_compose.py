"""The settings of a composition: a file for `atoll compose`, the same from the command line, and the body of a request.

Used by config_file.py, workflows, the command line and the server.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from atoll.config import DataConfig, DataSection, EvalConfig, EvalSection, GenerationConfig, GenerationSection, Name
from atoll.config_adapter import MAX_RANK
from atoll.config_quantization import QuantizationConfig
from atoll.config_section import Section, empty_as_mapping
from atoll.errors import ConfigError

METHODS = ("gradient", "gradient_per_layer", "cma", "nevergrad:<name>", "uniform", "best_single")
USUAL_SEEDS = 3  # beside test rows and controls, where something is drawn
_DETERMINISTIC = ("gradient", "gradient_per_layer", "uniform", "best_single")
_WITH_FOLDS = ("gradient", "gradient_per_layer")  # methods that can hold every example out from a search of its own


class ComposeSettings(Section):
    """Which adapters are composed, and how their weights are found."""

    adapters: tuple[str, ...] = Field(
        default=(), description="Compose only these: names or references of the hub (name, name@2, name:tag). Without it, every LoRA of the base."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Names or references that are left out.")
    k: int | None = Field(default=None, ge=1, description="Draw so many of the examples, by the seed; without it, all are used.")
    retrieve: Literal["auto", "loss", "slope", "text"] = Field(
        default="auto",
        description="How the hub is ranked for the examples: by each adapter's loss, by its first-order gain (slope), by its description (text), or "
        "by loss after the other two where there are many (auto).",
    )
    top_k: int = Field(default=10, ge=1, le=256, description="Adapters that go on from the ranking to the search.")
    method: str = Field(
        default="gradient_per_layer",
        description=f"How the weights are found: {', '.join(METHODS)}.",
        json_schema_extra={"examples": ["gradient", "gradient_per_layer", "cma", "nevergrad:NGOpt", "uniform", "best_single"]},
    )
    budget: int | None = Field(
        default=None, ge=1, description="Evaluations of a search: candidates scored on all examples. Without it, the method's own."
    )
    time_s: float | None = Field(
        default=None, gt=0, description="Seconds after which a search ends with the best so far: each search, of every seed, fold and control."
    )
    folds: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Groups of examples that a gradient search holds out in turn, each from a search of its own beside the real one, to know when to "
        "stop; without it, or with 0, none are.",
    )
    hold_out: float | None = Field(default=None, gt=0, lt=1, description="Hold out this share of the examples once, instead of folds.")
    l1: float = Field(default=0.05, ge=0, description="Strength of the regulariser, times the mean of |weight|.")
    bounds: tuple[float, float] = Field(default=(-1.5, 1.5), description="Smallest and largest weight.")
    form: Literal["cat", "product"] = Field(
        default="cat", description="What a composition is: the exact weighted sum of the updates (cat), or LoraHub's product of summed factors."
    )
    rank: int | None = Field(
        default=None, ge=1, le=MAX_RANK, description="Compress the result to this rank; without it, ranks add up and nothing is lost."
    )
    control_folds: int = Field(default=5, ge=2, le=20, description="Folds of the cross-validation that compares the result with the controls.")
    seed: int = Field(default=0, ge=0, description="Seed of the drawn examples, the folds, the search and the controls.")
    seeds: int | None = Field(
        default=None,
        ge=1,
        le=20,
        description="Repeat with so many seeds, from `seed` on, and keep the one that does best on rows that it has not seen. Without it, 3 "
        "where there are test rows and something is drawn (k examples, a part that a search holds out, or the search itself), else 1. Where all "
        "examples are used, each seed leaves a part of them out.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Number format of the base.")
    device: str = Field(default="cpu", min_length=1, description="Where to compute: cpu, or cuda (cuda:1, …) on a machine that has it.")

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        kind, _, name = method.partition(":")
        known = [listed.partition(":")[0] for listed in METHODS]
        if kind not in known or (kind == "nevergrad") != bool(name):
            near = get_close_matches(kind, known, n=1)
            meant = "did you mean nevergrad:NGOpt?" if kind == "nevergrad" else f"did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be one of {', '.join(METHODS)}" + (f"; {meant}" if meant else ""))
        return method

    @field_validator("bounds")
    @classmethod
    def _check_bounds(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not bounds[0] < bounds[1]:
            raise ValueError("must be a smaller and a larger number")
        return bounds

    @property
    def deterministic(self) -> bool:
        """Whether the method makes the same weights of the same examples, whatever the seed; what is held out aside."""
        return self.method.partition(":")[0] in _DETERMINISTIC

    @property
    def holds_out(self) -> bool:
        """Whether each search holds examples out, by its seed."""
        return self.hold_out is not None or bool(self.folds)

    @property
    def takes_folds(self) -> bool:
        """Whether the method can hold examples out in folds, and they are not held out once instead."""
        return self.method.partition(":")[0] in _WITH_FOLDS and self.hold_out is None


ComposeSection: TypeAlias = Annotated[ComposeSettings, BeforeValidator(empty_as_mapping, json_schema_input_type=ComposeSettings | None)]


class ComposeConfig(Section):
    """A compose file: one base, a few examples of a new task, and how the hub's adapters become one for it."""

    base: str = Field(
        min_length=1, description="The base model: an alias (smollm2-135m-instruct), a Hugging Face id, or a folder (./mine, relative to this file)."
    )
    quantization: QuantizationConfig | None = Field(
        default=None,
        description="Round the base's linears to 4 or 8 bits (QLoRA): {bits: 4}. Adapters that were trained on such a base are composed on it, and "
        "the result belongs to it. Without it, the base as it is.",
    )
    name: Name | None = Field(
        default=None,
        description="Name of the result in the hub: letters, digits, '.', '_' and '-'. Without it, the task's name, and nothing is published.",
    )
    description: str = Field(
        default="",
        max_length=2000,
        description="What the new task is, in a sentence: on the result's card, and for ranking adapters by their descriptions.",
    )
    data: DataSection = Field(
        default_factory=DataConfig,
        description="The examples, which are the training rows, and test rows where there are any. All rows of a single file are examples unless "
        "ratios or a split column say otherwise. Text means the path.",
    )
    compose: ComposeSection = Field(default_factory=ComposeSettings, description="Which adapters are composed, and how their weights are found.")
    controls: bool = Field(
        default=True, description="Compare the result with what is simpler: the base, one adapter, training on the examples, and more."
    )
    eval: EvalSection = Field(default_factory=EvalConfig, description="How it is measured on test rows.")
    generation: GenerationSection = Field(default_factory=GenerationConfig, description="How answers are written.")

    def require_data(self) -> DataConfig:
        """The data section, all rows of a single file being examples unless it says otherwise. Raises ConfigError when it names no rows."""
        if not self.data.is_given:
            raise ConfigError("there are no examples: data.path is not given", hint="add it to the file, or give them with --examples few.jsonl")
        if self.data.path is not None and "ratios" not in self.data.model_fields_set:
            return self.data.model_copy(update={"ratios": (1.0, 0.0, 0.0)})
        return self.data
