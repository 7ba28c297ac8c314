"""Replies in OpenAI's shape, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion import ChoiceLogprobs

from atoll.engine.request import Completion, TokenLogprob
from atoll.http.token_text import TokenTexts
from atoll.openai.reply import (
    Chunks,
    ContentLogprobs,
    Head,
    chat_logprobs_of,
    completion_logprobs_of,
    finish_reason,
    usage_of,
)
from conftest import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = TokenTexts(TOKENIZER)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def entries(ids: list[int]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token, -0.5 * (place + 1), ((token, -0.5 * (place + 1)), (70, -9.0))) for place, token in enumerate(ids))


def answer(ids: list[int], text: str, **changes: Any) -> Completion:
    return Completion("r", None, 3, tuple(ids), text, **{"finish_reason": "stop", "logprobs": entries(ids), **changes})


def parsed(chunk: bytes) -> dict[str, Any]:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2
    return dict(json.loads(chunk.removeprefix(b"data: ")))


def test_chunks_made_in_the_fast_way_are_those_made_in_the_slow_way():
    """The fast way writes JSON by hand; a quote in a model's name or text must not break it."""
    head = Head.new("chatcmpl", 'a"b\\', "fp_1")
    for with_usage in (False, True):
        chunks = Chunks(head, "chat.completion.chunk", with_usage=with_usage)
        for text in ('say "hi"\n', "\u2028 \U0001f600", ""):
            fast = chunks.text_writer(1, '"delta":{"content":', '},"logprobs":null,"finish_reason":null')(text)
            slow = chunks.chunk({"index": 1, "delta": {"content": text}, "logprobs": None, "finish_reason": None})
            assert fast == slow
            chunk = ChatCompletionChunk.model_validate(parsed(fast))
            assert (chunk.model, chunk.choices[0].delta.content, chunk.choices[0].index) == ('a"b\\', text, 1)
            assert ("usage" in parsed(fast)) == with_usage


def test_ids_differ():
    """Clients keep replies by their ids."""
    assert len({Head.new("cmpl", "m", "f").id for _ in range(100)}) == 100


@pytest.mark.parametrize("size", [1, 2, 100])
def test_chat_logprobs_are_of_the_content_and_of_nothing_else(size: int):
    """The tokens of a stop text are not in the content, so they are not in its log-probabilities; a character in two tokens has both."""
    ids = ids_of("né;x")
    completion = answer(ids, "né", stopped_by=";")
    whole = chat_logprobs_of(completion, TEXTS)
    found = ChoiceLogprobs.model_validate(whole).content
    assert found is not None and [entry.token for entry in found] == ["n", "\\xc3", "\\xa9"]
    assert bytes(byte for entry in found for byte in entry.bytes or []).decode() == "né"
    assert [entry.logprob for entry in found] == [-0.5, -1.0, -1.5] and len(found[0].top_logprobs) == 2
    reader, streamed = ContentLogprobs(TEXTS), []
    texts = ["n", "", "é", "", ""]
    for entry, text in zip(completion.logprobs or (), texts, strict=False):
        streamed += reader.push(entry, text)
    assert streamed + reader.finish(completion) == (whole or {})["content"]


def test_the_end_of_text_token_is_no_content_but_one_in_the_middle_is_told():
    """An answer that went on after it (ignore_eos) still tells every token."""
    ended = chat_logprobs_of(answer([*ids_of("ab"), 2], "ab", stopped_by=2), TEXTS)
    assert ended is not None and [entry["token"] for entry in ended["content"]] == ["a", "b"]
    on = chat_logprobs_of(answer([*ids_of("a"), 2, *ids_of("b")], "ab", finish_reason="length"), TEXTS)
    assert on is not None and [entry["token"] for entry in on["content"]] == ["a", "</s>", "b"]
    assert chat_logprobs_of(answer([2], "", stopped_by=2, logprobs=None), TEXTS) is None


def test_completion_logprobs_say_where_each_token_stands():
    """Programs cut the reply's text by text_offset; it counts characters of the text that was returned, prompt included."""
    prompt, ids = "né ", ids_of("ok!")
    completion = answer([*ids, 2], "ok!", stopped_by=2, prompt_logprobs=(None, *entries(ids_of(prompt))[1:]))
    found = completion_logprobs_of(completion, TEXTS, ids_of(prompt), echo=True, num_added=0, keep_answer=True)
    assert found is not None
    assert found["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", " ", "o", "k", "!", "</s>"]
    assert found["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["top_logprobs"][4] == {"o": -0.5, TEXTS.text_of(70): -9.0}
    alone = completion_logprobs_of(completion, TEXTS, ids_of(prompt), echo=False, num_added=0, keep_answer=True)
    choice = {"text": "ok!", "index": 0, "finish_reason": "stop", "logprobs": alone}
    body = Head.new("cmpl", "m", "f").reply("text_completion", [choice], usage_of([[completion]]))
    assert OpenAICompletion.model_validate(body).choices[0].logprobs is not None


def test_a_begin_of_text_token_takes_no_room_in_the_text():
    """The tokenizer put it there, not the client: the echoed text does not have it."""
    prompt = [1, *ids_of("ab")]
    completion = answer([5], "!", prompt_logprobs=(None, *entries(prompt)[1:]))
    found = completion_logprobs_of(completion, TEXTS, prompt, echo=True, num_added=1, keep_answer=False)
    assert found is not None and found["text_offset"] == [0, 0, 1] and len(found["tokens"]) == 3


def test_tokens_that_look_alike_keep_the_likelier_value():
    """lm-evaluation-harness takes a token for greedy if nothing in top_logprobs is likelier."""
    other = TOKENIZER.convert_tokens_to_ids("<s>")
    entry = TokenLogprob(ids_of("a")[0], -2.0, ((other, -0.5), (ids_of("b")[0], -1.0)))
    completion = Completion("r", None, 1, (entry.token_id,), "a", "length", logprobs=(entry,))
    found = completion_logprobs_of(completion, TEXTS, [5], echo=False, num_added=0, keep_answer=True)
    assert found is not None and found["top_logprobs"] == [{"<s>": -0.5, "b": -1.0, "a": -2.0}]


def test_usage_counts_a_prompt_once_and_every_answer():
    """n answers share one prompt; what was made for best_of was made."""
    one, two = answer([5, 6], ""), answer([5], "", num_reused_tokens=0)
    usage = usage_of([[one, two], [two]])
    assert usage == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}
    assert usage_of([[one]], dropped_tokens=2)["completion_tokens"] == 0


def test_words_for_the_end_of_an_answer():
    """A stop text is `stop`; what was cut, by length or by time, is `length`."""
    assert [finish_reason(reason) for reason in ("stop", "length", "deadline")] == ["stop", "length", "length"]
