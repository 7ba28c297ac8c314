"""The engine's state for one request: its tokens, how many of them the cache has, its text, its random numbers.

A sequence is everything a request needs to go on, so nothing about it depends on the batch it runs in: a random number is a function of the request's
seed and the token's place in the answer, and penalties come from the sequence's own counts.

Used by scheduler.py (which reads progress), sampler.py (which reads settings and counts) and engine.py (which owns it). No torch.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence as Seq
from hashlib import blake2b

from atoll.engine.request import Completion, FinishReason, Request, TokenEvent, TokenLogprob
from atoll.engine.stops import Decode, TextStream

_CONTEXT_TOKENS = 5  # of the prompt, decoded before the answer; enough for any character and a word's leading space


class Sequence:
    """One request on its way. `tokens` is prompt then answer; the KV cache holds the first `num_cached` of them."""

    def __init__(self, request_id: str, request: Request, max_new_tokens: int, eos_ids: Seq[int], decode: Decode) -> None:
        sampling = request.sampling
        self.request_id, self.adapter, self.sampling = request_id, request.adapter, sampling
        self.tokens: list[int] = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.max_new_tokens = max_new_tokens
        self.num_cached = 0
        self.kv_row: int | None = None  # set from admission to finish, together with the hold on the adapter
        self.overtaken = 0  # requests that came later and started earlier, while the adapter had no place
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_ids))
        self.seed = None if sampling.is_greedy else sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self._text = TextStream(decode, sampling.stop, self.tokens[-_CONTEXT_TOKENS:], after_text=request.sampling.stop_after_text)
        self.prompt_set: frozenset[int] = frozenset(self.tokens) if sampling.repetition_penalty != 1.0 else frozenset()
        self.counts: Counter[int] = Counter()  # of answer tokens; kept only where a penalty reads it
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.completion: Completion | None = None

    @property
    def num_new(self) -> int:
        """Answer tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """The prompt is in the cache; one token a step from here."""
        return self.num_cached >= self.num_prompt

    @property
    def may_stop(self) -> bool:
        """Whether the token that comes next may end the answer."""
        return self.num_new >= self.sampling.min_new_tokens

    def draw(self) -> float:
        """The random number in [0, 1) for the token that comes next: 53 bits of a hash of seed and place, the same however often it is drawn."""
        assert self.seed is not None
        digest = blake2b(self.seed.to_bytes(8, "little") + self.num_new.to_bytes(8, "little"), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def append(self, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Take the token that was chosen; returns its event, with the completion if it was the last."""
        self.tokens.append(token)
        if self.sampling.has_penalties:
            self.counts[token] += 1
        if logprob is not None:
            self.logprobs.append(logprob)
        may_stop = self.num_new > self.sampling.min_new_tokens or self.num_new >= self.max_new_tokens
        if may_stop and token in self.stop_ids:
            text = self._text.finish(may_stop=may_stop)
            return self._last(token, text, logprob, "stop", self._text.stopped_by or token)
        text = self._text.push(token, may_stop=may_stop)
        if self._text.stopped_by is None and self.num_new >= self.max_new_tokens:
            text += self._text.finish(may_stop=may_stop)
            if self._text.stopped_by is None:
                return self._last(token, text, logprob, "length", None)
        if self._text.stopped_by is not None:
            return self._last(token, text, logprob, "stop", self._text.stopped_by)
        return TokenEvent(self.request_id, token, text, logprob)

    def end(self, reason: FinishReason, error: str = "") -> TokenEvent:
        """Finish without a token: cancelled, or failed."""
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
        )
        return TokenEvent(self.request_id, token, text, logprob, self.completion)
