"""From a row to the text of a prompt, and from a prompt to tokens: the one way that training, evaluation and serving share.

A prompt is `instruction + "\n\n" + template`, with each `{column}` of the template replaced by the row's value; a chat prompt is that text as a
user turn (or a conversation) inside the tokenizer's chat template. PromptFormat is what travels in an adapter's manifest, so that whoever serves
the adapter asks it in the words it was trained on. Templates come from strangers' manifests too: they name columns and nothing else, no attributes,
indices or formats.

Used by data.task and data.encode, and by whoever turns a request into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from string import Formatter
from typing import Any

from atoll.errors import AdapterFormatError, ConfigError, DataError

MANIFEST_HINT = "the manifest is damaged or was not written by Atoll: publish the adapter again"
ROLES = ("system", "user", "assistant")
Turn = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class PromptFormat:
    """How one task's rows become prompts and completions.

    render(row)         = instruction + "\n\n" + template with the row's columns in it (without instruction, the latter alone)
    completion_for(row) = completion_prefix + row[target]; the prefix is left out after a prompt that ends in a line end, and in a chat

    With `chat` the rendered text is the user turn of the tokenizer's chat template (see encode_prompt). `stop` holds texts at which generation ends
    besides the end-of-sequence token. Data with literal `prompt` and `completion` columns has the template "{prompt}" and an empty prefix: nothing
    is added between the two, not even the space that "Answer:" and "yes" lack.
    """

    template: str = "{prompt}"
    instruction: str = ""
    target: str = "completion"
    chat: bool = False
    stop: tuple[str, ...] = ()
    completion_prefix: str = " "

    def __post_init__(self) -> None:
        parse_template(self.template)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in parse_template(self.template) if name is not None))

    def render(self, row: Mapping[str, Any], where: str = "") -> str:
        """The prompt's text. Raises DataError, naming `where` and the nearest column, if the row lacks a column of the template."""
        body = "".join(text + ("" if name is None else as_text(column(row, name, where))) for text, name in parse_template(self.template))
        return f"{self.instruction}\n\n{body}" if self.instruction else body

    def completion_for(self, row: Mapping[str, Any], where: str = "") -> str:
        """What the model should write after `render(row)`, without the end-of-sequence token. Raises DataError if the target is missing or null."""
        value = column(row, self.target, where)
        if value is None:
            raise DataError(f"{_at(where)}target column {self.target!r} is null", hint="drop the row or fill the value in")
        prefix = "" if self.chat or self.render(row, where).endswith("\n") else self.completion_prefix
        return prefix + as_text(value)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that from_json turns back into an equal PromptFormat."""
        return {**asdict(self), "stop": list(self.stop)}

    @classmethod
    def from_json(cls, value: Any) -> PromptFormat:
        """The inverse of to_json. Raises AdapterFormatError for anything else: a key we do not know could change the prompt, so it is not ignored."""
        if not isinstance(value, dict):
            raise AdapterFormatError(
                f"the prompt format is a {type(value).__name__}, expected a JSON object", hint="the manifest was not written by Atoll"
            )
        kinds = {field.name: bool if field.name == "chat" else str for field in fields(cls) if field.name != "stop"}
        unknown = sorted(set(value) - set(kinds) - {"stop"})
        if unknown:
            raise AdapterFormatError(f"the prompt format has the unknown key {unknown[0]!r}", hint="a newer Atoll may have written it: upgrade")
        for name, kind in kinds.items():
            if name in value and not isinstance(value[name], kind):
                expected = "a boolean" if kind is bool else "a text"
                raise AdapterFormatError(f"the prompt format's {name} is {value[name]!r:.80}, expected {expected}", hint=MANIFEST_HINT)
        stop = value.get("stop", [])
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise AdapterFormatError(f"the prompt format's stop is {stop!r}, expected a list of texts, none empty", hint=MANIFEST_HINT)
        try:
            return cls(**{**value, "stop": tuple(stop)})
        except ConfigError as error:
            raise AdapterFormatError(f"the prompt format cannot be used: {error.message}", hint=error.hint) from error


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, column name or None) pairs; `{{` and `}}` stand for single braces.

    Raises ConfigError for unbalanced braces, and for what str.format would also do with `{a.b}`, `{a[0]}`, `{a!r}`, `{a:>9}` and `{}`.
    """
    pieces: list[tuple[str, str | None]] = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"prompt template {_short(template)!r} is malformed: {error}", hint="write {{ and }} for braces that are text") from error
    for text, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name or name.isdigit() or any(mark in name for mark in ".[]{}")):
            found = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ConfigError(
                f"prompt template {_short(template)!r} holds {{{found}}}, expected the plain name of a column in braces",
                hint="write {{ and }} for braces that are text, and format values in the data file",
            )
        pieces.append((text, name))
    return pieces


