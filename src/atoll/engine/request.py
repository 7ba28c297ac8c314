"""What a user asks of the engine and what comes back: frozen, checked when made, without torch.

A wrong value is refused here with a sentence that names the parameter, so the engine's inside never meets one. What depends on the base (token ids
and lengths) is checked by Limits when a request is added.

Used by everything that generates: eval, workflows, server, cli.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Literal, NamedTuple, get_args

from atoll.errors import RequestRefused

MAX_LOGPROBS = 128  # alternatives a token: each is looked up and carried along for every token
_MAX_SEED = (1 << 64) - 1

FinishReason = Literal["stop", "length", "cancelled", "error", "deadline"]
GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: a JSON Schema (its text), any JSON object (text ""), a regular expression, or a Lark grammar.

    What is wrong inside the text shows when it is compiled for a base (grammar.GrammarCompiler).
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise RequestRefused(f"the grammar's kind is {self.kind!r}, but must be one of {', '.join(kinds)}")
        if not isinstance(self.text, str):
            raise RequestRefused(f"the grammar's text is {type(self.text).__name__}, but must be a string")
        if (self.text == "") != (self.kind == "json_object"):
            raise RequestRefused("the grammar json_object takes no text" if self.text else f"the grammar {self.kind} has no text")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise RequestRefused("the grammar's text holds half a surrogate pair, which is no character") from None

    @cached_property
    def digest(self) -> bytes:
        """What tells it from other grammars."""
        return blake2b(f"{self.kind}\0{self.text}".encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Timing:
    """Seconds of a request's life: waiting for a row, from admission to the first token, all of it. first_token_s counts from `add`."""

    queue_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats under the model's own distribution (before temperature and penalties), and the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy decoding until the end-of-text token or the row's last place.

    max_new_tokens None: as many as the row has room for. temperature 0: greedy. top_k 0, top_p 1, min_p 0: off. seed None: one is drawn and returned.
    repetition_penalty divides (or multiplies, below zero) the logits of prompt and answer tokens (Keskar et al. 2019, arXiv 1909.05858);
    frequency_penalty and presence_penalty are subtracted for answer tokens as in OpenAI's API. stop strings end the answer and are not part of it;
    neither is the text of stop_token_ids. With stop_after_text a stop string of white space ends the answer only once it has other text: for a model
    that begins its answer with a line end. Until min_new_tokens nothing but the length ends the answer. logprobs None: none; k: of every chosen token
    and the k likeliest. prompt_logprobs the same for the prompt's tokens. With a grammar the answer ends where nothing can follow it, whatever
    min_new_tokens and ignore_eos say; an answer that the length cuts off matches only as far as it goes.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_after_text: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("min_new_tokens", self.min_new_tokens, 0)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestRefused(f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}")
        _number("temperature", self.temperature, 0.0, math.inf)
        _whole("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)  # what float32 can multiply and divide by
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _whole("a token of logit_bias", token, 0)
            _number(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, _MAX_SEED)
        _stop_strings(self.stop)
        for token in self.stop_token_ids:
            _whole("a token of stop_token_ids", token, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestRefused(f"grammar is {type(self.grammar).__name__}, but must be a Grammar")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to continue. adapter is the key it was registered under (a digest), None for the base; request_id None: the engine names it.

    scope: whose request it is. Cached prompts are reused within one scope only, so that nobody learns another's prompt from the time an answer takes,
    and scopes share the engine fairly. deadline_s: seconds from `add` after which the request ends with what it has ("deadline").
    """

    prompt_ids: Sequence[int]
    adapter: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str | None = None
    scope: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """How likely is each continuation (a non-empty token list) after the prompt? One sum of log-probabilities each, in nats. scope: see Request."""

    prompt_ids: Sequence[int]
    continuations: Sequence[Sequence[int]]
    adapter: str | None = None
    scope: str = ""


@dataclass(frozen=True)
class EmbedRequest:
    """One text to turn into a vector: its final hidden states, averaged over all tokens ("mean") or of the last token alone ("last").

    scope: see Request.
    """

    prompt_ids: Sequence[int]
    adapter: str | None = None
    pooling: Literal["mean", "last"] = "mean"
    scope: str = ""


@dataclass(frozen=True)
class Completion:
    """A finished request. text has neither the stop string nor the end-of-text token; token_ids has every token that was generated.

    stopped_by: the stop string, or the id of the stopping token, when finish_reason is "stop"; None where a grammar was complete. error: the sentence
    when it is "error".
    logprobs: one entry a token of token_ids; prompt_logprobs: one a prompt token, the first None; both None unless asked for.
    seed: the one used, None when greedy. num_reused_tokens: prompt tokens whose keys and values were there already.
    """

    request_id: str
    adapter: str | None
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stopped_by: str | int | None = None
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    seed: int | None = None
    num_reused_tokens: int = 0
    timing: Timing = Timing()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token, or (token_id None) the end of a request that was cancelled or failed.

    text: what became final with this token, often "" while a character or a possible stop string is open; all texts of a request joined are
    Completion.text. completion is set on a request's last event only.
    """

    request_id: str
    token_id: int | None
    text: str
    logprob: TokenLogprob | None = None
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.completion is None else self.completion.finish_reason


@dataclass(frozen=True)
class Limits:
    """What a base and an engine can take: ids below `vocabulary`, `row_tokens` tokens a row."""

    vocabulary: int
    row_tokens: int

    def check(self, request: Request) -> None:
        """Raise RequestRefused where a request does not fit."""
        sampling = request.sampling
        self._check_ids("the prompt", request.prompt_ids)
        self._check_ids("stop_token_ids", sampling.stop_token_ids, may_be_empty=True)
        self._check_ids("logit_bias", tuple(sampling.logit_bias), may_be_empty=True)
        prompt, wanted = len(request.prompt_ids), sampling.max_new_tokens if sampling.max_new_tokens is not None else max(1, sampling.min_new_tokens)
        if prompt + wanted > self.row_tokens:
            raise RequestRefused(
                f"the prompt has {prompt} tokens and {wanted} more are asked for, but a row holds {self.row_tokens}",
                hint="shorten the prompt, ask for fewer tokens, or raise the engine's max_row_tokens if the base's context allows",
            )

    def check_score(self, item: ScoreRequest) -> None:
        """Raise RequestRefused where a scoring request does not fit."""
        self._check_ids("the prompt", item.prompt_ids)
        for continuation in item.continuations:
            self._check_ids("a continuation", continuation)
        longest = max(map(len, item.continuations), default=0)
        if len(item.prompt_ids) + longest > self.row_tokens:
            raise RequestRefused(
                f"the prompt has {len(item.prompt_ids)} tokens and its longest continuation {longest}, but a row holds {self.row_tokens}",
                hint="shorten the prompt, or raise the engine's max_row_tokens if the base's context allows",
            )

    def check_embed(self, item: EmbedRequest) -> None:
        """Raise RequestRefused where a text to embed does not fit."""
        self._check_ids("the text", item.prompt_ids)
        if len(item.prompt_ids) > self.row_tokens:
            raise RequestRefused(
                f"the text has {len(item.prompt_ids)} tokens, but a row holds {self.row_tokens}",
                hint="shorten the text, or raise the engine's max_row_tokens if the base's context allows",
            )

    def max_new_tokens(self, request: Request) -> int:
        """How long the answer may get: what was asked for, else what the row has room for."""
        asked = request.sampling.max_new_tokens
        return self.row_tokens - len(request.prompt_ids) if asked is None else asked

    def _check_ids(self, what: str, ids: Sequence[int], *, may_be_empty: bool = False) -> None:
        if not ids and not may_be_empty:
            raise RequestRefused(f"{what} has no tokens", hint="give at least one; a base's begin-of-text token counts")
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.vocabulary:
                raise RequestRefused(f"{what} holds {token!r}, but token ids are whole numbers from 0 to {self.vocabulary - 1}")


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    limits = f"{low} or more" if high is None else f"from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise RequestRefused(f"{name} is {value!r}, but must be a whole number, {limits}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """above: the lower limit itself is refused too."""
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if above else low <= value)
        and value <= high
    )
    if not fits:
        limits = f"{'above' if above else 'at least'} {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        raise RequestRefused(f"{name} is {value!r}, but must be a number {limits}")


def _stop_strings(stop: object) -> None:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise RequestRefused(f"stop is {stop!r}, but must be a list of strings")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise RequestRefused(f"a stop string is {text!r}, but must be a string that is not empty")
