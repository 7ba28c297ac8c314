"""Prompts: a template gives the same text as str.format, but only names columns; tokens are ready to be continued."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from atoll.data.prompt import PromptFormat, added_tokens, encode_prompt, encode_prompts, read_conversation, render_chat
from atoll.errors import AdapterFormatError, ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_base_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base_dir)


def with_frame(tokenizer: Any, frame: str) -> Any:
    """A copy of the tokenizer that frames every text, the way Llama's adds <s>; $A is the text."""
    from tokenizers.processors import TemplateProcessing

    framed = copy.deepcopy(tokenizer)
    special = [(token, framed.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    framed.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    return framed


@pytest.mark.parametrize("template", ["Text: {text}\nLabel:", "{{braces}} {text}{other column}", "{text} {text}", "no column"])
def test_a_prompt_is_the_instruction_an_empty_line_and_the_formatted_template(template: str) -> None:
    """Published task folders define their prompts with str.format; a difference would make scores incomparable."""
    row = {"text": "a {b} c", "other column": "x"}
    assert PromptFormat(template).render(row) == template.format(**row)
    assert PromptFormat(template, "Do it.").render(row) == "Do it.\n\n" + template.format(**row)


def test_values_that_are_no_text_are_written_plainly() -> None:
    """JSONL has numbers, booleans, null and lists; Python's own spelling of a list or None must not get into prompts."""
    row = {"n": 3, "f": 0.5, "b": True, "list": ["é", 1], "o": {"k": None}, "null": None}
    assert PromptFormat("{n} {f} {b} {list} {o}{null}").render(row) == '3 0.5 True ["é", 1] {"k": null}'


def test_an_unknown_column_is_named_with_those_there_are_and_the_nearest() -> None:
    """The commonest mistake in a YAML file; the message must hold all that is needed to correct it."""
    with pytest.raises(DataError) as caught:
        PromptFormat("{sentense}").render({"sentence": "x", "label": "y"}, "train.jsonl:7")
    assert caught.value.message == "train.jsonl:7: no column 'sentense'; the columns are 'sentence', 'label'"
    assert caught.value.hint == "did you mean 'sentence'?"


@pytest.mark.parametrize(
    "template", ["{", "}", "{a", "{}", "{0}", "{a.b}", "{a[0]}", "{a.__class__}", "{a!r}", "{a:>99999999}", '{"label": 1}', "{a:{b}}"]
)
def test_a_template_names_columns_and_nothing_else(template: str) -> None:
    """Templates come from strangers' manifests: attributes would leak objects, widths would fill memory."""
    with pytest.raises(ConfigError) as caught:
        PromptFormat(template)
    assert caught.value.hint


def test_a_completion_begins_with_a_space_unless_the_prompt_ends_a_line_or_is_a_chat() -> None:
    """The rule of the task folders; a wrong first token costs accuracy on every row."""
    row = {"text": "x", "label": "yes"}
    assert PromptFormat("{text}:", target="label").completion_for(row) == " yes"
    assert PromptFormat("{text}:\n", target="label").completion_for(row) == "yes"
    assert PromptFormat("{text}:", target="label", chat=True).completion_for(row) == "yes"
    assert PromptFormat("{text}", target="label", completion_prefix="").completion_for(row) == "yes"


def test_a_target_of_null_or_missing_is_named() -> None:
    """A null would otherwise be learned as an empty answer."""
    with pytest.raises(DataError, match=r"f:1: target column 'label' is null"):
        PromptFormat("x", target="label").completion_for({"label": None}, "f:1")
    with pytest.raises(DataError, match=r"f:1: no column 'label'"):
        PromptFormat("x", target="label").completion_for({"text": "x"}, "f:1")


def test_a_prompt_format_survives_the_manifest() -> None:
    """What a server applies must be what training used."""
    form = PromptFormat("{a}\n", "Do it.", "b", chat=True, stop=("\n", "###"), completion_prefix="")
    assert PromptFormat.from_json(json.loads(json.dumps(form.to_json()))) == form
    assert PromptFormat.from_json({}) == PromptFormat()
    assert form.columns == ("a",)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"template": 3},
        {"chat": "yes"},
        {"stop": "###"},
        {"stop": [""]},
        {"stop": [1]},
        {"template": "{a.b}"},
        {"system": "new key"},
    ],
)
def test_a_malformed_prompt_format_is_refused(value: Any) -> None:
    """Ignoring a part of it would mean asking the adapter in other words than it was trained on."""
    with pytest.raises(AdapterFormatError) as caught:
        PromptFormat.from_json(value)
    assert caught.value.hint


