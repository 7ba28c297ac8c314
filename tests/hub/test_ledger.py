"""Scores and runs: what is recorded is what is read, and a bad figure never enters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from atoll.errors import HubError

DIGEST = "a" * 64


def test_the_newest_score_counts_and_the_history_stays(hub):
    """A leaderboard shows one figure a cell, and anybody may ask how it changed."""
    hub.record_score(DIGEST, "intents", "v1", "accuracy", 0.5, stderr=0.1, n=100, failures=3)
    new = hub.record_score(DIGEST, "intents", "v1", "accuracy", 0.75, n=200, options_value=0.8, details={"seed": 7, "prompt": {"template": "{x}"}})
    hub.record_score("b" * 64, "intents", "v2", "accuracy", 0.1, n=10)
    assert [score.value for score in hub.scores(DIGEST)] == [0.75] and hub.scores(DIGEST)[0] == new
    assert [score.value for score in hub.scores(DIGEST, history=True)] == [0.75, 0.5]
    assert {score.digest[0] for score in hub.scores(task="intents")} == {"a", "b"}
    assert [score.digest[0] for score in hub.scores(task="intents", task_version="v2")] == ["b"]
    assert new.details["prompt"]["template"] == "{x}" and new.created.tzinfo is UTC and new.to_json()["stderr"] is None


@pytest.mark.parametrize("value, more", [(float("nan"), {}), (0.5, {"stderr": float("inf")}), (0.5, {"n": 0}), (0.5, {"failures": 11})])
def test_a_score_that_cannot_be_true_is_refused(hub, value, more):
    """NaN sorts above everything on a leaderboard."""
    with pytest.raises(HubError):
        hub.record_score(DIGEST, "t", "v", "accuracy", value, **{"n": 10, **more})
    with pytest.raises(HubError, match="JSON"):
        hub.record_score(DIGEST, "t", "v", "accuracy", 0.5, n=10, details={"loss": float("nan")})
    assert hub.scores(DIGEST) == ()


def test_scores_outlive_what_they_measured(hub, make):
    """A leaderboard of last month must not lose rows because somebody tidied up."""
    version = hub.publish(make(1), "a")
    hub.record_score(version.digest, "t", "v", "accuracy", 0.5, n=10)
    hub.delete("a")
    hub.gc()
    assert len(hub.scores(version.digest)) == 1


def test_a_run_is_recorded_when_it_starts_and_completed_once(hub):
    """A killed training stays visible as running; a finished one cannot be rewritten."""
    started = datetime(2030, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2)))
    run = hub.record_run("train", {"r": 16}, status="running", started=started, name="a")
    assert hub.runs(name="a")[0].finished is None
    facts = {"started": started, "finished": started, "seconds": 12.5, "digest": DIGEST, "name": "a"}
    done = hub.record_run("train", {"r": 16}, status="finished", run_id=run.id, **facts)
    assert done.id == run.id and hub.runs(digest=DIGEST) == (done,) and done.started == started and hub.runs(kind="compose") == ()
    with pytest.raises(HubError, match="finished"):
        hub.record_run("train", {}, status="failed", started=started, run_id=run.id)
    with pytest.raises(HubError, match="does not exist"):
        hub.record_run("train", {}, status="failed", started=started, run_id=99)
    with pytest.raises(HubError, match="kinds"):
        hub.record_run("cook", {}, status="failed", started=started)
