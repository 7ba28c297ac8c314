"""lorax-client, as it is on PyPI, against a live server: what its users call must work, and fail, as it does with LoRAX."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server.live_server import LABELS, Live, fill_hub, serving

from atoll.engine.request import Request, SamplingParams
from atoll.serving.merging import MergeSpec, merge_digest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it was written for an older pydantic
    import lorax
    from lorax import errors
    from lorax.types import MergedAdapters

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the same when it is called

PROMPT = "what is a lagoon?"
MERGED = {"ids": ["plain", "sentiment"], "weights": [0.75, -0.5], "density": 0.5}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
Ask = Callable[..., Any]


def _sync(live: Live, how: str, **options: Any) -> Any:
    client = lorax.Client(live.url, timeout=60)
    return client.generate(PROMPT, **options) if how == "generate" else list(client.generate_stream(PROMPT, **options))


def _async(live: Live, how: str, **options: Any) -> Any:
    async def run() -> Any:
        client = lorax.AsyncClient(live.url, timeout=60)
        if how == "generate":
            return await client.generate(PROMPT, **options)
        return [event async for event in client.generate_stream(PROMPT, **options)]

    return asyncio.run(run())


@pytest.fixture(params=[_sync, _async], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """ask(live, "generate" | "generate_stream", **options) through one of the two clients."""
    return request.param


both = pytest.mark.parametrize("how", ["generate", "generate_stream"])


def _text(reply: Any) -> str:
    return reply[-1].generated_text if isinstance(reply, list) else reply.generated_text


def _tokens(reply: Any) -> list[Any]:
    return [event.token for event in reply] if isinstance(reply, list) else reply.details.tokens


def _details(reply: Any) -> Any:
    return reply[-1].details if isinstance(reply, list) else reply.details


def _check_against(reply: Any, expected: Any) -> None:
    """A reply tells what the engine answers without HTTP: tokens, text, log-probabilities, counts."""
    assert _text(reply) == expected.text
    assert [token.id for token in _tokens(reply)] == list(expected.token_ids)
    assert [token.logprob for token in _tokens(reply)] == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
    assert _details(reply).generated_tokens == len(expected.token_ids)
    assert _details(reply).prompt_tokens == expected.num_prompt_tokens
    assert "".join(token.text for token in _tokens(reply) if not token.special) == expected.text


@both
def test_the_base_answers(live: Live, ask: Ask, how: str) -> None:
    """The plainest call there is."""
    reply = ask(live, how, max_new_tokens=12)
    _check_against(reply, live.generate(live.ids(PROMPT), max_new_tokens=12, logprobs=0))
    assert _details(reply).finish_reason in ("length", "eos_token")
    assert _details(reply).seed is None


@both
@pytest.mark.parametrize("source", [None, "hub", "pbase"])
def test_an_adapter_answers(live: Live, ask: Ask, how: str, source: str | None) -> None:
    """A request that names an adapter and gets the base's answer is the worst failure of all."""
    reply = ask(live, how, adapter_id="plain", adapter_source=source, max_new_tokens=12)
    _check_against(reply, live.generate(live.ids(PROMPT), "plain", max_new_tokens=12, logprobs=0))
    assert _text(reply) != _text(ask(live, how, max_new_tokens=12))


@both
def test_merged_adapters_answer(live: Live, ask: Ask, how: str) -> None:
    """The request's own mixture, here the exact weighted sum, served like an adapter."""
    reply = ask(live, how, merged_adapters=MergedAdapters(**MERGED), max_new_tokens=8)
    spec = MergeSpec(("plain", "sentiment"), (0.75, -0.5), density=0.5)
    digest = merge_digest(spec, [live.digest("plain"), live.digest("sentiment")])
    request = Request(live.ids(PROMPT), adapter=digest, sampling=SamplingParams(max_new_tokens=8, logprobs=0, stop=()))
    _check_against(reply, live.run(lambda engine: engine.generate([request]))[0])


@both
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_every_merge_strategy_of_the_client_answers(live: Live, how: str, strategy: str) -> None:
    """The client offers four; the fourth, linear, is compared with the engine above."""
    merged = MergedAdapters(**MERGED, merge_strategy=strategy, majority_sign_method="frequency")
    assert len(_tokens(_sync(live, how, merged_adapters=merged, max_new_tokens=2))) <= 2


@both
def test_a_missing_adapter_is_a_generation_error(live: Live, ask: Ask, how: str) -> None:
    """LoRAX's clients expect 424 generation for whatever an adapter's download can meet."""
    with pytest.raises(errors.GenerationError, match="no adapter 'nobody'"):
        ask(live, how, adapter_id="nobody", max_new_tokens=2)


