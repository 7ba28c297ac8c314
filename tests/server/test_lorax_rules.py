"""LoRAX's rules over raw HTTP: every message, every default, every null, and the headers, as clients in other languages meet them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tests.server.live_server import Live

from atoll.engine.request import Completion, EmbedRequest, Request, SamplingParams, ScoreRequest, TokenEvent, TokenLogprob
from atoll.http.token_text import TokenTexts
from atoll.lorax.reply import ReplyWriter
from atoll.lorax.types import Info, Parameters

PROMPT = "what is a lagoon?"
PREFIX = "Input validation error: "
ROUTES = ["/generate", "/generate_stream", "/", "/invocations", "/any/deployments/v2/llms/tiny-llama/generate"]

BROKEN_RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 8. Given: 0"),
    ({"best_of": 9, "do_sample": True}, "`best_of` must be > 0 and <= 8. Given: 9"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": -0.5}, "`temperature` must be non-negative"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": -1.0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": 1e-300}, "`repetition_penalty` must be >= 1e-6 and <= 1e6"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"top_p": 1.5}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
    ({"return_k_alternatives": 1000}, "`return_k_alternatives` must be <= 128"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    (
        {"max_new_tokens": 250},
        "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 17 `inputs` tokens and 250 `max_new_tokens`",
    ),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 255. Given: 0"),
    ({"truncate": 256}, "`truncate` must be strictly positive and less than 255. Given: 256"),
    ({"seed": -1}, "`seed` must be >= 0 and <= 18446744073709551615. Given: -1"),
    ({"stop": ["x"] * 17}, "`stop` supports up to 16 stop sequences. Given: 17"),
    ({"stop": [""]}, "`stop` sequences must have 1 to 256 characters. Given: 0"),
    ({"stop": ["x" * 257]}, "`stop` sequences must have 1 to 256 characters. Given: 257"),
    ({"adapter_id": "plain", "merged_adapters": {"ids": ["plain"], "weights": [1]}}, "at most one of `adapter_id` or `adapters` may be provided"),
    ({"merged_adapters": {"ids": [], "weights": []}}, "at least one adapter ID must be provided when setting `adapters`"),
    ({"merged_adapters": {"ids": ["plain"], "weights": []}}, "number of adapter IDs must match number of adapter weights"),
    ({"merged_adapters": {"ids": ["plain"], "weights": [1], "merge_strategy": "no such"}}, "merge_strategy is 'no such', expected one of "),
    ({"merged_adapters": {"ids": ["plain"], "weights": [1], "majority_sign_method": "loud"}}, "majority_sign_method is 'loud', expected one of "),
    ({"merged_adapters": {"ids": ["plain"], "weights": [1], "merge_strategy": "ties", "density": 7}}, "density is 7"),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}}, ""),
    ({"fields": {"a": 1}}, "`fields` fill a prompt format, which only `apply_chat_template` uses"),
    ({"temperature": "hot"}, "`parameters.temperature`: input should be a valid number"),
    ({"max_new_tokens": 1.5}, "`parameters.max_new_tokens`: input should be a valid integer"),
    ({"stop": "x"}, "`parameters.stop`: input should be a valid list"),
]


def _error(reply: Any) -> str:
    """The sentence of a validation error, which every route sends as JSON with status 422."""
    body = reply.json()
    assert reply.status_code == 422, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert body["error_type"] == "validation"
    assert body["error"].startswith(PREFIX)
    return str(body["error"].removeprefix(PREFIX))


@pytest.mark.parametrize(("parameters", "message"), BROKEN_RULES, ids=lambda value: str(value)[:60])
def test_a_broken_rule_is_told_in_loraxs_words(live: Live, parameters: dict[str, Any], message: str) -> None:
    """Clients match these sentences; LoRAX's router dies of some of these values instead."""
    assert _error(live.post("/generate", {"inputs": PROMPT, "parameters": parameters})).startswith(message)


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_has_the_same_rules(live: Live, path: str) -> None:
    """On streams too, before the status: nobody can act on an error inside of a 200."""
    for body, message in [
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": PROMPT, "stream": True, "parameters": {"max_new_tokens": 0}}, "`max_new_tokens` must be strictly positive"),
        ({"inputs": "x" * 256, "parameters": None}, "`inputs` must have less than 255 tokens. Given: 256"),
        ({"parameters": {}}, "`inputs` is missing"),
        ({"inputs": None}, "`inputs`: input should be a valid string"),
    ]:
        assert _error(live.post(path, body)) == message


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
def test_streams_have_two_rules_more(live: Live, parameters: dict[str, Any], message: str) -> None:
    """Both need the whole answer."""
    assert _error(live.post("/generate_stream", {"inputs": PROMPT, "parameters": parameters})) == message
    assert _error(live.post("/", {"inputs": PROMPT, "stream": True, "parameters": parameters})) == message


