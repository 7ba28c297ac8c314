"""Grammars in the engine: constrained rows are rows like others, whatever the engine does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from atoll.engine.engine import Engine
from atoll.engine.grammar import Matcher
from atoll.engine.request import Completion, Grammar, Request, SamplingParams
from atoll.errors import RequestRefused
from atoll.model.base import Base

ANSWER = {
    "type": "object",
    "properties": {
        "label": {"enum": ["spam", "ham"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
        "why": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 2},
    },
    "required": ["label", "score", "why"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(ANSWER))
PROMPT = [1, 40, 50, 60, 70, 80]


def requests() -> list[Request]:
    """Constrained and free rows of the base and several adapters, greedy and sampled."""
    adapters = (None, "r4", "r8", "r16", "r8-too")
    found: list[Request] = []
    for i in range(10):
        settings: dict[str, Any] = {"temperature": 1.2, "seed": i} if i % 2 else {}
        grammar = SCHEMA if i % 3 else None
        found.append(Request([*PROMPT, 100 + i], adapters[i % 5], SamplingParams(max_new_tokens=240 if grammar else 12, grammar=grammar, **settings)))
    return found


def check(completions: list[Completion]) -> None:
    """Every answer to a grammar is complete and valid."""
    for request, completion in zip(requests(), completions, strict=True):
        if request.sampling.grammar is not None:
            assert completion.finish_reason == "stop", completion
            jsonschema.validate(json.loads(completion.text), ANSWER)


def answers(completions: list[Completion]) -> list[tuple[tuple[int, ...], str, str]]:
    return [(c.token_ids, c.text, c.finish_reason) for c in completions]


@pytest.fixture(scope="module")
def alone(base: Base, adapters: dict[str, Any]) -> list[tuple[tuple[int, ...], str, str]]:
    """Each request in an engine of its own."""
    found: list[Completion] = []
    for request in requests():
        engine = Engine(base)
        for key, adapter in adapters.items():
            engine.register(key, adapter)
        found += engine.generate([request])
    check(found)
    return answers(found)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_rows": 3, "max_step_tokens": 5},  # prompts in chunks, rows that come and go
        {"num_pages": 8, "reuse_prefixes": False},  # 256 tokens for ten rows: some lose their pages and go on later
        {"num_pages": 8},
    ],
    ids=["together", "in chunks", "preempted", "preempted, with reuse"],
)
def test_constrained_rows_answer_in_any_batch_as_alone(
    make_engine: Callable[..., Engine], alone: list[tuple[tuple[int, ...], str, str]], settings: dict[str, int]
) -> None:
    """A matcher follows its sequence's tokens and nothing else: not neighbours, adapters, chunks, nor being preempted and resumed."""
    engine = make_engine(**settings)
    assert answers(engine.generate(requests())) == alone
    if settings.get("num_pages"):
        assert engine.stats()["preemptions"] > 0


def test_a_stream_of_json_joins_to_the_whole(make_engine: Callable[..., Engine]) -> None:
    """What a client prints while it comes is the text that is parsed in the end."""
    grammar = Grammar("json_schema", json.dumps({"const": {"grüße": "🙂", "n": [1, 2]}}))
    events = list(make_engine().stream(Request(PROMPT, "r8", SamplingParams(grammar=grammar, stop=("never",)))))
    completion = events[-1].completion
    assert completion is not None and completion.finish_reason == "stop"
    assert "".join(event.text for event in events) == completion.text
    assert json.loads(completion.text) == {"grüße": "🙂", "n": [1, 2]}


def test_an_answer_cut_off_by_the_length_says_so(make_engine: Callable[..., Engine]) -> None:
    """Half a JSON text must not look like a whole one."""
    [completion] = make_engine().generate([Request(PROMPT, None, SamplingParams(max_new_tokens=5, grammar=SCHEMA))])
    assert completion.finish_reason == "length" and len(completion.token_ids) == 5


def test_a_bad_schema_is_refused_before_anything_is_queued(make_engine: Callable[..., Engine]) -> None:
    """The client gets one sentence, and the other requests of the call do not start either."""
    engine = make_engine()
    bad = Request(PROMPT, None, SamplingParams(grammar=Grammar("json_schema", '{"type": "objekt"}')))
    for call in (engine.add, engine.stream):
        with pytest.raises(RequestRefused, match="objekt"):
            call(bad)
    with pytest.raises(RequestRefused, match="objekt"):
        engine.generate([Request(PROMPT), bad])
    assert not engine.has_work


def test_a_matcher_that_breaks_mid_way_ends_its_own_request_only(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit inside the compiler is met at some token of one request: an error completion for it, the right answer for everybody else."""
    good = make_engine().generate(requests())
    broken: list[Matcher] = []
    advance = Matcher.advance

    def failing(self: Matcher, token: int, *, ends: bool = False) -> None:
        if not broken and len(self._tokens) == 4:
            broken.append(self)
        if self in broken:
            self._failure = "lexer error"
        advance(self, token, ends=ends)

    monkeypatch.setattr(Matcher, "advance", failing)
    engine = make_engine()
    completions = engine.generate(requests())
    [failed] = [i for i, c in enumerate(completions) if c.finish_reason == "error"]
    assert completions[failed].error.startswith("the request's JSON schema could not be followed: lexer error")
    assert len(completions[failed].token_ids) == 4
    assert [a for i, a in enumerate(answers(completions)) if i != failed] == [a for i, a in enumerate(answers(good)) if i != failed]
    engine.check()
