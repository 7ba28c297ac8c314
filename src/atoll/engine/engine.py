"""The engine: one continuous batch in this process, any adapter in any row.

A step is schedule, run, finish: the scheduler names the rows, the runner gives their hidden states, the sampler their next tokens, and what has ended
gives back its KV row and its hold on its adapter. Nothing runs in the background: whoever calls `step`, `stream`, `generate` or `score` drives all
requests, and events of requests that somebody else waits for are kept for them. One thread at a time.

    add ─► waiting ─admit─► running (KV row + hold on adapter) ─► finished: both given back, last event carries the Completion

Used by eval, workflows and cli directly, and by the server.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from atoll.engine.config import EngineConfig
from atoll.engine.pool import AdapterPool
from atoll.engine.request import Completion, FinishReason, Limits, Request, ScoreRequest, TokenEvent
from atoll.engine.runner import Runner
from atoll.engine.scheduler import Scheduler, Work
from atoll.engine.scoring import Scoring, score_batch
from atoll.engine.sequence import Sequence as Running
from atoll.engine.step import Outcome, compute
from atoll.engine.stops import Decode
from atoll.errors import AtollError, EngineError, RequestRefused
from atoll.model.bank import LoraBank

if TYPE_CHECKING:
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base
    from atoll.model.kv_cache import KvCache

Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


class Engine:
    """Serves one base and any number of adapters registered for it.

    Example:
        engine = Engine(load_base("smollm2-135m-instruct"))
        engine.register(digest, adapter)
        [completion] = engine.generate([Request(prompt_ids, adapter=digest, sampling=SamplingParams(max_new_tokens=32))])
    """

    def __init__(self, base: Base, config: EngineConfig | None = None) -> None:
        self.base, self.config = base, config if config is not None else EngineConfig()
        decoder = base.decoder
        self.limits = Limits(decoder.shape.vocabulary, self.config.row_tokens(base.context_length))
        self._cache = decoder.new_cache(self.config.max_rows, self.limits.row_tokens)
        bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, decoder.dtype, decoder.device)
        self._pool = AdapterPool(bank, self.config.adapter_bytes)
        self._runner = Runner(decoder, self._cache, self._pool)
        self._scheduler = Scheduler(self.config.max_step_tokens, self.config.max_overtakes)
        self._places = _EnginePlaces(self._cache, self._pool)
        self._decode = _text_decoder(base.tokenizer)
        self._numbers = itertools.count(1)
        self._listeners: dict[str, Callable[[TokenEvent], None]] = {}
        self._events: list[TokenEvent] = []  # of requests that nobody listens to; the next `step` returns them
        self._scoring: list[Scoring] = []
        self._counts = Counter[str]()

    # Adapters

    def register(self, key: str, adapter: Adapter) -> None:
        """Make an adapter servable under `key` (its digest). See AdapterPool.register for what is refused."""
        self._pool.register(key, adapter)

    def unregister(self, key: str) -> None:
        """Forget an adapter. Raises EngineError while a running or waiting request uses it."""
        if any(sequence.adapter == key for sequence in self._scheduler.waiting.values()):
            raise EngineError(f"adapter {key!r} is named by waiting requests", hint="cancel them or wait until they end")
        self._pool.unregister(key)

    def is_registered(self, key: str) -> bool:
        return key in self._pool

    def pin(self, key: str) -> None:
        """Load an adapter now and keep it resident."""
        self._pool.pin(key)

    def unpin(self, key: str) -> None:
        """Let a pinned adapter leave when room is needed."""
        self._pool.unpin(key)

    # Requests

    def add(self, request: Request) -> str:
        """Queue a request and return its id; `step` delivers its events. Raises RequestRefused if it does not fit or names an unknown adapter."""
        self._check_request(request)
        return self._add(request)

    def cancel(self, request_id: str) -> bool:
        """End a request now, giving back what it holds; its last event says "cancelled". False if it is not waiting or running."""
        sequence = self._scheduler.remove(request_id)
        if sequence is None:
            return False
        self._end(sequence, "cancelled")
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to deliver."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._events)

    def step(self) -> list[TokenEvent]:
        """Compute one step; return the events of requests made by `add`, in order."""
        self._advance()
        events, self._events = self._events, []
        return events

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """The events of one request as they come; the last has the completion. Closing the iterator early cancels the request.

        A request that does not fit is refused here and now; a good one is queued at the first `next`.
        """
        self._check_request(request)
        return self._stream(request)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Completion]:
        """Answer all requests; completions in the order of the requests. None starts unless all are acceptable.

        progress(stage, done, total) is told of finished requests. Whatever interrupts it (Ctrl-C too), what it added is cancelled.
        """
        for request in requests:
            self._check_request(request)
        ids = [request.request_id for request in requests if request.request_id is not None]
        if len(set(ids)) < len(ids):
            raise RequestRefused(f"two requests have the id {next(name for name, n in Counter(ids).items() if n > 1)!r}", hint="leave request_id out")
        done: dict[int, Completion] = {}
        added: list[str] = []
        todo = deque(enumerate(requests))
        try:
            while len(done) < len(requests):
                while todo and len(self._scheduler.waiting) < self.config.max_waiting:
                    index, request = todo.popleft()
                    added.append(self._add(request, functools.partial(_keep_completion, done, index)))
                before = len(done)
                self._advance()
                if progress is not None and len(done) > before:
                    progress("generating", len(done), len(requests))
        finally:
            if len(done) < len(requests):
                for request_id in added:
                    self.cancel(request_id)
        self.check()
        return [done[index] for index in range(len(requests))]

    def score(self, items: Sequence[ScoreRequest], progress: Progress | None = None) -> list[list[float]]:
        """The log-probability, in nats, of each item's continuations after its prompt: one sum a continuation, in order.

        Runs at once, beside whatever else runs. Raises RequestRefused for an item that does not fit, EngineError where a result is not finite.
        """
        for item in items:
            self._check_adapter(item.adapter)
            self.limits.check_score(item)
        sums: list[list[float]] = [[] for _ in items]
        todo = deque(sorted((i for i, item in enumerate(items) if item.continuations), key=lambda i: items[i].adapter or ""))
        try:
            while todo:
                members = self._take_scoring(items, todo)
                if not members:
                    self._advance()  # rows or adapters are in use by running requests: let them get on
                    continue
                score_batch(self._runner, self._scoring, self.config.max_step_tokens)
                for index, scoring in zip(members, self._scoring, strict=True):
                    sums[index] = scoring.sums
                self._give_back_scoring(scrub=False)
                if progress is not None:
                    progress("scoring", len(items) - len(todo), len(items))
        finally:
            self._give_back_scoring(scrub=True)
        self.check()
        return sums

    # Its own state

    def check(self) -> None:
        """Raise AssertionError unless KV rows, adapter holds, bytes and sequences add up: nothing leaks and nothing has two owners."""
        self._scheduler.check()
        running = self._scheduler.running.values()
        self._cache.check([s.kv_row for s in running if s.kv_row is not None] + [s.kv_row for s in self._scoring])
        adapters = [s.adapter for s in running] + [s.item.adapter for s in self._scoring]
        self._pool.check(Counter(adapter for adapter in adapters if adapter is not None))
        orphans = [name for name in self._listeners if name not in self._scheduler]
        if orphans:
            raise AssertionError(f"somebody waits for requests that are gone: {orphans}")

    def stats(self) -> dict[str, int]:
        """Counts now (running, waiting, free_rows, adapters_…) and since the start (steps, …_tokens, finished_…, adapter_loads, …)."""
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "free_rows": self._cache.num_free,
            "steps": self._counts["steps"],
            "prefill_tokens": self._counts["prefill_tokens"],
            "generated_tokens": self._counts["generated_tokens"],
            **{f"finished_{reason}": self._counts[reason] for reason in ("stop", "length", "cancelled", "error")},
            **self._pool.stats(),
        }

    # Inside

    def _check_request(self, request: Request) -> None:
        self._check_adapter(request.adapter)
        self.limits.check(request)
        if request.request_id is not None and request.request_id in self._scheduler:
            raise RequestRefused(f"request id {request.request_id!r} is in use by a request that is not finished", hint="leave request_id out")

    def _check_adapter(self, key: str | None) -> None:
        if key is not None and key not in self._pool:
            raise RequestRefused(
                f"adapter {key!r} is not registered with this engine", hint="register it first; the base is asked for with adapter None"
            )

    def _add(self, request: Request, listener: Callable[[TokenEvent], None] | None = None) -> str:
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise RequestRefused(f"{self.config.max_waiting} requests wait already", hint="try again later, or raise max_waiting")
        request_id = request.request_id
        while request_id is None or request_id in self._scheduler:
            request_id = f"request-{next(self._numbers)}"
        sequence = Running(request_id, request, self.limits.max_new_tokens(request), self.base.eos_ids, self._decode)
        self._scheduler.add(sequence)
        if listener is not None:
            self._listeners[request_id] = listener
        return request_id

    def _stream(self, request: Request) -> Iterator[TokenEvent]:
        events: deque[TokenEvent] = deque()
        request_id = self._add(request, events.append)
        try:
            while True:
                while events:
                    event = events.popleft()
                    yield event
                    if event.completion is not None:
                        return
                self._advance()
        finally:
            self.cancel(request_id)

    def _advance(self) -> None:
        """One step: schedule, run, finish."""
        plan = self._scheduler.schedule(self._places)
        for sequence, error in plan.failed:
            self._fail(sequence, error)
        if plan.work:
            self._counts["steps"] += 1
            for item, outcome in zip(plan.work, compute(self._runner, plan.work), strict=True):
                self._finish(item, outcome)

    def _finish(self, item: Work, outcome: Outcome | Exception) -> None:
        """Give a sequence what the step found for it; end it if it is done."""
        sequence = item.sequence
        if isinstance(outcome, Exception):
            self._fail(sequence, outcome)
            return
        self._counts["prefill_tokens"] += max(0, min(item.stop, sequence.num_prompt) - item.start)
        sequence.num_cached = item.stop
        sequence.prompt_logprobs += outcome.prompt_logprobs
        if outcome.choice is None:
            return
        try:
            event = sequence.append(outcome.choice.token, outcome.choice.logprob)
        except Exception as error:  # a tokenizer that cannot decode one request's tokens is the end of that request only
            self._fail(sequence, error)
            return
        self._counts["generated_tokens"] += 1
        if event.completion is not None:
            self._release(sequence, scrub=False)
        self._deliver(event)

    def _fail(self, sequence: Running, error: Exception) -> None:
        message = f"{error.message} ({error.hint})" if isinstance(error, AtollError) and error.hint else str(error) or type(error).__name__
        _log.warning("request %s failed: %s", sequence.request_id, message, exc_info=None if isinstance(error, AtollError) else error)
        self._end(sequence, "error", message)

    def _end(self, sequence: Running, reason: FinishReason, error: str = "") -> None:
        """Finish a sequence without a token."""
        event = sequence.end(reason, error)
        self._release(sequence, scrub=True)
        self._deliver(event)

    def _release(self, sequence: Running, *, scrub: bool) -> None:
        """Give back the KV row and the hold on the adapter. scrub: the row may hold values that are not finite."""
        self._scheduler.remove(sequence.request_id)
        if sequence.kv_row is None:
            return
        if scrub:
            self._runner.scrub(sequence.kv_row, len(sequence.tokens))
        self._cache.give_back(sequence.kv_row)
        if sequence.adapter is not None:
            self._pool.release(sequence.adapter)
        sequence.kv_row = None

    def _deliver(self, event: TokenEvent) -> None:
        listener = self._listeners.get(event.request_id, self._events.append)
        if event.completion is not None:
            self._listeners.pop(event.request_id, None)
            self._counts[event.completion.finish_reason] += 1
        listener(event)

    def _take_scoring(self, items: Sequence[ScoreRequest], todo: deque[int]) -> list[int]:
        """Take rows and adapters for as many prompts as fit one step's tokens (one at least); returns their indices."""
        members: list[int] = []
        room = self.config.max_step_tokens
        while todo and self._cache.num_free and (not members or len(items[todo[0]].prompt_ids) <= room):
            item = items[todo[0]]
            if item.adapter is not None and not self._pool.hold(item.adapter):
                break
            self._scoring.append(Scoring(item, self._cache.take()))
            members.append(todo.popleft())
            room -= len(item.prompt_ids)
        return members

    def _give_back_scoring(self, *, scrub: bool) -> None:
        while self._scoring:
            scoring = self._scoring.pop()
            if scrub:
                self._runner.scrub(scoring.kv_row, scoring.length)
            self._cache.give_back(scoring.kv_row)
            if scoring.item.adapter is not None:
                self._pool.release(scoring.item.adapter)


class _EnginePlaces:
    """The scheduler's view of KV rows and adapters (scheduler.Places)."""

    def __init__(self, cache: KvCache, pool: AdapterPool) -> None:
        self._cache = cache
        self.hold, self.is_pinned, self.take_row = pool.hold, pool.is_pinned, cache.take

    @property
    def num_free_rows(self) -> int:
        return self._cache.num_free


def _keep_completion(done: dict[int, Completion], index: int, event: TokenEvent) -> None:
    """The listener of `generate`: it wants completions only."""
    if event.completion is not None:
        done[index] = event.completion


def _text_decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out. The Rust tokenizer is called directly: this runs for every token."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    decode = fast.decode if fast is not None else tokenizer.decode
    return lambda ids: str(decode(ids, skip_special_tokens=True))
