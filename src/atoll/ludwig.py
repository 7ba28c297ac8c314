"""Read configurations written for Ludwig: LoRA Land's short form, Ludwig's long form, and the form in LoRA Land's paper.

The one idea: translate to a plain mapping of Atoll's keys, and remember for each which key of the file it came from, so that a wrong value is
reported in the file's own words. What the file leaves out gets LoRA Land's settings (rate 2e-4, cosine, warmup 0.03, batches of 16, 3 epochs), not
Ludwig's defaults for tables; but LoRA's own (rank 8, alpha 2r, dropout 0.05, query and value) are Ludwig's. ludwig_keys says what becomes of a key.

Used by config_file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.errors import ConfigError
from atoll.ludwig_keys import ADAM_LIKE, ADAPTER_TYPES, DECAYS, OPTIMIZERS, OTHERS, RULES, SPLIT_TYPES, STARTS, TRAINER_TYPES, Rule, base_name
from atoll.yaml_file import Key, YamlFile, key_hint, key_text, kind_of, nearest

_MARKS = ("base_model", "model_type", "input_features", "output_features", "output_feature", "preprocessing", "prompt")
_OWN_MARKS = ("base", "data", "tasks")
_SHORT_SECTIONS = ("adapter", "trainer.optimizer")  # `adapter: lora` is short for `adapter: {type: lora}`
_LORA_LAND: Mapping[str, Any] = {"learning_rate": 2e-4, "schedule": "cosine", "warmup_fraction": 0.03, "epochs": 3, "early_stop_patience": 5}
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Translation:
    """data: a mapping in Atoll's own form. origins: the file's key for each of Atoll's (dotted) keys that the file gave."""

    data: dict[str, Any]
    warnings: tuple[str, ...]
    source: Literal["ludwig", "predibase"]
    origins: Mapping[str, Key]


def is_ludwig(file: YamlFile) -> bool:
    """Whether a file's top-level keys are Ludwig's or Predibase's. Raises ConfigError when some are and some are Atoll's."""
    theirs = next((mark for mark in _MARKS if mark in file.data), None)
    ours = next((mark for mark in _OWN_MARKS if mark in file.data), None)
    if theirs is not None and ours is not None:
        raise ConfigError(
            f"{file.where((theirs,))}: {theirs} is a key of Ludwig's form, but {ours} (line {file.lines[ours,]}) is one of Atoll's",
            hint="keep to one form; examples/train.yaml and examples/lora_land_article.yaml show each",
        )
    return theirs is not None


def translate(file: YamlFile) -> Translation:
    """Translate a whole file. Raises ConfigError, with line and key, for unknown keys and for what Atoll does not do."""
    reader = _Reader(file)
    reader.check(file.data, ())
    _base(reader)
    _prompt_and_target(reader)
    _split(reader)
    _lengths(reader)
    _adapter(reader)
    _quantization(reader)
    _batches(reader)
    _optimizer(reader)
    _schedule(reader)
    reader.put("generation.max_new_tokens", ("generation", "max_new_tokens"))
    source: Literal["ludwig", "predibase"] = "predibase" if "output_feature" in file.data else "ludwig"
    return Translation(reader.out, tuple(reader.warnings), source, reader.origins)


