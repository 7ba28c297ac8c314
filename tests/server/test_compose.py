"""Compositions over HTTP: asked, watched, cancelled, published, refused.

The process that composes is fake_composer.py here; the real one works in test_compose_whole.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server import fake_composer
from tests.server.live_server import Live, fill_hub, serving

from adapters import random_adapter
from atoll.model.adapter_files import write_adapter
from atoll.model.base import Base
from atoll.server import compose_jobs, processes

EXAMPLES = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
SECONDS = 60.0  # after which a test gives up
ASK = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
KEYS: dict[str, dict[str, Any]] = {
    "ann": {"scopes": ["infer", "publish", "admin"], "adapters": ["plain", "pair", "ann/*"]},
    "bob": {"scopes": ["publish"]},
    "root": {"scopes": ["publish", "admin"]},
}


@pytest.fixture(autouse=True)
def composer(served_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, and the adapter that it makes."""
    folder = tmp_path / "made"
    made = random_adapter(served_base.decoder, rank=4, seed=99)
    write_adapter(folder, replace(made, manifest={"format": 1, "kind": "composed", "base": served_base.describe(), "prompt": None, "parents": []}))
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, fake_composer.__file__, str(folder)))
    return folder


@pytest.fixture(scope="module")
def shared(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server for tests that need no settings of their own."""
    root = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base)) as running:
            yield running


@pytest.fixture(scope="module")
def small(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with tight limits."""
    root = tmp_path_factory.mktemp("small")
    limits = {"max_examples": 5, "max_test_rows": 6, "max_row_chars": 600, "max_row_tokens": 100, "max_top_k": 8, "max_seeds": 2, "max_budget": 50}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base), compose={**limits, "max_time_s": 30}) as running:
            yield running


def ask(live: Live, name: str = "new", key: str = "", **body: Any) -> httpx.Response:
    return live.post("/compose", {"name": name, "examples": EXAMPLES, **body}, key=key)


def asked(live: Live, name: str = "new", key: str = "", **body: Any) -> str:
    """The id of a job that was accepted."""
    found = ask(live, name, key, **body)
    assert found.status_code == 202, found.text
    return str(found.json()["id"])


def look(live: Live, job: str, key: str = "") -> dict[str, Any]:
    found: dict[str, Any] = live.get(f"/compose/{job}", key=key).json()
    return found


def until(live: Live, job: str, *states: str, stage: str = "", key: str = "") -> dict[str, Any]:
    """The job once it is in one of the states, and at a stage."""
    give_up = time.monotonic() + SECONDS
    while (found := look(live, job, key))["state"] not in states or not found["stage"].startswith(stage):
        assert time.monotonic() < give_up, found
        time.sleep(0.01)
    return found


def ended(live: Live, job: str, key: str = "") -> dict[str, Any]:
    return until(live, job, "finished", "failed", "cancelled", key=key)


def process_of(live: Live, job: str) -> int:
    """Of a running job that says so in its stage."""
    return int(until(live, job, "running", stage="process")["stage"].split()[1])


def has_ended(process: int) -> bool:
    """Whether it is gone, at once or in the next moments; one that nobody has reaped yet is."""
    give_up = time.monotonic() + SECONDS
    while time.monotonic() < give_up:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def delete(live: Live, job: str, key: str = "") -> httpx.Response:
    return live._ask("DELETE", f"/compose/{job}", key)


def events(stream: httpx.Response) -> Iterator[dict[str, Any]]:
    return (json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line.startswith("data:"))


# From asking to a servable adapter


def test_a_composition_is_accepted_at_once_and_servable_when_it_is_finished(shared: Live) -> None:
    """The job is where its Location says, and what it published answers the next request."""
    accepted = ask(shared, "acme/new", tags=["stable"], message="first")
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == f"/compose/{job['id']}"
    assert (job["name"], job["result"], job["error"]) == ("acme/new", None, None)
    assert job["state"] in ("queued", "running")
    done = ended(shared, job["id"])
    assert (done["state"], done["error"]) == ("finished", None)
    result = done["result"]
    assert result["adapter"] == "acme/new@1"
    assert [(weight["name"], weight["weight"]) for weight in result["weights"]] == [("plain@1", 0.5), ("sentiment@1", 0.5)]
    assert result["report"]["task"] == "new"
    assert shared.service.hub is not None
    version = shared.service.hub.resolve("acme/new:stable")
    assert (version.digest, version.message) == (result["digest"], "first")
    assert shared.post("/generate", {**ASK, "parameters": {**ASK["parameters"], "adapter_id": "acme/new"}}).status_code == 200
    assert shared.get("/adapters/acme/new").json()["kind"] == "composed"


