"""From a YAML file to a checked configuration.

The one idea: whatever form a file has (a training, land or compose file, one written for Ludwig or Predibase), it becomes a mapping of Atoll's keys;
overrides from the command line are laid over that, and one check by the models in config.py follows. Every complaint names file, line and key.

    read_yaml ─► (ludwig.translate) ─► overrides ─► TrainConfig | LandConfig | ComposeConfig

Used by workflows and the command line; also writes configurations back as YAML, and the JSON Schemas that editors use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import ValidationError

from atoll.config import BUILTIN, REFT_RATE_BESIDE_LORA, LandConfig, TaskEntry, TrainConfig, TrainerConfig
from atoll.config_adapter import ReftAdapterConfig
from atoll.config_compose import ComposeConfig
from atoll.errors import ConfigError
from atoll.files import write_file
from atoll.ludwig import is_ludwig, translate
from atoll.model.positions import Positions
from atoll.model_errors import config_error
from atoll.yaml_file import Key, YamlFile, dump_yaml, key_text, kind_of, nearest, parse_value, read_yaml

Config = TypeVar("Config", TrainConfig, LandConfig, ComposeConfig, covariant=True)
Kind = Literal["train", "land", "compose"]
SWEEP = "sweep"  # the section that makes many trainings of a training file, see config_sweep.py
_SWEEP = "Many trainings of this file: dotted keys with lists of values, or ranges {min, max, log} and samples; also seed and best_by."
_DATA_PATHS = ("path", "train", "validation", "test")
_SCHEMAS: Mapping[Kind, type[TrainConfig] | type[LandConfig] | type[ComposeConfig]] = {
    "train": TrainConfig,
    "land": LandConfig,
    "compose": ComposeConfig,
}
_WHAT: Mapping[Kind, str] = {"train": "a training file", "land": "a land file", "compose": "a compose file"}


@dataclass(frozen=True)
class LoadedConfig(Generic[Config]):
    """A checked configuration, and where it came from.

    root: the folder that the file's relative paths start from. warnings: sentences about keys that have no effect and the like, for the user to see.
    source: whose form the file was in.
    """

    config: Config
    path: Path
    root: Path
    warnings: tuple[str, ...]
    source: Literal["atoll", "ludwig", "predibase"]


@overload
def load_config(path: str | Path, kind: Literal["train"], overrides: Mapping[str, Any] | None = None) -> LoadedConfig[TrainConfig]: ...
@overload
def load_config(path: str | Path, kind: Literal["land"], overrides: Mapping[str, Any] | None = None) -> LoadedConfig[LandConfig]: ...
@overload
def load_config(
    path: str | Path, kind: Literal["compose"], overrides: Mapping[str, Any] | None = None, *, options: Mapping[str, str] | None = None
) -> LoadedConfig[ComposeConfig]: ...
@overload
def load_config(
    path: str | Path, kind: None = None, overrides: Mapping[str, Any] | None = None
) -> LoadedConfig[TrainConfig] | LoadedConfig[LandConfig] | LoadedConfig[ComposeConfig]: ...


def load_config(
    path: str | Path, kind: Kind | None = None, overrides: Mapping[str, Any] | None = None, *, options: Mapping[str, str] | None = None
) -> LoadedConfig[TrainConfig] | LoadedConfig[LandConfig] | LoadedConfig[ComposeConfig]:
    """Read, translate, override and check a file. Raises ConfigError, one sentence for all its problems.

    kind: which kind of file is wanted; None takes any. overrides: values by dotted key of Atoll's own form (`trainer.epochs`,
    `tasks.dates.adapter.r`), as `--set` gives them (parse_overrides); paths among them are relative to the working directory, not to the file.
    options: how a command line spells some of these keys, for complaints ("--method").
    """
    file = read_yaml(Path(path))
    if SWEEP in file.data:
        raise ConfigError(f"{file.where((SWEEP,))}: {file.path} is a sweep: many trainings in one file", hint=f"run: atoll train {file.path}")
    return load_parsed(file, kind, overrides, options=options)


def load_parsed(
    file: YamlFile,
    kind: Kind | None,
    overrides: Mapping[str, Any] | None = None,
    swept: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
) -> LoadedConfig[TrainConfig] | LoadedConfig[LandConfig] | LoadedConfig[ComposeConfig]:
    """As load_config, of a file that has been read. swept: values by dotted key that the file itself gives for this one of its trainings."""
    foreign = translate(file) if is_ludwig(file) else None
    data: dict[str, Any] = foreign.data if foreign is not None else file.data
    found = _kind_of(data, kind) if foreign is None else "train"
    if kind is not None and kind != found:
        raise _wrong_kind(file, found, kind, foreign is not None)

    root = file.path.absolute().parent
    data = _overridden(data, overrides or {})
    for key, value in (swept or {}).items():
        data = _with_override(data, key, value)
    base = data.get("base")
    if isinstance(base, str) and base.startswith((".", "~")):
        data = {**data, "base": os.path.normpath(root / Path(base).expanduser())}

    origins = foreign.origins if foreign is not None else {}
    blame = _Blame(file, origins, frozenset(overrides or {}), frozenset(swept or {}), options=options or {})
    if found == "land":
        land = _checked(LandConfig, data, blame)
        jobs = _jobs(land, file)
        return LoadedConfig(land, file.path, root, _notes(jobs), "atoll")
    if found == "compose":
        return LoadedConfig(_checked(ComposeConfig, data, blame), file.path, root, (), "atoll")
    train = _checked(TrainConfig, data, blame)
    warnings = (foreign.warnings if foreign is not None else ()) + _notes((train,))
    return LoadedConfig(train, file.path, root, warnings, foreign.source if foreign is not None else "atoll")


def load_compose(values: Mapping[str, Any], options: Mapping[str, str] | None = None) -> LoadedConfig[ComposeConfig]:
    """The composition that options alone describe: values by dotted key, and how they are spelled, as of `load_config`. Raises ConfigError."""
    nowhere = YamlFile(Path("the command line"), {}, {})
    config = _checked(ComposeConfig, _overridden({}, values), _Blame(nowhere, {}, frozenset(values), options=options or {}))
    return LoadedConfig(config, nowhere.path, Path.cwd(), (), "atoll")


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` texts from a command line, read as YAML: `5e-4`, `null` and `[q_proj, v_proj]` mean what they do in a file."""
    overrides = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting!r} is not key=value", hint="for example --set trainer.epochs=1")
        overrides[key] = parse_value(text, f"--set {key}")
    return overrides


