"""GET /metrics: LoRAX's names and ours, as Prometheus text or as JSON.

Three sources. Histograms and counters of requests are kept here, told by the service (Observer) once a request and by CountRequests once an HTTP
request, never once a token. Gauges are read from the engine's own counts when somebody asks. Per-adapter series are in adapter_metrics, since what
they name depends on who asks.

LoRAX's counters lack the suffix that the client library gives to counters; it is taken off where the text is written. Where LoRAX tells prefill from
decode steps, Atoll's steps hold both: `method="step"`.

Used by app. Every app has a registry of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.errors import AtollError
from atoll.http.adapter_metrics import AdapterMetrics
from atoll.http.auth import PREDIBASE, caller_of
from atoll.http.sse import OUTCOME
from atoll.serving.observer import Kind, Observer

if TYPE_CHECKING:
    from atoll.engine.request import Completion
    from atoll.serving.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)
_FAILURES = {422: "validation", 429: "overloaded", 424: "generation", 503: "dropped", 499: "dropped", 501: "classification_failure"}
_LORAX_COUNTER = re.compile(rb"^((?:# \w+ )?lorax_\w+)_total\b", re.MULTILINE)
_DEPLOYMENT = compile_path(PREDIBASE)[0]
_ARRIVED: ContextVar[float] = ContextVar("arrived")  # when the HTTP request that this task answers came in


def router(metrics: Metrics) -> APIRouter:
    """The route that tells what `metrics` counted."""
    routes = APIRouter(tags=["Server"])
    described = {200: {"description": "Prometheus text, or JSON.", "content": {"text/plain": {"schema": {"type": "string"}}, "application/json": {}}}}

    @routes.get("/metrics", summary="Counters, gauges and histograms", responses=described)  # type: ignore[arg-type]
    async def show(http: Request, format: str | None = None) -> Response:
        """As JSON with `?format=json` or `Accept: application/json`."""
        view = metrics.view(http)
        if format == "json" or (format is None and "application/json" in http.headers.get("accept", "")):
            return JSONResponse(as_json(view))
        return Response(as_text(view), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return routes


class Metrics(Observer):
    """What one app counts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self.adapters = AdapterMetrics(service.registry, service.base.name)
        self._make_lorax()
        self._make_own()
        self.registry.register(EngineGauges(service))
        service.observers.append(self)

    def view(self, http: Request) -> View:
        """What the sender of a request may see."""
        return View(self.registry, self.adapters.seen_by(caller_of(http)))

    # Told by CountRequests

    def arrived(self) -> None:
        self._count.inc()

    def answered(self, status: int, seconds: float, *, failed: bool) -> None:
        """A reply went out, whole or to its end. failed: it had begun, and its end was an error."""
        if failed:
            self._failure.labels("generation").inc()
        elif status < 400:
            self._success.inc()
            self._duration.observe(seconds)
        else:
            self._failure.labels(_FAILURES.get(status, "bad_request" if status < 500 else "incomplete")).inc()

    # Told by routes, which alone know it

    def asked(self, max_new_tokens: int) -> None:
        self._max_new_tokens.observe(max_new_tokens)

    def classified(self, num_inputs: int, num_entities: int) -> None:
        self._input_count.observe(num_inputs)
        self._classify_output_count.observe(num_entities)

    # Told by the service

    def accepted(self, kind: Kind, adapter: str) -> None:
        arrived = _ARRIVED.get(None)
        if arrived is not None:
            self._validation.observe(time.perf_counter() - arrived)

    def finished(self, kind: Kind, adapter: str, seconds: float, completion: Completion | None) -> None:
        self.adapters.finished(adapter, completion)
        if completion is None:
            self._batch_success.labels("classify" if kind == "score" else "embed").inc()
            return
        if completion.finish_reason == "error":
            self._batch_failure.inc()
        timing, num_tokens = completion.timing, len(completion.token_ids)
        inference = max(0.0, timing.total_s - timing.queue_s)
        self._queue.observe(timing.queue_s)
        self._inference.observe(inference)
        self._input_length.observe(completion.num_prompt_tokens)
        self._generated.observe(num_tokens)
        self._skipped.observe(0)
        self._prompt_tokens.inc(completion.num_prompt_tokens)
        self._generated_tokens.inc(num_tokens)
        if num_tokens:
            self._per_token.observe(inference / num_tokens)
        if timing.first_token_s is not None:
            self._first_token.observe(timing.first_token_s)
            if num_tokens > 1:
                self._between_tokens.observe(max(0.0, timing.total_s - timing.first_token_s) / (num_tokens - 1))

    def refused(self, kind: Kind, error: AtollError) -> None:
        self._refused.labels(type(error).__name__).inc()

    def stepped(self, seconds: Sequence[float]) -> None:
        for each in seconds:
            self._step.observe(each)
        self._steps.inc(len(seconds))
        self._good_steps.inc(len(seconds))

    def loaded(self, adapter: str, source: str, seconds: float) -> None:
        self._load.labels(source).observe(seconds)
        self.adapters.loaded(adapter)

    def load_failed(self, adapter: str, source: str, error: AtollError) -> None:
        self.adapters.load_failed(adapter)

    def evicted(self, adapter: str) -> None:
        self.adapters.evicted(adapter)

    # Inside

    def _make_lorax(self) -> None:
        self._count = self._counter("lorax_request_count", "Requests to generate, embed or classify.")
        self._success = self._counter("lorax_request_success", "Those that were answered.")
        self._failure = self._counter("lorax_request_failure", "Those that were not, by reason.", "err")
        self._steps = self._counter("lorax_batch_inference_count", "Engine steps.", "method").labels("step")
        self._batch_success = self._counter("lorax_batch_inference_success", "Steps that ended well; texts embedded or classified.", "method")
        self._batch_failure = self._counter("lorax_batch_inference_failure", "Requests that failed in a step.", "method").labels("step")
        self._good_steps = self._batch_success.labels("step")
        self._duration = self._histogram("lorax_request_duration", "Seconds from a request to the end of its reply.", SECONDS)
        self._validation = self._histogram("lorax_request_validation_duration", "Seconds from a request to the engine's queue.", SECONDS)
        self._queue = self._histogram("lorax_request_queue_duration", "Seconds in the engine's queue.", SECONDS)
        self._inference = self._histogram("lorax_request_inference_duration", "Seconds from the queue to the last token.", SECONDS)
        self._per_token = self._histogram("lorax_request_mean_time_per_token_duration", "Seconds a token, mean of one request.", SECONDS)
        self._generated = self._histogram("lorax_request_generated_tokens", "Tokens of an answer.", TOKENS)
        self._input_length = self._histogram("lorax_request_input_length", "Tokens of a prompt.", TOKENS)
        self._max_new_tokens = self._histogram("lorax_request_max_new_tokens", "Tokens that an answer might have had.", TOKENS)
        self._skipped = self._histogram("lorax_request_skipped_tokens", "Tokens that a draft saved: none, nothing is drafted.", TOKENS)
        self._input_count = self._histogram("lorax_request_input_count", "Texts of one request to classify.", TOKENS)
        self._classify_output_count = self._histogram("lorax_request_classify_output_count", "Entities of one request to classify.", TOKENS)
        self._step = self._histogram("lorax_batch_inference_duration", "Seconds of an engine step.", SECONDS, "method").labels("step")

    def _make_own(self) -> None:
        self._first_token = self._histogram("atoll_time_to_first_token_seconds", "Seconds from a request to its first token.", SECONDS)
        self._between_tokens = self._histogram("atoll_inter_token_seconds", "Seconds between two tokens, mean of one request.", SECONDS)
        self._prompt_tokens = self._counter("atoll_prompt_tokens", "Prompt tokens of finished requests.")
        self._generated_tokens = self._counter("atoll_generated_tokens", "Generated tokens of finished requests.")
        self._refused = self._counter("atoll_requests_refused", "Requests that the engine was not given, by class of error.", "error")
        self._load = self._histogram("atoll_adapter_load_seconds", "Seconds to load an adapter.", SECONDS, "source")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class EngineGauges(Collector):
    """What the service and the engine count themselves, read when asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        engine: Mapping[str, float] = stats["engine"]
        waiting, running = engine.get("waiting", 0), engine.get("running", 0)
        yield GaugeMetricFamily("lorax_queue_length", "Requests that wait for a row.", waiting)
        yield GaugeMetricFamily("lorax_batch_current_size", "Requests that run.", running)
        most = "Tokens that all admitted requests may have, prompts and answers."
        yield GaugeMetricFamily("lorax_batch_current_max_tokens", most, self._service.tokens_admitted)
        yield GaugeMetricFamily("lorax_batch_next_size", "Requests that would run if all found room.", waiting + running)
        yield GaugeMetricFamily("atoll_ready", "1 when the server answers.", float(stats["ready"]))
        yield GaugeMetricFamily("atoll_active_requests", "Requests admitted and not ended.", stats["active_requests"])
        yield GaugeMetricFamily("atoll_adapters_loading", "Adapters being loaded.", stats["loading_adapters"])
        for name, value in engine.items():
            if name in GAUGES:
                yield GaugeMetricFamily(f"atoll_engine_{name}", GAUGES[name], value)
            elif name in COUNTERS:
                yield CounterMetricFamily(f"atoll_engine_{name}", COUNTERS[name], value)


GAUGES = {
    "running": "Rows in use.",
    "waiting": "Requests that wait for a row.",
    "pages_free": "Pages of the KV cache that hold nothing.",
    "pages_cached": "Pages of the KV cache kept for reuse.",
    "adapters_registered": "Adapters the engine knows.",
    "adapters_resident": "Adapters ready to be used in a step.",
    "adapters_pinned": "Adapters that never leave.",
    "adapter_bytes": "Bytes of resident adapters.",
}
COUNTERS = {
    "steps": "Steps.",
    "prefill_tokens": "Prompt tokens computed.",
    "generated_tokens": "Tokens generated.",
    "reused_tokens": "Prompt tokens found in the KV cache.",
    "prefix_hits": "Requests whose prompt began in the KV cache.",
    "preemptions": "Requests stopped to free pages, which went on later.",
    "adapter_loads": "Adapters brought into the bank.",
    "adapter_evictions": "Adapters put out of the bank.",
    "finished_stop": "Requests that ended by themselves.",
    "finished_length": "Requests that ended at their length.",
    "finished_cancelled": "Requests that were cancelled.",
    "finished_error": "Requests that failed.",
    "finished_deadline": "Requests that ran out of time.",
}


class View(Collector):
    """Everything that one caller may see, without the library's `_created` series."""

    def __init__(self, *sources: Collector) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for family in source.collect():
                shown = Metric(family.name, family.documentation, family.type)
                shown.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield shown


