"""Function calls: what the grammar takes, and how an answer is read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atoll.openai.tools import CallReader, ToolUse, call_text, cuts_calls, tool_use
from atoll.openai.types import ParameterRefused, Tool, ToolChoice
from conftest import tiny_tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "O}\n"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def tools(*functions: dict[str, Any]) -> list[Tool]:
    return [Tool.model_validate({"type": "function", "function": function}) for function in functions]


def weather(choice: str | ToolChoice | None = None) -> ToolUse:
    use = tool_use(tools({"name": "get_weather", "parameters": WEATHER}, {"name": "stop-all"}), choice)
    assert use is not None
    return use


def verdict(grammar: str, text: str) -> str:
    """What a grammar says of a whole text: accepted, incomplete, or refused."""
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    tokenizer = tiny_tokenizer()
    matcher = LLMatcher(from_tokenizer(tokenizer, n_vocab=320), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if matcher.validate_tokens(ids) < len(ids):
        return "refused"
    matcher.consume_tokens(ids)
    return "accepted" if matcher.is_accepting() else "incomplete"


def read(text: str, use: ToolUse | None, size: int = 1) -> tuple[str, str | None, str]:
    """The whole of what a reader finds in a text that comes in pieces."""
    reader = CallReader(use)
    found = [reader.push(text[start : start + size]) for start in range(0, len(text), size)]
    names = [name for _, name, _ in found if name is not None]
    assert len(names) <= 1
    return "".join(part for part, _, _ in found) + reader.finish(), names[0] if names else None, "".join(part for _, _, part in found)


def test_the_grammar_takes_calls_that_fit_their_schema_and_nothing_else_beginning_like_a_call():
    """A client parses arguments without looking; what does not fit the schema must be impossible, references inside the schema included."""
    good = call_text("get_weather", '{"city": "Rome", "days": 3}')
    for grammar in (weather().grammar(None).text, weather("required").grammar(None).text):
        assert verdict(grammar, good) == "accepted"
        assert verdict(grammar, call_text("stop-all", "{}")) == "accepted"
        assert verdict(grammar, call_text("get_weather", '{"city": "Oslo"}')) == "refused"
        assert verdict(grammar, call_text("get_weather", '{"city": "Rome", "days": 10}')) == "refused"
        assert verdict(grammar, call_text("get_rain", "{}")) == "refused"
        assert verdict(grammar, call_text("stop-all", '{"a": 1}')) == "refused"


def test_with_auto_any_other_text_is_an_answer_and_with_required_none_is():
    """auto leaves the choice to the model; required does not."""
    for text in ("Hello <there>\n", "", "<tool", "a <tool_call> later"):
        assert verdict(weather().grammar(None).text, text) == "accepted"
        assert verdict(weather("required").grammar(None).text, text) != "accepted"


def test_with_auto_and_a_response_format_the_answer_is_a_call_or_fits_the_format():
    """Both demands of one request hold together."""
    grammar = weather("auto").grammar({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}).text
    assert verdict(grammar, '{"ok":true}') == "accepted"
    assert verdict(grammar, "Hello") == "refused"
    assert verdict(grammar, call_text("stop-all", "{}")) == "accepted"


def test_a_named_function_is_the_only_one_that_can_be_called():
    """tool_choice with a name is a promise to the client's code."""
    grammar = weather(ToolChoice.model_validate({"type": "function", "function": {"name": "stop-all"}})).grammar(None).text
    assert verdict(grammar, call_text("stop-all", "{}")) == "accepted"
    assert verdict(grammar, call_text("get_weather", '{"city": "Rome"}')) == "refused"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_call_is_read_back_whatever_pieces_it_comes_in(size: int):
    """Streams cut anywhere; a brace too many or too few would be invalid JSON at the client."""
    arguments = '{"city": "O}\\n", "deep": {"a": [{}, {"b": "}\\n</tool"}]}}'
    assert read(call_text("get_weather", arguments), weather(), size) == ("", "get_weather", arguments)


@pytest.mark.parametrize("size", [1, 4])
def test_text_stays_text(size: int):
    """A text that begins almost like a call must not lose its beginning."""
    for text in ("Hello", "<tool box", "<", "", "<tool_cal"):
        assert read(text, weather(), size) == (text, None, "")
    assert read(call_text("stop-all", "{}"), None, size) == (call_text("stop-all", "{}"), None, "")


def test_a_call_cut_by_the_length_shows_no_markup():
    """The markers are ours; a client must never see half of one as text."""
    whole = call_text("get_weather", '{"city": "Rome"}')
    for length in range(len("<tool_call>"), len(whole)):
        text, name, arguments = read(whole[:length], weather())
        assert text == "" and name in (None, "get_weather") and '{"city": "Rome"}'.startswith(arguments)
    assert read("<too", weather("required")) == ("", None, "")


def test_what_cannot_be_offered_is_refused_by_name():
    """A request whose tools were dropped in silence would never be answered by a call."""
    assert tool_use(None, None) is None and tool_use([], "auto") is None
    assert tool_use(tools({"name": "a"}), "none") is None
    for given, choice, param in (
        (None, "required", "tool_choice"),
        (tools({"name": "a"}, {"name": "a"}), None, "tools"),
        (tools({"name": "a"}), "sometimes", "tool_choice"),
        (tools({"name": "a"}), ToolChoice.model_validate({"type": "function", "function": {"name": "b"}}), "tool_choice"),
        (tools({"name": "a"}), ToolChoice.model_validate({"type": "allowed_tools"}), "tool_choice"),
        ([Tool.model_validate({"type": "custom", "custom": {"name": "x"}})], None, "tools"),
    ):
        with pytest.raises(ParameterRefused) as caught:
            tool_use(given, choice)
        assert caught.value.param == param


def test_a_schema_that_could_not_be_enforced_is_refused():
    """Arguments are promised to fit; a misspelt keyword would be dropped in silence by the compiler."""
    use = tool_use(tools({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "minLenght": 3}}}}), None)
    assert use is not None
    with pytest.raises(ParameterRefused, match=r"'f'.*minLenght"):
        use.grammar(None)


def test_instructions_name_every_function_with_its_schema():
    """A base whose template knows no tools learns of them here only."""
    told = weather().instructions()
    listed = [json.loads(line) for line in told.splitlines() if line.startswith('{"type"')]
    assert [tool["function"]["name"] for tool in listed] == ["get_weather", "stop-all"]
    assert listed[0]["function"]["parameters"] == WEATHER


def test_an_adapters_stop_text_that_stands_in_every_call_is_known():
    """A line end as stop text, common with adapters, would cut each call after its first line."""
    assert cuts_calls("\n") and cuts_calls("}") and not cuts_calls("\n\n") and not cuts_calls("###")
