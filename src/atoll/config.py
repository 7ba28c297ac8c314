"""Every setting of a training or a land file: its name, default, limits and help text.

The one idea: these models are the only place where a setting is described (the adapter's stand in config_adapter.py). The YAML loader
(config_file.py), the JSON Schema for editors, the command line's help and the error messages all read the fields here. Configs are frozen; what
follows from them is a property.

Used by every stage. A wrong value raises ConfigError with one sentence, whether it came from a file or from Python.
"""

from __future__ import annotations

import os
import re
import string
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from atoll.config_adapter import AdapterSection, LoraAdapterConfig, ReftAdapterConfig, family_of, require_type
from atoll.config_cost import CostConfig as CostConfig
from atoll.config_quantization import QuantizationConfig as QuantizationConfig
from atoll.config_section import Section as Section
from atoll.config_section import empty_as_mapping, given
from atoll.config_trainer import LION_BETAS
from atoll.config_trainer import REFT_LEARNING_RATE as REFT_LEARNING_RATE
from atoll.config_trainer import REFT_RATE_BESIDE_LORA as REFT_RATE_BESIDE_LORA
from atoll.config_trainer import TrainerConfig as TrainerConfig
from atoll.errors import ConfigError
from atoll.model_errors import config_error
from atoll.yaml_file import nearest

METRICS = (
    "accuracy",
    "exact_match",
    "f1",
    "label_and_explanation",
    "macro_f1",
    "matthews_corrcoef",
    "pass_at_1",
    "pearson",
    "rouge_l",
    "span_f1",
    "spearman",
    "sql_execution",
    "token_f1",
)
MATCHES = ("plain", "number", "number_after_####", "sql", "json")
BUILTIN = "builtin:"  # data paths that name a generated task
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
NAME_RULE = "must start with a letter or digit, hold only letters, digits, '.', '_' and '-' (96 at most), and have no '..'"


def atoll_home() -> Path:
    """The folder of bases and the hub: ATOLL_HOME, or ~/.atoll. An absolute path; not created here."""
    return Path(os.environ.get("ATOLL_HOME") or "~/.atoll").expanduser().absolute()


def is_valid_name(name: str) -> bool:
    """Whether `name` may name an adapter or a task: it is a file name everywhere, and cannot leave its folder."""
    return NAME_PATTERN.fullmatch(name) is not None and ".." not in name


def _checked_name(name: str) -> str:
    if not is_valid_name(name):
        raise ValueError(NAME_RULE)
    return name


def _text_as_data(value: Any) -> Any:
    """`data: rows.csv` is short for `data: {path: rows.csv}`."""
    return {"path": value} if isinstance(value, str) else empty_as_mapping(value)


def _text_as_task(value: Any) -> Any:
    """A task given as text is its data path."""
    return {"data": {"path": value}} if isinstance(value, str) else value