def as_text(view: View) -> bytes:
    """Prometheus text."""
    return _LORAX_COUNTER.sub(rb"\1", generate_latest(view))


def as_json(view: View) -> dict[str, dict[str, Any]]:
    """{name: {"type", "data": [{"key", "value"}]}}; a key is the series as the text would write it."""
    found: dict[str, dict[str, Any]] = {}
    for family in view.collect():
        lorax = family.name.startswith("lorax_")
        name = family.name if lorax or family.type != "counter" else family.name + "_total"
        found[name] = {
            "type": family.type,
            "data": [
                {"key": _series(sample.name.removesuffix("_total") if lorax else sample.name, sample.labels), "value": sample.value}
                for sample in family.samples
            ],
        }
    return found


def _series(name: str, labels: Mapping[str, str]) -> str:
    return name + ("{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}" if labels else "")


class CountRequests:
    """ASGI middleware around the routes that ask the engine: counts requests and times their replies to the last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, tuple(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = scope["path"].endswith(self._paths) or _DEPLOYMENT.fullmatch(scope["path"]) if scope["type"] == "http" else False
        if not counts or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499
        outcome: dict[str, bool] = {}
        scope[OUTCOME] = outcome

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.arrived()
        token = _ARRIVED.set(began)
        try:
            await self._app(scope, receive, watched)
        finally:
            _ARRIVED.reset(token)
            self._metrics.answered(status, time.perf_counter() - began, failed=outcome.get("failed", False))
