"""The soak itself: what it compares and counts, and half a minute of it on the tiny base."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def soaking() -> Iterator[None]:
    """The bench's folder on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


def test_a_name_means_what_it_may_have_meant_meanwhile(soaking: None) -> None:
    """Too little and right answers are called wrong; too much and wrong ones are called right."""
    from soaking.operators import History, Published

    history = History()
    history._all += [Published(2, 1, sent=10.0, done=11.0), Published(3, 2, sent=20.0, done=None)]
    assert history.possible(5.0, 9.0) == (0,)
    assert history.possible(5.0, 10.5) == (0, 1)
    assert history.possible(10.5, 12.0) == (0, 1)
    assert history.possible(12.0, 15.0) == (1,)
    assert history.possible(12.0, 30.0) == (1, 2)


def test_every_question_has_a_body_on_each_of_its_routes(soaking: None) -> None:
    """The pool must reach every route, adapter, merge and way of sampling, or the soak leaves something out."""
    from soaking.cases import MERGES, make_cases

    good = [f"a{number:02d}" for number in range(18)]
    cases = make_cases(good, seed=3)
    assert {route for case in cases for route in case.routes} == {
        *("generate", "generate_stream", "root", "predibase", "completions", "chat", "embed", "embeddings", "classify")
    }
    assert {case.adapter for case in cases} >= {None, *good, "moving", "labels"}
    assert len({json.dumps(case.merge) for case in cases if case.merge}) == len(MERGES)
    for case in cases:
        for route in case.routes:
            path, body = case.body(route)
            assert path.startswith("/")
            json.dumps(body)
    assert any(case.schema for case in cases)
    assert make_cases(good, seed=3) == cases


def _native(texts: list[str], generated: str) -> dict[str, Any]:
    tokens = [{"id": number, "text": text, "logprob": -1.0, "special": False} for number, text in enumerate(texts)]
    return {"generated_text": generated, "details": {"finish_reason": "length", "generated_tokens": len(texts), "tokens": tokens}}