class DataConfig(Section):
    """Where the rows come from and how a row becomes a prompt and a completion."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Rows to learn from: builtin:NAME, a .jsonl or .csv file, or a task folder; relative to this file.",
    )
    train: str | None = Field(default=None, min_length=1, description="File of training rows, when the parts are separate files (then without path).")
    validation: str | None = Field(default=None, min_length=1, description="File of validation rows, beside train.")
    test: str | None = Field(default=None, min_length=1, description="File of test rows, beside train.")
    template: str | None = Field(
        default=None,
        min_length=1,
        description="The prompt, with {column} where a column's text goes ({{ and }} are braces). Without it, the column prompt.",
    )
    instruction: str | None = Field(default=None, description="Text put before the template, with an empty line between.")
    target: str | None = Field(
        default=None, min_length=1, description="Column that holds what the model should write. Without it, the column completion."
    )
    chat: bool = Field(default=False, description="Put the prompt into a user turn of the base's chat template.")
    split_column: str | None = Field(
        default=None,
        min_length=1,
        description="Column that says which part a row is in: 0, 1, 2 or train, validation, test. A column named split is used when there is one.",
    )
    ratios: tuple[float, float, float] = Field(
        default=(0.8, 0.1, 0.1), description="Shares of rows for train, validation and test, when neither files nor a column split them."
    )
    seed: int = Field(default=17, ge=0, description="Seed of the split by ratios, and of the rows of a built-in task.")
    max_train_rows: int | None = Field(default=None, ge=1, description="Use at most so many training rows.")
    max_validation_rows: int | None = Field(default=None, ge=1, description="Use at most so many validation rows.")
    max_test_rows: int | None = Field(default=None, ge=1, description="Use at most so many test rows.")
    metric: str | None = Field(
        default=None,
        description=f"How answers are scored: {', '.join(METRICS)}. A task folder brings its own.",
        json_schema_extra={"examples": list(METRICS)},
    )
    match: str | None = Field(
        default=None,
        description=f"How exact_match compares: {', '.join(MATCHES)}. Without it, as plain text.",
        json_schema_extra={"examples": list(MATCHES)},
    )
    label_set: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Every allowed answer, for a closed set; text, so quote numbers."
    )
    references: str | None = Field(default=None, min_length=1, description="Column with a list of equally good answers; rouge_l takes the best.")
    gold_field: str | None = Field(default=None, min_length=1, description="Column to score against, where that is not the target.")

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            template_columns(template)
        return template

    @field_validator("ratios")
    @classmethod
    def _check_ratios(cls, ratios: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
            raise ValueError(f"must be three shares from 0 to 1 that sum to 1, but these sum to {sum(ratios):g}")
        if ratios[0] == 0:
            raise ValueError("the first share is for training and must be above 0")
        return ratios

    @field_validator("metric", "match")
    @classmethod
    def _check_scoring(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = METRICS if info.field_name == "metric" else MATCHES
        if name is not None and name not in known:
            guess = nearest(name, known)
            raise ValueError(f"must be one of {', '.join(known)}" + (f"; did you mean {guess}?" if guess else ""))
        return name

    @field_validator("label_set")
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = sorted({label for label in labels or () if (labels or ()).count(label) > 1})
        if twice:
            raise ValueError(f"has {twice[0]!r} more than once")
        if any(not label.strip() for label in labels or ()):
            raise ValueError("has an empty label")
        return labels

    @model_validator(mode="after")
    def _check_together(self) -> DataConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("give either path or train (with validation and test), not both")
        if self.train is None and self.path is None and (self.validation or self.test):
            raise ValueError("validation and test files need a train file beside them")
        if self.target is not None and self.target in self.columns:
            raise ValueError(f"template shows the target column {{{self.target}}}, so the answer would stand in the prompt")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template uses, each once, in order."""
        return template_columns(self.template) if self.template is not None else ()

    @property
    def is_given(self) -> bool:
        return self.path is not None or self.train is not None