def test_everything_may_be_null(live: Live) -> None:
    """The client sends every field, most of them null."""
    nothing = dict.fromkeys(Parameters.model_fields)
    plain = live.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}).json()
    assert live.post("/generate", {"inputs": PROMPT, "parameters": {**nothing, "max_new_tokens": 4}}).json() == plain
    assert live.post("/", {"inputs": PROMPT, "stream": None, "parameters": {**nothing, "max_new_tokens": 4}}).json() == [plain]


def test_unknown_fields_are_ignored(live: Live) -> None:
    """Clients of TGI send fields that LoRAX does not know, and it does not mind."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2, "top_n_tokens": 3}, "options": {"use_cache": False}}
    assert live.post("/generate", body).status_code == 200


@pytest.mark.parametrize("name", ["", None, "tiny", "__base_model__", "base"])
def test_the_base_has_several_names(live: Live, name: str | None) -> None:
    """null, an empty id, and the names by which it is listed."""
    name = live.base.name if name == "tiny" else name
    reply = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": name, "max_new_tokens": 4}})
    assert reply.json()["generated_text"] == live.generate(live.ids(PROMPT), max_new_tokens=4).text
    assert "x-adapter-id" not in reply.headers


@pytest.mark.parametrize(
    ("parameters", "draws"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, True),
        ({"top_k": 50}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5}, False),
        ({"do_sample": True, "temperature": 0}, False),
        ({"do_sample": True, "temperature": 1e-300}, False),
        ({"temperature": 1e300}, True),
    ],
)
def test_what_turns_sampling_on(live: Live, parameters: dict[str, Any], draws: bool) -> None:
    """A seed is told exactly when tokens were drawn."""
    body = {"inputs": PROMPT, "parameters": {**parameters, "max_new_tokens": 2, "details": True}}
    assert (live.post("/generate", body).json()["details"]["seed"] is not None) is draws


def test_without_max_new_tokens_the_answer_may_fill_the_row(live: Live) -> None:
    """LoRAX's default is what there is room for, not a small number."""
    reply = live.post("/generate", {"inputs": PROMPT, "parameters": {"ignore_eos_token": True, "details": True}}).json()
    assert reply["details"]["generated_tokens"] == 256 - len(live.ids(PROMPT))
    assert reply["details"]["finish_reason"] == "length"


def test_a_source_that_does_not_exist_fails_as_a_download(live: Live) -> None:
    """LoRAX finds that out while downloading, so its status is 424."""
    reply = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "plain", "adapter_source": "moon"}})
    assert reply.status_code == 424
    assert reply.json()["error_type"] == "generation"
    assert "Invalid source 'moon' when downloading adapter 'plain'" in reply.json()["error"]
    assert live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "plain", "adapter_source": "HUB", "max_new_tokens": 1}}).is_success


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_an_adapter_id_of_any_characters_is_answered(live: Live, path: str) -> None:
    """LoRAX's router dies when the id of a stream does not fit into a header."""
    for name in ("ädapter", "two\nlines", "naïve 🏝", "a,b", "../../etc/passwd", "\u0000", "x" * 5000):
        reply = live.post(path, {"inputs": PROMPT, "parameters": {"adapter_id": name, "max_new_tokens": 1}})
        assert reply.status_code == 424
        assert reply.json()["error_type"] == "generation"


def test_headers_of_a_whole_answer(live: Live) -> None:
    """Counts and whole milliseconds; dashboards parse them as integers."""
    reply = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "plain", "max_new_tokens": 4}})
    numbers = [
        "x-compute-time", "x-compute-characters", "x-total-time", "x-prompt-tokens", "x-generated-tokens", "x-skipped-tokens", "x-total-tokens",
        "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token", "x-time-to-first-token", "x-time-per-output-token",
    ]  # fmt: skip
    assert all(reply.headers[name].isdigit() for name in numbers)
    assert int(reply.headers["x-compute-characters"]) == len(PROMPT)
    assert int(reply.headers["x-prompt-tokens"]) == len(live.ids(PROMPT))
    assert int(reply.headers["x-total-tokens"]) == len(live.ids(PROMPT)) + int(reply.headers["x-generated-tokens"])
    assert reply.headers["x-model-id"] == live.base.name
    assert (reply.headers["x-adapter-id"], reply.headers["x-adapter-source"]) == ("plain", "hub")
    assert reply.headers["x-compute-type"] == "cpu"


