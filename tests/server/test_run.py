"""Running and stopping: one signal drains while the port still answers 503, a second one cuts."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from tests.server.live_server import ENGINE, fill_hub

from atoll.engine.config import EngineConfig
from atoll.errors import AdapterNotFound, ConfigError
from atoll.server import run as run_module
from atoll.server.run import DrainingServer, address_of, bind, run
from atoll.serving.config import ServeConfig
from atoll.serving.service import Service

LONG = {"inputs": "hello", "parameters": {"max_new_tokens": 240, "ignore_eos_token": True, "details": True}}


class Running:
    """`run` in a thread, and the server inside it to send signals to."""

    def __init__(self, base, hub, monkeypatch, **settings):
        servers = []

        class Kept(DrainingServer):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                servers.append(self)

        monkeypatch.setattr(run_module, "DrainingServer", Kept)
        config = ServeConfig(**{"base": str(base.path), "port": 0, "engine": EngineConfig(**ENGINE), "drain_s": 60, **settings})
        self.said, self.result, self.error = [], None, None
        self._started = threading.Event()
        listener = bind(config.host, 0)

        def work():
            try:
                with listener:
                    self.result = run(Service(base, config, hub), listener, started=self._say_started, stopping=self.said.append)
            except BaseException as error:
                self.error = error
            self._started.set()

        self.thread = threading.Thread(target=work)
        self.thread.start()
        self._started.wait(60)
        self._server = servers[0]

    def _say_started(self, url):
        self.url = url
        self._started.set()

    def signal(self):
        self._server.handle_exit(15, None)

    def ended(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.result


def events_of(stream):
    return (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))


def test_one_signal_drains_and_the_port_says_so_meanwhile(served_base, tmp_path, monkeypatch):
    """A load balancer must see 503, not a refused connection, while answers are finished."""
    server = Running(served_base, fill_hub(tmp_path, served_base), monkeypatch)
    with httpx.Client(base_url=server.url, timeout=60) as client, client.stream("POST", "/generate_stream", json=LONG) as stream:
        events = events_of(stream)
        next(events)
        server.signal()
        while (found := httpx.get(server.url + "/health")).status_code == 200:
            pass
        assert found.status_code == 503
        refused = httpx.post(server.url + "/generate", json=LONG)
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        last = list(events)[-1]
        assert last["details"]["generated_tokens"] == 240
    assert server.ended() is True
    assert server.said == ["stopping: 1 requests have 60 s to finish; Ctrl-C again cuts them"]


def test_a_second_signal_cuts(served_base, tmp_path, monkeypatch):
    """Whoever presses Ctrl-C twice means it."""
    server = Running(served_base, fill_hub(tmp_path, served_base), monkeypatch)
    with httpx.Client(base_url=server.url, timeout=60) as client, client.stream("POST", "/generate_stream", json=LONG) as stream:
        events = events_of(stream)
        next(events)
        server.signal()
        server.signal()
        left = list(events)
        assert len(left) < 240
        assert left[-1]["error_type"] == "incomplete_generation"
    assert server.ended() is False


def test_what_goes_wrong_at_the_start_comes_out_as_it_is(served_base, tmp_path, monkeypatch):
    """Not as uvicorn's "Application startup failed" with a traceback."""
    server = Running(served_base, fill_hub(tmp_path, served_base), monkeypatch, preload=["nope"])
    server.ended()
    assert isinstance(server.error, AdapterNotFound)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_printed_address_is_one_to_connect_to(host):
    """0.0.0.0 is where a server listens, not where a client goes."""
    with bind(host, 0) as listener:
        assert address_of(listener).startswith(("http://127.0.0.1:", "http://[::1]:"))
        with pytest.raises(ConfigError, match="in use"):
            listener.listen()
            bind(host, listener.getsockname()[1])
