"""LoRAX's rules for parameters, in its order and words, and what they mean for the engine.

Sampling is off unless do_sample is true or one of temperature, top_k, top_p and typical_p is given; temperature 0 is greedy whatever else is set.
What LoRAX leaves unchecked (types beyond their range, a stop text's length) has a rule of our own here, since every value a request can multiply
has a cap.

Used by generate for every generate route.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from atoll.engine.request import MAX_LOGPROBS, Grammar, SamplingParams
from atoll.errors import RequestRefused
from atoll.http.asking import StopCaps, grammar_for

if TYPE_CHECKING:
    from atoll.lorax.types import AdapterChoice, MergedAdapters, Parameters, ResponseFormat
    from atoll.serving.service import Service

N = TypeVar("N", int, float)

_SEEDS = 1 << 64
_EXTREME = 1e6  # how far from 1 a factor of logits may be, either way: beyond, float32 knows only 0 and infinity


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. max_input: tokens of a prompt; max_total: of prompt and answer."""

    best_of: int
    stops: StopCaps
    max_input: int
    max_total: int
    merged: int
    inputs: int

    @classmethod
    def of(cls, service: Service) -> Limits:
        config = service.config
        return cls(
            best_of=config.max_best_of,
            stops=StopCaps(config.max_stop_sequences, config.max_stop_length),
            max_input=service.max_input_tokens,
            max_total=service.max_total_tokens,
            merged=config.max_merged,
            inputs=config.max_inputs,
        )


def check_adapters(choice: AdapterChoice) -> None:
    """At most one way to name an adapter, and as many weights as ids."""
    merged: MergedAdapters | None = choice.merged_adapters
    if merged is None:
        return
    if choice.adapter_id:
        raise RequestRefused("at most one of `adapter_id` or `adapters` may be provided", hint="leave out adapter_id or merged_adapters")
    if not merged.ids:
        raise RequestRefused("at least one adapter ID must be provided when setting `adapters`")
    if len(merged.ids) != len(merged.weights):
        raise RequestRefused("number of adapter IDs must match number of adapter weights")


def check(parameters: Parameters, limits: Limits, *, streams: bool) -> None:
    """Raise RequestRefused, in LoRAX's words, for the first rule that the parameters break."""
    best_of = 1 if parameters.best_of is None else parameters.best_of
    if streams and best_of != 1:
        raise RequestRefused("`best_of` != 1 is not supported when streaming tokens")
    if streams and parameters.decoder_input_details:
        raise RequestRefused("`decoder_input_details` == true is not supported when streaming tokens")
    if not 1 <= best_of <= limits.best_of:
        raise RequestRefused(f"`best_of` must be > 0 and <= {limits.best_of}. Given: {best_of}")
    check_adapters(parameters)
    if best_of > 1 and not samples(parameters):
        raise RequestRefused("you must use sampling when `best_of` is > 1")
    _check_numbers(parameters)
    stops = parameters.stop or []
    if len(stops) > limits.stops.count:
        raise RequestRefused(f"`stop` supports up to {limits.stops.count} stop sequences. Given: {len(stops)}")
    if (misfit := limits.stops.misfit(stops)) is not None:
        raise RequestRefused(f"`stop` sequences must have 1 to {limits.stops.chars} characters. Given: {len(misfit)}")
    if parameters.seed is not None:
        if best_of > 1:
            raise RequestRefused("`seed` must not be set when `best_of` > 1")
        if not 0 <= parameters.seed < _SEEDS:
            raise RequestRefused(f"`seed` must be >= 0 and <= {_SEEDS - 1}. Given: {parameters.seed}")
    if parameters.truncate is not None and not 1 <= parameters.truncate <= limits.max_input:
        raise RequestRefused(f"`truncate` must be strictly positive and less than {limits.max_input}. Given: {parameters.truncate}")
    if parameters.watermark:
        raise RequestRefused("`watermark` is not supported", hint="leave it out: answers here are not watermarked")


