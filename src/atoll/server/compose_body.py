"""The body of POST /compose, and what a request's body becomes: rows in a folder, and a ComposeConfig that names them.

Everything a request can multiply is bounded here, before anything is computed: rows, characters and tokens of a row, adapters, seeds, evaluations,
seconds. Rows come in the body and never by a path, and of the adapters only those that the key may use are named to the process, so nothing it says
can speak of others.

Used by compose.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, create_model, model_validator

from atoll.config import DataConfig, is_valid_name
from atoll.config_compose import USUAL_SEEDS, ComposeConfig, ComposeSettings
from atoll.config_quantization import QuantizationConfig
from atoll.config_section import Section
from atoll.data.encode import encode_examples
from atoll.data.prompt import as_text, encode_prompts, parse_template
from atoll.data.task import Example, TaskData, load_task
from atoll.errors import AtollError, ConfigError, RequestRefused
from atoll.hub.names import check_tag, parse_reference
from atoll.model_errors import config_error
from atoll.server.compose_adapters import check_adapters

if TYPE_CHECKING:
    from atoll.model.base import Base
    from atoll.serving.config import ComposeLimits
    from atoll.serving.service import Service

EXAMPLES, TEST = "examples.jsonl", "test.jsonl"
MAX_NAMES = 256  # of adapters in one request
MAX_LABELS = 1000
DATA_KEYS = ("template", "instruction", "target", "chat", "metric", "match", "label_set", "references", "gold_field")
_OWN = ("adapters", "exclude", "dtype", "device")  # settings that the facts or the server give
WHOLE_KEYS = ("description", "controls")
SETTINGS = tuple(name for name in ComposeSettings.model_fields if name not in _OWN)


class Facts(Section):
    """What a composition is made from, and what becomes of it."""

    name: str = Field(min_length=1, max_length=193, description="name or owner/name of the result; a name that there is gets a new version.")
    examples: tuple[dict[str, Any], ...] = Field(
        min_length=1, description="Rows of the new task: prompt and completion, messages, or any columns with template and target."
    )
    test: tuple[dict[str, Any], ...] = Field(default=(), description="Rows to measure on, in the same form. Nothing is chosen by them.")
    adapters: tuple[str, ...] = Field(
        default=(),
        max_length=MAX_NAMES,
        description="Compose only these adapters of the hub; `from` is another name for it. Without it, every LoRA of the base that the key may use.",
    )
    exclude: tuple[str, ...] = Field(default=(), max_length=MAX_NAMES, description="Names or references that are left out.")
    tags: tuple[str, ...] = Field(default=(), max_length=16, description="Movable labels for the version.")
    message: str = Field(default="", max_length=10_000, description="What is new in this version.")

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, body: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """What is wrong with a body, in the words that a compose file's mistakes have."""
        if not isinstance(body, Mapping):
            return check(body)
        if {"adapters", "from"} <= body.keys():
            raise ConfigError("adapters and from are two names of one setting, and both are given", hint="leave one of them out")
        try:
            return check({"adapters" if name == "from" else name: value for name, value in body.items()})
        except ValidationError as problem:
            renamed = (lambda path: re.sub("^adapters", "from", path)) if "from" in body else lambda path: path
            raise config_error(problem, cls, lambda key: "", renamed) from None


if TYPE_CHECKING:

    class ComposeBody(Facts):
        """The body: the facts, and under their own names the settings of a compose file, of its data and its compose section."""
else:
    _KEYS = ((ComposeConfig, WHOLE_KEYS), (DataConfig, DATA_KEYS), (ComposeSettings, SETTINGS))
    _FIELDS = {name: config.model_fields[name] for config, names in _KEYS for name in names}
    ComposeBody = create_model("ComposeBody", __base__=Facts, **{name: (field.annotation, field) for name, field in _FIELDS.items()})


def prepared(body: ComposeBody, chosen: Sequence[str], folder: Path, service: Service) -> Mapping[str, Any]:
    """Write the rows into `folder` and check them; returns the request for the process, as JSON. Blocks: for a thread.

    chosen: what `candidates` said. Raises RequestRefused for what is too much, and what a ComposeConfig and its data raise, without a path of this
    machine.
    """
    from atoll.workflows.compose_plan import check_composable

    limits, hub = service.config.compose, service.hub
    assert hub is not None, "checked by may_publish"
    try:
        config = config_of(body, chosen, service.base, limits)
        check_adapters(config.compose, service)
        rows = {"examples": (EXAMPLES, body.examples, limits.max_examples), "test": (TEST, body.test, limits.max_test_rows)}
        for part, (file, values, most) in rows.items():
            _check_count(part, len(values), most)
            _write(folder / file, part, values, config.data, limits.max_row_chars)
        data = load_task(config.require_data(), name=config.name, root=folder)
        check_composable(config, data)
        _check_tokens(data, service.base, limits)
    except AtollError as error:
        raise type(error)(_spoken(error.message, folder), hint=_spoken(error.hint, folder)) from None
    return {
        "config": {**config.model_dump(mode="json"), **_rounding(config)},
        "root": str(folder),
        "hub": {"root": str(hub.root), "database_url": hub.urls[0], "blob_url": hub.urls[1]},
        "nice": limits.nice,
    }