@both
def test_a_bad_parameter_is_a_validation_error(live: Live, ask: Ask, how: str) -> None:
    """Also on streams, before they begin: a 422 with JSON, which the client can read."""
    with pytest.raises(errors.ValidationError, match=r"Input validation error: `max_new_tokens` must be strictly positive"):
        ask(live, how, max_new_tokens=0)


@both
def test_what_only_the_engine_can_refuse_is_a_validation_error(live: Live, ask: Ask, how: str) -> None:
    """A schema is compiled in the engine: on a stream too, the refusal must come before the status."""
    with pytest.raises(errors.ValidationError, match="Input validation error"):
        ask(live, how, response_format={"type": "json_object", "schema": {"type": "no such type"}}, max_new_tokens=4)


@both
def test_overload_is_an_overloaded_error(serve: Callable[..., Live], ask: Ask, how: str) -> None:
    """The client tells its user "Model is overloaded" by this class."""
    live = serve(max_concurrent_requests=1)
    stands_still, go_on = threading.Event(), threading.Event()

    def hold(engine: Any) -> None:
        stands_still.set()
        go_on.wait(60)

    asyncio.run_coroutine_threadsafe(live.service.run(hold), live.loop)
    assert stands_still.wait(60)
    first = threading.Thread(target=lambda: live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}))
    first.start()
    while not live.service.stats()["active_requests"]:
        first.join(0.005)
    try:
        with pytest.raises(errors.OverloadedError, match="Model is overloaded"):
            ask(live, how, max_new_tokens=1)
        assert int(live.post("/generate", {"inputs": "a"}).headers["retry-after"]) >= 1
    finally:
        go_on.set()
        first.join()
    assert _text(ask(live, how, max_new_tokens=1)) is not None


@both
def test_details_are_left_out_unless_asked_for(live: Live, ask: Ask, how: str) -> None:
    """`details: false` is the default of the API, true that of the client."""
    reply = ask(live, how, max_new_tokens=3, details=False)
    assert _details(reply) is None
    assert _text(reply) == live.generate(live.ids(PROMPT), max_new_tokens=3).text


def test_decoder_input_details_tell_the_prompt(live: Live, ask: Ask) -> None:
    """Every prompt token with its log-probability, the first without; and again when the prompt is in the prefix cache."""
    prompt = live.ids(PROMPT)
    expected = live.generate(prompt, max_new_tokens=2, prompt_logprobs=0)
    for _ in range(2):
        prefill = ask(live, "generate", max_new_tokens=2, decoder_input_details=True).details.prefill
        assert [token.id for token in prefill] == prompt
        assert "".join(token.text for token in prefill) == PROMPT
        assert prefill[0].logprob is None
        assert [token.logprob for token in prefill[1:]] == pytest.approx([entry.logprob for entry in expected.prompt_logprobs[1:]], abs=1e-4)


def test_alternatives_of_each_token(live: Live, ask: Ask) -> None:
    """The likeliest tokens first; for greedy answers the chosen one among them."""
    reply = ask(live, "generate", max_new_tokens=4, return_k_alternatives=3)
    for token in reply.details.tokens:
        found = [alternative.logprob for alternative in token.alternative_tokens]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        assert token.alternative_tokens[0].id == token.id
    assert all(token.alternative_tokens is None for token in ask(live, "generate", max_new_tokens=2).details.tokens)


def test_alternatives_come_in_streams_too(live: Live) -> None:
    """Only the asynchronous client asks for them there."""
    events = _async(live, "generate_stream", max_new_tokens=3, return_k_alternatives=2)
    assert all(len(event.token.alternative_tokens) == 2 for event in events)


@both
@pytest.mark.parametrize("adapter", [None, "plain"])
def test_a_response_format_is_kept(live: Live, ask: Ask, how: str, adapter: str | None) -> None:
    """Even a model of random weights writes what fits the schema."""
    wanted = {"type": "json_object", "schema": SCHEMA}
    reply = ask(live, how, adapter_id=adapter, response_format=wanted, max_new_tokens=60)
    assert _details(reply).finish_reason == "eos_token"
    assert isinstance(json.loads(_text(reply))["ok"], bool)


@both
def test_stop_sequences_end_the_answer(live: Live, ask: Ask, how: str) -> None:
    """The text ends before the stop sequence; its tokens were generated and are told."""
    whole = live.generate(live.ids(PROMPT), max_new_tokens=24).text
    stop = whole[3:5]
    reply = ask(live, how, max_new_tokens=24, stop_sequences=[stop, "never written"])
    assert _text(reply) == whole[: whole.index(stop)]
    assert _details(reply).finish_reason == "stop_sequence"
    assert "".join(token.text for token in _tokens(reply)) == _text(reply)


