"""What a request may say: every parameter out of range is refused by name, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from atoll.engine.request import Grammar, Limits, Request, SamplingParams, ScoreRequest
from atoll.errors import RequestRefused

WRONG: list[dict[str, Any]] = [
    {"max_new_tokens": 0},
    {"max_new_tokens": 1.5},
    {"max_new_tokens": True},
    {"min_new_tokens": -1},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"min_p": 1.5},
    {"typical_p": 0.0},
    {"typical_p": 1.01},
    {"repetition_penalty": 0.0},
    {"frequency_penalty": 2.1},
    {"presence_penalty": -2.1},
    {"logit_bias": {5: 101.0}},
    {"logit_bias": {-1: 1.0}},
    {"seed": -1},
    {"seed": 1 << 64},
    {"stop": ("",)},
    {"stop": "text"},
    {"stop": (3,)},
    {"stop_token_ids": (-1,)},
    {"logprobs": -1},
    {"logprobs": 129},
    {"prompt_logprobs": 1000},
    {"grammar": "json"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_parameter_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    """A bad value that reached the engine would fail in the middle of a batch, or be clamped in silence."""
    [name] = wrong
    with pytest.raises(RequestRefused, match="stop string" if wrong == {"stop": ("",)} or wrong == {"stop": (3,)} else name):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "{}", "kind is 'json', but must be one of json_schema, json_object, regex, lark"),
        (3, "", "kind is 3"),
        ("json_schema", "", "json_schema has no text"),
        ("regex", "", "regex has no text"),
        ("lark", "", "lark has no text"),
        ("json_object", "{}", "json_object takes no text"),
        ("json_schema", {"type": "object"}, "text is dict, but must be a string"),
        ("regex", "a\ud800", "half a surrogate pair"),
    ],
)
def test_a_grammar_that_says_nothing_is_refused(kind: Any, text: Any, reason: str) -> None:
    """Whoever builds one gets the mistake told where it is made, before a base is known that could compile it."""
    with pytest.raises(RequestRefused, match=reason):
        Grammar(kind, text)


def test_grammars_with_a_text_are_accepted() -> None:
    """A regular expression may be a single space."""
    assert Grammar("json_object").text == ""
    assert SamplingParams(grammar=Grammar("regex", " ")).grammar is not None


def test_the_edges_of_every_range_are_accepted() -> None:
    """Limits are inclusive as documented; an API in front must not meet surprises."""
    SamplingParams(
        max_new_tokens=1, temperature=0, top_k=0, top_p=1.0, min_p=1, frequency_penalty=-2, presence_penalty=2.0, seed=(1 << 64) - 1, logprobs=128
    )


def test_fewer_tokens_at_most_than_at_least_is_refused() -> None:
    """min above max can never be satisfied."""
    with pytest.raises(RequestRefused, match="min_new_tokens is 5, above max_new_tokens 4"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request([]), "the prompt has no tokens"),
        (Request([1, 320]), "320"),
        (Request([1, -1]), "-1"),
        (Request([1, "a"]), "'a'"),  # type: ignore[list-item]
        (Request([1] * 32), "a row holds 32"),
        (Request([1] * 30, sampling=SamplingParams(max_new_tokens=3)), "the prompt has 30 tokens and 3 more are asked for, but a row holds 32"),
        (Request([1] * 30, sampling=SamplingParams(min_new_tokens=3)), "a row holds 32"),
        (Request([1], sampling=SamplingParams(stop_token_ids=(320,))), "stop_token_ids holds 320"),
        (Request([1], sampling=SamplingParams(logit_bias={400: 1.0})), "logit_bias holds 400"),
    ],
)
def test_a_request_that_does_not_fit_the_base_is_refused(request_: Request, match: str) -> None:
    """Ids outside the vocabulary would read foreign memory or crash the whole step; lengths past the row would overwrite a neighbour."""
    with pytest.raises(RequestRefused, match=match):
        Limits(vocabulary=320, row_tokens=32).check(request_)


def test_an_open_ended_request_gets_what_its_row_has_room_for() -> None:
    """max_new_tokens None means until the row is full, not some hidden default."""
    assert Limits(320, 32).max_new_tokens(Request([1] * 30)) == 2


def test_a_scoring_request_with_an_empty_continuation_is_refused() -> None:
    """The probability of nothing is no score; a caller that passes it has lost its option text."""
    with pytest.raises(RequestRefused, match="a continuation has no tokens"):
        Limits(320, 32).check_score(ScoreRequest([1], [[2], []]))
    with pytest.raises(RequestRefused, match="a row holds 32"):
        Limits(320, 32).check_score(ScoreRequest([1] * 20, [[2], [3] * 13]))
