"""POST /v1/chat/completions with OpenAI's client: conversations, tools, structured answers, streams, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import openai
import pytest
from tests.server.live_server import SENTIMENT
from tests.server.openai_server import OpenAILive, openai_serving

from atoll.data.prompt import encode_prompt
from atoll.engine.request import Completion, TokenEvent
from atoll.model.base import load_base
from atoll.openai.chat import ChoiceWriter
from atoll.openai.reply import Chunks, Head
from atoll.openai.tools import call_text, tool_use
from atoll.serving.keys import EVERYBODY
from conftest import write_tiny_base

USER = [{"role": "user", "content": "a lagoon"}]
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": ARGUMENTS}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAILive]:
    """Over a base with room for tools: a byte is a token here."""
    root = tmp_path_factory.mktemp("server")
    base = load_base(str(write_tiny_base(root / "tiny", max_position_embeddings=1024)), dtype="float32", home=root / "home")
    with openai_serving(base, root, engine={"max_rows": 8}) as server:
        yield server


def ask(live: OpenAILive, **fields: Any) -> Any:
    return live.client().chat.completions.create(**{"model": "", "messages": USER, "max_tokens": 6, "temperature": 0, **fields})


def biased(live: OpenAILive, letter: str) -> dict[str, int]:
    return {str(live.ids(letter)[0]): 100}


def test_a_reply_has_openais_shape(live: OpenAILive):
    """What every program reads of a reply."""
    found = ask(live, model="plain")
    assert (found.object, found.model, found.id[:9]) == ("chat.completion", "plain", "chatcmpl-")
    choice = found.choices[0]
    assert (choice.message.role, choice.finish_reason, choice.message.tool_calls, choice.logprobs) == ("assistant", "length", None, None)
    prompt = encode_prompt(USER, live.base.tokenizer)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (len(prompt), 6, len(prompt) + 6)
    assert found.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_repeated_prompt_is_counted_as_cached(live: OpenAILive):
    """OpenAI's usage says how much of a prompt was there already, and so does ours."""
    long = [{"role": "user", "content": "a quiet lagoon in the morning, " * 4}]
    ask(live, messages=long)
    assert 0 < ask(live, messages=long).usage.prompt_tokens_details.cached_tokens < ask(live, messages=long).usage.prompt_tokens


def test_each_adapter_is_asked_in_its_own_format(live: OpenAILive):
    """The conversation of the base and of `talk`, the template of `sentiment`: the answer is the engine's own for that prompt."""
    tokenizer = live.base.tokenizer
    turns = [{"role": "system", "content": "s"}, *USER, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for model, adapter in (("", None), ("talk", "talk"), ("plain", "plain")):
        found = ask(live, model=model, messages=turns).choices[0].message.content
        assert found == live.generate(encode_prompt(turns, tokenizer), adapter, max_new_tokens=6).text
    found = ask(live, model="sentiment", extra_body={"ignore_eos": True}).choices[0].message.content
    prompt = encode_prompt(SENTIMENT.render({"text": "a lagoon"}), tokenizer)
    live.client().completions.create(model="sentiment", prompt="x", max_tokens=1)
    assert found == live.generate(prompt, "sentiment", max_new_tokens=6, ignore_eos=True).text.lstrip()
    with pytest.raises(openai.BadRequestError, match="conversation of system, user, assistant, user"):
        ask(live, model="sentiment", messages=turns)
    assert ask(live, model="sentiment", messages=turns, extra_body={"prompt_format": "base"}).choices[0].message.content is not None
    fields = {"fields": {"first": "tea"}}
    assert ask(live, model="pair", extra_body=fields).usage.prompt_tokens == len(live.ids("tea or a lagoon?"))


def test_white_space_that_belongs_to_the_template_is_left_out(live: OpenAILive):
    """An adapter that was trained on "Label: good" begins with a space; its stop at a line end does not count before the answer has begun."""
    ids = live.ids(" \ngo")
    bias = {"logit_bias": {str(ids[0]): 100, str(ids[2]): 98}, "frequency_penalty": 2}
    whole = ask(live, model="sentiment", **bias)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(live, model="sentiment", **bias, stream=True))
    assert whole.choices[0].message.content.startswith("g") and streamed == whole.choices[0].message.content


def test_the_default_temperature_samples_and_a_seed_repeats(live: OpenAILive):
    """OpenAI's default is 1: without a seed answers differ, with one they do not."""
    asked = {"temperature": None, "max_tokens": 12}
    assert len({ask(live, **asked).choices[0].message.content for _ in range(4)}) > 1
    assert len({ask(live, **asked, seed=4).choices[0].message.content for _ in range(3)}) == 1
    three = [choice.message.content for choice in ask(live, **asked, seed=4, n=3).choices]
    assert len(set(three)) == 3 and ask(live, **asked, seed=6).choices[0].message.content == three[2]


