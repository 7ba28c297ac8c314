"""The engine's state for one request: its tokens, how many of them the cache has, its text, its random numbers.

A sequence is everything a request needs to go on, so nothing about it depends on the batch it runs in: a random number is a function of the request's
seed and the token's place in the answer, and penalties come from the sequence's own counts.

Used by scheduler.py (which reads progress), sampler.py (which reads settings and counts) and engine.py (which owns it). No torch.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from hashlib import blake2b

from atoll.engine.grammar import Matcher
from atoll.engine.pages import Prefix
from atoll.engine.request import Completion, FinishReason, Request, Timing, TokenEvent, TokenLogprob
from atoll.engine.stops import Decode, TextStream

_CONTEXT_TOKENS = 5  # of the prompt, decoded before the answer; enough for any character and a word's leading space


class Sequence:
    """One request on its way. `tokens` is prompt then answer; the KV cache holds the first `num_cached` of them, in `pages`."""

    def __init__(
        self,
        request_id: str,
        request: Request,
        max_new_tokens: int,
        eos_ids: Seq[int],
        decode: Decode,
        *,
        matcher: Matcher | None = None,
        prefix: Prefix | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """matcher: follows the request's grammar, if it has one. prefix: names the sequence's pages for reuse; None: they are its own, always. clock
        gives seconds."""
        sampling = request.sampling
        self.request_id, self.adapter, self.scope, self.sampling = request_id, request.adapter, request.scope, sampling
        self.tokens: list[int] = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.max_new_tokens = max_new_tokens
        self.num_cached = 0
        self.pages: list[int] = []  # its page table; held from admission to finish or preemption, together with the hold on the adapter
        self.prefix = prefix
        self.num_sound = 0  # tokens of the cache that a finite result has been computed from
        self.num_indexed = 0  # pages that are known for reuse, or were when it took them
        self.num_reused_tokens = 0  # of the prompt, found when it was first admitted
        self.claim: bytes | None = None  # the key of a page that it is about to fill and others wait for
        self.arrival = 0  # its number in the order of arrival
        self.preempted = False  # it ran, lost its pages and waits to go on
        self._clock = clock
        self.added_at = clock()
        self.admitted_at: float | None = None
        self._first_token_at: float | None = None
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_ids))
        self.seed = None if sampling.is_greedy else sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self._text = TextStream(decode, sampling.stop, self.tokens[-_CONTEXT_TOKENS:], after_text=request.sampling.stop_after_text)
        self.prompt_set: frozenset[int] = frozenset(self.tokens) if sampling.repetition_penalty != 1.0 else frozenset()
        self.counts: Counter[int] = Counter()  # of answer tokens; kept only where a penalty reads it
        self._counts_tokens = sampling.has_penalties
        self.matcher = matcher
        self.is_plain = sampling.is_greedy and not self._counts_tokens and not sampling.logit_bias and sampling.logprobs is None and matcher is None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.completion: Completion | None = None

    @property
    def num_new(self) -> int:
        """Answer tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """All tokens but the last, which was generated, are in the cache; one token a step from here."""
        return self.num_cached == len(self.tokens) - 1 and self.num_cached >= self.num_prompt

    @property
    def max_cached(self) -> int:
        """The most tokens that the cache will hold of it: the last one of an answer is never fed."""
        return self.num_prompt + self.max_new_tokens - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of its prompt's log-probabilities are asked for and not there yet."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    @property
    def may_stop(self) -> bool:
        """Whether the token that comes next may end the answer."""
        return self.num_new >= self.sampling.min_new_tokens

    def admit(self, num_reused: int) -> None:
        """It runs from now on; the cache had the first num_reused tokens. Only the first time counts: later it was preempted and goes on."""
        if self.admitted_at is None:
            self.admitted_at = self._clock()
            self.num_reused_tokens = num_reused

    def draw(self) -> float:
        """The random number in [0, 1) for the token that comes next: 53 bits of a hash of seed and place, the same however often it is drawn."""
        assert self.seed is not None
        digest = blake2b(self.seed.to_bytes(8, "little") + self.num_new.to_bytes(8, "little"), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def append(self, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Take the token that was chosen; returns its event, with the completion if it was the last.

        Raises EngineError, having changed nothing, if its grammar cannot be followed.
        """
        num_new = len(self.tokens) - self.num_prompt + 1
        is_full = num_new >= self.max_new_tokens
        may_stop = is_full or num_new > self.sampling.min_new_tokens
        ends, is_complete = may_stop and token in self.stop_ids, False
        if self.matcher is not None:
            ends = ends or self.matcher.ended_by(token)
            self.matcher.advance(token, ends=ends)
            is_complete = self.matcher.is_done
        if self._first_token_at is None:
            self._first_token_at = self._clock()
        self.tokens.append(token)
        if self._counts_tokens:
            self.counts[token] += 1
        if logprob is not None:
            self.logprobs.append(logprob)
        if ends:
            text = self._text.finish(may_stop=may_stop)
            return self._last(token, text, logprob, "stop", self._text.stopped_by or token)
        text = self._text.push(token, may_stop=may_stop)
        if self._text.stopped_by is None and (is_full or is_complete):
            text += self._text.finish(may_stop=may_stop)
            if self._text.stopped_by is None:
                return self._last(token, text, logprob, "stop" if is_complete else "length", None)
        if self._text.stopped_by is not None:
            return self._last(token, text, logprob, "stop", self._text.stopped_by)
        return TokenEvent(self.request_id, token, text, logprob)

    def end(self, reason: FinishReason, error: str = "") -> TokenEvent:
        """Finish without a token: cancelled, failed, or out of time."""
        return self._last(None, self._text.abandon(), None, reason, None, error)

    def _last(
        self, token: int | None, text: str, logprob: TokenLogprob | None, reason: FinishReason, stopped_by: str | int | None, error: str = ""
    ) -> TokenEvent:
        sampling = self.sampling
        self.completion = Completion(
            request_id=self.request_id,
            adapter=self.adapter,
            num_prompt_tokens=self.num_prompt,
            token_ids=tuple(self.tokens[self.num_prompt :]),
            text=self._text.text,
            finish_reason=reason,
            stopped_by=stopped_by,
            error=error,
            logprobs=tuple(self.logprobs) if sampling.logprobs is not None else None,
            prompt_logprobs=tuple(self.prompt_logprobs[: self.num_prompt]) if sampling.prompt_logprobs is not None else None,
            seed=self.seed,
            num_reused_tokens=self.num_reused_tokens,
            timing=self._timing(),
        )
        return TokenEvent(self.request_id, token, text, logprob, self.completion)

    def _timing(self) -> Timing:
        now = self._clock()
        return Timing(
            queue_s=(now if self.admitted_at is None else self.admitted_at) - self.added_at,
            first_token_s=None if self._first_token_at is None else self._first_token_at - self.added_at,
            total_s=now - self.added_at,
        )
