"""What stands around all routes: who may, bodies that are wrong in every way, methods, documents, and clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.server.live_server import Live

from atoll.http.auth import RULES, Rules
from atoll.http.body import has_half_surrogate, text_problem
from atoll.server import manage
from atoll.server.app import create_app, declared
from atoll.serving.config import ServeConfig
from atoll.serving.keys import Caller
from atoll.serving.service import Service

OPEN = {"/health", "/ping", "/startup"}  # and GET /
EVERYWHERE = ["/generate", "/v1/completions", "/adapters/plain/load", "/compose"]


def _sentence(reply: Any) -> str:
    """The sentence of an error, whatever the protocol; every error is JSON."""
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def _routes(live: Live) -> list[tuple[str, str]]:
    return declared(create_app(Service(live.base, live.service.config)).routes)


def _filled(path: str) -> str:
    for name in ("tenant", "deployment", "model:path", "name:path", "job"):
        path = path.replace("{" + name + "}", "x")
    assert "{" not in path
    return path


# Who may


def test_every_route_says_who_may_use_it(live: Live) -> None:
    """A new route without a rule fails here, and create_app refuses to start with it."""
    rules = Rules({**RULES, **manage.RULES})
    routes = _routes(live)
    assert len(routes) > 30
    assert not [route for route in routes if not rules.has(*route)]
    assert {path for path, method in routes if rules.scope_for(_filled(path), method) is None} == OPEN | {"/"}
    assert rules.scope_for("/", "POST") == "infer"
    assert rules.scope_for("/of/tomorrow", "GET") == "admin"
    assert rules.scope_for("/adapters", "DELETE") == "admin"


def test_every_route_but_health_asks_for_a_key(serve: Callable[..., Live]) -> None:
    """LoRAX and vLLM leave some of theirs open; here each route is asked without a key, with a wrong one, and with one that lacks its scope."""
    live = serve(keys={"infer": {"scopes": ["infer"]}, "publish": {"scopes": ["publish"]}})
    rules = Rules({**RULES, **manage.RULES})
    with httpx.Client(base_url=live.url, timeout=60) as client:

        def ask(method: str, path: str, key: str | None = None) -> httpx.Response:
            return client.request(method, _filled(path), headers={} if key is None else {"authorization": f"Bearer {key}"})

        for path, method in _routes(live):
            scope = rules.scope_for(_filled(path), method)
            if scope is None:
                assert ask(method, path).status_code == 200
                continue
            for key in (None, "wrong"):
                refused = ask(method, path, key)
                assert (path, refused.status_code) == (path, 401)
                assert "key" in _sentence(refused)
            lacking = live.keys["publish" if scope == "infer" else "infer"]
            assert (path, ask(method, path, lacking).status_code) == (path, 403)
            if scope == "infer":
                assert ask(method, path, live.keys["infer"]).status_code not in (401, 403)


def test_a_key_may_come_in_either_header(serve: Callable[..., Live]) -> None:
    """OpenAI's and LoRAX's clients send a bearer, others x-api-key; a body is not read before the key is known."""
    live = serve(keys={"ann": {"scopes": ["infer"]}}, max_body_bytes=1024)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    assert live.post("/generate", body, key="ann").status_code == 200
    assert live.post("/generate", body, headers={"x-api-key": live.keys["ann"]}).status_code == 200
    assert live.post("/generate", body, headers={"authorization": f"Basic {live.keys['ann']}"}).status_code == 401
    assert live.post("/generate", {"inputs": "x" * 5000}).status_code == 401
    assert live.get("/nowhere").status_code == 401
    assert live.get("/nowhere", key="ann").status_code == 404


def test_a_key_with_an_allow_list_sees_nothing_else(serve: Callable[..., Live]) -> None:
    """Another's adapter is answered in the very words of one that does not exist, on every route that names one."""
    live = serve(keys={"ann": {"scopes": ["infer"], "adapters": ["plain"]}})
    parameters: dict[str, Any] = {"max_new_tokens": 1}
    for path in ("/generate", "/generate_stream", "/embed", "/classify"):
        allowed = live.post(path, {"inputs": "a", "parameters": {**parameters, "adapter_id": "plain"}}, key="ann")
        assert allowed.status_code == (501 if path == "/classify" else 200)
        replies = [
            live.post(path, {"inputs": "a", "parameters": {**parameters, "adapter_id": name}}, key="ann") for name in ("sentiment", "sentimenu")
        ]
        assert [reply.status_code for reply in replies] == [424, 424]
        assert replies[0].text.replace("sentiment", "sentimenu") == replies[1].text
    merged = {"ids": ["plain", "sentiment"], "weights": [1, 1]}
    assert live.post("/generate", {"inputs": "a", "parameters": {"merged_adapters": merged}}, key="ann").status_code == 424
    assert live.get("/info", key="ann").json()["adapters"] == 1


