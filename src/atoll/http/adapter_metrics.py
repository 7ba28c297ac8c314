"""Per-adapter metrics: requests, tokens, errors, loads, evictions, residence, time to first token.

Two things are bounded. How many adapters have a name of their own: the first MAX_NAMES that were used; all others share "other", so a thousand
adapters do not make a thousand times thirty series. And who sees a name: a key with an allow-list sees those it may use, and all others as "other"
too, unless it has the scope admin. The base is "base", merged adapters share "merged".

Used by metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from atoll.engine.request import Completion
    from atoll.serving.keys import Caller
    from atoll.serving.registry import AdapterRegistry

MAX_NAMES = 200
OTHER, BASE, MERGED = "other", "base", "merged"
FIRST_TOKEN = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_COUNTERS = {
    "requests": "Requests that ended.",
    "prompt_tokens": "Prompt tokens of requests that ended.",
    "generated_tokens": "Tokens generated for them.",
    "errors": "Requests that failed.",
    "loads": "Times the adapter was loaded.",
    "load_failures": "Times it could not be.",
    "evictions": "Times it was put out to make room.",
}


@dataclass
class Series:
    """What is counted of one adapter."""

    counts: Counter[str] = field(default_factory=Counter)
    first_token: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN) + 1))  # one more for what is above all
    first_token_s: float = 0.0

    def add(self, other: Series) -> None:
        self.counts.update(other.counts)
        self.first_token = [mine + its for mine, its in zip(self.first_token, other.first_token, strict=True)]
        self.first_token_s += other.first_token_s


class AdapterMetrics:
    """Counts by adapter name, with room for `max_names` of them."""

    def __init__(self, registry: AdapterRegistry, base_name: str, max_names: int = MAX_NAMES) -> None:
        self._registry, self._base_name, self._max_names = registry, base_name, max_names
        self._series: dict[str, Series] = {}

    def finished(self, adapter: str, completion: Completion | None) -> None:
        """A request ended."""
        series = self._of(adapter)
        series.counts["requests"] += 1
        if completion is None:
            return
        series.counts["prompt_tokens"] += completion.num_prompt_tokens
        series.counts["generated_tokens"] += len(completion.token_ids)
        series.counts["errors"] += completion.finish_reason == "error"
        first = completion.timing.first_token_s
        if first is not None:
            series.first_token[bisect_left(FIRST_TOKEN, first)] += 1
            series.first_token_s += first

    def loaded(self, adapter: str) -> None:
        self._of(adapter).counts["loads"] += 1

    def load_failed(self, adapter: str) -> None:
        self._of(adapter).counts["load_failures"] += 1

    def evicted(self, adapter: str) -> None:
        self._of(adapter).counts["evictions"] += 1

    def seen_by(self, caller: Caller) -> Collector:
        """The series as a caller may see them."""
        if caller.adapters is None or caller.may("admin"):
            return Shown(self, lambda name: name)
        return Shown(self, lambda name: name if name in (BASE, OTHER) or caller.allows(name) else OTHER)

    def collect(self, shown: Callable[[str], str]) -> Iterator[Metric]:
        """The series under the names that `shown` gives them."""
        merged: dict[str, Series] = {}
        for name, series in self._series.items():
            merged.setdefault(shown(name), Series()).add(series)
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"atoll_adapter_{name}", text, labels=("adapter",))
            for adapter, series in merged.items():
                family.add_metric((adapter,), series.counts[name])
            yield family
        first = HistogramMetricFamily("atoll_adapter_time_to_first_token_seconds", "Seconds to the first token.", labels=("adapter",))
        for adapter, series in merged.items():
            first.add_metric((adapter,), _cumulative(series.first_token), series.first_token_s)
        yield first
        yield self._loaded_now(shown)
        yield self._kinds_now()

    def _loaded_now(self, shown: Callable[[str], str]) -> Metric:
        family = GaugeMetricFamily("atoll_adapter_resident", "Versions of the adapter that are loaded now.", labels=("adapter",))
        now = Counter(shown(self._label(entry.name)) for entry in self._registry.entries.values() if entry.loaded is not None)
        for adapter, count in now.items():
            family.add_metric((adapter,), count)
        return family

    def _kinds_now(self) -> Metric:
        family = GaugeMetricFamily("atoll_adapters_loaded", "Versions that are loaded now, by kind of adapter.", labels=("kind",))
        for kind, count in Counter(entry.traits.kind for entry in self._registry.entries.values() if entry.loaded is not None).items():
            family.add_metric((kind,), count)
        return family

    def _of(self, adapter: str) -> Series:
        """The series of an adapter; the one that many share once there are too many."""
        return self._series.setdefault(self._label(adapter, new=True), Series())

    def _label(self, adapter: str, *, new: bool = False) -> str:
        if adapter in ("", self._base_name):
            return BASE
        if adapter.startswith(MERGED + ":"):
            return MERGED
        known = adapter in self._series or (new and len(self._series) < self._max_names)
        return adapter if known else OTHER


class Shown(Collector):
    """AdapterMetrics under the names that one caller may see."""

    def __init__(self, metrics: AdapterMetrics, shown: Callable[[str], str]) -> None:
        self._metrics, self._shown = metrics, shown

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect(self._shown)


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each with all below it."""
    found, total = [], 0
    for bound, count in zip((*map(str, FIRST_TOKEN), "+Inf"), counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