def to_yaml(config: TrainConfig | LandConfig | ComposeConfig) -> str:
    """The configuration as a file that loads to an equal one; a training config with every value, others with those that were set."""
    return dump_yaml(config.model_dump(mode="json", exclude_unset=not isinstance(config, TrainConfig)))


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema (draft 2020-12) of each kind of file, by kind: train, land, compose."""
    schemas: dict[str, dict[str, Any]] = {}
    for kind, model in _SCHEMAS.items():
        schema = model.model_json_schema(mode="validation")
        if kind == "train":
            schema["properties"][SWEEP] = {"type": "object", "title": "Sweep", "description": _SWEEP}
        schemas[kind] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"Atoll {kind} file"}
    return schemas


def write_schemas(folder: Path) -> tuple[Path, ...]:
    """Write KIND.schema.json for each kind into a folder, which is made if need be. Raises StorageError when the disk refuses."""
    written = []
    for kind, schema in json_schemas().items():
        target = folder / f"{kind}.schema.json"
        write_file(target, json.dumps(schema, indent=2, ensure_ascii=False) + "\n")
        written.append(target)
    return tuple(written)


@dataclass(frozen=True)
class _Blame:
    """Who is to blame for a wrong value: a line of the file, in the file's own words, or an override."""

    file: YamlFile
    origins: Mapping[str, Key]
    overrides: frozenset[str]
    swept: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        text = key_text(key)
        for place in self.swept:
            if text == place or text.startswith(f"{place}."):
                return self.file.where((SWEEP, place))
        if any(text == override or text.startswith(f"{override}.") for override in self.overrides):
            return self.options.get(text) or f"--set {text}"
        return self.file.where(self.origins.get(text, key))

    def renamed(self, path: str) -> str | None:
        return key_text(self.origins[path]) if path in self.origins and path not in self.overrides else None