class GenerationConfig(Section):
    """How long answers may get."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of an answer; without it, the longest training completion with some room to spare."
    )
    stop: tuple[str, ...] = Field(default=(), description="Texts that end an answer, besides the base's end token.")

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("has an empty text, which would end every answer at once")
        return stop


class EvalConfig(Section):
    """How a land is measured."""

    test_rows: int | None = Field(
        default=None, ge=1, description="Use at most so many test rows a task, drawn by a hash of their content; without it, all."
    )
    batch_size: int = Field(default=32, ge=1, le=1024, description="Answers generated at the same time.")
    option_scoring: bool = Field(default=True, description="For tasks with a closed label set, also choose the most likely label (a second column).")
    max_options: int = Field(default=160, ge=2, description="Leave that column out for tasks with more labels than this.")
    chat_base: bool = Field(default=True, description="Score the base inside its chat template too, and compare adapters with the better of the two.")


Name: TypeAlias = Annotated[str, AfterValidator(_checked_name)]
DataSection: TypeAlias = Annotated[DataConfig, BeforeValidator(_text_as_data, json_schema_input_type=str | DataConfig | None)]
TrainerSection: TypeAlias = Annotated[TrainerConfig, BeforeValidator(empty_as_mapping, json_schema_input_type=TrainerConfig | None)]
GenerationSection: TypeAlias = Annotated[GenerationConfig, BeforeValidator(empty_as_mapping, json_schema_input_type=GenerationConfig | None)]
CostSection: TypeAlias = Annotated[CostConfig, BeforeValidator(empty_as_mapping, json_schema_input_type=CostConfig | None)]
EvalSection: TypeAlias = Annotated[EvalConfig, BeforeValidator(empty_as_mapping, json_schema_input_type=EvalConfig | None)]

_BASE = "The base model: an alias (smollm2-135m-instruct), a Hugging Face id, or a folder (./mine, relative to this file)."
_NAME = "Name of the adapter in the hub: letters, digits, '.', '_' and '-'. Without it, the task's name."
_ROUNDING = "Round the base's linears to 4 or 8 bits (QLoRA): {bits: 4}. The adapter belongs to that rounded base. Without it, the base as it is."

_COST = "What an hour of computing costs, so that each run has a price on its record."


class TrainConfig(Section):
    """A training file: one base, one adapter."""

    base: str = Field(min_length=1, description=_BASE)
    name: Name | None = Field(default=None, description=_NAME)
    data: DataSection = Field(default_factory=DataConfig, description="Where the rows come from and how a row becomes a prompt. Text means the path.")
    adapter: AdapterSection = Field(default_factory=LoraAdapterConfig, description="What is trained.")
    trainer: TrainerSection = Field(default_factory=TrainerConfig, validate_default=True, description="How it is trained.")
    generation: GenerationSection = Field(default_factory=GenerationConfig, description="How answers are written.")
    quantization: QuantizationConfig | None = Field(default=None, description=_ROUNDING)
    cost: CostSection = Field(default_factory=CostConfig, description=_COST)

    @field_validator("adapter", mode="before")
    @classmethod
    def _check_type_given(cls, value: Any) -> Any:
        require_type(value)
        return value

    @field_validator("trainer")
    @classmethod
    def _defaults_that_depend(cls, trainer: TrainerConfig, info: ValidationInfo) -> TrainerConfig:
        """Edits of a few thousand numbers want larger steps than LoRA's factors; Lion has averaging factors of its own."""
        if trainer.optimizer == "lion" and "betas" not in trainer.model_fields_set:
            trainer = trainer.model_copy(update={"betas": LION_BETAS})
        if isinstance(info.data.get("adapter"), ReftAdapterConfig) and "learning_rate" not in trainer.model_fields_set:
            return trainer.model_copy(update={"learning_rate": REFT_LEARNING_RATE})
        return trainer

    @model_validator(mode="after")
    def _check_sharding(self) -> TrainConfig:
        """What needs more of a weight than a process has of it."""
        if self.trainer.fsdp and isinstance(self.adapter, LoraAdapterConfig) and self.adapter.use_dora:
            raise ValueError("adapter.use_dora measures every weight after each step, which trainer.fsdp keeps in parts; leave one of them out")
        if self.trainer.fsdp and self.quantization is not None and self.quantization.holds_blocks:
            raise ValueError(
                f"trainer.fsdp shares out weights that lie in memory as bf16, but quantization.resident is {self.quantization.resident}; "
                "leave one of them out"
            )
        return self

    def require_data(self) -> DataConfig:
        """The data section, when it names rows. Raises ConfigError when neither the file nor the command line did."""
        if not self.data.is_given:
            raise ConfigError("there is no training data: data.path is not given", hint="add it to the file, or give it with --data rows.jsonl")
        return self.data


class TaskDefaults(Section):
    """Settings of all tasks of a land, where a task does not say otherwise."""

    data: DataSection = Field(default_factory=DataConfig, description="For every task's data.")
    adapter: AdapterSection = Field(default_factory=LoraAdapterConfig, description="For every task's adapter.")
    trainer: TrainerSection = Field(default_factory=TrainerConfig, description="For every task's training.")
    generation: GenerationSection = Field(default_factory=GenerationConfig, description="For every task's answers.")