@both
def test_a_seed_repeats_an_answer(live: Live, ask: Ask, how: str) -> None:
    """And is told, as is one that the server drew."""
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first, again, other = (ask(live, how, seed=seed, **options) for seed in (7, 7, 8))
    assert _text(first) == _text(again) != _text(other)
    assert _details(first).seed == 7
    drawn = ask(live, how, **options)
    assert _text(ask(live, how, seed=_details(drawn).seed, **options)) == _text(drawn)


def test_best_of_gives_the_likeliest_sequence_and_the_others(live: Live, ask: Ask) -> None:
    """Each sequence draws its own seed; the one with the highest mean log-probability wins."""
    reply = ask(live, "generate", best_of=2, do_sample=True, max_new_tokens=8)
    [other] = reply.details.best_of_sequences
    assert other.seed != reply.details.seed
    means = [sum(token.logprob for token in sequence.tokens) / len(sequence.tokens) for sequence in (reply.details, other)]
    assert means[0] >= means[1]
    assert other.generated_tokens == len(other.tokens)


@both
def test_the_whole_text_can_be_returned(live: Live, ask: Ask, how: str) -> None:
    """return_full_text puts the prompt in front."""
    assert _text(ask(live, how, max_new_tokens=3, return_full_text=True)).startswith(PROMPT)


@both
def test_truncate_keeps_the_end_of_the_prompt(live: Live, ask: Ask, how: str) -> None:
    """What stands last in a prompt is the question."""
    reply = ask(live, how, max_new_tokens=4, truncate=5)
    _check_against(reply, live.generate(live.ids(PROMPT)[-5:], max_new_tokens=4, logprobs=0))


@pytest.fixture(scope="module")
def classifier(served_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose default adapter has labels: the client's classify names none."""
    root = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base), default_adapter="sentiment") as running:
            yield running


def test_embed(live: Live) -> None:
    """A flat list of the hidden size, the same from both clients."""
    found = lorax.Client(live.url).embed(PROMPT).embeddings
    assert len(found) == live.base.decoder.shape.hidden
    assert asyncio.run(lorax.AsyncClient(live.url).embed(PROMPT)).embeddings == pytest.approx(found, abs=1e-5)


def test_classify_and_classify_batch(classifier: Live) -> None:
    """One list of entities a text, in the order of the texts."""
    client = lorax.Client(classifier.url)
    one = client.classify("it is fine").entities
    assert sorted(entity["entity_group"] for entity in one) == sorted(LABELS)
    assert [entity["score"] for entity in one] == sorted((entity["score"] for entity in one), reverse=True)
    assert sum(entity["score"] for entity in one) == pytest.approx(1.0)
    batch = client.classify_batch(["it is fine", "it is not"])
    assert [found.entities[0]["word"] for found in batch] == ["it is fine", "it is not"]
    assert [entity["score"] for entity in batch[0].entities] == pytest.approx([entity["score"] for entity in one], abs=1e-4)


def test_the_asynchronous_classify_reaches_us_and_fails_in_the_client(classifier: Live) -> None:
    """It unpacks the reply's list as keywords, whatever the server sends: this notices when that is mended."""
    with pytest.raises(TypeError, match="mapping"):
        asyncio.run(lorax.AsyncClient(classifier.url).classify("it is fine"))


def test_without_labels_classify_says_so(live: Live) -> None:
    """The base has no classes; the client shows the sentence that says what to do."""
    with pytest.raises(errors.UnknownError, match="the base has no closed set of labels"):
        lorax.Client(live.url).classify(PROMPT)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.UnknownError),
        (403, errors.ShardNotReadyError),
        (404, errors.NotFoundError),
        (413, errors.UnknownError),
        (422, errors.ValidationError),
        (500, errors.UnknownError),
        (503, errors.UnknownError),
    ],
)
def test_the_client_reads_every_error_body_that_has_no_class_of_its_own(status: int, kind: type[Exception]) -> None:
    """It needs an object at the top and a string in `error`, whatever the status."""
    from lorax.errors import parse_error

    from atoll.http.errors import refusal

    body = dict(refusal(status, "a sentence", "native", hint="a way out").body)
    found = parse_error(status, body, {"x-b3-traceid": "1"})
    assert type(found) is kind
    assert "a sentence" in str(found)