def test_a_server_without_keys_answers_to_local_names_only(live: Live) -> None:
    """Else a web page whose name points to 127.0.0.1 could use it from a visitor's browser."""
    for host in ("127.0.0.1:3000", "localhost:1", "[::1]:3000", "box", "host.docker.internal"):
        assert live.get("/health", headers={"host": host}).status_code == 200
    for path in ("/generate", "/health"):
        refused = live.get(path, headers={"host": "evil.example.com"})
        assert refused.status_code == 403
        assert "evil.example.com" in _sentence(refused)


def test_a_bearer_goes_to_the_source_only_where_it_is_no_key(live: Live) -> None:
    """LoRAX hands the bearer on to the adapter's hub; a key of this server must never leave it."""
    from starlette.requests import Request

    from atoll.http.auth import source_token

    request = Request({"type": "http", "headers": [(b"authorization", b"Bearer hf_abc")]})
    assert source_token(request, has_keys=False) == "hf_abc"
    assert source_token(request, has_keys=True) is None


# Bodies


@pytest.mark.parametrize("path", EVERYWHERE)
@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"{", {"content-type": "application/json"}),
        (b"", {"content-type": "application/json"}),
        (b"[1, 2]", {"content-type": "application/json"}),
        (b"null", {"content-type": "application/json"}),
        (b'{"inputs": "a"}', {}),
        (b'{"inputs": "a"}', {"content-type": "text/plain"}),
        (b"\xff\xfe", {"content-type": "application/json"}),
        (b'{"inputs": "\\ud800"}', {"content-type": "application/json"}),
        (b'{"inputs": "\xed\xa0\x80"}', {"content-type": "application/json"}),
        ('{"inputs": "a"}'.encode("utf-16"), {"content-type": "application/json"}),
        (b"[" * 100_000, {"content-type": "application/json"}),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', {"content-type": "application/json"}),
        (b'{"inputs": "a", "parameters": {"seed": 1' + b"0" * 5000 + b"}}", {"content-type": "application/json"}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_is_no_request_is_refused_as_json(live: Live, path: str, content: bytes, headers: dict[str, str]) -> None:
    """axum answers text/plain, on which clients crash; and nothing here may be a 500."""
    reply = httpx.post(live.url + path, content=content, headers=headers, timeout=60)
    if path == "/adapters/plain/load" and (content in (b"", b"null") or b"NaN" in content):
        assert reply.status_code == 200  # its body is optional, and has no such field
        return
    assert reply.status_code in (400, 422), reply.text
    assert _sentence(reply)


def test_half_a_surrogate_pair_is_found_wherever_it_stands() -> None:
    """It is no character: tokenizers raise on it, and databases."""
    for good in (rb'"\ud83d\ude00"', rb'"\\ud800"', rb'"\\\\ud800"', rb'"\u0041\uD83D\uDE00\n"', b'"\xf0\x9f\x98\x80"'):
        assert not has_half_surrogate(good)
        assert text_problem(good) is None
    for bad in (rb'"\ud800"', rb'"\udc00"', rb'"\ud800\n\udc00"', rb'"\\\ud800"', rb'"\uD800x\udc00"', rb'"\ud800\ud800\udc00"'):
        assert has_half_surrogate(bad)


def test_a_large_body_is_refused_before_it_is_read(serve: Callable[..., Live]) -> None:
    """Also one that does not say how large it is."""
    live = serve(max_body_bytes=2048)
    body = json.dumps({"inputs": "x" * 4000}).encode()
    json_type = {"content-type": "application/json"}
    for path, shape in [("/generate", "error_type"), ("/v1/completions", None)]:
        for content in (body, iter([body[:1000], body[1000:]])):
            reply = httpx.post(live.url + path, content=content, headers=json_type, timeout=60)
            assert reply.status_code == 413
            assert "larger than 2048 bytes" in _sentence(reply)
            assert shape is None or reply.json()[shape] == "too_large"
    assert live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).is_success


# Methods and documents