def test_both_names_of_the_length_are_taken(live: OpenAILive):
    """max_completion_tokens replaced max_tokens; clients send either."""
    assert ask(live, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    assert ask(live, max_tokens=3).usage.completion_tokens == 3


def test_logprobs_are_the_engines_scores(live: OpenAILive):
    """Their sum is how likely the answer is after the prompt."""
    found = ask(live, logprobs=True, top_logprobs=3, logit_bias=biased(live, "q")).choices[0]
    content = found.logprobs.content
    assert "".join(entry.token for entry in content) == found.message.content == "qqqqqq"
    prompt = encode_prompt(USER, live.base.tokenizer)
    assert sum(entry.logprob for entry in content) == pytest.approx(live.score(prompt, live.ids("qqqqqq")), abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode() == entry.token for entry in content)
    chunks = list(ask(live, logprobs=True, top_logprobs=3, logit_bias=biased(live, "q"), stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == ["q"] * 6
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-5)


@pytest.mark.parametrize("stop", ["qq", ["x", "qq"]])
def test_a_stop_text_ends_an_answer(live: OpenAILive, stop: str | list[str]):
    """LoRAX called this content_filter, and programs then threw the answer away."""
    found = ask(live, logit_bias=biased(live, "q"), stop=stop).choices[0]
    assert (found.message.content, found.finish_reason) == ("", "stop")


def test_a_stream_says_the_same_as_a_whole_reply(live: OpenAILive):
    """The role first, then the text, then why it ended, then the usage if it was asked for."""
    asked = {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 20}
    whole = ask(live, **asked)
    *chunks, last = list(ask(live, **asked, stream=True, stream_options={"include_usage": True}))
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert {(chunk.id, chunk.object, chunk.created) for chunk in chunks} == {(last.id, "chat.completion.chunk", last.created)}
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + ["length"]
    assert all("usage" not in chunk.model_fields_set for chunk in ask(live, stream=True))


def test_json_answers_fit_their_schema_at_temperature_1(live: OpenAILive):
    """The promise of response_format: a random model fits by force alone."""
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": ARGUMENTS, "strict": True}}
    for seed in range(4):
        found = ask(live, temperature=1, seed=seed, max_tokens=120, response_format=form).choices[0]
        jsonschema.validate(json.loads(found.message.content), ARGUMENTS)
        assert found.finish_reason == "stop"
    bias = biased(live, "}")
    assert json.loads(ask(live, max_tokens=100, response_format={"type": "json_object"}, logit_bias=bias).choices[0].message.content) == {}
    assert ask(live, response_format={"type": "text"}).choices[0].message.content == ask(live).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_has_arguments_that_fit(live: OpenAILive, choice: Any):
    """Programs parse arguments without looking; whole and streamed they are the same, under the name that may be called."""
    for seed in range(3):
        asked = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": 150}
        found = ask(live, **asked).choices[0]
        [call] = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and found.message.content is None and call.id.startswith("call_")
        assert call.function.name == "weather" or (choice == "required" and call.function.name == "now")
        jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS if call.function.name == "weather" else {"maxProperties": 0})
        chunks = [chunk.choices[0] for chunk in ask(live, **asked, stream=True)]
        parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
        assert parts[0].id.startswith("call_") and [part.index for part in parts] == [0] * len(parts)
        assert (parts[0].type, parts[0].function.name) == ("function", call.function.name) and all(part.id is None for part in parts[1:])
        assert "".join(part.function.arguments for part in parts) == call.function.arguments
        assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)


def test_with_auto_the_model_may_answer_or_call(live: OpenAILive):
    """Biased to a letter it writes text; biased to the first sign of a call it can only go on to a whole one."""
    said = ask(live, tools=TOOLS, logit_bias=biased(live, "q")).choices[0]
    assert (said.message.content, said.message.tool_calls, said.finish_reason) == ("qqqqqq", None, "length")
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    assert ask(live, tools=TOOLS, messages=history).choices[0].finish_reason in ("length", "stop")
    none = ask(live, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.content == ask(live).choices[0].message.content


def test_a_streamed_call_after_auto_is_told_apart_from_text():
    """Nothing goes out before it is clear which of the two it is."""
    from openai.types.chat import ChatCompletionChunk

    from atoll.openai.types import Tool

    use = tool_use([Tool.model_validate(tool) for tool in TOOLS], "auto")
    text = call_text("weather", '{"city": "Rome", "days": 1}')
    writer = ChoiceWriter(Chunks(Head.new("chatcmpl", "m", "f"), "chat.completion.chunk", with_usage=False), 0, use, None, trims=False)
    events = [TokenEvent("r", 5, letter) for letter in text]
    events.append(TokenEvent("r", 2, "", completion=Completion("r", None, 1, (5, 2), text, "stop", stopped_by=2)))
    sent = b"".join(writer.push(event) for event in events).decode().split("\n\n")[:-1]
    chunks = [ChatCompletionChunk.model_validate(json.loads(event.removeprefix("data: "))).choices[0] for event in sent]
    calls = [part.function for chunk in chunks for part in chunk.delta.tool_calls or [] if part.function]
    assert [call.name for call in calls if call.name] == ["weather"]
    assert "".join(call.arguments or "" for call in calls) == '{"city": "Rome", "days": 1}'
    assert not any(chunk.delta.content for chunk in chunks) and chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"format": "wav", "voice": "alloy"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 9}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1100}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"model": "sentiment", "tools": TOOLS}, "tools"),
        ({"extra_body": {"fields": {"a": 1}}}, "fields"),
        ({"extra_body": {"typical_p": 2}}, "typical_p"),
        ({"extra_body": {"min_p": -1}}, "min_p"),
    ],
)
def test_a_wrong_request_is_refused_by_name(live: OpenAILive, fields: dict[str, Any], param: str):
    """A client's mistake is a BadRequestError that says which field, also when a stream was asked for."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(live, **fields, stream=stream)
        assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_a_schema_that_cannot_be_held_is_refused_before_a_stream_begins(live: OpenAILive):
    """A 200 that breaks off after its first event would look like a failure of the server."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "propertees": {}}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="propertees"):
            ask(live, response_format=form, stream=stream)