def _checked(model: type[Config], data: Mapping[str, Any], blame: _Blame) -> Config:
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise config_error(problem, model, blame.where, blame.renamed) from None


def _jobs(land: LandConfig, file: YamlFile) -> tuple[TrainConfig, ...]:
    """The land's jobs, made once at load so that a bad mixture of defaults and task is found before any work."""
    try:
        return land.jobs()
    except ConfigError as problem:
        raise ConfigError(f"{file.path}: {problem.message}", hint=problem.hint) from None


def _kind_of(data: Mapping[str, Any], wanted: Kind | None) -> Kind:
    """What a file of Atoll's own form is; one that could be of two kinds is what is wanted."""
    if "tasks" in data or "defaults" in data:
        return "land"
    if "compose" in data or "controls" in data:
        return "compose"
    return "compose" if wanted == "compose" and not {"adapter", "trainer"} & set(data) else "train"


def _wrong_kind(file: YamlFile, found: Kind, wanted: Kind, foreign: bool) -> ConfigError:
    signs = {"train": "", "land": " (it has tasks or defaults)", "compose": " (it has compose or controls)"}
    form = " in Ludwig's form" if foreign else " (it has no tasks)" if wanted == "land" and found == "train" else signs[found]
    return ConfigError(f"{file.path} is {_WHAT[found]}{form}, expected {_WHAT[wanted]}", hint=f"run: atoll {found} {file.path}")