def config_of(body: ComposeBody, chosen: Sequence[str], base: Base, limits: ComposeLimits) -> ComposeConfig:
    """The composition over `base` that a body asks for. Raises ConfigError, and RequestRefused for what is beyond the limits."""
    asked = body.model_dump(exclude_unset=True, exclude={"examples", "test"})
    for text in body.exclude:
        parse_reference(text)
    _check_count("label_set", len(asked.get("label_set") or ()), MAX_LABELS)
    for tag in body.tags:
        check_tag(tag)
    for name, most in (("top_k", limits.max_top_k), ("seeds", limits.max_seeds), ("budget", limits.max_budget), ("time_s", limits.max_time_s)):
        if asked.get(name) is not None and asked[name] > most:
            raise RequestRefused(f"`{name}` is {asked[name]:g}, and at most {most:g} is taken here", hint="ask for less")
    own = ComposeSettings.model_fields
    settings = {
        "top_k": min(own["top_k"].default, limits.max_top_k),
        "time_s": limits.max_time_s,
        **{name: asked[name] for name in SETTINGS if asked.get(name) is not None},
        "adapters": tuple(chosen),
        "exclude": () if chosen and not body.adapters else body.exclude,  # those of an allow-list are left out already
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.decoder.device),
    }
    if body.test and limits.max_seeds < USUAL_SEEDS:  # what is usual beside test rows where examples are drawn
        settings.setdefault("seeds", limits.max_seeds if "k" in settings else 1)
    data = {"train": EXAMPLES, **({"test": TEST} if body.test else {}), **{name: asked[name] for name in DATA_KEYS if asked.get(name) is not None}}
    rounded = base.fingerprint.quantization  # the worker's base is the one that is served; blocks in memory would compute the same
    quantization = QuantizationConfig.named(rounded) if rounded else None
    whole: dict[str, Any] = {"base": base.name, "quantization": quantization, "name": _task_name(body.name), "data": data, "compose": settings}
    return ComposeConfig(**whole, **{name: asked[name] for name in WHOLE_KEYS if name in asked})


def _rounding(config: ComposeConfig) -> dict[str, Any]:
    """The section as it was made: a whole one of 8 bits would name settings of 4."""
    return {} if config.quantization is None else {"quantization": config.quantization.model_dump(mode="json", exclude_unset=True)}


def _task_name(name: str) -> str | None:
    """What the result's task is called: the name without its owner, where a file may be called so."""
    last = name.rpartition("/")[2]
    return last if is_valid_name(last) else None


def _check_count(part: str, num: int, most: int) -> None:
    if num > most:
        raise RequestRefused(f"`{part}` has {num:,} entries, and at most {most:,} are taken here", hint="send fewer")


def _write(path: Path, part: str, rows: Sequence[Mapping[str, Any]], data: DataConfig, most: int) -> None:
    """The rows as JSON lines, none longer than `most` characters, nor its prompt once it is filled in."""
    literal, columns = _template(data)
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            line = json.dumps(row, ensure_ascii=False)
            chars = max(len(line), literal + sum(len(as_text(row.get(name))) * count for name, count in columns.items()))
            if chars > most:
                raise RequestRefused(
                    f"{part}, row {number} has {chars:,} characters with its prompt, and at most {most:,} are taken here", hint="shorten it"
                )
            file.write(line + "\n")


def _template(data: DataConfig) -> tuple[int, dict[str, int]]:
    """Characters of the prompt's own text, and how often each column stands in it."""
    columns: dict[str, int] = {}
    chars = len(data.instruction or "")
    for text, name in parse_template(data.template or ""):
        chars += len(text)
        if name is not None:
            columns[name] = columns.get(name, 0) + 1
    return chars, columns


def _check_tokens(data: TaskData, base: Base, limits: ComposeLimits) -> None:
    """No row longer than the limit and the base's context; a conversation may have become several examples."""
    most, chat = min(limits.max_row_tokens, base.context_length), data.task.chat
    _check_count("examples", len(data.train), limits.max_examples)
    _check_count("test", len(data.test), limits.max_test_rows)
    lengths = encode_examples(data.train, base.tokenizer, None, chat=chat, eos_ids=base.eos_ids).lengths
    asked = encode_prompts([example.turns for example in data.test], base.tokenizer, chat, [example.where for example in data.test])
    for rows, counts in ((data.train, lengths), (data.test, [len(prompt) for prompt in asked])):
        _check_lengths(rows, counts, most)


def _check_lengths(rows: Sequence[Example], counts: Sequence[int], most: int) -> None:
    for example, count in zip(rows, counts, strict=True):
        if count > most:
            raise RequestRefused(f"{example.where}: the row has {count:,} tokens, and at most {most:,} are taken here", hint="shorten it")


def _spoken(text: str, folder: Path) -> str:
    """A message about our files as one about the body."""
    for file, part in ((EXAMPLES, "examples"), (TEST, "test")):
        text = text.replace(f"{folder / file}:", f"{part}, row ").replace(str(folder / file), f"`{part}`")
    return re.sub(r"\b(?:compose|data)\.(\w+)", _flat, text.removeprefix("ComposeConfig: "))


def _flat(found: re.Match[str]) -> str:
    """A key of a compose file as the body calls it: without its section."""
    return found[1] if found[1] in (*SETTINGS, *DATA_KEYS) else found[0]
