"""One process beside the server that does long work: started with little, heard line by line, and ended with everything that it started.

It gets its request as JSON on its input and writes one JSON object a line: {"progress": [stage, done, total]}, and at last {"result": {…}} or
{"error": {"kind", "message", "hint"}}. Its error output is for the server's log alone. It is a group of its own, so that Ctrl-C in the server's
terminal does not reach it and one kill reaches all of it; of the server's environment it sees only what computing needs, no keys and no tokens.

Used by compose_jobs.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from atoll import errors
from atoll.config import atoll_home
from atoll.config_cost import CURRENCY, PER_CPU_HOUR, PER_HOUR
from atoll.errors import AtollError

COMMAND = (sys.executable, "-m", "atoll.workflows.compose_worker")
MAX_LINE_BYTES = 4 << 20  # a report with all its tables is a small part of it
LAST_LINES, LAST_LINE_CHARS = 40, 500
REAP_S = 5.0  # for what was killed to be gone: only something that left its group could still hold a pipe
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "CXX"),
    *(PER_HOUR, PER_CPU_HOUR, CURRENCY),  # for the record of what it cost
    *("ATOLL_KERNEL", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES"),
)
CLOUD_PREFIXES = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
SAFE = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}  # no module is taken from the working folder


class Crashed(Exception):
    """A process ended without a result or an error of ours. last_words: the end of its error output."""

    def __init__(self, status: int | None, last_words: str) -> None:
        super().__init__(f"status {status}")
        self.status, self.last_words = status, last_words

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


def environment(threads: int, *, with_clouds: bool = False) -> dict[str, str]:
    """What the process sees: a few names of ours, our home, so many threads. with_clouds: also how object stores are reached."""
    passed = {name: value for name, value in os.environ.items() if name in PASSED_ON or (with_clouds and name.startswith(CLOUD_PREFIXES))}
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**passed, **counts, **QUIET, **SAFE, "ATOLL_HOME": str(atoll_home())}


class Child:
    """One process while it runs; made by `started`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    @classmethod
    @asynccontextmanager
    async def started(cls, request: Mapping[str, Any], *, threads: int = 1, with_clouds: bool = False) -> AsyncIterator[Child]:
        """A process that has its request; whatever happens inside, it and its group are gone at the end."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment(threads, with_clouds=with_clouds),
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        child = cls(process)
        listening = asyncio.ensure_future(child._listen())
        try:
            await child._ask({**request, "parent": os.getpid()})
            yield child
        finally:
            child.kill()
            ended = asyncio.ensure_future(process.wait())
            _, late = await asyncio.wait({listening, ended}, timeout=REAP_S)
            for task in late:
                task.cancel()

    async def outcome(self, told: Callable[[str, int, int], None]) -> Mapping[str, Any]:
        """Its result; `told` hears of its progress. Raises the error that it names, or Crashed."""
        assert self._process.stdout is not None
        while line := await self._line(self._process.stdout):
            said = _said(line)
            if "progress" in said:
                told(*said["progress"])
            elif "error" in said:
                raise _error_of(said["error"])
            elif "result" in said:  # nothing comes after it, and large libraries take their time to end
                result: Mapping[str, Any] = said["result"]
                return result
        status = await self._process.wait()
        raise Crashed(status, "\n".join(self._last))

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C would."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it and everything that it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _ask(self, request: Mapping[str, Any]) -> None:
        writer = self._process.stdin
        assert writer is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: its end says so
            writer.write(json.dumps(request).encode())
            await writer.drain()
        writer.close()

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readline()
        except ValueError:  # a line without an end
            self.kill()
            raise Crashed(None, "it wrote a line that is too long") from None

    async def _listen(self) -> None:
        """Keep the last lines of its error output, each cut to a length."""
        reader = self._process.stderr
        assert reader is not None
        rest = b""
        while part := await reader.read(1 << 14):
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-LAST_LINE_CHARS:]
            self._last.extend(line.decode(errors="replace")[:LAST_LINE_CHARS] for line in lines)
        if rest:
            self._last.append(rest.decode(errors="replace"))


def _said(line: bytes) -> Mapping[str, Any]:
    """A line as an object; what is none is none of ours."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error_of(said: Mapping[str, str]) -> AtollError:
    """The error that the process named, in its own class where that is one of errors.py."""
    kind = getattr(errors, said["kind"], AtollError)
    known = kind if isinstance(kind, type) and issubclass(kind, AtollError) else AtollError
    return known(said["message"], hint=said["hint"])