def column(row: Mapping[str, Any], name: str, where: str = "") -> Any:
    """row[name], or a DataError that names the place, the column, the columns there are and the nearest of them."""
    if name not in row:
        near = get_close_matches(name, row, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name an existing column in the template, target or other setting, or add it to the data"
        raise DataError(f"{_at(where)}no column {name!r}; the columns are {', '.join(map(repr, row)) or 'none'}", hint=hint)
    return row[name]


def as_text(value: Any) -> str:
    """A value as it stands in a prompt: text as it is, null as nothing, lists and objects as JSON, numbers and booleans by str()."""
    if value is None:
        return ""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def encode_prompt(prompt: str | Sequence[Turn], tokenizer: Any, chat: bool = False) -> list[int]:
    """The tokens of a prompt, ready to be continued: the one function that training, evaluation and serving use.

    Text gets what the tokenizer puts before a text (a BOS, or nothing) and never what it puts after it. With `chat`, or for a list of turns, the
    prompt is rendered by the tokenizer's chat template up to where the answer begins. Special tokens written out in the text count as such.

    Raises ConfigError if the tokenizer has no chat template, DataError if the prompt has no token.
    """
    return encode_prompts([prompt], tokenizer, chat)[0]


READS_WHOLE = "reads_whole_texts"  # set on the tokenizer of a base that reads a text to its end before it answers (model.base): it sees that end


def encode_prompts(prompts: Sequence[str | Sequence[Turn]], tokenizer: Any, chat: bool = False, where: Sequence[str] = ()) -> list[list[int]]:
    """encode_prompt for many prompts in one call of the tokenizer, which is several times faster; `where` names them in errors."""
    places = where or [""] * len(prompts)
    before, behind = added_tokens(tokenizer)
    end = behind if getattr(tokenizer, READS_WHOLE, False) else []
    prefixes: list[list[int]] = []
    texts = []
    for prompt, place in zip(prompts, places, strict=True):
        turns = as_turns(prompt) if chat or not isinstance(prompt, str) else None
        texts.append(render_chat(turns, tokenizer, place) if turns is not None else str(prompt))
        prefixes.append([] if turns is not None else before)  # a chat template writes its own BOS
    encoded = [prefix + token_ids + end for prefix, token_ids in zip(prefixes, tokenize(texts, tokenizer), strict=True)]
    for token_ids, place in zip(encoded, places, strict=True):
        if not token_ids:
            raise DataError(f"{_at(place)}the prompt is empty, so there is nothing to continue", hint="give a prompt or an instruction")
    return encoded


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, nothing added before or after."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text on its own accord, found by encoding a letter with and without: ([bos], []), ([], [eos]), …"""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ConfigError(f"the tokenizer encodes 'a' as {full} with and {plain} without special tokens", hint="use a base with a common tokenizer")


def as_turns(prompt: str | Sequence[Turn]) -> Sequence[Turn]:
    """A text as the one user turn of a conversation; turns as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def read_conversation(row: Mapping[str, Any], where: str) -> list[tuple[Turn, bool]]:
    """The turns of a row's `messages`, in OpenAI's shape, each with whether it is to be learned: assistant turns are, unless their `weight` is 0.

    Raises DataError, naming place and message, for whatever could not be trained on as it stands: tools, other roles, images, odd weights.
    """
    messages = column(row, "messages", where)
    for key in ("tools", "functions"):
        if row.get(key):
            raise DataError(
                f"{where}: the row has {key}, which Atoll does not train on", hint="write the calls as text: prompt and completion columns"
            )
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is {messages!r:.60}, expected a list of turns", hint='[{"role": "user", "content": "..."}, ...]')
    return [_read_turn(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def _read_turn(message: Any, where: str) -> tuple[Turn, bool]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {message!r:.60}, expected an object with role and content", hint='{"role": "user", "content": "..."}')
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        hint = "write tool calls and their results as text, in prompt and completion columns" if role in ("tool", "function") else "use one of these"
        raise DataError(f"{where} has role {role!r}, expected one of {', '.join(ROLES)}", hint=hint)
    extra = sorted(key for key, value in message.items() if key not in ("role", "content", "weight") and value)
    if extra:
        raise DataError(f"{where} has {extra[0]!r}, which Atoll does not train on", hint="a turn holds role and content, and optionally weight")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} has content {content!r:.60}, expected a text", hint="only text can be trained on")
    if weight not in (0, 1):
        raise DataError(f"{where} has weight {weight!r}, expected 0 or 1", hint="0: not to be learned")
    return {"role": role, "content": content}, role == "assistant" and weight == 1


def render_chat(turns: Sequence[Turn], tokenizer: Any, where: str = "", answer: str | None = None) -> str:
    """The chat template's text of `turns`, up to where the answer begins; with `answer`, what it writes from there on, end of turn included.

    The answer's text is found by rendering with and without it, so it is exactly what the template makes of it, whatever the template is.

    Raises ConfigError without a chat template, or if rendering with the answer changes what stands before it; DataError if the template refuses the
    turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this data is a chat, but the base's tokenizer has no chat template",
            hint="use an instruct base, or write prompt and completion columns and leave `chat` out",
        )
    opening = _apply_template(tokenizer, turns, where, add_generation_prompt=True)
    if answer is None:
        return opening
    full = _apply_template(tokenizer, [*turns, {"role": "assistant", "content": answer}], where, add_generation_prompt=False)
    if not full.startswith(opening):
        raise ConfigError(
            f"{_at(where)}the chat template rewrites a conversation when its answer is added (it begins {_short(tokenizer.chat_template)!r})",
            hint="render the conversations yourself and give prompt and completion columns",
        )
    return full[len(opening) :]


def _apply_template(tokenizer: Any, turns: Sequence[Turn], where: str, *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=add_generation_prompt, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{_at(where)}the chat template refuses turns of {roles}: {error}", hint="reorder or merge the turns as it demands"
        ) from error
    return text


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
