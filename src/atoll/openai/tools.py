"""Calls of functions (OpenAI's `tools`): what the model is told, what it may write, and how that is read back.

An answer is either a text or one call, and which of the two shows in its first characters, so a stream can be told apart at once:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Rome"}}
    </tool_call>

This is the form that Qwen, SmolLM and Hermes models were trained on. A grammar holds the model to it, and the arguments to their JSON Schema; with
tool_choice "auto" the grammar also takes any other text. A base whose chat template knows this form writes the instructions itself; for others they
are a system turn, and results come back as user turns.

Used by chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atoll.engine.request import Grammar
from atoll.engine.schema import MAX_GRAMMAR_BYTES, read_schema
from atoll.errors import RequestRefused
from atoll.openai.types import Function, ParameterRefused, Tool, ToolChoice

_OPEN, _NAMED, _CLOSE = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes; no endless white space

Turn = dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request. `callable` are those that the answer may call; `must`: it has to call one."""

    functions: tuple[Function, ...]
    callable: tuple[Function, ...]
    must: bool

    def grammar(self, schema: dict[str, Any] | None) -> Grammar:
        """One call, or (unless it must be one) any other text, which has to fit `schema` if there is one."""
        self._check_size()
        rules = ["start: call" if self.must else "start: call | answer"]
        if not self.must and schema is not None:
            rules.append(f"answer: %json {read_schema(json.dumps(schema))}")
        elif not self.must:
            rules += ["answer: ANSWER", "ANSWER: /(?s:.*)/ & ~/(?s:<tool_call>.*)/"]
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(self.callable))))
        for number, function in enumerate(self.callable):
            begin = json.dumps(_OPEN + function.name + _NAMED)
            rules.append(f"call_{number}: {begin} arguments_{number} {json.dumps(_CLOSE)}")
            rules.append(f"arguments_{number}: %json {_arguments_schema(function)}")
        return Grammar("lark", "\n".join(rules))

    def _check_size(self) -> None:
        """Before a look inside: no grammar of that size is accepted."""
        size = sum(len(json.dumps(function.parameters)) for function in self.callable)
        if size > MAX_GRAMMAR_BYTES:
            message = f"the parameters of the tools have {size} characters together, but at most {MAX_GRAMMAR_BYTES} are accepted"
            raise ParameterRefused(message, param="tools", code="invalid_value", hint="send fewer or smaller schemas")

    def blamed(self, error: RequestRefused, grammar: Grammar) -> RequestRefused:
        """The engine's complaint about `grammar`, which the client never saw, as one about the function whose schema it is about."""
        found = re.search(r"line (\d+), column \d+: (.+)", error.message)
        line = grammar.text.splitlines()[int(found[1]) - 1] if found is not None else ""
        rule = re.match(r"arguments_(\d+):", line)
        if found is None or rule is None:
            return ParameterRefused(f"the tools cannot be used: {error.message}", param="tools", code="invalid_value", hint=error.hint)
        return _unusable(self.callable[int(rule[1])], found[2], error.hint)

    def described(self) -> list[dict[str, Any]]:
        """The functions as chat templates and models want to see them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": function.parameters or {"type": "object", "properties": {}},
                },
            }
            for function in self.functions
        ]

    def instructions(self) -> str:
        """What a model is told whose chat template does not know tools."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.described())
        return (
            f"You can call these functions:\n<tools>\n{listed}\n</tools>\n\nTo call one, answer with nothing but its name and arguments:\n"
            f'<tool_call>\n{{"name": <name>, "arguments": <JSON object>}}\n</tool_call>'
        )