def test_prompt_tokens_keep_what_stands_before_a_text_and_not_what_stands_after(tokenizer: Any) -> None:
    """An EOS after the prompt would tell the model that it is done; a missing BOS ruins Llama and Gemma."""
    plain = encode_prompt("ab", tokenizer)
    assert len(plain) == 2
    assert encode_prompt("ab", with_frame(tokenizer, "<s> $A")) == [1, *plain]
    assert encode_prompt("ab", with_frame(tokenizer, "<s> $A </s>")) == [1, *plain]
    assert encode_prompt("ab", with_frame(tokenizer, "$A </s>")) == plain
    assert added_tokens(with_frame(tokenizer, "<s> $A </s>")) == ([1], [2])


def test_an_end_token_written_in_the_prompt_stays(tokenizer: Any) -> None:
    """Only what the tokenizer adds is dropped, not what the user wrote."""
    assert encode_prompt("ab</s>", with_frame(tokenizer, "$A </s>"))[-1] == 2


def test_many_prompts_are_encoded_as_each_alone(tokenizer: Any) -> None:
    """The batch call is for speed only; texts and conversations may stand side by side."""
    prompts = ["one", "a longer prompt é", ({"role": "user", "content": "hi"},)]
    framed = with_frame(tokenizer, "<s> $A")
    assert encode_prompts(prompts, framed) == [encode_prompt(prompt, framed) for prompt in prompts]


def test_a_chat_prompt_is_what_the_chat_template_gives(tokenizer: Any) -> None:
    """Token by token what transformers gives, with no BOS on top of the template's own."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert encode_prompt(turns, tokenizer) == expected
    assert encode_prompt(turns, with_frame(tokenizer, "<s> $A")) == expected
    assert encode_prompt("hi", tokenizer, chat=True) == encode_prompt(turns[1:], tokenizer)


def test_an_empty_prompt_needs_a_token_to_continue_from(tokenizer: Any) -> None:
    """Without any token there is no position to predict from."""
    with pytest.raises(DataError, match="f:3: the prompt is empty"):
        encode_prompts([""], tokenizer, where=["f:3"])
    assert encode_prompt("", with_frame(tokenizer, "<s> $A")) == [1]


def test_a_base_without_a_chat_template_says_so(tokenizer: Any) -> None:
    """Falling back to plain text would train on another prompt than the one asked for."""
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template") as caught:
        encode_prompt("hi", bare, chat=True)
    assert "instruct base" in caught.value.hint


def test_an_answer_is_what_the_template_makes_of_it(tokenizer: Any) -> None:
    """Found by rendering with and without the answer; a template that rewrites the history is refused by name, with the row."""
    turns = [{"role": "user", "content": "hi"}]
    assert render_chat(turns, tokenizer, answer="yes") == "yes<|im_end|>\n"
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"f:2: the chat template rewrites a conversation"):
        render_chat(turns, rewriting, "f:2", answer="yes")


def test_turns_that_the_template_refuses_are_named(tokenizer: Any) -> None:
    """Many templates demand that user and assistant alternate; the row must be found."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    with pytest.raises(DataError, match=r"f:2: the chat template refuses turns of system, user: no system turns"):
        encode_prompts([({"role": "system", "content": "s"}, {"role": "user", "content": "u"})], strict, where=["f:2"])


def test_a_conversation_is_read_in_openai_shape() -> None:
    """Texts in parts and turns of weight 0 are part of that shape."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": "c", "weight": 0, "tool_calls": []},
        {"role": "assistant", "content": "d"},
    ]
    turns = read_conversation({"messages": messages}, "f:1")
    assert [(turn["content"], learned) for turn, learned in turns] == [("s", False), ("ab", False), ("c", False), ("d", True)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hi"}, "f:1: messages is 'hi', expected a list of turns"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": ["hi"]}, "message 1 is 'hi'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 has role 'tool'"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "message 1 has role 'developer'"),
        ({"messages": [{"content": "x"}]}, "has role None"),
        ({"messages": [{"role": "user", "content": None}]}, "has content None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]}, "expected a text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "has 'tool_calls'"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "has weight 0.5"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "f:1: the row has tools"),
        ({"text": "x"}, "f:1: no column 'messages'"),
    ],
)
def test_what_cannot_be_trained_on_in_a_conversation_is_refused_by_name(row: dict[str, Any], said: str) -> None:
    """A dropped tool call or image would train on an answer whose reason is missing."""
    with pytest.raises(DataError) as caught:
        read_conversation(row, "f:1")
    assert said in caught.value.message
    assert caught.value.hint
