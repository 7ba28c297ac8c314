"""Metrics: LoRAX's names, ours, adapters' own; as text and as JSON; and what a key with an allow-list may see of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.server.live_server import Live

from atoll.engine.request import Completion, Timing
from atoll.errors import QueueFull
from atoll.http.adapter_metrics import AdapterMetrics
from atoll.server.app import create_app
from atoll.serving.keys import Caller
from atoll.serving.service import Service

LORAX = {
    "lorax_request_count", "lorax_request_success", "lorax_request_failure", "lorax_batch_inference_count", "lorax_batch_inference_success",
    "lorax_request_duration", "lorax_request_validation_duration", "lorax_request_queue_duration", "lorax_request_inference_duration",
    "lorax_request_mean_time_per_token_duration", "lorax_request_generated_tokens", "lorax_request_input_length", "lorax_request_max_new_tokens",
    "lorax_request_skipped_tokens", "lorax_request_input_count", "lorax_request_classify_output_count", "lorax_batch_next_size",
    "lorax_batch_inference_duration", "lorax_queue_length", "lorax_batch_current_size",
}  # fmt: skip


def _series(live: Live, key: str = "") -> dict[str, float]:
    """Every series of the text: "name{label=value}" -> value."""
    reply = live.get("/metrics", key=key)
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = (line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#"))
    return {name.replace('"', ""): float(value) for name, _, value in lines}


def _ask(live: Live, key: str = "", **parameters: Any) -> int:
    return live.post("/generate", {"inputs": "abc", "parameters": {"max_new_tokens": 3, **parameters}}, key=key).status_code


def test_requests_are_counted_by_how_they_ended(serve: Callable[..., Live]) -> None:
    """Dashboards made for LoRAX read these names, without the suffix that the client library would add."""
    live = serve()
    assert [_ask(live), _ask(live, adapter_id="plain"), _ask(live, adapter_id="nobody"), _ask(live, top_k=0)] == [200, 200, 424, 422]
    live.post("/generate_stream", {"inputs": "abc", "parameters": {"max_new_tokens": 3}})
    live.post("/v1/completions", {"prompt": "abc", "max_tokens": 3, "temperature": 0})
    live.post("/classify", {"inputs": "fine", "parameters": {"adapter_id": "sentiment"}})
    while (found := _series(live))["lorax_request_success"] < 5:
        pass  # a reply's last byte is sent a moment before it is counted
    assert found["lorax_request_count"] == 7
    assert found["lorax_request_success"] == 5
    assert found["lorax_request_failure{err=generation}"] == 1
    assert found["lorax_request_failure{err=validation}"] == 1
    assert found["lorax_request_duration_count"] == 5
    assert found["lorax_request_input_length_sum"] == 4 * 3
    assert found["lorax_request_generated_tokens_count"] == 4
    assert found["lorax_request_validation_duration_count"] == 5
    assert found["lorax_request_max_new_tokens_sum"] == 3 * 3  # of LoRAX's routes
    assert found["lorax_request_classify_output_count_sum"] == 3
    assert found["atoll_time_to_first_token_seconds_count"] == 4
    assert found["atoll_inter_token_seconds_count"] == 4
    assert found["lorax_batch_inference_count{method=step}"] == found["lorax_batch_inference_success{method=step}"] > 0
    assert found["lorax_batch_inference_success{method=classify}"] == 1
    assert found["atoll_engine_pages_free"] > 0
    assert found["atoll_engine_generated_tokens_total"] == found["atoll_generated_tokens_total"] == 12
    assert found["lorax_queue_length"] == found["lorax_batch_current_size"] == found["atoll_active_requests"] == 0


def test_adapters_have_metrics_of_their_own(serve: Callable[..., Live]) -> None:
    """LoRAX has none, so nobody can tell which adapter is slow, failing, or reloaded all the time."""
    live = serve()
    for adapter in ("plain", "plain", "sentiment", None):
        _ask(live, adapter_id=adapter)
    _ask(live, merged_adapters={"ids": ["plain", "sentiment"], "weights": [1, 1]})
    found = _series(live)
    requests = {name: found[f"atoll_adapter_requests_total{{adapter={name}}}"] for name in ("plain", "sentiment", "base", "merged")}
    assert requests == {"plain": 2, "sentiment": 1, "base": 1, "merged": 1}
    assert found["atoll_adapter_loads_total{adapter=plain}"] == 1
    assert found["atoll_adapter_resident{adapter=plain}"] == 1
    assert found["atoll_adapter_generated_tokens_total{adapter=plain}"] == 6
    assert found["atoll_adapter_time_to_first_token_seconds_count{adapter=plain}"] == 2
    assert found["atoll_adapter_time_to_first_token_seconds_bucket{adapter=plain,le=+Inf}"] == 2
    assert found["atoll_adapter_load_seconds_count{source=hub}"] == 2


def test_metrics_as_json(live: Live) -> None:
    """LoRAX's form: {name: {type, data: [{key, value}]}}; by query or by header."""
    _ask(live)
    body = live.get("/metrics?format=json").json()
    assert live.get("/metrics", headers={"accept": "application/json"}).json().keys() == body.keys()
    assert set(body) >= LORAX
    assert body["lorax_request_count"]["type"] == "counter"
    [entry] = body["lorax_request_count"]["data"]
    assert entry["key"] == "lorax_request_count" and entry["value"] >= 1
    keys = [entry["key"] for entry in body["lorax_request_duration"]["data"]]
    assert 'lorax_request_duration_bucket{le="+Inf"}' in keys and "lorax_request_duration_count" in keys


