"""From `inputs` to the tokens that are asked, on LoRAX's routes.

    as it is (the default)         the text with what the tokenizer puts before a text
    apply_chat_template            the adapter's own prompt format, `inputs` in the column that `fields` leaves open; without one, the base's
                                   chat template
    /classify                      the adapter's own prompt format, always: its labels mean nothing outside of it

Long texts are tokenised beside the event loop, so that one large prompt does not hold up everybody's streams.

Used by generate, texts and the OpenAI routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.data.prompt import encode_prompt, encode_prompts, tokenize
from atoll.errors import DataError, RequestRefused
from atoll.http.asking import row_of

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat
    from atoll.model.base import Base

T = TypeVar("T")

_LONG_TEXT = 20_000  # characters


async def beside(work: Callable[[], T], num_chars: int) -> T:
    """work(), in a thread when the text it reads is long."""
    return work() if num_chars < _LONG_TEXT else await asyncio.to_thread(work)


async def encode_texts(base: Base, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts as they are."""
    return await beside(lambda: _encode(base, texts), sum(map(len, texts)))


async def encode_in_format(base: Base, form: PromptFormat | None, inputs: str, fields: Mapping[str, Any] | None) -> list[int]:
    """The tokens of `inputs` as the user's text: in the adapter's format, or else in the base's chat template.

    Raises RequestRefused if the fields do not leave exactly one column open, ConfigError without a chat template.
    """
    text, chat = (inputs, True) if form is None else (form.render(row_of(form, inputs, fields, "`inputs`")), form.chat)
    return await beside(lambda: encode_prompt(text, base.tokenizer, chat), len(text))


def label_tokens(form: PromptFormat | None, prompts: Sequence[str], labels: Sequence[str], base: Base) -> list[list[tuple[int, ...]]]:
    """For each rendered prompt, the tokens of every label as training would write it after that prompt.

    Where one label's tokens begin another's, the shorter could never lose, so then all are followed by the end-of-text token.
    """
    if base.decoder.classifies:  # a class is one number
        return [[(number,) for number in range(len(labels))]] * len(prompts)
    assert form is not None, "labels mean nothing without the prompt that they answer"
    found: dict[str, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        prefix = prefix_after(form, prompt)
        if prefix not in found:
            token_ids = [tuple(ids) for ids in tokenize([prefix + label for label in labels], base.tokenizer)]
            if _one_begins_another(token_ids):
                token_ids = [(*ids, base.eos_ids[0]) for ids in token_ids]
            found[prefix] = token_ids
    return [found[prefix_after(form, prompt)] for prompt in prompts]


def prefix_after(form: PromptFormat, prompt: str) -> str:
    """What stands between a prompt and its answer."""
    return "" if form.chat or prompt.endswith("\n") else form.completion_prefix


def _encode(base: Base, texts: Sequence[str]) -> list[list[int]]:
    try:
        return encode_prompts(texts, base.tokenizer)
    except DataError as error:  # a text without any token
        raise RequestRefused("`inputs` cannot be empty", hint=error.message) from error


def _one_begins_another(token_ids: Sequence[tuple[int, ...]]) -> bool:
    ordered = sorted(token_ids)
    return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ordered))