@dataclass
class _Reader:
    """The file's values by key, and what has been made of them so far."""

    file: YamlFile
    out: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Key] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def get(self, *key: str | int) -> Any:
        """The value at a key, None when it is absent."""
        value: Any = self.file.data
        for part in key:
            if isinstance(value, str) and part == "type":  # a section in its short form
                return value
            if isinstance(value, list) and isinstance(part, int):
                value = value[part] if part < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value

    def has(self, *key: str) -> bool:
        """Whether a key is written in the file, with or without a value."""
        parent = self.get(*key[:-1])
        return isinstance(parent, dict) and key[-1] in parent

    def set(self, ours: str, value: Any, theirs: Key | None = None) -> None:
        """Set one of Atoll's dotted keys; `theirs` is where a wrong value is to be blamed on."""
        section, _, name = ours.rpartition(".")
        (self.out.setdefault(section, {}) if section else self.out)[name] = value
        if theirs is not None:
            self.origins[ours] = theirs

    def put(self, ours: str, theirs: Key, default: Any = None) -> None:
        """Copy the file's value, or the default (unless that is None)."""
        value = self.get(*theirs)
        if value is not None:
            self.set(ours, value, theirs)
        elif default is not None:
            self.set(ours, default)

    def warn(self, key: Key, text: str) -> None:
        self.warnings.append(f"{self.file.where(key)}: {key_text(key)} {text}")

    def error(self, key: Key, text: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.file.where(key)}: {key_text(key)} {text}", hint=hint)

    def choice(self, key: Key, known: Iterable[str], supported: Iterable[str], default: str) -> str:
        """The text at `key`, one of `supported`; a ConfigError says whether another value is unknown or only not offered here."""
        value, known, supported = self.get(*key), list(known), list(supported)
        if value is None:
            return default
        if value in supported:
            return str(value)
        if value in known:
            raise self.error(key, f"{value!r} is not supported", f"supported: {', '.join(supported)}")
        guess = nearest(value, known) if isinstance(value, str) else None
        raise self.error(key, f"is {value!r}, which is not known", f"did you mean {guess}?" if guess else f"supported: {', '.join(supported)}")

    def count(self, *key: str, least: int = 1) -> int | None:
        """The whole number at `key`, None when it is absent or `auto`."""
        value = self.get(*key)
        if value is None or value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"is {value!r}: must be a whole number from {least}, or auto")
        return value

    def check(self, value: Any, key: Key) -> None:
        """Go through every key of the file: refuse unknown and unsupported ones, collect warnings about those without effect."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                if not isinstance(item, dict):
                    raise self.error((*key, index), f"must be keys with values, but this is {kind_of(item)}")
                self.check(item, (*key, index))
            return
        for name, inner in value.items():
            path = (*key, name)
            rule = RULES.get(_generic(path))
            if rule is None:
                raise self._unknown(path)
            self._apply(rule, inner, path)

    def _apply(self, rule: Rule, value: Any, path: Key) -> None:
        if rule.does == "section":
            if isinstance(value, (dict, list)):
                if isinstance(value, list) is not (_generic(path) + "[].name" in RULES):
                    raise self.error(path, f"must not be {kind_of(value)}")
                self.check(value, path)
            elif value is not None and not (isinstance(value, str) and key_text(path) in _SHORT_SECTIONS):
                raise self.error(path, f"must be keys with values, but this is {kind_of(value)}")
        elif rule.does == "refused" and not rule.passes(value):
            raise self.error(path, f"is known but not supported: {rule.why}", "remove the key if the result may do without it")
        elif rule.does == "no effect" and not rule.passes(value):
            self.warn(path, f"is known but has no effect here: {rule.why}")

    def _unknown(self, path: Key) -> ConfigError:
        parent = _generic(path[:-1])
        prefix = f"{parent}." if parent else ""
        siblings = [rule.removeprefix(prefix) for rule in RULES if rule.startswith(prefix) and "." not in rule.removeprefix(prefix)]
        return self.error(path, "is not a key of Ludwig's LLM configuration", key_hint(str(path[-1]), key_text(path[:-1]), siblings, RULES))


def _generic(key: Key) -> str:
    """The path with list positions left open, as RULES writes it: input_features[].name."""
    text = "".join("[]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def _base(reader: _Reader) -> None:
    if reader.get("model_type") not in (None, "llm"):
        raise reader.error(("model_type",), f"is {reader.get('model_type')!r}", "supported: llm")
    name = reader.get("base_model")
    if name is None:
        raise ConfigError(f"{reader.file.path}: base_model is missing", hint="base_model: an alias, a Hugging Face id, or a folder")
    reader.set("base", base_name(name) if isinstance(name, str) else name, ("base_model",))


def _feature_column(reader: _Reader, section: str) -> str | None:
    """The column of the one text feature in a list, None when the list is absent."""
    features = reader.get(section)
    if features is None:
        return None
    if len(features) != 1:
        raise reader.error(
            (section,), f"has {len(features)} entries, but a prompt has one input and one output", "name other columns in prompt.template"
        )
    if reader.get(section, 0, "type") not in (None, "text"):
        raise reader.error((section, 0, "type"), f"{reader.get(section, 0, 'type')!r} is not supported", "supported: text")
    column = reader.get(section, 0, "column") or reader.get(section, 0, "name")
    if not isinstance(column, str):
        raise reader.error((section, 0), "has no name", "name: the column in the data")
    return column


def _prompt_and_target(reader: _Reader) -> None:
    """The template with Ludwig's own placeholders resolved, and the output's column as the target."""
    column, template, task = _feature_column(reader, "input_features"), reader.get("prompt", "template"), reader.get("prompt", "task")
    key: Key = ("prompt", "template")
    if isinstance(template, str):
        if "{__context__}" in template:
            raise reader.error(key, "has {__context__}: examples are not looked up at run time", "write the examples into the template")
        if "{__sample__}" in template and column is None:
            raise reader.error(key, "has {__sample__}, but there are no input_features", "name the column: {text}")
        if "{__task__}" in template and not isinstance(task, str):
            raise reader.error(key, "has {__task__}, but prompt.task is not given", "add prompt.task")
        template = template.replace("{__sample__}", f"{{{column}}}")
        if "{__task__}" in template:
            template = template.replace("{__task__}", task.replace("{", "{{").replace("}", "}}"))
        elif task is not None:
            reader.warn(("prompt", "task"), "is known but has no effect here: the template has no {__task__}")
    elif template is None and task is not None:
        reader.set("data.instruction", task, ("prompt", "task"))
        reader.warn(("prompt", "task"), "stands before the input here; Ludwig's own wording around it is not used")
    if template is None and column is not None:
        template, key = f"{{{column}}}", ("input_features", 0)
    if template is not None:
        reader.set("data.template", template, key)

    short, long = reader.get("output_feature"), _feature_column(reader, "output_features")
    if short is not None and long is not None:
        raise reader.error(("output_feature",), "and output_features are both given", "keep one of the two")
    if short is None and long is None:
        raise ConfigError(f"{reader.file.path}: output_features is missing", hint="output_feature: the column that holds what the model should write")
    reader.set("data.target", short if short is not None else long, ("output_feature",) if short is not None else ("output_features", 0))


def _split(reader: _Reader) -> None:
    if reader.get("preprocessing", "split") is None:
        return
    kind = reader.choice(("preprocessing", "split", "type"), SPLIT_TYPES, ("fixed", "random"), "random")
    if kind == "fixed":
        reader.put("data.split_column", ("preprocessing", "split", "column"), "split")
        return
    reader.put("data.ratios", ("preprocessing", "split", "probabilities"))
    reader.warn(("preprocessing", "split"), "is random, but a column named split decides where the rows have one")


def _lengths(reader: _Reader) -> None:
    """One limit for the whole row: the global one, from either place, or the sum of the two parts'."""
    places: list[Key] = [(section, "global_max_sequence_length") for section in ("preprocessing", "prompt")]
    given = [place for place in places if reader.get(*place) is not None]
    parts: list[Key] = [(section, 0, "preprocessing", "max_sequence_length") for section in ("input_features", "output_features")]
    limits = [reader.get(*part) for part in parts]
    if len(given) == 2 and reader.get(*given[0]) != reader.get(*given[1]):
        raise reader.error(given[0], f"is {reader.get(*given[0])}, but {key_text(given[1])} is {reader.get(*given[1])}", "keep one of the two")
    if not given and "p95" in limits:
        reader.set("trainer.max_length", "p95", parts[limits.index("p95")])
        return
    if not given and all(isinstance(limit, int) for limit in limits):
        reader.set("trainer.max_length", sum(limits), parts[0])
        return
    if given:
        reader.put("trainer.max_length", given[0])
    why = "the limit of the whole row counts" if given else "rows are limited as a whole; give preprocessing.global_max_sequence_length"
    for part, limit in zip(parts, limits, strict=True):
        if limit is not None:
            reader.warn(part, f"is known but has no effect here: {why}")