def test_every_name_of_lorax_is_there(live: Live) -> None:
    """Also before anything has happened to it, so that alerts do not see gaps."""
    _ask(live)
    text = live.get("/metrics").text
    assert {name for name in LORAX if f"# TYPE {name} " in text} == LORAX
    assert "_created" not in text


def test_a_key_with_an_allow_list_sees_no_other_adapters_name(serve: Callable[..., Live]) -> None:
    """A name can be a customer's: others are summed as "other", for all but operators."""
    live = serve(keys={"all": {"scopes": ["infer"]}, "ann": {"adapters": ["plain"]}, "op": {"scopes": ["infer", "admin"], "adapters": ["plain"]}})
    for adapter in ("plain", "sentiment", "sentiment", "pair"):
        assert _ask(live, "all", adapter_id=adapter) == 200
    for key in ("all", "op"):
        assert _series(live, key)["atoll_adapter_requests_total{adapter=sentiment}"] == 2
    text = live.get("/metrics", key="ann").text + live.get("/metrics?format=json", key="ann").text
    assert "sentiment" not in text and "pair" not in text
    seen = _series(live, "ann")
    assert seen["atoll_adapter_requests_total{adapter=plain}"] == 1
    assert seen["atoll_adapter_requests_total{adapter=other}"] == 3
    assert seen["atoll_adapter_resident{adapter=other}"] == 2


class _NoEntries:
    entries: dict[str, Any] = {}  # noqa: RUF012 - stands for an empty registry


def test_a_thousand_adapters_do_not_make_a_thousand_series() -> None:
    """The first ones keep names of their own, so that their counters never jump; the rest share one."""
    metrics = AdapterMetrics(_NoEntries(), "base-name", max_names=3)  # type: ignore[arg-type]
    timing = Timing(first_token_s=0.04)
    for number in range(1000):
        metrics.finished(f"adapter-{number}", Completion("1", None, 2, (5, 6), "", "stop", timing=timing))
    metrics.finished("base-name", None)
    metrics.evicted("adapter-1")
    samples = {
        (sample.name, sample.labels["adapter"]): sample.value
        for family in metrics.seen_by(Caller()).collect()
        for sample in family.samples
        if "_bucket" not in sample.name
    }
    names = {adapter for _, adapter in samples}
    assert names == {"adapter-0", "adapter-1", "adapter-2", "other", "base"}
    assert samples["atoll_adapter_requests_total", "other"] == 997
    assert samples["atoll_adapter_generated_tokens_total", "other"] == 2 * 997
    assert samples["atoll_adapter_time_to_first_token_seconds_count", "other"] == 997
    assert samples["atoll_adapter_evictions_total", "adapter-1"] == 1


def test_two_apps_do_not_share_a_registry(live: Live) -> None:
    """A library that registers globally fails at the second app of a process."""
    apps = [create_app(Service(live.base, live.service.config)) for _ in range(2)]
    first, second = (app.state.metrics for app in apps)
    first.refused("generate", QueueFull("x"))
    name = "atoll_requests_refused_total"
    assert first.registry.get_sample_value(name, {"error": "QueueFull"}) == 1
    assert second.registry.get_sample_value(name, {"error": "QueueFull"}) is None


@pytest.mark.parametrize("path", ["/metrics", "/metrics?format=json"])
def test_asking_for_metrics_is_not_counted(live: Live, path: str) -> None:
    """Or a dashboard would see itself."""
    before = _series(live)["lorax_request_count"]
    live.get(path)
    assert _series(live)["lorax_request_count"] == before
