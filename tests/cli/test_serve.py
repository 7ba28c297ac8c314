"""`atoll serve` and `atoll keys`: what is refused at once, and one server from its start to its last answer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from atoll.serving.keys import Keys

PLAIN = ("--set", "engine.kernel=plain")  # compiling another would take longer than the test


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(atoll, tiny_base_dir):
    """Minutes of loading must not end in "address already in use"."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = atoll("serve", tiny_base_dir, "--port", port)
    assert result.code == 1
    assert result.err.startswith(f"error: port {port} of 127.0.0.1 is in use")
    assert "--port" in result.err
    assert "loading" not in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "needs keys"),
        (("--host", "203.0.113.7", "--keys", "{keys}"), "is not an address of this machine"),
        (("--host", "no such host", "--keys", "{keys}"), "cannot be listened on"),
        (("--keys", "{nowhere}"), "keys file"),
        (("--keys", "{broken}"), "broken.json:2: not valid YAML"),
        (("--local-root", "{nowhere}"), "which is no folder"),
        (("--set", "max_rows=3"), "max_rows"),
        (("--set", "engine.max_rowz=3"), "max_rowz"),
        (("--set", "compose.max_topk=3"), "max_topk"),
        (("--set", "other.thing=3"), "no section 'other'"),
        (("--port", "70000"), "port"),
        (("--adapter", "nope"), "no adapter 'nope'"),
        (("--port", "0", "--set", "engine.kernel=magic"), "kernel"),
    ],
)
def test_a_wrong_option_is_one_sentence(atoll, tiny_base_dir, tmp_path, arguments, said):
    """Nothing is loaded, and no traceback."""
    (tmp_path / "keys.json").write_text('{"keys": []}')
    (tmp_path / "broken.json").write_text('{"keys": 5\n')
    files = {name: tmp_path / f"{name}.json" for name in ("keys", "broken", "nowhere")}
    words = [word.format(**files) for word in arguments]
    base = () if "--adapter" in words else (tiny_base_dir,)
    result = atoll("serve", *base, "--port", "0", *words) if "--port" not in words else atoll("serve", *base, *words)
    assert result.code in (1, 2)
    assert said in result.err
    assert "Traceback" not in result.err


def test_an_adapter_that_cannot_be_preloaded_stops_the_start(atoll, trained, tiny_base_dir):
    """A server without the adapter it was started for answers errors all night."""
    limits = (*PLAIN, "--set", "max_adapter_bytes=100")
    result = atoll("serve", tiny_base_dir, "--port", 0, "--dtype", "float32", "--adapter", "colours", *limits)
    assert result.code == 1
    assert "error: colours has" in result.err
    assert "Traceback" not in result.err


class Server:
    """`atoll serve` in a process of its own."""

    def __init__(self, home: Path, log: Path, *arguments: object) -> None:
        self._log = log
        self._out = log.open("wb")
        command = [sys.executable, "-m", "atoll.cli.main", "serve", "--port", "0", *map(str, arguments)]
        environment = {**os.environ, "ATOLL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._out, env=environment)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def url(self) -> str:
        """Once it answers."""
        for _ in range(6000):
            if found := re.search(r"try: curl (http://[0-9.:]+)/generate", self.said):
                return found[1]
            assert self.process.poll() is None, self.said
            time.sleep(0.01)
        raise AssertionError(self.said)

    def end(self) -> int:
        """Its exit code, having said nothing on stdout."""
        printed, _ = self.process.communicate(timeout=60)
        assert printed == b""
        return self.process.returncode

    def kill(self) -> None:
        """Whatever became of it, leave nothing behind."""
        self.process.kill()
        self.process.communicate()
        self._out.close()


def test_a_server_answers_drains_and_ends_well(trained_home, tiny_base_dir, tmp_path):
    """From the printed curl to a polite stop: a signal in the middle of an answer does not cut it."""
    server = Server(trained_home, tmp_path / "log", tiny_base_dir, "--dtype", "float32", *PLAIN, "--adapter", "colours", "--json-log", "--access-log")
    try:
        url = server.url()
        [curl] = re.findall(r"try: curl \S+ -H 'content-type: application/json' -d '(.*)'", server.said)
        answered = httpx.post(f"{url}/generate", json=json.loads(curl), timeout=60)
        assert answered.status_code == 200, answered.text
        assert httpx.get(f"{url}/adapters").json()["adapters"][0]["pinned"] is True
        body = {"inputs": "a red", "parameters": {"max_new_tokens": 200, "ignore_eos_token": True, "details": True}}
        events = []
        with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))
                    if len(events) == 1:
                        server.process.send_signal(signal.SIGTERM)
        assert len(events) == 200, server.said
        assert events[-1]["details"]["finish_reason"] == "length"
        assert server.end() == 0
    finally:
        server.kill()
    lines = [json.loads(line) for line in server.said.splitlines() if line.startswith("{")]
    assert next(line["message"] for line in lines if line["logger"] == "uvicorn.access").endswith('"POST /generate HTTP/1.1" 200')
    assert "Once upon" not in "".join(json.dumps(line) for line in lines)
    assert server.said.rstrip().endswith("stopped")


# ---- keys ----


def test_a_key_is_printed_once_and_works(atoll, atoll_home):
    """Its only copy goes to stdout, so that it can be piped."""
    made = atoll("keys", "add", "ci", "--scope", "infer", "--scope", "publish", "--adapter", "acme/*", "--note", "for CI")
    assert made.code == 0
    key = made.out.strip()
    caller = Keys(atoll_home / "keys.json").caller(key)
    assert (caller.key_id, caller.scopes, caller.adapters) == ("ci", {"infer", "publish"}, ("acme/*",))
    listed = atoll("keys", "list")
    assert key not in listed.out
    assert "acme/*" in listed.out
    [record] = atoll("keys", "list", "--json").json()
    assert (record["id"], record["note"]) == ("ci", "for CI")
    assert "sha256" not in record
    assert atoll("keys", "remove", "ci").code == 0
    assert atoll("keys", "list", "--json").json() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "x", "--scope", "root"), "no scope 'root'"),
        (("add", "a b"), "id"),
        (("remove", "x"), "keys"),
        (("add", "taken"), "already"),
    ],
)
def test_a_wrong_key_command_is_one_sentence(atoll, arguments, said):
    """And the file stays as it was."""
    atoll("keys", "add", "taken")
    result = atoll("keys", *arguments)
    assert result.code == 1
    assert said in result.err
    assert [record["id"] for record in atoll("keys", "list", "--json").json()] == ["taken"]