def test_headers_of_a_stream_and_of_merged_adapters(live: Live) -> None:
    """Several adapters are joined by commas, in the order of the request."""
    merged = {"ids": ["plain", "pair"], "weights": [1, 1]}
    reply = live.post("/generate_stream", {"inputs": PROMPT, "parameters": {"merged_adapters": merged, "max_new_tokens": 1}})
    assert reply.headers["x-adapter-id"] == "plain,pair"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-compute-characters"] == str(len(PROMPT))


def test_a_stream_is_events_of_tokens_and_nothing_else(live: Live) -> None:
    """Its last event has the text and the details; a [DONE] would make LoRAX's client fail."""
    reply = live.post("/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True}})
    lines = [line for line in reply.text.split("\n") if line]
    assert all(line.startswith("data:") for line in lines)
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    whole = live.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True}}).json()
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"] == {name: whole["details"][name] for name in events[-1]["details"]}


def test_the_end_of_text_token_is_told_and_not_written(live: Live) -> None:
    """It is among the tokens, marked special, and in no text; what it lets go of a stop sequence that never came is its predecessor's."""
    ids, stop = live.ids("ok\n"), SamplingParams(logprobs=0, stop=("\n\n",))
    tokens = (*ids, live.base.eos_ids[0])
    logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens)
    completion = Completion("1", None, 1, tokens, "ok\n", "stop", stopped_by=tokens[-1], logprobs=logprobs)
    writer = ReplyWriter(TokenTexts(live.base.tokenizer))
    reply = writer.body(Request(live.ids("?"), sampling=stop), [completion], details=True, full_text="")
    told = reply["details"]["tokens"]
    assert reply["details"]["finish_reason"] == "eos_token"
    assert [token["text"] for token in told] == ["o", "k", "\n", "</s>"]
    assert [token["special"] for token in told] == [False, False, False, True]
    event = json.loads(writer.last_event(TokenEvent("1", tokens[-1], "", logprobs[-1], completion), details=True, full_text="").removeprefix("data:"))
    assert event["token"] == told[-1]
    assert event["generated_text"] == reply["generated_text"] == "ok\n"


def test_texts_of_tokens_join_to_the_answer_even_inside_characters(live: Live) -> None:
    """A character of several tokens appears with its last one."""
    wanted = {"type": "json_object", "schema": {"const": "é🏝x"}}
    body = {"inputs": PROMPT, "parameters": {"response_format": wanted, "details": True, "max_new_tokens": 40}}
    whole = live.post("/generate", body).json()
    assert json.loads(whole["generated_text"]) == "é🏝x"
    assert "".join(token["text"] for token in whole["details"]["tokens"] if not token["special"]) == whole["generated_text"]


def test_an_adapters_own_stop_texts_end_its_answers(live: Live) -> None:
    """They were trained with it; ignore_eos_token turns them off with the end-of-text token."""
    sampling = {"max_new_tokens": 40, "stop": ("\n",), "stop_after_text": True}
    expected = live.generate(live.ids(PROMPT), "sentiment", **sampling) if _known(live, "sentiment") else None
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "sentiment", "max_new_tokens": 40}}
    assert expected is not None
    assert live.post("/generate", body).json()["generated_text"] == expected.text
    ignoring = live.post("/generate", {**body, "parameters": {**body["parameters"], "ignore_eos_token": True}}).json()
    request = Request(live.ids(PROMPT), live.digest("sentiment"), SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert ignoring["generated_text"] == live.run(lambda engine: engine.generate([request]))[0].text


def _known(live: Live, name: str) -> bool:
    """Have an adapter loaded."""
    return live.post("/generate", {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}).is_success


def test_apply_chat_template_uses_the_adapters_own_format(live: Live) -> None:
    """Else the base's chat template. LoRAX accepts the field and ignores it."""

    def ask(**parameters: Any) -> Any:
        body = {"inputs": "fine", "parameters": {"max_new_tokens": 3, "apply_chat_template": True, "decoder_input_details": True, **parameters}}
        return live.post("/generate", body)

    def prompt(reply: Any) -> str:
        return "".join(token["text"] for token in reply.json()["details"]["prefill"])

    assert prompt(ask(adapter_id="sentiment")) == "Good or bad?\n\nText: fine\nLabel:"
    assert prompt(ask()) == "<|im_start|>user\nfine<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(ask(adapter_id="pair", fields={"first": "tea"})) == "tea or fine?"
    assert "`fields` must give all of them but the one that `inputs` fills" in _error(ask(adapter_id="pair"))
    assert "`fields` has 'third'" in _error(ask(adapter_id="pair", fields={"third": 1}))


def test_tokenize(live: Live) -> None:
    """Offsets count characters, also where a character is several tokens."""
    found = live.post("/tokenize", {"inputs": "aé"}).json()
    assert [(token["text"], token["start"], token["stop"]) for token in found] == [("a", 0, 1), ("é", 1, 2), ("é", 1, 2)]
    assert [token["id"] for token in found] == live.ids("aé")
    assert live.post("/tokenize", {"inputs": "aé", "add_special_tokens": False}).json() == found


def test_embed_with_and_without_an_adapter(live: Live) -> None:
    """The mean of the last hidden states, or the last one."""
    for adapter, pooling in [(None, None), (None, "last"), ("plain", "mean"), ("plain", "last")]:
        reply = live.post("/embed", {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "pooling": pooling}}).json()
        item = EmbedRequest(live.ids(PROMPT), live.digest(adapter) if adapter else None, pooling or "mean")
        assert reply["embeddings"] == pytest.approx(live.run(lambda engine, item=item: engine.embed([item]))[0], abs=1e-5)
    assert "`inputs` must have less than 255 tokens" in _error(live.post("/embed", {"inputs": "x" * 300}))