class TaskEntry(TaskDefaults):
    """One task of a land; what it leaves out comes from the defaults."""

    name: Name | None = Field(
        default=None, description="Name of the task and its adapter. Without it, the name of the built-in task, file or folder."
    )

    @property
    def key(self) -> str:
        """The name, given or taken from the data path."""
        source = self.data.path or self.data.train or ""
        path = PurePath(source.removeprefix(BUILTIN))
        return self.name or (path.stem if path.suffix in (".jsonl", ".json", ".csv") else path.name)

    @model_validator(mode="after")
    def _check_key(self) -> TaskEntry:
        if not self.data.is_given:
            raise ValueError("this task has no data: give data.path (builtin:NAME, a file or a task folder)")
        if not is_valid_name(self.key):
            raise ValueError(f"the data path gives this task the name {self.key!r}, which cannot be used; add a name, which {NAME_RULE}")
        return self


class LandConfig(Section):
    """A land file: one base, many tasks; each task becomes an adapter, and all are measured against the base."""

    base: str = Field(min_length=1, description=_BASE)
    defaults: Annotated[TaskDefaults, BeforeValidator(empty_as_mapping, json_schema_input_type=TaskDefaults | None)] = Field(
        default_factory=TaskDefaults, description="Settings of all tasks, where a task does not say otherwise."
    )
    tasks: tuple[Annotated[TaskEntry, BeforeValidator(_text_as_task, json_schema_input_type=str | TaskEntry)], ...] = Field(
        min_length=1, description="The tasks: a data path such as builtin:dates, or a mapping with data and what differs from the defaults."
    )
    eval: EvalSection = Field(default_factory=EvalConfig, description="How the land is measured.")
    quantization: QuantizationConfig | None = Field(default=None, description=_ROUNDING)
    cost: CostSection = Field(default_factory=CostConfig, description=_COST)

    @model_validator(mode="after")
    def _check_names(self) -> LandConfig:
        names = [task.key for task in self.tasks]
        for index, name in enumerate(names):
            if name.casefold() in (other.casefold() for other in names[:index]):
                raise ValueError(f"tasks[{index}] has the name {name!r}, which an earlier task has; give one of them another name")
        return self

    def jobs(self) -> tuple[TrainConfig, ...]:
        """One training config a task: the defaults, and over them each key that the task gives. Raises ConfigError when a mixture is not valid."""
        return tuple(self._job(index, task) for index, task in enumerate(self.tasks))

    def _job(self, index: int, task: TaskEntry) -> TrainConfig:
        sections = {name: {**given(getattr(self.defaults, name)), **given(getattr(task, name))} for name in TaskDefaults.model_fields}
        if "type" in task.adapter.model_fields_set and family_of(task.adapter) != family_of(self.defaults.adapter):
            sections["adapter"] = dict(given(task.adapter))  # LoRA's defaults say nothing about ReFT, nor the other way round
        try:
            return TrainConfig.model_validate({"base": self.base, "name": task.key, "quantization": self.quantization, "cost": self.cost, **sections})
        except ValidationError as problem:
            raise config_error(problem, TrainConfig, lambda key: f"tasks[{index}] ({task.key}), with the defaults") from None


def template_columns(template: str) -> tuple[str, ...]:
    """The columns in a template's braces, each once, in order. Raises ValueError for braces that are not `{column}`."""
    columns: dict[str, None] = {}
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as problem:
        raise ValueError(f"braces do not match ({problem}); write {{{{ and }}}} for braces that are text") from None
    for _, field, spec, conversion in pieces:
        if field is None:
            continue
        if not field or field.isdecimal() or any(sign in field for sign in ".[]"):
            raise ValueError(f"{{{field}}} does not name a column; write {{column}}, and {{{{ and }}}} for braces that are text")
        if spec or conversion:
            raise ValueError(f"{{{field}}} has a format behind the column's name; write {{column}} alone, and {{{{ and }}}} for braces that are text")
        columns[field] = None
    return tuple(columns)