def _adapter(reader: _Reader) -> None:
    if reader.get("adapter") is None:
        raise ConfigError(f"{reader.file.path}: adapter is missing; without one, Ludwig trains the whole base", hint="adapter: {type: lora}")
    reader.set("adapter.type", reader.choice(("adapter", "type"), ADAPTER_TYPES, ("lora",), "lora"))
    reader.put("adapter.r", ("adapter", "r"), 8)
    reader.put("adapter.dropout", ("adapter", "dropout"), 0.05)
    reader.put("adapter.target_modules", ("adapter", "target_modules"), ["q_proj", "v_proj"])
    for name in ("alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "loraplus_lr_ratio"):
        reader.put(f"adapter.{name}", ("adapter", name))
    if reader.get("adapter", "init_lora_weights") not in (None, True):
        reader.set("adapter.init_lora_weights", reader.choice(("adapter", "init_lora_weights"), STARTS, STARTS[:4], "default"))
    if reader.get("model_parameters", "neftune_noise_alpha"):  # 0 is none
        reader.put("trainer.neftune_noise_alpha", ("model_parameters", "neftune_noise_alpha"))


def _quantization(reader: _Reader) -> None:
    if reader.get("quantization") is None:
        return
    reader.put("quantization.bits", ("quantization", "bits"), 4)
    reader.put("quantization.quant_type", ("quantization", "bnb_4bit_quant_type"))
    reader.put("quantization.double_quant", ("quantization", "bnb_4bit_use_double_quant"))


def _batches(reader: _Reader) -> None:
    """Rows an optimizer step, and lengths in optimizer steps: Ludwig counts forward passes, of which `accumulation` make one step."""
    if reader.choice(("trainer", "type"), TRAINER_TYPES, ("finetune", "none"), "finetune") == "none":
        raise reader.error(("trainer", "type"), "is 'none', which asks for no training", "write finetune")
    batch, accumulation = reader.count("trainer", "batch_size"), reader.count("trainer", "gradient_accumulation_steps")
    effective = reader.count("trainer", "effective_batch_size")
    origin: Key = ("trainer", "effective_batch_size" if effective else "batch_size" if batch else "gradient_accumulation_steps")
    if effective is not None:
        accumulation = accumulation or (effective // batch if batch else 1)
        if effective != (batch or effective // accumulation) * accumulation:
            raise reader.error(origin, f"is {effective}, which is not batch_size times gradient_accumulation_steps", "give two of the three")
    elif batch or accumulation:
        effective = (batch or 1) * (accumulation or 1)
    passes = accumulation or 1
    reader.set("trainer.batch_size", effective or _BATCH_SIZE, origin if effective else None)

    reader.put("trainer.epochs", ("trainer", "epochs"), _LORA_LAND["epochs"])
    steps = reader.count("trainer", "train_steps")
    if steps is not None:
        reader.set("trainer.max_steps", math.ceil(steps / passes), ("trainer", "train_steps"))
        if passes > 1:
            rows = f"of {effective} rows"
            reader.warn(("trainer", "train_steps"), f"counts forward passes: {steps} of them are {math.ceil(steps / passes)} optimizer steps {rows}")
    checkpoint = reader.count("trainer", "steps_per_checkpoint", least=0)
    if checkpoint:
        for name in ("eval_every", "checkpoint_every"):
            reader.set(f"trainer.{name}", math.ceil(checkpoint / passes), ("trainer", "steps_per_checkpoint"))
    _evaluation_rows(reader)


def _evaluation_rows(reader: _Reader) -> None:
    """eval_steps limits an evaluation to so many batches."""
    steps, rows = reader.count("trainer", "eval_steps"), reader.count("trainer", "eval_batch_size", least=0)
    if steps and rows:
        reader.set("data.max_validation_rows", steps * rows, ("trainer", "eval_steps"))
    elif steps:
        reader.warn(("trainer", "eval_steps"), "is known but has no effect here: it counts batches, and eval_batch_size is not given")


def _optimizer(reader: _Reader) -> None:
    kind = reader.choice(("trainer", "optimizer", "type"), OPTIMIZERS, (*ADAM_LIKE, *OTHERS), "adam")
    if kind in OTHERS:
        reader.set("trainer.optimizer", kind, ("trainer", "optimizer", "type"))
        reader.put("trainer.momentum", ("trainer", "optimizer", "momentum"), 0.0 if kind == "sgd" else None)
    elif reader.get("trainer", "optimizer", "momentum"):
        reader.warn(("trainer", "optimizer", "momentum"), f"is known but has no effect here: {kind} has none")
    if "paged" in kind or "8bit" in kind:
        reader.warn(("trainer", "optimizer"), f"{kind} is AdamW here: its state is held in 32 bits, in memory")
    elif kind == "adam" and reader.get("trainer", "optimizer", "weight_decay"):
        reader.warn(("trainer", "optimizer", "weight_decay"), "acts on the weights (AdamW) here, not on the gradients")
    for name in ("betas", "eps", "weight_decay"):
        reader.put(f"trainer.{name}", ("trainer", "optimizer", name))
    if reader.get("trainer", "learning_rate") == "auto":
        reader.set("trainer.learning_rate", _LORA_LAND["learning_rate"])
        reader.warn(("trainer", "learning_rate"), f"auto is {_LORA_LAND['learning_rate']} here")
    else:
        reader.put("trainer.learning_rate", ("trainer", "learning_rate"), _LORA_LAND["learning_rate"])
    if reader.has("trainer", "gradient_clipping") and reader.get("trainer", "gradient_clipping") is None:
        reader.set("trainer.max_grad_norm", 0, ("trainer", "gradient_clipping"))
    else:
        reader.put("trainer.max_grad_norm", ("trainer", "gradient_clipping", "clipglobalnorm"))


def _schedule(reader: _Reader) -> None:
    """The learning rate's curve and early stopping; a schedule written as null is Ludwig's way to keep the rate constant."""
    section: Key = ("trainer", "learning_rate_scheduler")
    off = any(reader.has(*key) and reader.get(*key) is None for key in (("trainer", "learning_rate_scheduler"), (*section, "decay")))  # type: ignore[arg-type]
    supported = ("cosine", "cosine_with_restarts", "linear", "constant", "inverse_sqrt")
    decay = "constant" if off else reader.choice((*section, "decay"), DECAYS, supported, str(_LORA_LAND["schedule"]))
    if decay == "cosine_with_restarts":
        reader.warn((*section, "decay"), "is a cosine without restarts here")
        decay = "cosine"
    reader.set("trainer.schedule", decay)
    reader.put("trainer.warmup_fraction", (*section, "warmup_fraction"), _LORA_LAND["warmup_fraction"])

    patience = reader.get("trainer", "early_stop")
    if patience == -1 or reader.get("trainer", "skip_all_evaluation") is True:
        reader.set("trainer.early_stop_patience", None)
    else:
        reader.put("trainer.early_stop_patience", ("trainer", "early_stop"), _LORA_LAND["early_stop_patience"])