def test_a_name_that_there_is_gets_a_new_version(shared: Live) -> None:
    """As publishing does; nothing is overwritten."""
    assert ended(shared, asked(shared, "plain"))["result"]["adapter"] == "plain@2"


def test_jobs_run_one_after_the_other_in_the_order_in_which_they_came(shared: Live) -> None:
    """Two at once would take two cores from the server."""
    first = asked(shared, "slow")
    others = [asked(shared, f"turn{number}") for number in range(2)]
    process_of(shared, first)
    assert [look(shared, job)["state"] for job in others] == ["queued", "queued"]
    assert [job["id"] for job in shared.get("/compose").json()["jobs"]][:3] == [*reversed(others), first]
    assert delete(shared, first).json()["state"] == "cancelled"
    ends = [ended(shared, job) for job in others]
    assert [end["state"] for end in ends] == ["finished", "finished"]
    assert ends[0]["started"] + ends[0]["seconds"] <= ends[1]["started"] + 0.01  # seconds are rounded


def test_events_tell_of_every_stage_and_end_with_the_job(shared: Live) -> None:
    """The same object as GET gives, so a client needs one reader."""
    job = asked(shared, "slow")
    with httpx.stream("GET", f"{shared.url}/compose/{job}/events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = events(stream)
        assert any(each["stage"].startswith("process") for each in told)
        assert delete(shared, job).status_code == 200
        assert list(told)[-1] == look(shared, job)
    with httpx.stream("GET", f"{shared.url}/compose/{job}/events", timeout=60) as stream:
        assert [each["state"] for each in events(stream)] == ["cancelled"]


def test_the_process_gets_rows_in_a_folder_of_its_own_and_no_secrets(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads files that strangers published: it must not have the server's tokens, nor its cores."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("ATOLL_PRICE_PER_HOUR", "2")
    live = serve(compose={"nice": 7, "threads": 3})
    rows = [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}]
    job = asked(live, examples=rows, template="{text}?", target="label", top_k=2, bounds=[-1, 1], exclude=["pair"], k=1, controls=False)
    report = ended(live, job)["result"]["report"]
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & set(report["environment"])
    assert {"PATH", "ATOLL_HOME", "OMP_NUM_THREADS", "ATOLL_PRICE_PER_HOUR"} <= set(report["environment"])
    assert [json.loads(line) for line in report["rows"].splitlines()] == rows
    request = report["request"]
    assert request["nice"] == 7
    assert not Path(request["root"]).exists()
    config = request["config"]
    assert (config["base"], config["controls"], config["data"]["template"]) == (live.base.name, False, "{text}?")
    settings = config["compose"]
    assert (settings["top_k"], settings["k"], settings["bounds"], settings["exclude"], settings["adapters"]) == (2, 1, [-1.0, 1.0], ["pair"], [])
    assert (settings["dtype"], settings["device"], settings["time_s"]) == ("float32", "cpu", 600.0)


# Cancelling


def test_cancelling_ends_the_process_and_publishes_nothing(shared: Live) -> None:
    """Politely first; the answer comes when it is over."""
    job = asked(shared, "slow")
    process = process_of(shared, job)
    gone = delete(shared, job)
    assert (gone.status_code, gone.json()["state"], gone.json()["result"]) == (200, "cancelled", None)
    assert has_ended(process)
    assert shared.get("/adapters/slow").status_code == 404
    assert delete(shared, job).json()["state"] == "cancelled"  # again changes nothing


def test_what_does_not_end_when_asked_is_killed_with_all_that_it_started(shared: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that outlives its parent would take a core for good."""
    monkeypatch.setattr(compose_jobs, "CANCEL_S", 0.1)
    job = asked(shared, "stubborn")
    helper = process_of(shared, job)
    assert delete(shared, job).json()["state"] == "cancelled"
    assert has_ended(helper)


def test_a_waiting_job_is_cancelled_without_having_begun(shared: Live) -> None:
    """And those behind it move up."""
    jobs = [asked(shared, name) for name in ("slow", "slow", "behind")]
    assert delete(shared, jobs[1]).json()["started"] is None
    assert look(shared, jobs[0])["state"] == "running"
    delete(shared, jobs[0])
    assert ended(shared, jobs[2])["state"] == "finished"


def test_every_job_that_has_begun_is_a_run_of_the_hub(serve: Callable[..., Live]) -> None:
    """`atoll runs` is where an operator looks for what a server has computed, and what it cost."""
    live = serve(compose={"job_s": 5.0})
    hub = live.service.hub
    assert hub is not None
    done = ended(live, asked(live, "acme/fine"))
    for name in ("wrong", "crash"):
        ended(live, asked(live, name))
    slow, waiting = asked(live, "slow"), asked(live, "waiting")
    process_of(live, slow)
    for job in (waiting, slow):  # the first has not begun, so it is no run
        delete(live, job)
    late = ended(live, asked(live, "stubborn"))
    runs = {run.name: run for run in hub.runs()}
    assert {name: run.status for name, run in runs.items()} == {
        "acme/fine": "finished",
        "wrong": "failed",
        "crash": "failed",
        "slow": "interrupted",
        "stubborn": "failed",
    }
    assert {run.kind for run in runs.values()} == {"compose"}
    assert (runs["acme/fine"].digest, runs["acme/fine"].cost) == (done["result"]["digest"], fake_composer.COST)
    assert (runs["slow"].message, runs["slow"].digest, runs["slow"].cost) == ("cancelled", None, None)
    assert runs["wrong"].message == "examples.jsonl:1: no"
    assert runs["stubborn"].message == late["error"]["message"]
    assert all((run.seconds or 0) > 0 and run.finished is not None for run in runs.values())
    assert "secret" not in runs["crash"].message


def test_a_ledger_that_refuses_holds_nothing_up(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published is so, and the next job has its turn."""
    live = serve()
    hub = live.service.hub
    assert hub is not None

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(hub, "record_run", refused)
    assert ended(live, asked(live, "fine"))["result"]["adapter"] == "fine@1"
    assert ended(live, asked(live, "wrong"))["state"] == "failed"
    assert ended(live, asked(live, "fine"))["state"] == "finished"
    assert "published as fine@1, but not in the ledger" in caplog.text


def test_a_composition_that_takes_too_long_has_failed(serve: Callable[..., Live]) -> None:
    """One that hangs must not hold the queue for good."""
    live = serve(compose={"job_s": 0.5})
    job = ended(live, asked(live, "stubborn"))
    assert (job["state"], job["error"]["code"]) == ("failed", "timed_out")
    assert "0.5 s" in job["error"]["message"]


def test_a_server_that_stops_cancels_what_runs_and_what_waits(serve: Callable[..., Live]) -> None:
    """Nobody would read what they make; whoever watches is told."""
    live = serve()
    running, waiting = (asked(live, "slow") for _ in range(2))
    process = process_of(live, running)
    with httpx.stream("GET", f"{live.url}/compose/{running}/events", timeout=60) as stream:
        told = events(stream)
        next(told)
        live.wait(live.service.stop(0.0))
        last = list(told)[-1]
    assert (last["state"], last["error"]["code"]) == ("cancelled", "unavailable")
    assert look(live, waiting)["state"] == "cancelled"
    assert has_ended(process)
    assert live.service.hub is not None
    assert [(run.status, run.message) for run in live.service.hub.runs()] == [("interrupted", "the server stopped")]
    refused = ask(live)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")


# Failing


@pytest.mark.parametrize(
    ("name", "code", "said", "logged"),
    [
        ("wrong", "data_error", "examples.jsonl:1: no", ""),
        ("gone", "adapter_not_found", "no longer there", ""),
        ("crash", "crashed", "broke off", "secret words for the log"),
        ("killed", "crashed", "want of memory", "status -9"),
        ("chatty", "crashed", "broke off", "too long"),
    ],
)
def test_a_failure_is_a_sentence_and_its_details_stand_in_the_log(
    shared: Live, caplog: pytest.LogCaptureFixture, name: str, code: str, said: str, logged: str
) -> None:
    """A user's mistake is told to the user; a crash may quote other people's data."""
    job = ended(shared, asked(shared, name))
    assert (job["state"], job["result"], job["error"]["code"]) == ("failed", None, code)
    assert said in job["error"]["message"]
    assert "secret" not in json.dumps(job)
    assert logged in caplog.text
    assert ended(shared, asked(shared, "after"))["state"] == "finished"


def test_what_could_not_be_served_is_not_published(shared: Live, composer: Path) -> None:
    """The adapter is read against the base before the hub takes it, whoever made it."""
    (composer / "adapter_model.safetensors").write_bytes(b"\0" * 99)
    job = ended(shared, asked(shared, "broken"))
    assert (job["state"], job["error"]["code"]) == ("failed", "adapter_format_error")
    assert "/tmp" not in json.dumps(job)
    assert shared.get("/adapters/broken").status_code == 404


def test_a_composer_that_cannot_start_is_a_failure_of_ours(shared: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose details nobody sees but the log."""
    monkeypatch.setattr(processes, "COMMAND", ("/nowhere/python",))
    job = ended(shared, asked(shared))
    assert (job["state"], job["error"]["code"]) == ("failed", "internal")
    assert "nowhere" not in json.dumps(job)


# Bounds


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "name is missing"),
        ({"name": "new"}, "examples is missing"),
        ({"name": "new", "examples": []}, "examples is []: must not be empty"),
        ({"name": "new", "examples": "rows.jsonl"}, "must be a list, but this is text"),
        ({"name": "new", "examples": [["a", "b"]]}, "examples[0] is"),
        ({"name": "new", "examples": [{"prompt": "a"}]}, "examples, row 1"),
        ({"name": "new", "examples": [*EXAMPLES, {"prompt": "a", "completion": " "}]}, "examples, row 3"),
        ({"name": "new", "examples": [{"q": "a", "a": "b"}], "template": "{q}"}, "answer"),
        ({"name": "new", "examples": [{"q": "a", "a": "b"}], "template": "{q.x}", "target": "a"}, "template"),
        ({"name": "new", "examples": EXAMPLES, "test": [{"prompt": "a"}]}, "test, row 1"),
        ({"name": "new", "examples": EXAMPLES * 4}, "at most 5 are taken"),
        ({"name": "new", "examples": EXAMPLES, "test": EXAMPLES * 4}, "at most 6 are taken"),
        ({"name": "new", "examples": [{"prompt": "a" * 600, "completion": "b"}]}, "characters"),
        ({"name": "new", "examples": [{"q": "a" * 90, "a": "b"}], "template": "{q}" * 10, "target": "a"}, "characters"),
        ({"name": "new", "examples": [{"prompt": "é" * 60, "completion": "b"}]}, "tokens"),
        ({"name": "new", "examples": EXAMPLES, "test": [{"prompt": "é" * 60, "completion": "b"}]}, "tokens"),
        ({"name": "new", "examples": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 6}]}, "at most 5"),
        ({"name": "new", "examples": EXAMPLES, "top_k": 9}, "`top_k`"),
        ({"name": "new", "examples": EXAMPLES, "top_k": 0}, "top_k is 0: must be at least 1"),
        ({"name": "new", "examples": EXAMPLES, "top_k": True}, "top_k is True: must be a number"),
        ({"name": "new", "examples": EXAMPLES, "seeds": 4}, "`seeds`"),
        ({"name": "new", "examples": EXAMPLES, "budget": 9999}, "`budget`"),
        ({"name": "new", "examples": EXAMPLES, "time_s": 9999}, "`time_s`"),
        ({"name": "new", "examples": EXAMPLES, "k": 3}, "k is 3"),
        ({"name": "new", "examples": EXAMPLES, "method": "magic"}, "method"),
        ({"name": "new", "examples": EXAMPLES, "bounds": [1, -1]}, "bounds is"),
        ({"name": "new", "examples": EXAMPLES, "label_set": ["b", "b"]}, "label_set is"),
        ({"name": "new", "examples": EXAMPLES, "label_set": ["b", "e"]}, "examples, row 2"),
        ({"name": "new", "examples": EXAMPLES, "label_set": [str(number) for number in range(1001)]}, "`label_set`"),
        ({"name": "new", "examples": EXAMPLES, "dtype": "float32"}, "dtype is not a key"),
        ({"name": "new", "examples": EXAMPLES, "path": "/etc/passwd"}, "path is not a key"),
        ({"name": "new", "examples": EXAMPLES, "test": EXAMPLES, "metric": "pass_at_1"}, "not allowed here"),
        ({"name": "new", "examples": EXAMPLES, "exclude": ["../x"]}, "'../x'"),
        ({"name": "new", "examples": EXAMPLES, "tags": ["1.0"]}, "tag"),
        ({"name": "../new", "examples": EXAMPLES}, "'../new'"),
        ({"name": "base", "examples": EXAMPLES}, "'base'"),
        ({"name": "new", "examples": EXAMPLES, "adapters": ["nope"]}, "no adapter 'nope'"),
        ({"name": "new", "examples": EXAMPLES, "from": ["nope"]}, "no adapter 'nope'"),
        ({"name": "new", "examples": EXAMPLES, "from": "plain"}, "from is 'plain': must be a list"),
        ({"name": "new", "examples": EXAMPLES, "from": ["plain"], "adapters": ["pair"]}, "both are given"),
        ({"name": "new", "examples": EXAMPLES, "adapters": ["a"] * 257}, "must have at most 256 entries"),
        ({"name": "n" * 194, "examples": EXAMPLES}, "must have at most 193 characters"),
        ({"name": "new", "examples": EXAMPLES, "adapters": ["hf:acme/lora"]}, "'hf:acme/lora' names an adapter of elsewhere"),
        ({"name": "new", "examples": EXAMPLES, "adapters": ["s3://acme/lora"]}, "'s3://acme/lora' names an adapter of elsewhere"),
        ({"name": "new", "examples": EXAMPLES, "adapters": ["plain"], "exclude": ["PLAIN"]}, "every adapter named is excluded"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_what_a_request_multiplies_is_bounded_and_told_at_once(small: Live, body: dict[str, Any], said: str) -> None:
    """Before a process starts, in one sentence about the body, never about a file of ours."""
    before = small.get("/compose").json()
    refused = small.post("/compose", body)
    assert small.get("/compose").json() == before
    assert refused.status_code in (404, 422), refused.text
    assert said in refused.json()["error"]["message"]
    assert "/tmp" not in refused.text and ".jsonl" not in refused.text.replace("rows.jsonl", "")


def test_a_body_that_python_can_hardly_hold_is_refused(small: Live) -> None:
    """Nested beyond every stack, or with numbers that JSON has not."""
    deep = b"[" * 900 + b"]" * 900
    for row in (deep, b"NaN", b"1e999", b"1" + b"0" * 400):
        body = b'{"name": "new", "examples": [{"prompt": "a", "completion": "b", "x": ' + row + b"}]}"
        refused = small.post("/compose", content=body, headers={"content-type": "application/json"})
        assert refused.status_code in (202, 422) if row != deep else refused.status_code == 422, refused.text


def test_a_full_disk_is_told(small: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a 500: asking again may help once there is room."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    refused = small.post("/compose", {"name": "new", "examples": EXAMPLES})
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_error")


def test_the_queue_is_bounded_in_all_and_for_each_key(serve: Callable[..., Live]) -> None:
    """One key must not keep all others waiting for hours."""
    live = serve(compose={"max_waiting": 2, "per_key": 2}, keys={name: {"scopes": ["publish"]} for name in ("ann", "bob")})
    jobs = [ask(live, "slow", key="ann").json()["id"] for _ in range(2)]
    own = ask(live, key="ann")
    assert (own.status_code, own.json()["error"]["code"], own.headers["retry-after"]) == (429, "queue_full", "10")
    assert "this key" in own.json()["error"]["message"]
    assert ask(live, key="bob").status_code == 202
    full = ask(live, key="bob")
    assert full.status_code == 429 and "this key" not in full.text
    for job in jobs:
        assert delete(live, job, key="ann").status_code == 200
    assert ask(live, key="ann").status_code == 202


def test_only_the_newest_results_of_a_key_are_kept(serve: Callable[..., Live]) -> None:
    """Reports would fill the memory of a server that runs for months."""
    live = serve(compose={"kept_per_key": 2})
    jobs = [ask(live, f"new{number}").json()["id"] for number in range(4)]
    ended(live, jobs[-1])
    assert [job["id"] for job in live.get("/compose").json()["jobs"]] == [jobs[3], jobs[2]]
    assert live.get(f"/compose/{jobs[0]}").status_code == 404


def test_rows_go_when_the_job_is_over_or_refused(serve: Callable[..., Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are other people's data, and disks fill."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    live = serve()
    jobs = [ask(live, name).json()["id"] for name in ("slow", "slow", "crash")]
    assert ask(live, examples=[{"prompt": "a"}]).status_code == 422
    assert len(list(scratch.iterdir())) == 3
    jobs.append(ask(live, "new").json()["id"])
    for job in jobs[:2]:
        delete(live, job)
    for job in jobs[2:]:
        ended(live, job)
    assert list(scratch.iterdir()) == []


# Who may


def test_a_key_composes_only_adapters_that_it_may_use(serve: Callable[..., Live]) -> None:
    """Neither the process nor its report ever hears of others, nor can a name be told from one that nobody has."""
    live = serve(keys=KEYS)
    done = ended(live, ask(live, "ann/new", key="ann").json()["id"], key="ann")
    assert done["result"]["report"]["request"]["config"]["compose"]["adapters"] == ["pair@1", "plain@1"]
    assert "sentiment" not in json.dumps(done)
    left = ended(live, ask(live, "ann/new", key="ann", exclude=["pair", "sentiment"]).json()["id"], key="ann")
    assert left["result"]["report"]["request"]["config"]["compose"]["adapters"] == ["plain@1"]
    refused = [ask(live, "ann/new", key="ann", adapters=["plain", name]) for name in ("sentiment", "sentimenu")]
    assert [reply.status_code for reply in refused] == [404, 404]
    assert refused[0].text.replace("sentiment", "sentimenu") == refused[1].text
    assert ask(live, "sentiment", key="ann").status_code == 403
    named = ended(live, ask(live, "new", key="bob", **{"from": ["sentiment", "pair@1"]}).json()["id"], key="bob")
    assert [weight["name"] for weight in named["result"]["weights"]] == ["sentiment@1", "pair@1"]
    nothing = ask(live, "ann/x", key="ann", exclude=["plain", "pair", "ann/new"])
    assert nothing.status_code == 404 and "no LoRA adapter" in nothing.json()["error"]["message"]


def test_a_job_of_another_key_does_not_exist(serve: Callable[..., Live]) -> None:
    """Its name alone says what others work at. Whoever administers everything sees everything."""
    live = serve(keys=KEYS)
    job = ask(live, "slow", key="bob").json()["id"]
    for path in ("/compose/{}", "/compose/{}/events"):
        replies = [live.get(path.format(one), key="ann") for one in (job, "0" * 16)]
        assert [reply.status_code for reply in replies] == [404, 404]
        assert replies[0].text.replace(job, "0" * 16) == replies[1].text
    assert delete(live, job, key="ann").status_code == 404
    assert live.get("/compose", key="ann").json()["jobs"] == []
    assert [each["id"] for each in live.get("/compose", key="root").json()["jobs"]] == [job]
    assert delete(live, job, key="root").json()["state"] == "cancelled"
    assert look(live, job, key="bob")["state"] == "cancelled"


def test_what_a_key_may_no_longer_use_leaves_its_old_results(serve: Callable[..., Live]) -> None:
    """An allow-list that was narrowed holds for what is told of the past too."""
    live = serve(keys=KEYS)
    job = ask(live, "new", key="bob").json()["id"]
    assert len(ended(live, job, key="bob")["result"]["weights"]) == 2
    file = live.service.config.keys_file
    assert file is not None
    known = json.loads(file.read_text())
    for record in known["keys"]:
        if record["id"] == "bob":
            record["adapters"] = ["plain"]
    file.write_text(json.dumps(known, indent=1))
    result = look(live, job, key="bob")["result"]
    assert [weight["name"] for weight in result["weights"]] == ["plain@1"]
    assert result["report"] is None


def test_a_key_that_was_revoked_publishes_nothing_more(serve: Callable[..., Live]) -> None:
    """Its jobs may have waited for hours."""
    from atoll.serving.keys import remove_key

    live = serve(keys=KEYS)
    blocking, job = ask(live, "slow", key="root").json()["id"], ask(live, "new", key="bob").json()["id"]
    file = live.service.config.keys_file
    assert file is not None
    remove_key(file, "bob")
    delete(live, blocking, key="root")
    found = ended(live, job, key="root")
    assert (found["state"], found["error"]["code"]) == ("failed", "key_refused")
    assert live.get("/adapters/new", key="ann").status_code == 404


def test_a_server_that_does_not_compose_says_so(serve: Callable[..., Live], served_base: Base, tmp_path: Path) -> None:
    """Turned off, or without a hub: one sentence and the way out."""
    off = ask(serve(compose={"enabled": False}))
    assert (off.status_code, off.json()["error"]["code"]) == (424, "not_offered")
    assert "compose.enabled" in off.json()["error"]["hint"]
    with serving(served_base, None) as live:
        bare = ask(live)
        assert (bare.status_code, bare.json()["error"]["code"]) == (424, "source_refused")
        assert "hub" in bare.json()["error"]["message"]


def test_a_page_of_elsewhere_composes_nothing(serve: Callable[..., Live]) -> None:
    """As with all that changes something here."""
    live = serve()
    body = {"name": "new", "examples": EXAMPLES}
    assert live.post("/compose", body, headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.delete(live.url + "/compose/x", headers={"origin": "https://evil.example"}).status_code == 403
