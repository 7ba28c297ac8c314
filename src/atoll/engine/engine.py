"""The engine: one continuous batch in this process, any adapter in any row.

A step is schedule, run, finish: the scheduler names the rows and finds them pages, the runner gives their hidden states, the sampler their next
tokens, and what has ended gives back its pages and its hold on its adapter. Nothing runs in the background: whoever calls `step`, `stream`,
`generate`, `score` or `embed` drives everything, and events of requests that somebody else waits for are kept for them. One thread at a time.

    add ─► waiting ─admit─► running (pages + hold on adapter) ─► finished: both given back, last event carries the Completion
    begin_score, begin_embed ─► jobs ─ a batch before each step ─► finished: result

Used by eval, workflows and cli directly, and by the server.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.engine.config import EngineConfig
from atoll.engine.intake import Intake, Pace
from atoll.engine.jobs import Job, Jobs, Lack, Lender
from atoll.engine.pages import Pages
from atoll.engine.pool import AdapterPool
from atoll.engine.request import Completion, EmbedRequest, FinishReason, Request, ScoreRequest, TokenEvent
from atoll.engine.runner import Runner, serving_decoder
from atoll.engine.scheduler import Scheduler, Work
from atoll.engine.sequence import Sequence as Running
from atoll.engine.step import Outcome, compute
from atoll.errors import AtollError, QueueFull, RequestRefused
from atoll.model.kv_cache import PAGE_TOKENS

if TYPE_CHECKING:
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

T = TypeVar("T")
Progress = Callable[[str, int, int], None]

_SPARE_DEADLINES = 64  # of ended requests, before they are swept

_log = logging.getLogger(__name__)


class Engine:
    """Serves one base and any number of adapters registered for it.

    Example:
        engine = Engine(load_base("smollm2-135m-instruct"))
        engine.register(digest, adapter)
        [completion] = engine.generate([Request(prompt_ids, adapter=digest, sampling=SamplingParams(max_new_tokens=32))])
    """

    def __init__(self, base: Base, config: EngineConfig | None = None) -> None:
        """Raises ConfigError where the config asks for the native kernel and it cannot run."""
        self.base, self.config = base, config if config is not None else EngineConfig()
        decoder = serving_decoder(base, self.config.kernel)
        self.kernel = str(getattr(decoder, "kernel", "plain"))  # "plain", or the name of the compiled forward's target
        page_bytes = decoder.new_cache(1).token_bytes * PAGE_TOKENS
        num_pages = self.config.cache_pages(self.config.row_tokens(base.context_length), PAGE_TOKENS, page_bytes)
        self._pages = Pages(num_pages, PAGE_TOKENS)
        self._pool = AdapterPool(decoder.new_bank(), self.config.adapter_bytes)
        self._runner = Runner(decoder, decoder.new_cache(num_pages), self._pool)
        self._intake = Intake(base, self.config, self._pages, self._pool)
        self._scheduler = Scheduler(
            self._pages,
            self._pool,
            self._runner.zero_pages,
            max_rows=self.config.max_rows,
            max_step_tokens=self.config.max_step_tokens,
            max_overtakes=self.config.max_overtakes,
            regime=self._intake.regime,
            whole_prompts=base.decoder.whole_prompts,
        )
        self.limits, self.grammars = self._intake.limits, self._intake.grammars
        self._lender = Lender(self._pages, self._pool, self._runner, self.config.max_step_tokens, whole=base.decoder.whole_prompts)
        self._jobs = Jobs()
        self._numbers = itertools.count(1)
        self._listeners: dict[str, Callable[[TokenEvent], None]] = {}
        self._events: list[TokenEvent] = []  # of requests that nobody listens to; the next `step` returns them
        self._deadlines: list[tuple[float, int, str]] = []  # (when, number of the sequence, its id); finished ones leave late
        self._pace = Pace()
        self._counts = Counter[str]()

    # Adapters

    def pack(self, adapter: Adapter) -> Any | None:
        """Do the work of loading an adapter ahead, on any thread: give the result to `register`, or drop it. None where there is nothing to do."""
        return self._pool.pack(adapter)

    def register(self, key: str, adapter: Adapter, packed: Any = None) -> None:
        """Make an adapter servable under `key` (its digest), at any time. See AdapterPool.register for what is refused."""
        self._pool.register(key, adapter, packed)

    def unregister(self, key: str, wait: bool = False) -> bool:
        """Forget an adapter; True when that is done. Raises EngineError while a waiting or running request uses it.

        With wait it is then forgotten when the last of them has ended, and refused to new ones from now on.
        """
        gone = self._pool.unregister(key, wait=wait)
        if gone:
            self._pages.forget(key)
        return gone

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
        """Queue a request and return its id; `step` delivers its events.

        Raises RequestRefused if it does not fit or names an unknown adapter, QueueFull if max_waiting requests wait already.
        """
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
        return bool(self._scheduler.running or self._scheduler.waiting or self._events or self._jobs)

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
        self._check_if_idle()
        return [done[index] for index in range(len(requests))]

    # Given texts

    def score(self, items: Sequence[ScoreRequest], progress: Progress | None = None) -> list[list[float]]:
        """The log-probability, in nats, of each item's continuations after its prompt: one sum a continuation, in order.

        Runs beside whatever else runs. Raises RequestRefused for an item that does not fit, EngineError where a result is not finite.
        """
        return self._run_job(self.begin_score(items), "scoring", progress)

    def embed(self, items: Sequence[EmbedRequest], progress: Progress | None = None) -> list[list[float]]:
        """A vector of each text: its final hidden states, averaged or the last. Raises as `score` does."""
        return self._run_job(self.begin_embed(items), "embedding", progress)

    def begin_score(self, items: Sequence[ScoreRequest]) -> Job[list[float]]:
        """`score` without waiting: each `step` computes a batch of the job; when it has finished, `result` has what `score` returns."""
        return self._begin(self._intake.score_job(items))

    def begin_embed(self, items: Sequence[EmbedRequest]) -> Job[list[float]]:
        """`embed` without waiting: see begin_score."""
        return self._begin(self._intake.embed_job(items))

    def cancel_job(self, job: Job[Any]) -> None:
        """Compute no more of a job; nothing happens if it has finished."""
        if self._jobs.remove(job):
            self._unuse(job.users)

    # Its own state

    def check(self) -> None:
        """Raise AssertionError unless pages, adapter holds, bytes and sequences add up: nothing leaks and nothing has two owners."""
        self._scheduler.check()
        running, waiting = self._scheduler.running.values(), self._scheduler.waiting
        self._pages.check([sequence.pages for sequence in running])
        used = Counter(s.adapter for s in itertools.chain(running, waiting) if s.adapter is not None)
        for job in self._jobs:
            used.update(job.users)
        self._pool.check(Counter(s.adapter for s in running if s.adapter is not None), used)
        orphans = [name for name in self._listeners if name not in self._scheduler]
        if orphans:
            raise AssertionError(f"somebody waits for requests that are gone: {orphans}")

    def stats(self) -> dict[str, int]:
        """Counts now (running, waiting, free_rows, pages_…, adapters_…) and since the start (steps, …_tokens, finished_…, adapter_loads, …)."""
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "free_rows": self.config.max_rows - len(self._scheduler.running),
            "pages_total": self._pages.num_pages,
            "pages_free": self._pages.num_free,
            "pages_cached": self._pages.num_cached,
            **{key: self._counts[key] for key in ("steps", "prefill_tokens", "generated_tokens")},
            **{key: self._scheduler.counts[key] for key in ("prefix_hits", "reused_tokens", "preemptions")},
            **{f"finished_{reason}": self._counts[reason] for reason in ("stop", "length", "cancelled", "error", "deadline")},
            **self._pool.stats(),
        }

    def adapter_stats(self) -> dict[str, dict[str, int | bool]]:
        """Of every registered adapter: resident, pinned, in_use (unfinished requests), bytes, loads."""
        return self._pool.adapter_stats()

    # Inside

    def _check_request(self, request: Request) -> None:
        self._intake.check(request)
        if request.request_id is not None and request.request_id in self._scheduler:
            raise RequestRefused(f"request id {request.request_id!r} is in use by a request that is not finished", hint="leave request_id out")

    def _add(self, request: Request, listener: Callable[[TokenEvent], None] | None = None) -> str:
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise QueueFull(
                f"{self.config.max_waiting} requests wait already",
                hint="try again later, or raise max_waiting",
                retry_after_s=self._pace.time_for(len(self._scheduler.waiting)),
            )
        request_id = request.request_id
        while request_id is None or request_id in self._scheduler:
            request_id = f"request-{next(self._numbers)}"
        sequence = self._intake.sequence(request_id, request)
        self._scheduler.add(sequence)
        if request.deadline_s is not None:
            self._watch((sequence.added_at + request.deadline_s, sequence.arrival, request_id))
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
        """One step: schedule, run, finish; before it a batch of the jobs."""
        self._end_overdue()
        if self._jobs:
            job = self._jobs.step(self._lender)
            if job.finished:
                self._unuse(job.users)
        lack = self._jobs.lack(self.config.max_overtakes)  # of pages: nobody else gets any; of an adapter's place: those go on who take none
        plan = self._scheduler.schedule(admit=lack != Lack(None), wanted=lack.adapter if lack is not None else None)
        for sequence, error in plan.failed:
            self._fail(sequence, error)
        if plan.work:
            self._counts["steps"] += 1
            for item, outcome in zip(plan.work, compute(self._runner, plan.work), strict=True):
                self._finish(item, outcome)

    def _watch(self, deadline: tuple[float, int, str]) -> None:
        """Remember a deadline; when most of those remembered are of requests that have ended, forget these."""
        heapq.heappush(self._deadlines, deadline)
        if len(self._deadlines) > _SPARE_DEADLINES + 2 * (len(self._scheduler.running) + len(self._scheduler.waiting)):
            self._deadlines = [entry for entry in self._deadlines if self._scheduler.arrival(entry[2]) == entry[1]]
            heapq.heapify(self._deadlines)

    def _end_overdue(self) -> None:
        """End the requests whose time is up, with what they have."""
        while self._deadlines and self._deadlines[0][0] <= self._intake.clock():
            _, arrival, request_id = heapq.heappop(self._deadlines)
            if self._scheduler.arrival(request_id) == arrival:
                sequence = self._scheduler.remove(request_id)
                assert sequence is not None
                self._end(sequence, "deadline")

    def _finish(self, item: Work, outcome: Outcome | Exception) -> None:
        """Give a sequence what the step found for it; end it if it is done."""
        sequence = item.sequence
        if isinstance(outcome, Exception):
            self._fail(sequence, outcome)
            return
        if item.start < sequence.num_prompt:
            self._counts["prefill_tokens"] += min(item.stop, sequence.num_prompt) - item.start
        self._scheduler.computed(item, sound=outcome.choice is not None)
        sequence.prompt_logprobs += outcome.prompt_logprobs
        if outcome.choice is None:
            return
        try:
            event = sequence.append(outcome.choice.token, outcome.choice.logprob)
        except Exception as error:  # a tokenizer or a grammar that fails on one request's tokens is the end of that request only
            self._fail(sequence, error)
            return
        self._counts["generated_tokens"] += 1
        if event.completion is not None:
            self._scheduler.remove(sequence.request_id)
            self._forget(sequence)
        self._deliver(event)

    def _fail(self, sequence: Running, error: Exception) -> None:
        message = f"{error.message} ({error.hint})" if isinstance(error, AtollError) and error.hint else str(error) or type(error).__name__
        _log.warning("request %s failed: %s", sequence.request_id, message, exc_info=None if isinstance(error, AtollError) else error)
        self._scheduler.remove(sequence.request_id, failed=True)
        self._end(sequence, "error", message)

    def _end(self, sequence: Running, reason: FinishReason, error: str = "") -> None:
        """Finish a sequence that is removed already, without a token."""
        event = sequence.end(reason, error)
        self._forget(sequence)
        self._deliver(event)

    def _forget(self, sequence: Running) -> None:
        if sequence.adapter is not None:
            self._unuse({sequence.adapter: 1})

    def _unuse(self, users: dict[str, int]) -> None:
        for key, count in users.items():
            for _ in range(count):
                if self._pool.unuse(key):
                    self._pages.forget(key)

    def _deliver(self, event: TokenEvent) -> None:
        listener = self._listeners.get(event.request_id, self._events.append)
        if event.completion is not None:
            self._listeners.pop(event.request_id, None)
            reason = event.completion.finish_reason
            self._counts[reason] += 1
            if reason != "cancelled":
                self._pace.finished(self._intake.clock())
        listener(event)

    def _begin(self, job: Job[T]) -> Job[T]:
        if job.finished:
            self._unuse(job.users)
        else:
            self._jobs.add(job)
        return job

    def _run_job(self, job: Job[T], stage: str, progress: Progress | None) -> list[T]:
        try:
            while not job.finished:
                before = job.num_done
                self._advance()
                if progress is not None and job.num_done > before:
                    progress(stage, job.num_done, job.num_items)
        finally:
            self.cancel_job(job)
        self._check_if_idle()
        return job.result()

    def _check_if_idle(self) -> None:
        """After a call that ran by itself; while others run, whoever serves them chooses when to check."""
        if not self.has_work:
            self.check()


def _keep_completion(done: dict[int, Completion], index: int, event: TokenEvent) -> None:
    """The listener of `generate`: it wants completions only."""
    if event.completion is not None:
        done[index] = event.completion
