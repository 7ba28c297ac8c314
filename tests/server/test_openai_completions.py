"""POST /v1/completions with OpenAI's client: texts continued, scored, streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.server.openai_server import OpenAILive, openai_serving

from atoll.model.base import Base


@pytest.fixture(scope="module")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAILive]:
    with openai_serving(served_base, tmp_path_factory.mktemp("server")) as server:
        yield server


def ask(live: OpenAILive, **fields: Any) -> Any:
    return live.client().completions.create(**{"model": "", "prompt": "a lagoon", "max_tokens": 6, "temperature": 0, **fields})


def biased(live: OpenAILive, letter: str) -> dict[str, int]:
    """A bias that forces a letter."""
    return {str(live.ids(letter)[0]): 100}


def test_a_reply_has_openais_shape(live: OpenAILive):
    """Ids are unique, the time is now, and the model is the one that was asked for."""
    found, again = ask(live, model="plain"), ask(live, model="plain")
    assert found.object == "text_completion" and found.model == "plain" and found.id.startswith("cmpl-") and found.id != again.id
    assert found.created >= int(live.service.started_at) and found.system_fingerprint.startswith("fp_")
    assert found.choices[0].finish_reason == "length" and found.choices[0].logprobs is None
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 6, 14)
    assert ask(live).model == live.base.name and ask(live, model=live.base.name).choices[0].text == ask(live).choices[0].text


def test_the_adapter_that_is_named_answers(live: OpenAILive):
    """A 200 with the base's answer under an adapter's name is the worst failure; each must be the engine's own answer for it."""
    for name in ("plain", "talk"):
        found = ask(live, model=name, logprobs=0).choices[0]
        alone = live.generate(live.ids("a lagoon"), name, max_new_tokens=6, logprobs=0)
        assert found.text == alone.text
        assert found.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in alone.logprobs or ()], abs=1e-4)
    assert ask(live, model="plain@1").choices[0].text == ask(live, model="plain").choices[0].text


def test_every_form_of_prompt_is_continued(live: OpenAILive):
    """A text, tokens, and lists of both; choices come in the order of the prompts."""
    one = ask(live).choices[0].text
    ids = live.ids("a lagoon")
    for prompt in ("a lagoon", ["a lagoon"], ids, [ids]):
        assert ask(live, prompt=prompt).choices[0].text == one
    both = ask(live, prompt=["a lagoon", "b"], n=2, temperature=1, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (9, 24)
    assert ask(live, prompt=[ids, live.ids("b")]).choices[0].text == one


def test_n_choices_differ_and_come_again_with_their_seed(live: OpenAILive):
    """Choice i draws from seed + i, so more choices do not change the first ones."""
    two = [choice.text for choice in ask(live, n=2, temperature=1, seed=7).choices]
    three = [choice.text for choice in ask(live, n=3, temperature=1, seed=7).choices]
    assert len(set(three)) == 3 and three[:2] == two
    assert ask(live, temperature=1, seed=8).choices[0].text == two[1]
    assert ask(live, temperature=1, seed=-8).choices[0].text  # OpenAI's seeds may be negative


def test_best_of_returns_the_likeliest_per_token(live: OpenAILive):
    """All of best_of are made, and paid for."""
    every = ask(live, n=4, temperature=1, seed=3, logprobs=0)
    means = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in every.choices}
    best = ask(live, n=2, best_of=4, temperature=1, seed=3)
    assert [choice.text for choice in best.choices] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert best.usage.completion_tokens == every.usage.completion_tokens and best.choices[0].logprobs is None


def test_logit_bias_forces_and_forbids_a_token(live: OpenAILive):
    """Keys are token ids written as text."""
    assert ask(live, logit_bias=biased(live, "q")).choices[0].text == "qqqqqq"
    first = live.ids(ask(live, logit_bias=biased(live, "q"), max_tokens=1).choices[0].text)[0]
    assert "q" not in ask(live, logit_bias={str(first): -100}).choices[0].text