def _overridden(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        data = _with_override(data, key, _from_cwd(key, value))
    return data


def _with_override(data: Any, key: str, value: Any, done: str = "") -> Any:
    """A copy of `data` with a value set at a dotted key. Sections that are absent are made; a task is found by number or name."""
    head, dot, rest = key.partition(".")
    if isinstance(data, list) and done == "tasks":
        return _with_task_override(data, key, value, done)
    if data is None:
        data = {}
    if isinstance(data, str) and done.rpartition(".")[2] == "data":
        data = {"path": data}  # the short form of a data section
    if not isinstance(data, dict):
        raise ConfigError(f"--set {done}.{key}: {done} is {kind_of(data)}, which has no keys", hint=f"set it as a whole: --set {done}=...")
    place = f"{done}.{head}" if done else head
    return {**data, head: _with_override(data.get(head), rest, value, place) if dot else value}


def _with_task_override(tasks: list[Any], key: str, value: Any, done: str) -> list[Any]:
    """`0.adapter.r` or `dates.adapter.r`; a name may itself have dots, so the longest name that fits is taken."""
    names = [str(index) for index in range(len(tasks))] + [_task_name(task) for task in tasks]
    fitting = [index for index, name in enumerate(names) if name and key.startswith(f"{name}.")]
    if not fitting:
        known = [name for name in names[len(tasks) :] if name]
        guess = nearest(key.partition(".")[0], known)
        hint = f"did you mean {done}.{guess}?" if guess else f"tasks: {', '.join(known)}"
        raise ConfigError(f"--set {done}.{key}: there is no such task", hint=hint)
    found = max(fitting, key=lambda index: len(names[index]))
    position, rest = found % len(tasks), key.removeprefix(f"{names[found]}.")
    task = {"data": {"path": tasks[position]}} if isinstance(tasks[position], str) else tasks[position]
    return [*tasks[:position], _with_override(task, rest, value, f"{done}.{names[found]}"), *tasks[position + 1 :]]


def _task_name(task: Any) -> str:
    """The name that a task of the file will have, "" for one that is not valid."""
    try:
        return TaskEntry.model_validate({"data": task} if isinstance(task, str) else task).key
    except ValidationError:
        return str(task.get("name") or "") if isinstance(task, dict) else ""


def _from_cwd(key: str, value: Any) -> Any:
    """An override's data file or base folder as an absolute path: on a command line, paths start from the working directory."""
    parts = key.split(".")
    is_file = parts[-1] == "data" or (len(parts) > 1 and parts[-2] == "data" and parts[-1] in _DATA_PATHS)
    is_folder = parts == ["base"] and isinstance(value, str) and value.startswith((".", "~"))
    if isinstance(value, str) and not value.startswith(BUILTIN) and (is_file or is_folder):
        return os.path.normpath(Path.cwd() / Path(value).expanduser())
    return value


def _notes(configs: tuple[TrainConfig, ...]) -> tuple[str, ...]:
    """What a user should know about configurations that are valid."""
    notes: dict[str, None] = {}
    for config in configs:
        if (rounding := config.quantization) is not None and rounding.holds_blocks:
            notes[f"quantization.resident {rounding.resident} saves memory and costs time: every step expands the base's weights twice"] = None
        owner = f"{config.name}: " if len(configs) > 1 else ""
        for note in (*_reft_notes(config), *_trainer_notes(config.trainer)):
            notes[f"{owner}{note}"] = None
        if config.data.template is not None and not config.data.columns:
            notes[f"{owner}data.template has no {{column}}, so every prompt is the same text: {config.data.template[:60]!r}"] = None
    return tuple(notes)


def _trainer_notes(trainer: TrainerConfig) -> Iterator[str]:
    """Settings of another optimizer or schedule than the chosen one."""
    users: dict[str, tuple[str, tuple[str, ...]]] = {
        "momentum": ("optimizer", ("sgd",)),
        "eps": ("optimizer", ("adamw",)),
        "betas": ("optimizer", ("adamw", "lion")),
        "cycles": ("schedule", ("cosine_with_restarts",)),
        "decay_fraction": ("schedule", ("warmup_stable_decay",)),
        "final_fraction": ("schedule", ("cosine", "linear", "cosine_with_restarts", "warmup_stable_decay")),
    }
    for key, (chooser, values) in users.items():
        chosen = getattr(trainer, chooser)
        if getattr(trainer, key) != type(trainer).model_fields[key].default and chosen not in values:
            yield f"trainer.{key} has no effect: it is for {chooser} {' and '.join(values)}, not {chosen}"
    if trainer.optimizer in ("sgd", "lion") and "learning_rate" not in trainer.model_fields_set:
        other = "much higher" if trainer.optimizer == "sgd" else "some times lower"
        yield f"trainer.learning_rate is not given: {trainer.learning_rate:g} is meant for adamw, {trainer.optimizer} wants a {other} one"


def _reft_notes(config: TrainConfig) -> Iterator[str]:
    """Settings that have no effect for the kind of adapter."""
    trainer, adapter = config.trainer, config.adapter
    reft = adapter if isinstance(adapter, ReftAdapterConfig) else adapter.reft
    if reft is None and trainer.reft_weight_decay:
        yield "trainer.reft_weight_decay has no effect: the adapter has no ReFT part"
    if reft is adapter and trainer.weight_decay:
        yield "trainer.weight_decay has no effect: it is LoRA's; trainer.reft_weight_decay decays ReFT's W"
    if (reft is None or reft is adapter) and trainer.reft_learning_rate != REFT_RATE_BESIDE_LORA:
        yield "trainer.reft_learning_rate has no effect: it is for a ReFT part beside a LoRA; trainer.learning_rate counts"
    if reft is not None and not reft.tied and not Positions.parse(reft.positions).has_sides:
        yield f"tied: false has no effect: positions {reft.positions} have no second side"