def tool_use(tools: Sequence[Tool] | None, choice: str | ToolChoice | None) -> ToolUse | None:
    """The functions that a request offers; None when the answer is to be a text anyway. Raises ParameterRefused."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ParameterRefused("tool_choice asks for a call, but there are no tools", param="tool_choice", code="invalid_value")
        return None
    functions = tuple(_function(tool) for tool in tools)
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ParameterRefused(f"two tools have the name {twice!r}", param="tools", code="invalid_value")
    if choice is None or choice == "auto":
        return ToolUse(functions, functions, must=False)
    if choice == "required":
        return ToolUse(functions, functions, must=True)
    if choice == "none":
        return None
    if isinstance(choice, str) or choice.type != "function" or choice.function is None:
        found = choice if isinstance(choice, str) else choice.type
        raise ParameterRefused(
            f"tool_choice is {found[:40]!r}, but must be none, auto, required or one function",
            param="tool_choice",
            code="invalid_value",
            hint='{"type": "function", "function": {"name": "..."}}',
        )
    chosen = tuple(function for function in functions if function.name == choice.function.name)
    if not chosen:
        raise ParameterRefused(f"tool_choice names {choice.function.name[:80]!r}, which is not in tools", param="tool_choice", code="invalid_value")
    return ToolUse(functions, chosen, must=True)


def cuts_calls(stop: str) -> bool:
    """Whether a stop text would cut every call short."""
    return stop in _OPEN or stop in _NAMED or stop in _CLOSE


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it."""
    return f"{_OPEN}{name}{_NAMED}{arguments}{_CLOSE}"


class CallReader:
    """Reads an answer while it comes: `push` gives what is new of the text, of the function's name, or of its arguments.

    Nothing of a call is ever given out as text. What is not decided yet is held back.
    """

    def __init__(self, use: ToolUse | None) -> None:
        """use None: everything is text."""
        self.name: str | None = None
        self._must = use is not None and use.must
        self._stage = "text" if use is None else "opening"
        self._held = ""

    def push(self, new: str) -> tuple[str, str | None, str]:
        """(text, name, arguments): what became known with `new`; the name comes once, whole."""
        if self._stage == "text":
            return new, None, ""
        self._held += new
        text, name, arguments = "", None, ""
        if self._stage == "opening":
            if self._held.startswith(_OPEN):
                self._stage, self._held = "name", self._held.removeprefix(_OPEN)
            elif not _OPEN.startswith(self._held):
                self._stage, text, self._held = "text", self._held, ""
        if self._stage == "name" and _NAMED in self._held:
            name, self._held = self._held.split(_NAMED, 1)
            self._stage, self.name = "arguments", name
        if self._stage == "arguments":
            arguments, self._held = self._split_close()
        return text, name, arguments

    def finish(self) -> str:
        """The end of the answer, which may have been cut anywhere: the text that was held back. The beginning of a call is no text."""
        rest, self._held = self._held, ""
        return rest if self._stage == "opening" and not self._must and not rest.startswith("<tool_call>") else ""

    def _split_close(self) -> tuple[str, str]:
        """What surely belongs to the arguments, and the rest, which is the call's end or may become it. A line end cannot stand before
        `</tool_call>` inside JSON, so the first end found is the end."""
        held = self._held
        place = held.find(_CLOSE)
        if place >= 0:
            self._stage = "done"
            return held[:place], ""
        keep = next((size for size in range(min(len(_CLOSE) - 1, len(held)), 0, -1) if held.endswith(_CLOSE[:size])), 0)
        return held[: len(held) - keep], held[len(held) - keep :]


def _function(tool: Tool) -> Function:
    if tool.type != "function" or tool.function is None:
        raise ParameterRefused(f"a tool has type {tool.type[:40]!r}, but only functions can be called", param="tools", code="unsupported_value")
    return tool.function


def _arguments_schema(function: Function) -> str:
    """The schema of a function's arguments as the grammar takes it. Raises ParameterRefused, naming the function, for one that cannot be enforced."""
    wanted = {"type": "object", **(function.parameters or {"properties": {}, "additionalProperties": False})}
    try:
        checked: dict[str, Any] = json.loads(read_schema(json.dumps(wanted)))
    except RequestRefused as error:
        raise _unusable(function, error.message, error.hint) from error
    return json.dumps({**checked, "x-guidance": _SPACED})


def _unusable(function: Function, reason: str, hint: str) -> ParameterRefused:
    message = f"the parameters of function {function.name!r} cannot be used: {reason}"
    return ParameterRefused(message, param="tools", code="invalid_function_parameters", hint=hint)