@pytest.mark.parametrize("stop", ["q", ["x", "q"], ["qq"]])
def test_stop_texts_end_an_answer_and_are_not_in_it(live: OpenAILive, stop: str | list[str]):
    """As one text or several, also when they are spread over tokens."""
    found = ask(live, logit_bias=biased(live, "q"), stop=stop).choices[0]
    assert (found.text, found.finish_reason) == ("", "stop")
    assert ask(live, logit_bias=biased(live, "q"), stop=None).choices[0].text == "qqqqqq"
    streamed = list(ask(live, logit_bias=biased(live, "q"), stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "" and streamed[-1].choices[0].finish_reason == "stop"


def test_an_adapters_own_stop_texts_hold_unless_told_otherwise(live: OpenAILive):
    """They are part of what it was trained on. The penalty makes the answer some letters and then line ends."""
    letters = {"model": "sentiment", "logit_bias": {str(live.ids("q")[0]): 100, str(live.ids("\n")[0]): 96}, "frequency_penalty": 2}
    held, on = ask(live, **letters).choices[0], ask(live, **letters, extra_body={"ignore_eos": True}).choices[0].text
    assert on.startswith("q") and "\n" in on
    assert (held.text, held.finish_reason) == (on[: on.index("\n")], "stop")


def test_echoed_logprobs_are_the_engines_scores(live: OpenAILive):
    """Programs that rank answers add these up; the sum must be what the engine's own scoring says, for the base and for an adapter."""
    prompt, continuation = live.ids("the lagoon is"), live.ids(" quiet")
    for model, adapter in (("", None), ("plain", "plain")):
        found = ask(live, model=model, prompt=prompt + continuation, max_tokens=0, echo=True, logprobs=1)
        told = found.choices[0].logprobs
        assert found.choices[0].text == "the lagoon is quiet" and len(told.tokens) == len(prompt + continuation)
        assert told.token_logprobs[0] is None and found.usage.completion_tokens == 0
        assert sum(told.token_logprobs[len(prompt) :]) == pytest.approx(live.score(prompt, continuation, adapter), abs=1e-4)
        assert "".join(told.tokens) == "the lagoon is quiet" and told.text_offset == list(range(len(told.tokens)))


def test_logprobs_tell_the_likeliest_tokens_and_the_chosen_one(live: OpenAILive):
    """Greedy decoding chooses the likeliest, so its value is the largest; a sampled token is listed beside them."""
    greedy = ask(live, logprobs=3).choices[0].logprobs
    assert all(max(top.values()) == value for top, value in zip(greedy.top_logprobs, greedy.token_logprobs, strict=True))
    sampled = ask(live, logprobs=2, temperature=1, seed=1).choices[0].logprobs
    assert all(name in top for name, top in zip(sampled.tokens, sampled.top_logprobs, strict=True))
    assert all(len(top) in (2, 3) for top in sampled.top_logprobs)


def test_streams_say_the_same_as_whole_replies(live: OpenAILive):
    """Each choice by its index, the finish once, the usage last when asked for."""
    asked = {"prompt": ["a lagoon", "b"], "n": 2, "temperature": 1, "seed": 5, "echo": True}
    whole = ask(live, **asked)
    chunks = list(ask(live, **asked, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert last.choices == [] and last.usage == whole.usage and all(chunk.usage is None for chunk in body)
    assert {chunk.id for chunk in chunks} == {last.id} and {chunk.object for chunk in chunks} == {"text_completion"}
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in body if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own if part.finish_reason] == ["length"]
    plain = list(ask(live, stream=True))
    assert all("usage" not in (chunk.model_fields_set) for chunk in plain)


def test_a_stream_tells_logprobs_token_by_token(live: OpenAILive):
    """The same lists as of a whole reply, in pieces."""
    whole = ask(live, logprobs=2, temperature=1, seed=2).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in ask(live, logprobs=2, temperature=1, seed=2, stream=True)]
    assert [value for part in parts if part for value in part.token_logprobs] == pytest.approx(whole.token_logprobs, abs=1e-5)
    assert [token for part in parts if part for token in part.tokens] == whole.tokens
    offsets = [offset for part in parts if part for offset in part.text_offset]
    assert offsets == whole.text_offset


def test_a_stream_ends_with_done(live: OpenAILive):
    """Clients without a parser of their own wait for it."""
    reply = httpx.post(live.url + "/v1/completions", json={"model": "", "prompt": "a", "max_tokens": 2, "stream": True})
    events = reply.text.split("\n\n")
    assert reply.headers["content-type"].startswith("text/event-stream") and events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_json_is_held_to_its_schema(live: OpenAILive):
    """LoRAX's routes take response_format here too; a random model at temperature 1 fits by force alone."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(3):
        found = ask(live, temperature=1, seed=seed, max_tokens=60, extra_body={"response_format": form}).choices[0]
        assert found.finish_reason == "stop" and isinstance(json.loads(found.text)["ok"], bool)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "stream"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 300}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [3, 320]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": {"text": "a"}}, None),
        ({"extra_body": {"min_tokens": 7}}, "min_tokens"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"merged_adapters": {"ids": ["plain"], "weights": [1]}}, "model": "talk"}, "merged_adapters"),
        ({"extra_body": {"merged_adapters": {"ids": ["plain"], "weights": []}}}, None),
        ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format"),
    ],
)
def test_a_wrong_request_is_refused_by_name(live: OpenAILive, fields: dict[str, Any], param: str | None):
    """A client's mistake is a BadRequestError that says which field; a stream is refused before it begins."""
    for stream in {bool(fields.get("stream")), True}:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(live, **{**fields, "stream": stream} if "best_of" not in fields else fields)
        assert (caught.value.type == "invalid_request_error" and caught.value.code) or param is None or isinstance(fields.get(param), str | dict)
        if param is not None:
            assert caught.value.param == param or str(caught.value.param).startswith(param)


def test_a_prompt_that_is_too_long_has_its_own_code(live: OpenAILive):
    """Programs shorten the conversation when they see it."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(live, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found(live: OpenAILive):
    """Also when the reply would have been a stream."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(live, model="nobody", stream=stream)
        assert caught.value.code == "model_not_found"


def test_fields_that_clients_send_and_we_do_not_know_are_ignored(live: OpenAILive):
    """Every framework adds its own."""
    plain = ask(live).choices[0].text
    assert ask(live, user="me", extra_body={"metadata": {"a": "b"}, "seedling": 1, "guided_decoding_backend": None}).choices[0].text == plain


def test_adapters_can_be_merged_for_one_request(live: OpenAILive):
    """As on LoRAX's routes; a single adapter of weight 1 is itself."""
    merged = {"merged_adapters": {"ids": ["plain"], "weights": [1.0], "merge_strategy": "linear"}}
    assert ask(live, extra_body=merged).choices[0].text == ask(live, model="plain").choices[0].text
    two = {"merged_adapters": {"ids": ["plain", "talk"], "weights": [0.5, 0.5]}}
    assert ask(live, extra_body=two).choices[0].text


async def ask_async(live: OpenAILive) -> tuple[str, str]:
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as asked:
        whole = await asked.completions.create(model="plain", prompt="a lagoon", max_tokens=6, temperature=0)
        stream = await asked.completions.create(model="plain", prompt="a lagoon", max_tokens=6, temperature=0, stream=True)
        return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])


def test_the_async_client_reads_both_kinds_of_reply(live: OpenAILive):
    """It has another HTTP stack and another reader of events."""
    whole, streamed = asyncio.run(ask_async(live))
    assert whole == streamed == ask(live, model="plain").choices[0].text


def test_a_client_that_hangs_up_frees_its_rows(live: OpenAILive):
    """Streams are closed before their end all the time; what runs on would hold up everybody else."""
    stream = ask(live, max_tokens=240, n=4, temperature=1, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    for _ in range(500):
        if live.run(lambda engine: engine.stats()["running"] + engine.stats()["waiting"]) == 0:
            break
        asyncio.run(asyncio.sleep(0.01))
    else:
        raise AssertionError("requests of a client that hung up still run")
