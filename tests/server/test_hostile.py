"""What no client library would send: bytes on a socket, numbers and nestings without measure, names that are paths or headers.

After each of them the server must answer the next request as if nothing had been. Waiting is bounded by timeouts of the test, never asserted.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.server.live_server import Live

from atoll.http.body import BodyLimit

SECONDS = 60.0  # after which a test gives up
JSON_TYPE = "Content-Type: application/json"
LONG = {"inputs": "once upon", "parameters": {"max_new_tokens": 12, "ignore_eos_token": True, "details": True}}


@pytest.fixture(autouse=True)
def alive(live: Live) -> Iterator[None]:
    """Whatever a test did, the server answers afterwards and its engine's accounts add up."""
    yield
    assert live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200
    until(lambda: live.service.stats()["active_requests"] == 0)
    live.run(lambda engine: engine.check())
    assert live.service.failed is None


def until(what: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    give_up = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.005)


@contextmanager
def connected(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=SECONDS) as connection:
        yield connection


def request(path: str, body: Any = None, *headers: str, method: str = "POST") -> bytes:
    """A whole request as bytes. body: JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", JSON_TYPE, f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


def replies(connection: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """(status, headers, body) of that many replies on one connection, read as HTTP says; fewer if the server hangs up."""
    found, reader = [], connection.makefile("rb")
    for _ in range(count):
        line = reader.readline()
        if not line:
            break
        headers: dict[str, str] = {}
        while (header := reader.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(reader.readline(), 16):
                body += reader.read(size)
                reader.readline()
            reader.readline()
        else:
            body = reader.read(int(headers.get("content-length", 0)))
        found.append((int(line.split()[1]), headers, body))
    return found


def ask(live: Live, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """The reply to bytes on a connection of their own; (0, {}, b"") if the server hung up instead."""
    with connected(live) as connection:
        connection.sendall(raw)
        return next(iter(replies(connection, 1)), (0, {}, b""))


def events(body: bytes) -> list[Any]:
    return [json.loads(line.removeprefix(b"data:")) for line in body.split(b"\n") if line.startswith(b"data:")]


# Bodies


@pytest.mark.parametrize(
    "value",
    [
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        "1" + "0" * 400,
        "1" + "0" * 5000,
        "-1e-400",
        "0.1e1",
        "18446744073709551616",
        '"1"',
        "true",
        "[]",
    ],
    ids=lambda value: value[:24],
)
def test_a_number_is_taken_or_refused_whatever_it_looks_like(live: Live, value: str) -> None:
    """JSON's numbers have no limits, and Python reads some that are not JSON's."""
    for field in ("max_new_tokens", "temperature", "top_k", "top_p", "typical_p", "seed", "repetition_penalty", "truncate", "best_of"):
        status, headers, body = ask(live, request("/generate", f'{{"inputs": "a", "parameters": {{"{field}": {value}}}}}'.encode()))
        assert status in (200, 422), (field, status, body[:200])
        assert headers["content-type"] == "application/json"
    for field in ("max_tokens", "temperature", "n", "seed", "logprobs", "top_k", "presence_penalty"):
        status, _, body = ask(live, request("/v1/completions", f'{{"prompt": "a", "{field}": {value}}}'.encode()))
        assert status in (200, 400), (field, status, body[:200])


def _deep(levels: int, around: str = "[]") -> str:
    return around[0] * levels + around[1] * levels


@pytest.mark.parametrize(
    "body",
    [
        '{"inputs": "a", "parameters": ' + _deep(100_000) + "}",
        '{"inputs": "a", "parameters": {"fields": {"x": ' + _deep(5_000) + "}}}",
        '{"inputs": "a", "parameters": {"stop": ' + json.dumps(["x"] * 100_000) + "}}",
        '{"inputs": "a", "parameters": {"stop": ["' + "x" * 1_000_000 + '"]}}',
        '{"inputs": "' + "a" * 1_000_000 + '"}',
        '{"inputs": "a", "parameters": {"merged_adapters": {"ids": ' + json.dumps(["plain"] * 100_000) + ', "weights": [1]}}}',
        '{"inputs": "a", "parameters": {"adapter_id": "' + "x" * 1_000_000 + '"}}',
        '{"inputs": "a", "parameters": {"response_format": {"type": "json_object", "schema": ' + '{"items":' * 300 + "{}" + "}" * 300 + "}}}",
        '{"inputs": "a", "parameters": {"response_format": {"schema": {"enum": ' + json.dumps([str(n) for n in range(50_000)]) + "}}}}",
        '{"inputs": "a", "parameters": {"response_format": {"schema": {"type": "string", "pattern": "((a{0,999}){0,999}){0,999}"}}}}',
        '{"inputs": "a", "parameters": {"response_format": {"schema": {"$ref": "#"}}}}',
        '{"inputs": "a", "parameters": {"response_format": {"schema": {"$ref": "http://127.0.0.1:1/x"}}}}',
        '{"inputs": "a", "parameters": {"response_format": {"schema": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#"}}}}}}',
    ],
    ids=lambda body: body[:20] + body[30:80],
)
def test_a_body_without_measure_is_refused_or_answered(live: Live, body: str) -> None:
    """Nothing that a request can make large may take the server with it, nor the thread that computes for everybody."""
    if '"max_new_tokens"' not in body:
        body = body.replace('"parameters": {', '"parameters": {"max_new_tokens": 2, ', 1)
    status, headers, content = ask(live, request("/generate", body.encode()))
    assert status == 424 if "x" * 999_999 in body and "adapter_id" in body else status in (200, 413, 422), (status, content[:300])
    assert headers["content-type"] == "application/json"
    assert len(content) < 10_000


def test_openai_lists_without_measure_are_refused(live: Live) -> None:
    """The same for what its routes take in lists."""
    many = 100_000
    tool = {"type": "function", "function": {"name": "f"}}
    turn = {"role": "user", "content": "a"}
    for path, body in [
        ("/v1/completions", {"prompt": ["a"] * many}),
        ("/v1/completions", {"prompt": [5] * many}),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * many}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "stop_token_ids": [10**9] * many}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): 1 for n in range(many)}}),
        ("/v1/chat/completions", {"messages": [turn] * 20_000}),
        ("/v1/chat/completions", {"messages": [turn], "tools": [tool] * 20_000}),
        ("/v1/embeddings", {"input": ["a"] * many}),
    ]:
        status, _, content = ask(live, request(path, body))
        assert status in (400, 413), (path, status, content[:300])


def test_a_field_that_stands_twice_is_read_once(live: Live) -> None:
    """Python keeps the last, and so do we, everywhere: no part of the server may see the first."""
    refused = ask(live, request("/generate", b'{"inputs": "a", "inputs": "", "parameters": {"max_new_tokens": 1}}'))
    assert refused[0] == 422
    answered = ask(
        live, request("/generate", b'{"inputs": "", "inputs": "a", "parameters": {"max_new_tokens": 999999999}, "parameters": {"max_new_tokens": 1}}')
    )
    assert answered[0] == 200


@pytest.mark.parametrize(
    "path", ["/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions", "/embed", "/classify_batch", "/v1/embeddings"]
)
@pytest.mark.parametrize(
    "content", [rb'"\ud800"', rb'"\udc00x"', rb'"\u0000"', b'"\xff"', b'"\xc0\xae"', b'"\xed\xa0\x80"', '"\U0010ffff\ufeff"'.encode()]
)
def test_text_that_is_no_text_is_refused(live: Live, path: str, content: bytes) -> None:
    """Half characters, bytes that are no UTF-8, and characters that are merely strange."""
    values: dict[str, Any] = {"messages": b'[{"role": "user", "content": %b}]', "inputs": b"%b", "prompt": b"%b", "input": b"%b"}
    field = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}.get(path, "inputs")
    value = values[field] % content if path != "/classify_batch" else b"[" + content + b"]"
    extra = b', "max_tokens": 1' if path.startswith("/v1/c") else b', "parameters": {"max_new_tokens": 1, "adapter_id": "sentiment"}'
    status, _, body = ask(live, request(path, b'{"%b": %b%b}' % (field.encode(), value, extra)))
    strange = content in (rb'"\u0000"', '"\U0010ffff\ufeff"'.encode())
    assert status == 200 if strange else status in (400, 422), (status, body[:300])


# Names


@pytest.mark.parametrize(
    "name", ["plain\r\nx-evil: 1", "plain\nx-evil: 1", "plain\x00", "plé", "plain, sentiment", "x\u2028y", "%0d%0ax-evil:1", "\x7f", " plain "]
)
def test_a_name_cannot_write_headers(live: Live, name: str) -> None:
    """Replies name their adapter in a header, also on streams, where the header goes out before anything else."""
    for path in ("/generate", "/generate_stream"):
        status, headers, body = ask(live, request(path, {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 1}}))
        assert status in (200, 422, 424), body[:200]
        assert "x-evil" not in headers
    status, headers, body = ask(live, request("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}))
    assert status in (200, 400, 404), body[:200]
    assert "x-evil" not in headers


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%2f..%2fetc",
        "../../../etc/passwd",
        "%252e%252e%252fetc",
        "..%5c..%5cetc",
        "%c0%ae%c0%ae%c0%afetc",
        "%00",
        "plain%00",
        "plain%0d%0ax-evil:%201",
        "%ff",
        "//etc/passwd",
        "plain/../sentiment",
        "%",
        "%zz",
        "a" * 5000,
        "plain?source=local&revision=../..",
        "plain;x",
    ],
)
def test_a_path_names_an_adapter_or_nothing(live: Live, name: str) -> None:
    """Whatever is written in place of a name, in whatever escape: no file of the machine, no 500, no header."""
    for method, path in (
        ("GET", "/adapters/{}"),
        ("GET", "/v1/models/{}"),
        ("POST", "/adapters/{}/load"),
        ("POST", "/{}/deployments/v2/llms/{}/generate"),
    ):
        body = {"source": "local"} if path.endswith("load") else {"inputs": "a"} if path.endswith("generate") else None
        status, headers, content = ask(live, request(path.format(name, name), body, method=method))
        assert status in (200, 400, 404, 405, 414, 422, 424, 431), (method, path, status, content[:300])
        assert "x-evil" not in headers
        assert b"root:" not in content
        if status == 200:
            assert json.loads(content).get("name", "plain") == "plain" or json.loads(content)["id"] == name


# Connections


def test_two_streams_in_one_breath_come_in_order(live: Live) -> None:
    """HTTP/1.1 allows to send the next request before the reply to the last one; the second's bytes must not look like the first one's hanging up."""
    [alone] = [events(ask(live, request("/generate_stream", LONG))[2])]
    other = {**LONG, "inputs": "another"}
    others = events(ask(live, request("/generate_stream", other))[2])
    with connected(live) as connection:
        connection.sendall(request("/generate_stream", LONG) + request("/generate_stream", other) + request("/generate", {**LONG, "inputs": ""}))
        first, second, third = replies(connection, 3)
    assert [first[0], second[0], third[0]] == [200, 200, 422]
    assert events(first[2]) == alone
    assert events(second[2]) == others


def test_a_body_that_never_ends_holds_nothing_but_its_connection(live: Live, serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, by length, drop by drop: nothing is admitted, and after a time the server answers 408 and hangs up."""
    monkeypatch.setattr("atoll.server.app.BodyLimit", functools.partial(BodyLimit, timeout_s=0.3))
    short = serve()
    chunked = f"POST /generate HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n".encode() + b'{"inp\r\n'
    partial = f"POST /generate HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}\r\nContent-Length: 1000\r\n\r\n".encode() + b'{"inputs":'
    for raw in (chunked, partial):
        with connected(short) as connection:
            connection.sendall(raw)
            assert short.service.stats()["active_requests"] == 0
            [(status, headers, body)] = replies(connection, 1)
            assert (status, headers["connection"]) == (408, "close")
            assert json.loads(body)["error_type"] == "timeout"
            assert connection.recv(1) == b""
        with connected(short) as connection:
            connection.sendall(raw)  # and one who leaves in the middle
    assert short.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"\x00\x01\x02\x03" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    ],
    ids=lambda raw: raw[:60].decode("latin-1").replace("\r\n", "|"),
)
def test_what_is_no_http_is_refused_and_the_connection_closed(live: Live, raw: bytes) -> None:
    """By the HTTP layer, before any route; no such connection may stay half-understood."""
    with connected(live) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            found = replies(connection, 3)
        except (ConnectionError, ValueError):  # it hung up at once, or in the middle
            return
    assert all(400 <= status < 500 or status in (200, 505) for status, _, _ in found), found
    assert not [body for status, _, body in found if status == 200 and body]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