def test_an_unknown_model_is_not_found(live: OpenAILive):
    """`code` is what programs look at."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(live, model="nobody/nothing", stream=stream)
        assert caught.value.code == "model_not_found"


def test_harmless_fields_are_ignored(live: OpenAILive):
    """Every framework adds its own, and OpenAI's defaults ask for nothing."""
    extra = {"safety_identifier": "x", "chat_template_kwargs": {}, "verbosity": "medium", "reasoning_effort": "none", "modalities": ["text"]}
    found = ask(live, user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=False, extra_body=extra)
    assert found.choices[0].message.content == ask(live).choices[0].message.content


def test_too_many_requests_are_a_rate_limit_with_a_time_to_wait(serve: Callable[..., OpenAILive]):
    """The client waits as long as the header says."""
    small = serve(per_key_requests=2)
    small.service.places.take(1, EVERYBODY)
    with openai.OpenAI(base_url=small.url + "/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="", messages=USER, n=2, stream=stream)  # type: ignore[arg-type]
            assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "overloaded"
            with pytest.raises(openai.BadRequestError, match="2 are allowed"):  # more than there ever are: waiting does not help
                client.chat.completions.create(model="", messages=USER, n=3, stream=stream)  # type: ignore[arg-type]
        patient = client.with_options(max_retries=3)  # what was refused may give its place back a moment later
        assert patient.chat.completions.create(model="", messages=USER, max_tokens=1).choices  # type: ignore[arg-type]
    small.service.places.give_back(1, EVERYBODY)


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_client(live: OpenAILive, monkeypatch: pytest.MonkeyPatch):
    """The status was sent long ago; what comes then must not look like the end of the answer."""

    def breaks(self: ChoiceWriter, event: TokenEvent) -> bytes:
        if event.completion is None:
            return writes(self, event)
        return writes(self, TokenEvent("r", None, "", completion=Completion("r", None, 1, (), "", "error", error="the adapter gave NaN")))

    writes = ChoiceWriter.push
    monkeypatch.setattr(ChoiceWriter, "push", breaks)
    with pytest.raises(openai.APIError, match="the adapter gave NaN"):
        list(ask(live, stream=True, logit_bias=biased(live, "q")))


async def ask_async(live: OpenAILive) -> tuple[str, str, str]:
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "plain", "messages": USER, "max_tokens": 6, "temperature": 0}
        whole, stream = await asyncio.gather(client.chat.completions.create(**asked), client.chat.completions.create(**asked, stream=True))
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        form = {"response_format": {"type": "json_object"}, "logit_bias": biased(live, "}")}
        async with client.chat.completions.stream(**asked, **form) as helper:  # the client's own accumulator
            last = await helper.get_final_completion()
        return whole.choices[0].message.content or "", text, last.choices[0].message.content or ""


def test_the_async_client_and_its_helpers_read_both_kinds_of_reply(live: OpenAILive):
    """They check more of the chunks' shape than the plain iterator does."""
    whole, streamed, gathered = asyncio.run(ask_async(live))
    assert whole == streamed == ask(live, model="plain").choices[0].message.content and gathered == "{}"


def test_the_clients_parser_takes_typed_answers_and_calls(live: OpenAILive):
    """`parse` sends a strict schema and reads the answer into it; it fails on anything but what OpenAI sends."""
    from pydantic import BaseModel, Field

    class Trip(BaseModel):
        good: bool
        days: int = Field(ge=1, le=9)

    found = live.client().chat.completions.parse(
        model="plain",
        messages=USER,
        response_format=Trip,
        max_tokens=150,
        seed=1,  # type: ignore[arg-type]
    )
    assert isinstance(found.choices[0].message.parsed, Trip)
    tool = openai.pydantic_function_tool(Trip, name="trip")
    called = live.client().chat.completions.parse(
        model="plain",
        messages=USER,
        tools=[tool],
        tool_choice="required",
        max_tokens=150,  # type: ignore[arg-type]
    )
    [call] = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Trip)
