"""Requests that nobody would write, made from the OpenAPI document: whatever comes back is documented, has its documented form, and is no 500.

Three ways: values that the document allows, values that it does not, and good requests with a field or two of either kind. Examples are always the
same ones; the slow run takes more of them.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, configuration, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from tests.server import fake_composer
from tests.server.live_server import Live, fill_hub, serving

from atoll.model.base import Base
from atoll.server import processes

QUICK, MANY = 5, 60  # examples of each operation in each way
TOKENS = 4  # of an answer: what is asked here is not how long it may be
PROMISED = (501, 503)  # statuses of ours above 500: no encoder is served; no room now
CHECKS = ("status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance")

NATIVE: dict[str, Any] = {"inputs": "hello", "parameters": {"max_new_tokens": TOKENS, "adapter_id": "plain"}}
LABELLED: dict[str, Any] = {"inputs": "hello", "parameters": {"adapter_id": "sentiment"}}
TURNS = [{"role": "user", "content": "hello"}]
GOOD: dict[str, dict[str, Any]] = {
    "/": NATIVE,
    "/invocations": NATIVE,
    "/generate": NATIVE,
    "/generate_stream": NATIVE,
    "/embed": {"inputs": "hello", "parameters": {"adapter_id": "plain"}},
    "/classify": LABELLED,
    "/classify_batch": {**LABELLED, "inputs": ["hello", "you"]},
    "/tokenize": {"inputs": "hello"},
    "/v1/completions": {"model": "plain", "prompt": "hello", "max_tokens": TOKENS},
    "/v1/chat/completions": {"model": "plain", "messages": TURNS, "max_tokens": TOKENS},
    "/v1/embeddings": {"model": "plain", "input": "hello"},
    "/v1/load_lora_adapter": {"lora_name": "nick", "lora_path": "plain"},
    "/v1/unload_lora_adapter": {"lora_name": "nick"},
    "/compose": {"name": "composed", "examples": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}], "top_k": 2},
}


@pytest.fixture(scope="module")
def fuzzed(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that nobody else uses, with every source that needs no network."""
    root = tmp_path_factory.mktemp("fuzzed")
    configuration.set_hypothesis_home_dir(root / "hypothesis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        hub = fill_hub(root, served_base)
        patch.setattr(processes, "COMMAND", (sys.executable, fake_composer.__file__, str(root / "folders" / "plain")))
        with serving(served_base, hub, local_root=root / "folders", max_body_bytes=1 << 16, request_timeout_s=20.0) as running:
            yield running


@pytest.fixture(scope="module")
def operations(fuzzed: Live) -> list[Any]:
    """The operations of the document, in its order."""
    load_all_checks()
    schema = schemathesis.openapi.from_dict(fuzzed.get("/openapi.json").json())
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 30
    return found


class Finder:
    """Sends cases to a server and keeps the first of each kind of failure."""

    def __init__(self, live: Live) -> None:
        self._url = live.url
        self._checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKS]
        assert len(self._checks) == len(CHECKS)
        self.found: dict[tuple[str, str], str] = {}
        self.statuses = Counter[int]()

    def send(self, case: Any) -> None:
        reply = case.call(base_url=self._url)
        self.statuses[reply.status_code] += 1
        shown = f"{reply.status_code} {reply.text[:300]} for {case.as_curl_command()[:400]}"
        if reply.status_code >= 500 and reply.status_code not in PROMISED:
            self.found.setdefault((case.operation.label, "server error"), shown)
        try:
            case.validate_response(reply, checks=self._checks)
        except FailureGroup as group:
            for failure in group.exceptions:
                self.found.setdefault((case.operation.label, type(failure).__name__), f"{failure}: {shown}")

    def explore(self, operation: Any, mode: GenerationMode, count: int, *, overlay: bool = False) -> None:
        """`count` cases of an operation. overlay: only one or two of a case's fields, on top of a good request."""

        @settings(
            max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        @given(operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            if not overlay:
                case.body = _shortened(case.body)
            elif isinstance(case.body, dict):
                case.body = _overlaid(GOOD[operation.path], case.body)
            self.send(case)

        run()

    def check(self) -> None:
        assert not self.found, "\n".join(f"{label}, {kind}: {shown}" for (label, kind), shown in self.found.items())


def _shortened(body: Any) -> Any:
    """The body, without an answer of thousands of tokens where it is a good one."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("parameters"), dict) and "max_new_tokens" not in body["parameters"]:
        return {**body, "parameters": {**body["parameters"], "max_new_tokens": TOKENS}}
    if "parameters" not in body and "inputs" in body:
        return {**body, "parameters": {"max_new_tokens": TOKENS}}
    return body


def _overlaid(good: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """A good body with one or two fields of a drawn one, those of `parameters` counted like the others."""
    draw = random.Random(repr(drawn))
    inner = drawn.get("parameters")
    if isinstance(inner, dict) and inner and isinstance(good.get("parameters"), dict) and draw.random() < 0.8:
        return {**good, "parameters": {**good["parameters"], **_some(inner, draw)}}
    return {**good, **_some(drawn, draw)}


def _some(fields: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    keys = draw.sample(sorted(fields), min(len(fields), draw.randint(1, 2)))
    return {key: fields[key] for key in keys}


def _takes_something(operation: Any, mode: GenerationMode) -> bool:
    """Nothing can be wrong with a request that has no parts."""
    return mode is GenerationMode.POSITIVE or bool(operation.body or operation.query)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
def test_whatever_the_document_allows_or_forbids_is_answered_as_documented(
    fuzzed: Live, operations: list[Any], mode: GenerationMode, count: int
) -> None:
    """A 500 tells a client that the fault is ours and to try again; an undocumented reply breaks clients that were made from the document."""
    finder = Finder(fuzzed)
    for operation in operations:
        if _takes_something(operation, mode):
            finder.explore(operation, mode, count)
    finder.check()
    assert finder.statuses.total() > 20 * QUICK
    assert (finder.statuses[200] > 0) == (mode is GenerationMode.POSITIVE) or finder.statuses[200] < finder.statuses.total() / 2
    fuzzed.run(lambda engine: engine.check())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("count", [2 * QUICK, pytest.param(2 * MANY, marks=pytest.mark.slow)])
def test_a_strange_field_in_a_good_request_is_taken_or_refused(fuzzed: Live, operations: list[Any], mode: GenerationMode, count: int) -> None:
    """Requests that are wrong everywhere are refused at the first field; these get behind it, to the engine."""
    finder = Finder(fuzzed)
    for operation in operations:
        if operation.path in GOOD and operation.method.upper() == "POST":
            finder.explore(operation, mode, count, overlay=True)
    finder.check()
    assert finder.statuses[200] > 0
    fuzzed.run(lambda engine: engine.check())


def test_good_requests_of_this_file_are_good(fuzzed: Live) -> None:
    """Else the test above would find nothing behind the first refusal."""
    for path, body in GOOD.items():
        reply = fuzzed.post(path, body)
        assert reply.status_code == (202 if path == "/compose" else 200), (path, reply.text)
