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