def _check_numbers(parameters: Parameters) -> None:
    """The rules of single numbers."""
    _require(parameters.temperature, lambda value: value >= 0, "`temperature` must be non-negative")
    _require(parameters.repetition_penalty, lambda value: value > 0, "`repetition_penalty` must be strictly positive")
    _require(parameters.repetition_penalty, lambda value: 1 / _EXTREME <= value <= _EXTREME, "`repetition_penalty` must be >= 1e-6 and <= 1e6")
    _require(parameters.frequency_penalty, lambda value: -2 <= value <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")
    _require(parameters.presence_penalty, lambda value: -2 <= value <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0")
    _require(parameters.top_p, lambda value: 0 < value <= 1, "`top_p` must be > 0.0 and <= 1.0")
    _require(parameters.typical_p, lambda value: 0 < value < 1, "`typical_p` must be > 0.0 and < 1.0")
    _require(parameters.top_k, lambda value: value > 0, "`top_k` must be strictly positive")
    _require(parameters.return_k_alternatives, lambda value: value > 0, "`return_k_alternatives` must be strictly positive")
    _require(parameters.return_k_alternatives, lambda value: value <= MAX_LOGPROBS, f"`return_k_alternatives` must be <= {MAX_LOGPROBS}")
    _require(parameters.max_new_tokens, lambda value: value > 0, "`max_new_tokens` must be strictly positive")


def _require(value: float | None, rule: Callable[[float], bool], message: str) -> None:
    if value is not None and not rule(value):
        raise RequestRefused(message, hint=f"found {value!r:.40}")


def check_inputs(inputs: str) -> None:
    if not inputs:
        raise RequestRefused("`inputs` cannot be empty")


def check_lengths(num_input: int, max_new_tokens: int | None, limits: Limits) -> None:
    """The rules of the prompt's length, once it is known."""
    if max_new_tokens is not None and num_input + max_new_tokens > limits.max_total:
        raise RequestRefused(
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total}. "
            f"Given: {num_input} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
        )
    if num_input > limits.max_input:
        raise RequestRefused(f"`inputs` must have less than {limits.max_input} tokens. Given: {num_input}", hint="`truncate` keeps the last ones")


def samples(parameters: Parameters) -> bool:
    """Whether tokens are drawn, in the sense of the rule for best_of: temperature 0 counts, though it is greedy."""
    given = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    return bool(parameters.do_sample) or any(value is not None for value in given)


def sampling_params(
    parameters: Parameters, *, max_new_tokens: int, stop: tuple[str, ...], stop_token_ids: tuple[int, ...], stop_after_text: bool, logprobs: bool
) -> SamplingParams:
    """What the engine is told. stop, stop_token_ids: the adapter's and the request's. logprobs: each token's is wanted."""
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    if temperature < 1 / _EXTREME:
        temperature = 0.0  # the same tokens, without dividing by what float32 takes for 0
    alternatives = parameters.return_k_alternatives or 0
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=min(temperature, _EXTREME) if samples(parameters) else 0.0,
        top_k=_default(parameters.top_k, 0),
        top_p=_default(parameters.top_p, 1.0),
        typical_p=_default(parameters.typical_p, 1.0),
        repetition_penalty=_default(parameters.repetition_penalty, 1.0),
        frequency_penalty=_default(parameters.frequency_penalty, 0.0),
        presence_penalty=_default(parameters.presence_penalty, 0.0),
        seed=parameters.seed,
        stop=stop,
        stop_token_ids=stop_token_ids,
        stop_after_text=stop_after_text,
        ignore_eos=bool(parameters.ignore_eos_token),
        logprobs=alternatives if logprobs else None,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        grammar=_grammar(parameters.response_format),
    )


def _grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """The grammar of a response_format: its schema, whatever its type says."""
    return None if wanted is None or (wanted.type == "text" and wanted.schema_ is None) else grammar_for(wanted.schema_)


def _default(value: N | None, otherwise: N) -> N:
    return otherwise if value is None else value