def test_a_reply_that_contradicts_itself_is_a_finding(soaking: None) -> None:
    """The tokens' texts are the text; generated_text stands in the last event of a stream; OpenAI's stream says why it ended."""
    from soaking.reading import Malformed, read_reply, read_stream

    assert read_reply("generate", _native(["a", "b"], "ab")).text == "ab"
    with pytest.raises(Malformed):
        read_reply("generate", _native(["a", "b"], "abc"))
    chunk = {"choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}], "usage": None}
    with pytest.raises(Malformed):
        read_stream("completions", [chunk], whole=True)
    assert read_stream("completions", [chunk], whole=False).text == "a"
    with pytest.raises(Malformed):
        read_reply("chat", {"choices": []})


def _look(**changes: Any) -> dict[str, Any]:
    """What a server at rest says of itself."""
    zero = dict.fromkeys(("tickets", "places", "keys_with_places", "holds", "users", "loading", "looking", "given_up"), 0)
    stats = {"running": 0, "waiting": 0, "adapters_in_use": 0, "pages_total": 9, "pages_free": 9}
    return {**zero, "task_names": ["Server.serve"], "stats": stats} | changes


def test_whatever_is_left_is_a_finding(soaking: None) -> None:
    """One page, hold, place, task or file a request would be thousands by the evening."""
    from soaking.leaks import growth, left_at_end, left_behind, log_problems
    from soaking.process import Usage

    rest = _look()
    assert left_behind(rest, rest) == []
    assert left_behind(rest, _look(stats={**rest["stats"], "pages_free": 8})) == ["left behind: 1 pages"]
    assert left_behind(rest, _look(holds=2, task_names=["Server.serve", "stream"])) == ["left behind: 2 holds", "left behind: 1 tasks stream"]
    assert left_at_end(rest, []) == []
    assert left_at_end(_look(places=1), ["atoll-upload-x"]) == ["after the end: 1 places", "temporary files are left: atoll-upload-x"]
    clean = "05:17:56 warning atoll.engine.engine: request s41 failed: an error of its adapter\nstopped"
    assert log_problems(clean) == []
    assert len(log_problems(clean + "\n05:18:07 error uvicorn.error: Exception in ASGI application\nTraceback (most recent call last):")) == 2
    samples = [(float(number), Usage(100 << 20, 200 << 20, 20)) for number in range(16)]
    leaking = [(at, Usage(usage.anonymous_bytes + number * (20 << 20), 0, 20)) for number, (at, usage) in enumerate(samples)]
    assert growth(samples, [], 0)["bounded"] and growth(samples, [], 0)["growth_mb"] == 0
    assert not growth(leaking, [], 0)["bounded"]
    assert growth(leaking, [(0.0, 0), (12.0, 200 << 20)], 0)["bounded"], "what adapters take is no leak"
    assert not growth(leaking, [(0.0, 200 << 20), (12.0, 0)], 0)["bounded"], "and what they give back hides none"
    assert growth(samples[:3], [], 0) == {}


@pytest.mark.slow
def test_an_answer_that_differs_in_anything_is_wrong(soaking: None, tmp_path: Path) -> None:
    """The comparison itself: a soak that calls everything right proves nothing."""
    from dataclasses import replace

    from soaking.cases import MOVING, make_cases
    from soaking.reference import Reference, Seen
    from soaking.world import make_world

    world = make_world("tiny", tmp_path)
    cases = make_cases(world.good, seed=0)
    reference = Reference(world, cases)
    moving = next(case for case in cases if case.adapter == MOVING and case.kind == "text" and case.sampling["max_new_tokens"] >= 8)
    text = next(case for case in cases if case.adapter == "a03" and case.kind == "text" and case.sampling["max_new_tokens"] >= 8)
    right, _ = reference.answer(text.number, None)
    assert right.token_ids is not None and right.logprobs is not None
    assert reference.verdict(Seen(text.number, right)) == "right"
    assert reference.verdict(Seen(text.number, replace(right, token_ids=None, logprobs=None, num_tokens=None))) == "right"
    assert reference.verdict(Seen(text.number, replace(right, text=right.text[:3], token_ids=None, logprobs=None, whole=False))) == "right"
    for changes in (
        {"text": right.text + "x"},
        {"finish": "stop" if right.finish == "length" else "length"},
        {"token_ids": (*right.token_ids[:-1], right.token_ids[-1] ^ 1)},
        {"logprobs": (right.logprobs[0] + 0.01, *right.logprobs[1:])},
        {"num_tokens": len(right.token_ids) + 1},
        {"text": "x" + right.text, "whole": False},
    ):
        assert reference.verdict(Seen(text.number, replace(right, **changes))) == "wrong", changes
    answers = [reference.answer(moving.number, content)[0] for content in range(len(world.contents))]
    assert len(set(answers)) == len(answers), "contents that answer alike would hide a stale one"
    assert reference.verdict(Seen(moving.number, answers[1], contents=(0, 1))) == "right"
    assert reference.verdict(Seen(moving.number, answers[1], contents=(0, 2))) == "wrong"
    for kind in ("embed", "classify"):
        case = next(case for case in cases if case.kind == kind and case.adapter != MOVING)
        found, _ = reference.answer(case.number, None)
        other, _ = reference.answer(next(each.number for each in cases if each.kind == kind and each != case and each.adapter != MOVING), None)
        assert reference.verdict(Seen(case.number, found)) == "right"
        assert reference.verdict(Seen(case.number, other)) == "wrong"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_a_minute_of_everything_leaves_the_server_right_and_clean(tmp_path: Path) -> None:
    """Wrong answers, leaks, errors of ours, a dirty log or a server that does not drain: each fails the soak."""
    command = [sys.executable, str(BENCH / "soak.py"), "--base", "tiny", "--minutes", "0.5", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"], done.stderr[-6000:]
    assert done.returncode == 0
    assert result["answers"] > 100
    assert result["integrity_checks"] > 5
    assert result["drain"]["answered"] == result["drain"]["inside"]