def test_unknown_paths_and_methods(live: Live) -> None:
    """JSON with a way out; a path that exists says what it takes."""
    assert live.get("/nowhere").status_code == 404
    assert live.get("/health/").status_code == 404
    assert "'/v1/nowhere'" in live.get("/v1/nowhere").json()["error"]["message"]
    refused = live.get("/generate")
    assert (refused.status_code, refused.headers["allow"]) == (405, "OPTIONS, POST")
    assert "does not take GET" in _sentence(refused)
    assert set(httpx.options(live.url + "/").headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
    assert httpx.options(live.url + "/generate").status_code == 204
    assert httpx.options(live.url + "/nowhere").status_code == 404


def test_head_is_get_without_its_body(live: Live) -> None:
    """Load balancers ask with HEAD."""
    for path in ("/health", "/", "/info", "/metrics"):
        reply = httpx.head(live.url + path)
        assert (reply.status_code, reply.content) == (200, b"")
    assert httpx.head(live.url + "/nowhere").status_code == 404


def test_the_openapi_document_is_the_same_under_both_names(live: Live) -> None:
    """LoRAX's name and the common one; every route is described, with its errors in the shape of its protocol."""
    document = live.get("/openapi.json").json()
    assert live.get("/api-doc/openapi.json").json() == document
    hidden = {"/docs", "/openapi.json", "/api-doc/openapi.json"}
    assert {path.replace(":path", "") for path, _ in _routes(live)} - hidden == set(document["paths"])
    for path in ("/generate", "/classify", "/tokenize", "/embed"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "401", "403", "408", "413", "422", "424", "429", "503"} <= set(responses)
        assert responses["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert "text/event-stream" in document["paths"]["/generate_stream"]["post"]["responses"]["200"]["content"]
    json.dumps(document, allow_nan=False)


def test_the_documentation_page_needs_nothing_from_elsewhere(live: Live) -> None:
    """It must work without a network, and tell nobody who reads it."""
    page = live.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/generate_stream" in page.text and "decoder_input_details" in page.text
    assert "http://" not in page.text and "https://" not in page.text and "<script" not in page.text


def test_cors_is_off_unless_configured(live: Live, serve: Callable[..., Live]) -> None:
    """A page of another origin may read answers only where the operator said so."""
    asked = {"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in httpx.options(live.url + "/generate", headers=asked).headers
    other = serve(cors_origins=("https://app.example",))
    allowed = httpx.options(other.url + "/generate", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = httpx.options(other.url + "/generate", headers={**asked, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


# Clients that leave


def _until(what: Callable[[], bool]) -> None:
    """Wait, without a bound of its own, for something that must come."""
    while not what():
        time.sleep(0.005)


@pytest.mark.parametrize(("path", "streams"), [("/generate", False), ("/generate_stream", True), ("/v1/completions", True)])
def test_a_client_that_hangs_up_ends_its_request_in_the_engine(serve: Callable[..., Live], path: str, streams: bool) -> None:
    """Else its row is computed to the end for nobody."""
    live = serve()
    native = {"inputs": "a", "parameters": {"ignore_eos_token": True}}
    body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True} if path.startswith("/v1") else native
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    slow = [True]

    def drag(engine: Any) -> None:
        """Keep the engine slow, so that the client leaves in the middle."""
        original = engine.step

        def step() -> Any:
            if slow[0]:
                time.sleep(0.02)
            return original()

        engine.step = step

    live.run(drag)
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + content)
        if streams:
            received = b""
            while b"data:" not in received:
                received += connection.recv(4096)
        else:
            _until(lambda: live.service.stats()["active_requests"] == 1)
    _until(lambda: live.service.stats()["active_requests"] == 0)
    slow[0] = False
    stats = live.run(lambda engine: engine.stats())
    assert stats["finished_cancelled"] == 1
    assert stats["finished_length"] == 0
    live.run(lambda engine: engine.check())


def test_a_server_that_stops_ends_what_runs_and_says_so(serve: Callable[..., Live]) -> None:
    """A stream cut by the end of the server tells its client that the answer is incomplete."""
    live = serve(drain_s=0.0)
    live.run(lambda engine: setattr(engine, "step", _slowed(engine.step)))
    with httpx.stream("POST", live.url + "/generate_stream", json={"inputs": "a", "parameters": {"ignore_eos_token": True}}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        live.wait(live.service.stop(0.0))
        events = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    assert events[-1]["error_type"] == "incomplete_generation"
    refused = live.post("/generate", {"inputs": "a"})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
    assert live.get("/").status_code == 503


def _slowed(step: Callable[[], Any]) -> Callable[[], Any]:
    def slow() -> Any:
        time.sleep(0.01)
        return step()

    return slow


def test_an_engine_failure_is_424_with_its_sentence(serve: Callable[..., Live]) -> None:
    """And on streams an event, after which the stream ends."""
    live = serve()

    def break_it(engine: Any) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the forward broke")

        engine._runner.forward = fail

    live.run(break_it)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 3}}
    whole = live.post("/generate", body)
    assert whole.status_code == 424
    assert whole.json()["error_type"] == "generation"
    assert whole.json()["error"].startswith("Request failed during generation: Server error: ")
    [event] = [json.loads(line.removeprefix("data:")) for line in live.post("/generate_stream", body).text.split("\n") if line]
    assert event["error_type"] == "generation"


def test_a_bug_of_ours_is_a_500_without_its_details(live: Live) -> None:
    """The log has the details; the reply has none, and is JSON like every other."""
    import asyncio

    service = Service(live.base, ServeConfig(base=str(live.base.path)))
    app = create_app(service)

    @app.get("/info2", include_in_schema=False)
    async def broken() -> None:
        raise ZeroDivisionError("secret detail")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/info2")

    reply = asyncio.run(ask())
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error_type"] == "internal"


def test_a_caller_is_nobody_on_open_routes() -> None:
    """Health needs no key, and grants nothing."""
    assert not Caller(scopes=frozenset()).may("infer")
