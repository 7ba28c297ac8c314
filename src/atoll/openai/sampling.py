"""From an OpenAI body to the engine's sampling parameters.

Each value is checked where a sentence can name OpenAI's own field: the engine's checks speak of the engine's names. The defaults are OpenAI's
(temperature 1), not the engine's.

Used by chat and completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from atoll.engine.request import Grammar, SamplingParams
from atoll.http.asking import StopCaps, grammar_for
from atoll.openai.types import ParameterRefused, ResponseFormat, Sampling

MAX_TOP_LOGPROBS = 20  # of chat, as OpenAI has it
MAX_LOGPROBS = 5  # of completions
_SEEDS = 1 << 64
_MAX_DIGITS = 12  # of a token id: Python reads no number of thousands


def num_choices(body: Sampling, most: int) -> int:
    """n, checked."""
    return 1 if body.n is None else _whole("n", body.n, 1, most)


def stop_strings(body: Sampling, caps: StopCaps) -> tuple[str, ...]:
    """stop as a tuple, checked."""
    stops = () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if len(stops) > caps.count:
        raise ParameterRefused(f"stop has {len(stops)} texts, but at most {caps.count} are taken", param="stop", code="array_above_max_length")
    if (misfit := caps.misfit(stops)) is not None:
        found = f"has {len(misfit)} characters" if misfit else "is empty"
        raise ParameterRefused(f"a stop text {found}, but it must have 1 to {caps.chars}", param="stop", code="invalid_value")
    return stops


def sampling_params(
    body: Sampling,
    *,
    max_new_tokens: int | None,
    stop: Sequence[str],
    stop_token_ids: Sequence[int] = (),
    stop_after_text: bool = False,
    grammar: Grammar | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters of choice 0. stop, stop_token_ids: the client's and the adapter's."""
    ignore_eos = bool(body.ignore_eos or body.ignore_eos_token)
    min_tokens = 0 if body.min_tokens is None else _whole("min_tokens", body.min_tokens, 0)
    if max_new_tokens is not None and min_tokens > max_new_tokens:
        raise ParameterRefused(f"min_tokens is {min_tokens}, above the {max_new_tokens} tokens asked for", param="min_tokens", code="invalid_value")
    top_k = 0 if body.top_k is None or body.top_k == -1 else _whole("top_k", body.top_k, 0)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_tokens,
        temperature=_number("temperature", body.temperature, 1.0, 0.0, 100.0),
        top_k=top_k,
        top_p=_number("top_p", body.top_p, 1.0, 0.0, 1.0, above=True),
        min_p=_number("min_p", body.min_p, 0.0, 0.0, 1.0),
        typical_p=_number("typical_p", body.typical_p, 1.0, 0.0, 1.0, above=True),
        repetition_penalty=_number("repetition_penalty", body.repetition_penalty, 1.0, 0.0, 100.0, above=True),
        frequency_penalty=_number("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        presence_penalty=_number("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=None if body.seed is None else body.seed % _SEEDS,
        stop=tuple(dict.fromkeys(stop)),
        stop_token_ids=tuple(dict.fromkeys((*(body.stop_token_ids or ()), *stop_token_ids))),
        stop_after_text=stop_after_text,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """Choice i draws from seed + i, so that n choices of one seed differ and come again."""
    return None if seed is None else (seed + index) % _SEEDS


def max_tokens(name: str, value: int | None, least: int = 1) -> int | None:
    """A length, checked."""
    return None if value is None else _whole(name, value, least)


def chat_logprobs(wanted: bool | None, top: int | None) -> int | None:
    """How many alternatives a token; None: no log-probabilities."""
    if top is not None and not wanted:
        raise ParameterRefused("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    if not wanted:
        return None
    return 0 if top is None else _whole("top_logprobs", top, 0, MAX_TOP_LOGPROBS)


def completion_logprobs(wanted: int | None) -> int | None:
    """How many alternatives a token; None: no log-probabilities."""
    return None if wanted is None else _whole("logprobs", wanted, 0, MAX_LOGPROBS)


def grammar_of(form: ResponseFormat | None) -> Grammar | None:
    """What response_format demands of the answer."""
    schema = schema_of(form)
    return None if schema is None else grammar_for(schema)


def schema_of(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON Schema that response_format demands; None for text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return form.schema_ if form.schema_ is not None else {"type": "object"}
    schema = form.json_schema.schema_ if form.json_schema is not None else form.schema_
    if schema is None:
        raise ParameterRefused(
            "response_format of type json_schema has no schema",
            param="response_format",
            code="missing_required_parameter",
            hint='{"type": "json_schema", "json_schema": {"name": "answer", "schema": {...}}}',
        )
    return schema


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_DIGITS):
            raise ParameterRefused(f"logit_bias has the key {key[:40]!r}, but keys are token ids", param="logit_bias", code="invalid_value")
        biases[int(key)] = _number(f"logit_bias of token {key}", value, 0.0, -100.0, 100.0, param="logit_bias")
    return biases


def _whole(name: str, value: int, low: int, high: int | None = None) -> int:
    if value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        code = "integer_below_min_value" if value < low else "integer_above_max_value"
        raise ParameterRefused(f"{name} is {value}, but must be {limits}", param=name, code=code)
    return value


def _number(name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False, param: str | None = None) -> float:
    """above: the lower limit itself is refused too."""
    if value is None:
        return default
    if not math.isfinite(value) or value < low or value > high or (above and value == low):
        code = "decimal_below_min_value" if value <= low else "decimal_above_max_value"
        limits = f"{'above' if above else 'from'} {low:g}{' and at most' if above else ' to'} {high:g}"
        raise ParameterRefused(f"{name} is {value:g}, but must be {limits}", param=param or name, code=code)
    return float(value)
