"""The soaked server as a process: started, looked into, measured, asked to stop.

Used by soak.py; what runs in it is child.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soaking.world import World

START_S, ANSWER_S = 300.0, 90.0
_SERVING = re.compile(r"serving .* at (http://\S+) ")


class ServerFailed(Exception):
    """The server did not start, or does not answer any more."""


@dataclass(frozen=True)
class Usage:
    """What the process has of the machine: anonymous and all resident bytes, open files."""

    anonymous_bytes: int
    resident_bytes: int
    num_files: int


@dataclass
class Server:
    """A running `atoll serve`. usage: samples over time, (seconds, Usage), where the system tells it."""

    process: asyncio.subprocess.Process
    log: Path
    scratch: Path
    url: str = ""
    usage: list[tuple[float, Usage]] = field(default_factory=list)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def start(cls, world: World, settings: Sequence[str], log: Path) -> Server:
        """Start and wait until it serves. settings: of `--set`. Raises ServerFailed."""
        scratch = log.with_name("scratch")
        scratch.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("child.py")), "serve", world.base_ref, "--port", "0", "--dtype", world.dtype]
        command += ["--keys", str(world.keys_file), "--local-root", str(world.local), *(part for each in settings for part in ("--set", each))]
        environment = {**os.environ, "ATOLL_HOME": str(world.home), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "PYTHONASYNCIODEBUG": ""}
        with log.open("wb") as errors:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, limit=1 << 24)
        server = cls(process, log, scratch)
        try:
            async with asyncio.timeout(START_S):
                while not (found := _SERVING.search(server.text())):
                    if process.returncode is not None:
                        raise ServerFailed(f"the server ended with {process.returncode}:\n{server.text()[-2000:]}")
                    await asyncio.sleep(0.1)
        except BaseException:
            server.kill()
            raise
        server.url = found[1]
        return server

    def text(self) -> str:
        """The log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    async def look(self) -> dict[str, Any]:
        """What it holds now, its engine having checked itself. Raises ServerFailed."""
        assert self.process.stdin is not None
        async with self._asking:
            try:
                self.process.stdin.write(b"look\n")
                await self.process.stdin.drain()
                return await self.last_look()
            except (OSError, TimeoutError) as error:
                raise ServerFailed(f"the server does not answer the soak: {error!r}") from error

    async def last_look(self) -> dict[str, Any]:
        """One answer of the process: to `look`, or what it says of itself when it ends. Raises ServerFailed."""
        assert self.process.stdout is not None
        async with asyncio.timeout(ANSWER_S):
            line = await self.process.stdout.readline()
        if not line:
            raise ServerFailed("the server ended without saying what it held")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ServerFailed(f"the server could not be looked into: {found['error']}")
        return found

    def measure(self, now: float) -> None:
        """Take a sample of its usage."""
        usage = usage_of(self.process.pid)
        if usage is not None:
            self.usage.append((now, usage))

    def ask_to_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it whatever it does."""
        if self.process.returncode is None:
            self.process.kill()

    def leftovers(self) -> list[str]:
        """What it left in its temporary folder."""
        return sorted(path.name for path in self.scratch.iterdir())


def usage_of(pid: int) -> Usage | None:
    """None where there is no /proc."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        num_files = len(list((folder / "fd").iterdir()))
    except OSError:
        return None
    if "VmRSS" not in status:
        return None  # it has ended
    return Usage(_kilobytes(status["RssAnon"]), _kilobytes(status["VmRSS"]), num_files)


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024
