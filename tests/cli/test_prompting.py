"""Which words an adapter is asked in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from atoll.cli.prompting import make_prompt
from atoll.data.prompt import PromptFormat
from atoll.errors import ConfigError, RequestRefused
from atoll.model.base import load_tokenizer


@pytest.fixture
def base(tiny_base_dir):
    """What make_prompt needs of a base: a tokenizer with a chat template."""
    return SimpleNamespace(tokenizer=load_tokenizer(tiny_base_dir))


def adapter(**form):
    return SimpleNamespace(version=SimpleNamespace(ref="dates@1"), prompt=PromptFormat(**form) if form else None)


def test_the_text_fills_the_one_column_that_no_field_fills(base):
    """A template of two columns needs one field and the text; with both left open there is no guess."""
    two = adapter(template="{question} / {options}:", stop=("\n",))
    made = make_prompt(base, two, {"prompt": "when?", "options": "A B"})
    assert (made.text, made.style, made.stop, made.trims) == ("when? / A B:", "template", ("\n",), True)
    with pytest.raises(RequestRefused, match=r"dates@1 needs 'question', 'options', and 'question', 'options' are missing") as refusal:
        make_prompt(base, two, {"prompt": "when?"})
    assert "--field question=... --field options=..." in refusal.value.hint


def test_prompts_of_training_and_of_asking_are_the_same_tokens(base):
    """The reason for templates to travel: other tokens are another question."""
    from atoll.data.prompt import encode_prompt

    plain, chat = adapter(template="{text} is", instruction="Name it."), adapter(template="{prompt}", chat=True, completion_prefix="")
    assert make_prompt(base, plain, {"prompt": "x"}).token_ids == encode_prompt("Name it.\n\nx is", base.tokenizer)
    assert make_prompt(base, chat, {"prompt": "x"}).token_ids == encode_prompt("x", base.tokenizer, chat=True)
    turns = [{"role": "user", "content": "x"}]
    assert make_prompt(base, chat, {"messages": turns}).token_ids == encode_prompt(turns, base.tokenizer)


def test_an_adapter_without_a_template_and_a_base_are_asked_alike(base):
    """In the chat template where there is one, else in the text's own words."""
    stranger = adapter()
    assert make_prompt(base, stranger, {"prompt": "x"}) == make_prompt(base, None, {"prompt": "x"})
    assert make_prompt(base, None, {"prompt": "x"}).style == "chat"
    base.tokenizer.chat_template = None
    assert make_prompt(base, None, {"prompt": "x"}).style == "raw"
    with pytest.raises(ConfigError, match="no chat template"):
        make_prompt(base, None, {"prompt": "x"}, "chat")


def test_braces_in_what_the_user_typed_are_text(base):
    """A prompt is data, never a template."""
    assert make_prompt(base, adapter(template="{text} is"), {"prompt": "{text} {x} {0.a}"}).text == "{text} {x} {0.a} is"