def test_classify_scores_are_the_softmax_of_the_labels_likelihoods(live: Live) -> None:
    """What the adapter was trained to answer, among what it may answer."""
    found = live.post("/classify", {"inputs": "fine", "parameters": {"adapter_id": "sentiment"}}).json()
    labels = ["good", "bad", "mixed"]
    item = ScoreRequest(live.ids("Good or bad?\n\nText: fine\nLabel:"), [live.ids(" " + label) for label in labels], live.digest("sentiment"))
    sums = live.run(lambda engine: engine.score([item]))[0]
    expected = {label: math.exp(value) / sum(map(math.exp, sums)) for label, value in zip(labels, sums, strict=True)}
    assert {entity["entity_group"]: entity["score"] for entity in found} == pytest.approx(expected, abs=1e-5)
    assert all((entity["word"], entity["start"], entity["end"]) == ("fine", 0, 4) for entity in found)


def test_classify_refuses_what_it_cannot_do(live: Live) -> None:
    """501 with a reason, in LoRAX's shape; and too many texts, or none, are the client's mistake."""
    for adapter in (None, "plain", "pair"):
        reply = live.post("/classify_batch", {"inputs": ["fine"], "parameters": {"adapter_id": adapter}})
        assert reply.status_code == 501
        assert reply.json()["error_type"] == "classification_failure"
        assert "trained on a closed set of labels" in reply.json()["hint"]
    chosen = {"parameters": {"adapter_id": "sentiment"}}
    assert _error(live.post("/classify_batch", {"inputs": [], **chosen})) == "`inputs` cannot be empty"
    assert _error(live.post("/classify_batch", {"inputs": ["a", ""], **chosen})) == "`inputs` cannot be empty"
    assert _error(live.post("/classify_batch", {"inputs": ["a"] * 65, **chosen})) == "`inputs` may hold up to 64 texts. Given: 65"
    assert "tokens" in _error(live.post("/classify", {"inputs": "x" * 300, **chosen}))


def test_predibases_path_serves_this_base_and_no_other(live: Live) -> None:
    """Any tenant; the deployment must be the base, by its name or the last part of it."""
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "plain", "max_new_tokens": 3}}
    path = "/4a5b/deployments/v2/llms/{}/generate"
    assert live.post(path.format("tiny-llama"), body).json() == live.post("/generate", body).json()
    assert "data:" in live.post(path.format("tiny-llama") + "_stream", body).text
    missing = live.post(path.format("mistral-7b"), body)
    assert missing.status_code == 404
    assert "there is no deployment 'mistral-7b' here" in missing.json()["error"]


def test_info(live: Live) -> None:
    """LoRAX's fields for dashboards, and what this server is."""
    info = Info.model_validate(live.get("/info").json())
    assert (info.model_id, info.max_total_tokens, info.max_input_length, info.max_best_of) == (live.base.name, 256, 255, 8)
    assert info.base["weights_fingerprint"] == live.base.fingerprint.weights
    assert info.adapters == 3
    assert info.kernel == live.run(lambda engine: engine.kernel)
