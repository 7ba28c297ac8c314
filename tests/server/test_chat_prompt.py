"""From a conversation to tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from atoll.data.prompt import PromptFormat, encode_prompt
from atoll.openai.chat_prompt import ChatPrompt, chat_prompt
from atoll.openai.tools import call_text, tool_use
from atoll.openai.types import ChatBody, ParameterRefused
from conftest import tiny_tokenizer

CLASSIFY = PromptFormat(template="Text: {text}\nLabel:", instruction="Is it good?", stop=("\n",))
NATIVE = (
    "{% if tools %}[tools {% for tool in tools %}{{ tool.function.name }}{% endfor %} <tool_call>]{% endif %}"
    "{% for message in messages %}[{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %} -> {{ call.function.arguments.city }}{% endfor %}]{% endfor %}"
)


def base(template: str | None = "") -> Any:
    tokenizer = tiny_tokenizer()
    if template != "":
        tokenizer.chat_template = template
    return SimpleNamespace(name="tiny", tokenizer=tokenizer)


def body(*messages: dict[str, Any], **fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": list(messages), **fields})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def asked(given: ChatBody, form: PromptFormat | None = None, of: Any = None) -> ChatPrompt:
    return chat_prompt(of or base(), form, given, tool_use(given.tools, given.tool_choice))


def text(prompt: ChatPrompt) -> str:
    return str(tiny_tokenizer().decode(prompt.token_ids))


def test_a_conversation_goes_through_the_bases_chat_template():
    """Every turn counts; parts of text are one text, and a developer is a system turn by another name."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = body({"role": "developer", "content": "Be brief."}, user(parts), {"role": "assistant", "content": "c"}, user("d"))
    expected = [{"role": "system", "content": "Be brief."}, user("ab"), {"role": "assistant", "content": "c"}, user("d")]
    assert asked(given).token_ids == encode_prompt(expected, tiny_tokenizer())


def test_an_adapter_with_its_own_format_is_asked_in_it():
    """An adapter answers well only in the words that it was trained on."""
    prompt = asked(body(user("fine")), CLASSIFY)
    assert text(prompt) == "Is it good?\n\nText: fine\nLabel:"
    assert prompt.stop == ("\n",) and prompt.trims


def test_a_template_within_a_chat_becomes_the_user_turn():
    """A format may be both: its template inside the base's chat template."""
    form = PromptFormat(template="Sort: {text}", chat=True)
    prompt = asked(body(user("fine")), form)
    assert prompt.token_ids == encode_prompt("Sort: fine", tiny_tokenizer(), chat=True) and not prompt.trims


def test_an_adapter_of_plain_conversations_takes_every_turn():
    """It was trained on conversations, so it may be asked one."""
    form = PromptFormat(template="{prompt}", chat=True, stop=("##",))
    given = body({"role": "system", "content": "s"}, user("a"), {"role": "assistant", "content": "b"}, user("c"))
    assert asked(given, form) == ChatPrompt(asked(given).token_ids, ("##",))


def test_an_adapter_of_single_prompts_refuses_conversations_unless_the_base_format_is_asked_for():
    """Putting turns in a way it never saw would give worse answers in silence; the sentence says the way out."""
    given = [{"role": "system", "content": "Be nice."}, user("fine")]
    with pytest.raises(ParameterRefused, match="system, user") as caught:
        asked(body(*given), CLASSIFY)
    assert "prompt_format" in caught.value.hint
    assert asked(body(*given, prompt_format="base"), CLASSIFY) == asked(body(*given))


def test_fields_fill_the_other_columns_of_a_template():
    """A prompt of several columns has one text and some values beside it."""
    form = PromptFormat(template="{schema} | {question}")
    assert text(asked(body(user("how many?"), fields={"schema": "t(a)"}), form)) == "t(a) | how many?"
    for fields in (None, {"schema": "t", "question": "q"}, {"table": "t"}):
        with pytest.raises(ParameterRefused) as caught:
            asked(body(user("how many?"), fields=fields), form)
        assert caught.value.param == "fields" and "'schema', 'question'" in caught.value.message
    with pytest.raises(ParameterRefused):
        asked(body(user("x"), fields={"a": 1}))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([user("a"), {"role": "robot", "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages[0].audio"),
    ],
)
def test_what_is_not_text_is_refused_by_its_place(messages: list[dict[str, Any]], param: str):
    """An image that was dropped in silence would give an answer to another question."""
    with pytest.raises(ParameterRefused) as caught:
        asked(body(*messages))
    assert caught.value.param == param


def test_a_base_without_a_chat_template_says_so():
    """No template may be invented for it."""
    with pytest.raises(ParameterRefused, match="no chat template"):
        asked(body(user("x")), of=base(None))


def test_a_template_that_refuses_turns_is_the_clients_to_know():
    """Templates raise on turns in a wrong order: that is no failure of the server."""
    with pytest.raises(ParameterRefused, match="must alternate"):
        asked(body(user("x")), of=base("{{ raise_exception('roles must alternate') }}"))


CALLED = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}]


def test_tools_are_told_and_their_results_shown_to_a_base_that_knows_none():
    """The model must see what it may call, in the form that the grammar holds it to, and what came of its calls."""
    shown = text(asked(body({"role": "system", "content": "Be brief."}, user("Rome?"), CALLED, RESULT, tools=TOOLS)))
    assert shown.index("Be brief.") < shown.index('"name": "weather"') < shown.index("Rome?")
    assert call_text("weather", '{"city": "Rome"}') in shown and "<tool_response>\nsunny\n</tool_response>" in shown
    assert '"name": "weather"' in text(asked(body(user("Rome?"), tools=TOOLS)))
    assert "<tools>" not in text(asked(body(user("Rome?"), tools=TOOLS, tool_choice="none")))


def test_a_template_that_knows_tools_is_given_them():
    """A base that was trained on tools knows its own words for them best, and wants arguments as an object."""
    shown = text(asked(body(user("Rome?"), CALLED, RESULT, tools=TOOLS), of=base(NATIVE)))
    assert shown == "[tools weather <tool_call>][user: Rome?][assistant:  -> Rome][tool: sunny]"


def test_an_adapter_of_single_prompts_has_no_place_for_tools():
    """Its template cannot tell the model of them."""
    with pytest.raises(ParameterRefused) as caught:
        asked(body(user("x"), tools=TOOLS), CLASSIFY)
    assert caught.value.param == "tools"
