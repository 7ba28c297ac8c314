"""From a conversation to the tokens that are asked.

    an adapter without a prompt format    the conversation, in the base's chat template
    one trained on plain conversations    the same
    one with a template of its own        its template, filled with the one user turn; it was trained on single prompts and knows no conversation,
                                          so system turns, earlier turns and tools are refused instead of being put in some way it never saw
    prompt_format: "base"                 the conversation in the base's chat template, whatever the adapter

Used by chat.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.data.prompt import PromptFormat, encode_prompt, parse_template, tokenize
from atoll.errors import AtollError, ConfigError, DataError, RequestRefused
from atoll.http.asking import row_of, trims
from atoll.openai.tools import ToolUse, Turn, call_text, cuts_calls
from atoll.openai.types import ChatBody, Message, ParameterRefused, TextPart

if TYPE_CHECKING:
    from atoll.model.base import Base

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True)
class ChatPrompt:
    """Tokens ready to be continued. stop: the adapter's own. trims: the answer's first white space belongs to the adapter's template."""

    token_ids: list[int]
    stop: tuple[str, ...] = ()
    trims: bool = False


def chat_prompt(base: Base, form: PromptFormat | None, body: ChatBody, use: ToolUse | None) -> ChatPrompt:
    """The prompt of a chat request; form: the adapter's prompt format. Raises ParameterRefused for a conversation that cannot be put."""
    turns = [_turn(message, number) for number, message in enumerate(body.messages)]
    if not turns:
        raise ParameterRefused("messages is empty", param="messages", code="empty_array")
    form = None if body.prompt_format == "base" else form
    if form is None or _is_plain_chat(form):
        if body.fields:
            raise ParameterRefused("fields are given, but no prompt template is in use that they could fill", param="fields", code="invalid_value")
        stop = () if form is None else tuple(text for text in form.stop if use is None or not cuts_calls(text))
        return ChatPrompt(_conversation(base, turns, use), stop)
    try:
        text = form.render(_row(form, turns, body, use))
        return ChatPrompt(encode_prompt(text, base.tokenizer, form.chat), form.stop, trims=trims(form))
    except (DataError, ConfigError) as error:
        raise _refused(error) from error


def num_chars(body: ChatBody) -> int:
    """About how much text there is to read: turns, calls, tools, schemas and fields."""
    return sum(map(_chars_of, body.messages)) + _size([tool.function.parameters for tool in body.tools or () if tool.function]) + _size(body.fields)


def _chars_of(message: Message) -> int:
    content = message.content
    said = len(content) if isinstance(content, str) else sum(len(part.text or part.refusal or "") for part in content or ())
    return said + sum(len(call.function.arguments) + len(call.function.name) for call in message.tool_calls or () if call.function)


def _size(value: Any) -> int:
    """The characters in a JSON value, about."""
    waiting, size = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += (*one.keys(), *one.values())
        elif isinstance(one, list):
            waiting += one
        else:
            size += len(one) if isinstance(one, str) else 1
    return size


def _row(form: PromptFormat, turns: Sequence[Turn], body: ChatBody, use: ToolUse | None) -> dict[str, Any]:
    """The columns of a template: the request's fields, and the user's text in the one that they leave open."""
    hint = 'send one user message, or "prompt_format": "base" to use the base\'s chat template instead'
    if use is not None:
        raise ParameterRefused("this adapter has a prompt format of its own, which has no place for tools", param="tools", hint=hint)
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(turn["role"] for turn in turns[:8]) + (", ..." if len(turns) > 8 else "")
        raise ParameterRefused(
            f"this adapter was trained on single prompts in a format of its own, and cannot be asked a conversation of {roles}",
            param="messages",
            code="invalid_value",
            hint=hint,
        )
    try:
        return row_of(form, str(turns[0]["content"]), body.fields, "the message")
    except RequestRefused as error:
        raise ParameterRefused(error.message, param="fields", code="invalid_value", hint=error.hint) from error


