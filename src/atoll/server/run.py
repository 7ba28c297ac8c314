"""Run a service behind HTTP until somebody asks it to stop: bind, start, serve, drain.

The one idea: whoever asks once is polite. From the first signal on, new requests get 503 on a port that still listens, so a load balancer sees it and
goes elsewhere, while running ones finish; then the port closes. The second signal cuts what is left, which is told so.

Used by `atoll serve`.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from atoll.errors import ConfigError
from atoll.server.app import create_app

if TYPE_CHECKING:
    from types import FrameType

    from atoll.serving.service import Service

Say = Callable[[str], None]
CLOSE_S = 5  # seconds for replies that are computed to reach slow clients
BACKLOG = 2048
SWITCH_S = 0.0005
_REASONS = {
    errno.EADDRINUSE: ("is in use by another program", "choose another with --port; 0 takes a free one"),
    errno.EACCES: ("may not be used without more rights", "choose one above 1023 with --port"),
    errno.EADDRNOTAVAIL: ("is not an address of this machine", "give one of its own addresses with --host; 0.0.0.0 is all of them"),
}


def bind(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Raises ConfigError if the address cannot be had: before minutes go into loading a base."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"host {host!r} cannot be listened on: {error.strerror or error}", hint="give an address of this machine with --host"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        why, hint = _REASONS.get(error.errno or 0, (f"cannot be had: {error.strerror or error}", "choose another with --port"))
        raise ConfigError(f"port {port} of {host} {why}", hint=hint) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket, as clients write it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, listener: socket.socket, *, access_log: bool = False, started: Say, stopping: Say) -> bool:
    """Serve until a signal; True if every request was finished, False if some were cut. Raises what starting the service raises.

    started is told the address once requests are answered, stopping what is happening after a signal.
    """
    config = uvicorn.Config(
        create_app(service),
        lifespan="on",
        ws="none",
        access_log=access_log,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = DrainingServer(config, service, stopping)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, service, listener, started))
    return not server.was_cut


async def _serve(server: DrainingServer, service: Service, listener: socket.socket, started: Say) -> None:
    await service.start()  # here rather than in the app's lifespan, so that its errors come out as they are
    _settle()
    server.loop = asyncio.get_running_loop()
    server.when_started = lambda: started(address_of(listener))
    try:
        await server.serve(sockets=[listener])
    finally:
        await service.stop(0)


def _settle() -> None:
    """Tell the interpreter that what is loaded stays, and that two threads share it."""
    gc.collect()
    gc.freeze()  # the base and its libraries are some hundred thousand objects, which each full collection would walk through in vain
    sys.setswitchinterval(SWITCH_S)  # else the event loop waits up to 5 ms for the engine's thread each time it has something to do


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which stops when the service has drained."""

    loop: asyncio.AbstractEventLoop
    when_started: Callable[[], None]

    def __init__(self, config: uvicorn.Config, service: Service, say: Say) -> None:
        super().__init__(config)
        self._service, self._say = service, say
        self._stopping: list[asyncio.Task[None]] = []
        self.was_cut = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.when_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. Not kept in uvicorn's list of signals, which it raises again at the end: a server asked to stop has succeeded."""
        self.loop.call_soon_threadsafe(self._asked)

    def _asked(self) -> None:
        work = self._cut() if self._stopping else self._drain()
        self._stopping.append(asyncio.ensure_future(work))

    async def _drain(self) -> None:
        active = self._service.stats()["active_requests"]
        if active:
            self._say(f"stopping: {active} requests have {self._service.config.drain_s:g} s to finish; Ctrl-C again cuts them")
        await self._service.stop()
        self.was_cut = self.was_cut or self._service.counts["cut"] > 0
        self.should_exit = True

    async def _cut(self) -> None:
        self.was_cut = True
        self.force_exit = len(self._stopping) > 1  # the third signal: not even the last words of what was cut
        await self._service.stop(0)
        self.should_exit = True
