"""A whole composition over HTTP with the real process: from examples in a body to an adapter that answers, on the tiny base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.server.live_server import LABELS, Live, fill_kinds, serving

from atoll.model.base import Base
from atoll.serving.keys import add_key

ROWS = [{"text": text, "label": LABELS[place % 2]} for place, text in enumerate(("sun", "rain", "cake", "mud", "song", "dust"))]
BODY: dict[str, Any] = {"template": "Text: {text}\nLabel:", "target": "label", "label_set": LABELS[:2], "top_k": 2, "budget": 6, "k": 4}
SECONDS = 240.0


@pytest.fixture(scope="module")
def composing(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server over adapters of every kind, with a key that may use two of them."""
    root = tmp_path_factory.mktemp("composing")
    file = root / "keys.json"
    keys = {name: add_key(file, name, ["infer", "publish"], adapters) for name, adapters in (("all", None), ("ann", ["plain", "pair", "ann*"]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        patch.setenv("ATOLL_KERNEL", "plain")  # compiling another would take longer than the test
        with serving(served_base, fill_kinds(root, served_base), keys_file=file, compose={"nice": 0}) as running:
            running.keys.update(keys)
            yield running


def watched(live: Live, key: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every state of a job that was told, to its end."""
    accepted = live.post("/compose", body, key=key)
    assert accepted.status_code == 202, accepted.text
    url, headers = live.url + accepted.headers["location"] + "/events", {"authorization": f"Bearer {live.keys[key]}"}
    with httpx.stream("GET", url, headers=headers, timeout=SECONDS) as stream:
        return [json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line.startswith("data:")]


def test_examples_become_an_adapter_with_controls_that_answers_at_once(composing: Live) -> None:
    """The report has the contestants, the manifest the parents, and the next request the new adapter."""
    *before, job = watched(composing, "all", {"name": "mood", "examples": ROWS, "test": ROWS[:2], "seeds": 2, **BODY})
    assert (job["state"], job["error"]) == ("finished", None), job
    result = job["result"]
    assert result["adapter"] == "mood@1"
    assert {weight["name"] for weight in result["weights"]} <= {"plain@1", "sentiment@1", "pair@1"}
    assert all(weight["digest"] == composing.digest(weight["name"]) for weight in result["weights"])
    report = result["report"]
    assert {"base", "composed", "best single", "uniform"} <= {line["name"] for line in report["lines"]}
    assert len(report["seeds"]) == 2
    assert any("ReFT" in warning for warning in result["warnings"])
    assert {each["state"] for each in before} <= {"queued", "running"}
    assert len({each["stage"] for each in before}) > 3
    [listed] = [each for each in composing.get("/adapters", key="all").json()["adapters"] if each["name"] == "mood"]
    assert (listed["kind"], listed["digest"]) == ("composed", result["digest"])
    assert [parent["name"] for parent in listed["parents"]] == [weight["name"] for weight in result["weights"]]
    hub = composing.service.hub
    assert hub is not None
    [run], [score] = hub.runs(digest=result["digest"]), hub.scores(result["digest"])
    assert (run.kind, run.status, run.name) == ("compose", "finished", "mood")
    assert run.cost is not None and 0 < run.cost["seconds"] <= (run.seconds or 0) and run.cost["peak_memory_bytes"] > 0
    assert (score.metric, score.n) == (report["metric"], 2)
    labelled = composing.post("/classify", {"inputs": "sun", "parameters": {"adapter_id": "mood"}}, key="all")
    assert labelled.status_code == 200, labelled.text


def test_a_key_with_an_allow_list_gets_an_adapter_of_its_own_adapters(composing: Live) -> None:
    """Retrieval over the whole hub would tell, by the report, what others have."""
    job = watched(composing, "ann", {"name": "ann-mood", "examples": ROWS, "controls": False, **BODY})[-1]
    assert job["state"] == "finished", job
    assert {weight["name"] for weight in job["result"]["weights"]} <= {"plain@1", "pair@1"}
    text = json.dumps(job)
    assert not any(other in text for other in ("sentiment", "edits@", "judge", "both@", "atoll-compose-"))
    assert job["result"]["report"]["candidates"] == 2


def test_a_mistake_that_only_the_process_can_see_is_one_sentence(composing: Live) -> None:
    """What is left of the whole hub, where nobody names adapters."""
    hub = composing.service.hub
    assert hub is not None
    names = [version.name for version in hub.list()]
    job = watched(composing, "all", {"name": "mood", "examples": ROWS, "exclude": names, **BODY})[-1]
    assert (job["state"], job["error"]["code"]) == ("failed", "config_error")
    assert "excluded" in job["error"]["message"]
    assert hub.runs(status="failed")[0].message == job["error"]["message"]


def test_a_real_composition_can_be_cancelled(composing: Live) -> None:
    """Wherever it is: loading, ranking, searching."""
    body = {"name": "never", "examples": ROWS, "seeds": 10, **BODY, "budget": 2000}
    accepted = composing.post("/compose", body, key="all")
    url, headers = composing.url + accepted.headers["location"], {"authorization": f"Bearer {composing.keys['all']}"}
    with httpx.stream("GET", url + "/events", headers=headers, timeout=SECONDS) as stream:
        told = (json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line.startswith("data:"))
        assert any(each["stage"] not in ("", "starting") for each in told)
        gone = httpx.delete(url, headers=headers, timeout=SECONDS).json()
        assert list(told)[-1] == gone
    assert (gone["state"], gone["result"]) == ("cancelled", None)
    assert composing.get("/adapters/never", key="all").status_code == 404