def _conversation(base: Base, turns: Sequence[Turn], use: ToolUse | None) -> list[int]:
    """The turns in the base's chat template, with the tools told in its own way or in ours."""
    template = base.tokenizer.chat_template
    if not template:
        raise ParameterRefused(
            f"the base {base.name!r} has no chat template, so it cannot be asked a conversation",
            param="messages",
            code="unsupported_value",
            hint="use /v1/completions, or an adapter that has a prompt format",
        )
    knows_tools = "<tool_call>" in str(template) and "tools" in str(template)
    turns = [_with_native_calls(turn) for turn in turns] if knows_tools else _with_told_tools(turns, use)
    text = _render(base.tokenizer, turns, use.described() if use is not None and knows_tools else None)
    token_ids = tokenize([text], base.tokenizer)[0]
    if not token_ids:
        raise ParameterRefused("the conversation is empty, so there is nothing to answer", param="messages", code="invalid_value")
    return token_ids


def _render(tokenizer: Any, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), tools=tools, add_generation_prompt=True, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:  # a template is a program: it may stumble over any odd turn
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise ParameterRefused(
            f"the base's chat template refuses turns of {roles}: {error}",
            param="messages",
            code="invalid_value",
            hint="reorder or merge the messages as it demands",
        ) from error


def _with_told_tools(turns: Sequence[Turn], use: ToolUse | None) -> list[Turn]:
    """For a template that does not know tools: instructions as system turn, calls as text, results as user turns."""
    told: list[Turn] = []
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "tool":
            told.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif turn.get("tool_calls"):
            calls = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in turn["tool_calls"]]
            told.append({"role": "assistant", "content": "\n".join(([content] if content else []) + calls)})
        else:
            told.append(turn)
    if use is None:
        return told
    if told[0]["role"] == "system":
        return [{"role": "system", "content": f"{told[0]['content']}\n\n{use.instructions()}"}, *told[1:]]
    return [{"role": "system", "content": use.instructions()}, *told]


def _with_native_calls(turn: Turn) -> Turn:
    """Templates want a call's arguments as an object, OpenAI sends them as text."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = call["function"]["arguments"]
        calls.append({**call, "function": {"name": call["function"]["name"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


def _turn(message: Message, number: int) -> Turn:
    param = f"messages[{number}]"
    role = _ROLES.get(message.role)
    if role is None:
        known = ", ".join(_ROLES)
        raise ParameterRefused(f"{param}.role is {message.role[:40]!r}, but must be one of {known}", param=f"{param}.role", code="invalid_value")
    if message.audio is not None or message.function_call is not None:
        what = "audio" if message.audio is not None else "function_call"
        raise ParameterRefused(f"{param}.{what} is not supported", param=f"{param}.{what}", code="unsupported_parameter")
    turn: Turn = {"role": role, "content": _content(message, role, param)}
    if role == "tool" and message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if role != "assistant":
            raise ParameterRefused(f"{param} has tool_calls, but only the assistant calls", param=f"{param}.tool_calls", code="invalid_value")
        turn["tool_calls"] = [_past_call(call.function, call.id, call.type, param) for call in message.tool_calls]
    return turn


def _past_call(function: Any, call_id: str | None, kind: str, param: str) -> dict[str, Any]:
    if function is None or kind != "function":
        raise ParameterRefused(f"{param}.tool_calls has a call of type {kind[:40]!r}, but only functions are called", param=f"{param}.tool_calls")
    return {"id": call_id, "type": "function", "function": {"name": function.name, "arguments": function.arguments}}


def _content(message: Message, role: str, param: str) -> str:
    """A turn's text; parts of text are joined as they are."""
    if message.content is None:
        if role == "assistant" and message.tool_calls:
            return ""
        raise ParameterRefused(f"{param}.content is missing", param=f"{param}.content", code="missing_required_parameter")
    if isinstance(message.content, str):
        return message.content
    return "".join(_part(part, f"{param}.content[{place}]") for place, part in enumerate(message.content))


def _part(part: TextPart, param: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal") or text is None:
        raise ParameterRefused(f"{param} is of type {part.type[:40]!r}, but only text is understood here", param=param, code="unsupported_value")
    return text


def _is_plain_chat(form: PromptFormat) -> bool:
    """Whether the format is the base's chat template and nothing else, so that a conversation is what the adapter was trained on."""
    pieces = parse_template(form.template)
    return form.chat and not form.instruction and len(form.columns) == 1 and all(not text for text, _ in pieces)


def _refused(error: AtollError) -> ParameterRefused:
    return ParameterRefused(error.message, param="messages", code="invalid_value", hint=error.hint)
