"""Run a model's Python against tests, in a child process with limits.

This bounds accidents, it does not stop an attacker: the child has no limit on reading files of this user or on the network. That is why it runs only
where the caller said so, and why the hint names a container. What it does have: an isolated interpreter (no site packages, no environment), an empty
working folder that is deleted, limits on CPU time, memory, file size, open files and processes, and a wall clock that kills the whole process group.

Used by eval.row_metrics (pass_at_1).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

# Runs in the child. The limits are set before the candidate's first line, hard and soft, so the candidate cannot raise them. The nonce goes to stdout
# only after the last test, so that leaving early with exit code 0 is not a pass.
_CHILD = """
import json, resource, sys
job = json.load(sys.stdin)
limits = job["limits"]
for name, value in (
    ("RLIMIT_CPU", limits["cpu_s"]), ("RLIMIT_AS", limits["memory_bytes"]), ("RLIMIT_FSIZE", limits["file_bytes"]),
    ("RLIMIT_NOFILE", 32), ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0),
):
    if hasattr(resource, name):
        resource.setrlimit(getattr(resource, name), (value, value))
out = sys.stdout
space = {"__name__": "candidate"}
sys.stdout = sys.stderr
exec(compile(job["code"], "<candidate>", "exec"), space)
exec(compile(job["tests"], "<tests>", "exec"), space)
out.write(job["nonce"])
out.flush()
"""


@dataclass(frozen=True)
class SandboxLimits:
    """What one candidate may use: CPU seconds, wall-clock seconds, bytes of address space, bytes of any file it writes."""

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_bytes: int = 512 * 1024 * 1024
    file_bytes: int = 1024 * 1024


def passes_tests(code: str, tests: str, limits: SandboxLimits | None = None) -> bool:
    """Whether `code` and then `tests` run to the end in a child process within `limits`. Needs a POSIX system."""
    limits = limits or SandboxLimits()
    nonce = secrets.token_hex(16)
    job = json.dumps({"code": code, "tests": tests, "nonce": nonce, "limits": asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="atoll-sandbox-") as name:
        folder = Path(name)
        (folder / "job.json").write_bytes(job.encode("utf-8"))
        (folder / "empty").mkdir()
        # Files, not pipes: RLIMIT_FSIZE bounds what a candidate prints, where a pipe would fill our memory.
        with (folder / "job.json").open("rb") as stdin, (folder / "stdout").open("wb") as stdout:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=folder / "empty",
                env={},
                start_new_session=True,  # a process group of its own, so that one kill reaches all of it
            )
            try:
                child.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                return False
            finally:
                _kill_group(child)
        return child.returncode == 0 and (folder / "stdout").read_bytes().endswith(nonce.encode())


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # everything in the group has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