def test_a_wrong_method_is_refused_with_what_would_be_right(live: Live, method: str) -> None:
    """On every route that only takes POST."""
    for path in ("/generate", "/generate_stream", "/v1/chat/completions", "/embed", "/adapters/plain/load", "/v1/load_lora_adapter"):
        status, headers, body = ask(live, request(path, None, method=method))
        assert status == (404 if method == "GET" and path == "/adapters/plain/load" else 405), (path, status)
        if status == 405:
            assert "POST" in headers["allow"]
        assert json.loads(body)["error"]


def test_many_connections_that_say_nothing_stop_nobody(live: Live) -> None:
    """Half a request line each: they cost a socket, and no request waits for them."""
    opened = [socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=SECONDS) for _ in range(100)]
    try:
        for connection in opened:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHos")
        assert live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}).status_code == 200
    finally:
        for connection in opened:
            connection.close()


def test_a_crowd_that_hangs_up_leaves_nothing(live: Live) -> None:
    """Streams and whole replies, left at every moment of their lives; afterwards no task of theirs is there."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    before = live.wait(tasks())
    body = {"inputs": "once", "parameters": {"max_new_tokens": 200, "ignore_eos_token": True, "adapter_id": "plain"}}
    for number in range(40):
        path = ("/generate_stream", "/generate", "/embed", "/classify")[number % 4]
        with connected(live) as connection:
            connection.sendall(request(path, {**body, "parameters": {**body["parameters"], "adapter_id": "sentiment"}}))
            if number % 3 == 0:
                connection.recv(1)
            elif number % 3 == 1:
                time.sleep(0.001 * number)
    until(lambda: live.service.stats()["active_requests"] == 0)
    until(lambda: live.wait(tasks()) <= before)
