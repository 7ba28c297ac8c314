"""The process that composes for a server: what it writes, what it keeps to itself, and when it ends.

Whole compositions are in tests/server/test_compose_whole.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 120.0
START = (
    "import json, sys, time\nfrom atoll.errors import DataError\nfrom atoll.workflows import compose_worker as worker\ndef compose(request, out):\n"
)


def run(body: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The worker with its work replaced by `body`."""
    program = f"{START}    {body}\nworker.compose = compose\nsys.exit(worker.main())\n"
    return subprocess.run([sys.executable, "-c", program], input=json.dumps(request), capture_output=True, text=True, timeout=SECONDS)


def test_an_error_of_ours_is_a_line_without_the_folder_of_the_rows(tmp_path: Path) -> None:
    """Where a server keeps what it was sent is nobody's business."""
    done = run("raise DataError(request['root'] + '/examples.jsonl:3: no', hint='see ' + request['root'] + '/x')", {"root": str(tmp_path)})
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"error": {"kind": "DataError", "message": "examples.jsonl:3: no", "hint": "see x"}}


def test_what_is_printed_does_not_mix_with_the_lines(tmp_path: Path) -> None:
    """Libraries print; whoever reads the lines must not stumble over it."""
    done = run("print('noise'); worker._say(out, progress=['a', 1, 2]); raise KeyboardInterrupt", {"root": str(tmp_path)})
    assert done.returncode == 130
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"progress": ["a", 1, 2]},
        {"error": {"kind": "Interrupted", "message": "the composition was interrupted", "hint": ""}},
    ]
    assert "noise" in done.stderr


def test_a_bug_is_a_traceback_for_the_log_and_no_line(tmp_path: Path) -> None:
    """The server tells of it in general words."""
    done = run("1 / 0", {"root": str(tmp_path), "nice": 1})
    assert (done.returncode, done.stdout) == (1, "")
    assert "ZeroDivisionError" in done.stderr


def test_it_ends_with_the_process_that_started_it() -> None:
    """A server that is killed cannot cancel: what it started must notice by itself."""
    child = "import sys, time; from atoll.workflows.compose_worker import _end_with as w; w(int(sys.argv[1])); print(flush=True); time.sleep(600)"
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    stat, give_up = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + SECONDS
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < give_up
        time.sleep(0.05)
