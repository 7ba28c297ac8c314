"""What may come in: requests are checked against base, limits and registered adapters here, and become the engine's own objects.

Whatever is refused is refused before anything of it is queued. The root of a sequence's prefix is made here too: it holds all that decides keys and
values besides the tokens (the adapter's registration and, for rope types that depend on it, the length), and whose they are (the scope). The places
that a ReFT adapter edits are resolved here, once: the prompt's length is known and never changes.

Used by engine.py.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from atoll.engine.config import EngineConfig
from atoll.engine.embedding import EmbedJob
from atoll.engine.grammar import GrammarCompiler
from atoll.engine.pages import Edits, Pages, Prefix
from atoll.engine.pool import AdapterPool
from atoll.engine.request import EmbedRequest, Limits, Request, ScoreRequest
from atoll.engine.scoring import ScoreJob, pages_for_item
from atoll.engine.sequence import Sequence as Running
from atoll.engine.stops import Decode
from atoll.errors import RequestRefused
from atoll.model.reft import side_of

if TYPE_CHECKING:
    from atoll.model.base import Base

_RECENT = 64  # finished requests that say how fast the queue moves
_LONGEST_RETRY_S = 60.0


class Intake:
    """Checks requests and makes sequences and jobs of them. A use is counted for each adapter that they name; the engine counts it down."""

    def __init__(self, base: Base, config: EngineConfig, pages: Pages, pool: AdapterPool) -> None:
        shape, rotary = base.decoder.shape, base.decoder.rotary
        row_tokens = min(config.row_tokens(base.context_length), pages.num_pages * pages.page_tokens)
        self.limits = Limits(shape.vocabulary, row_tokens)
        self.decode = _text_decoder(base.tokenizer)
        self.clock = time.monotonic
        self.regime: Callable[[int], int] | None = rotary.regime if rotary.by_length else None
        self.grammars = GrammarCompiler(base.tokenizer, shape.vocabulary, base.eos_ids)  # its `check` may be called from any thread
        self._eos_ids, self._reuse = base.eos_ids, config.reuse_prefixes and not base.decoder.whole_prompts
        self._classifies, self._whole_prompts = base.decoder.classifies, base.decoder.whole_prompts
        self._pages, self._pool = pages, pool

    def check(self, request: Request) -> None:
        """Raise RequestRefused where a request does not fit, names an unknown adapter, or has a grammar that cannot be followed."""
        if self._classifies:
            raise RequestRefused(
                "the base is an encoder: it tells classes apart and writes no text",
                hint="ask for classes: atoll classify, POST /classify, or Engine.score",
            )
        if self._whole_prompts and request.sampling.prompt_logprobs is not None:
            raise RequestRefused(
                "the base reads its prompt and does not predict it, so prompt tokens have no log-probabilities", hint="leave them out"
            )
        self._check_adapter(request.adapter)
        self.limits.check(request)
        deadline = request.deadline_s
        if deadline is not None and not (math.isfinite(deadline) and deadline > 0):
            raise RequestRefused(f"deadline_s is {deadline!r}, but must be a number of seconds above 0")
        if request.sampling.grammar is not None:
            self.grammars.check(request.sampling.grammar)

    def sequence(self, request_id: str, request: Request) -> Running:
        """A checked request as the engine runs it."""
        grammar = request.sampling.grammar
        matcher = self.grammars.compile(grammar) if grammar is not None else None
        prefix = self._prefix(request.adapter, request.scope, len(request.prompt_ids))
        sequence = Running(
            request_id,
            request,
            self.limits.max_new_tokens(request),
            self._eos_ids,
            self.decode,
            matcher=matcher,
            prefix=prefix,
            clock=self.clock,
        )
        if request.adapter is not None:
            self._pool.use(request.adapter)
        return sequence

    def score_job(self, items: Sequence[ScoreRequest]) -> ScoreJob:
        """A job of scoring requests. Raises RequestRefused for one that does not fit."""
        for item in items:
            self._check_adapter(item.adapter)
            self.limits.check_score(item)
            needed = pages_for_item(item, self._pages)
            if needed > self._pages.num_pages:
                raise RequestRefused(
                    f"a prompt of {len(item.prompt_ids)} tokens with its longest continuation needs {needed} pages of the KV cache, "
                    f"but it has {self._pages.num_pages}",
                    hint="shorten the prompt, or raise the engine's kv_bytes",
                )
        self._use(items)
        return ScoreJob(items, [self._prefix(item.adapter, item.scope, len(item.prompt_ids)) for item in items])

    def embed_job(self, items: Sequence[EmbedRequest]) -> EmbedJob:
        """A job of texts to embed. Raises RequestRefused for one that does not fit."""
        if self._whole_prompts:
            raise RequestRefused(
                "no vector of a text is made of the states of an encoder or encoder-decoder base", hint="serve a decoder for vectors"
            )
        for item in items:
            self._check_adapter(item.adapter)
            self.limits.check_embed(item)
        self._use(items)
        return EmbedJob(items)

    def _use(self, items: Sequence[ScoreRequest] | Sequence[EmbedRequest]) -> None:
        for item in items:
            if item.adapter is not None:
                self._pool.use(item.adapter)

    def _check_adapter(self, key: str | None) -> None:
        if key is not None:
            self._pool.check_known(key)

    def _prefix(self, adapter: str | None, scope: str, length: int) -> Prefix | None:
        if not self._reuse:
            return None
        where = (scope, self.regime(length) if self.regime is not None else 0)
        if adapter is None:
            return Prefix(None, 0, *where)
        serial, parts = self._pool.serial(adapter), self._pool.reft(adapter)
        groups = [
            (part, side_of(spec, side), places) for part, spec in enumerate(parts) for side, places in enumerate(spec.positions.resolve(length))
        ]
        edits = Edits(adapter, serial, groups) if groups else None
        if self._pool.changes_linears(adapter):
            return Prefix(adapter, serial, *where, edits=edits)
        return Prefix(None, 0, *where, edits=edits)  # the base's own before the first edit


class Pace:
    """How fast requests finish, from the last ones that did."""

    def __init__(self) -> None:
        self._finished_at: deque[float] = deque(maxlen=_RECENT)

    def finished(self, now: float) -> None:
        self._finished_at.append(now)

    def time_for(self, num_requests: int) -> float:
        """Seconds that so many requests will take, between 1 and a minute: when somebody who finds the queue full should come again."""
        if len(self._finished_at) < 2:
            return 1.0
        pace = (self._finished_at[-1] - self._finished_at[0]) / (len(self._finished_at) - 1)
        return min(_LONGEST_RETRY_S, max(1.0, pace * num_requests))


def _text_decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out. The Rust tokenizer is called directly: this runs for every token."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    decode = fast.decode if fast is not None else tokenizer.decode
    return lambda ids: str(decode(ids, skip_special_tokens=True))
