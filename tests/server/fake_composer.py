"""Stands in for the process that composes: what it does is in the name that it is asked for. Imports nothing of ours, so it starts at once.

    slow        says that it is at work until it is interrupted
    stubborn    the same, but no interrupt ends it; a process of its own sleeps beside it
    crash       breaks off with words for the log
    killed      is killed, as the system does when memory is short
    wrong       says what its user did wrong
    gone        says that an adapter is gone, and which are there instead
    chatty      prints what is no JSON, and a line that has no end
    others      finishes: two lines of progress, then a copy of the folder in its first argument

What it was given stands in the report.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COST = {"tokens": None, "seconds": 2.5, "cpu_seconds": 2.0, "peak_memory_bytes": 1 << 20}


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    request = json.load(sys.stdin)
    name = request["config"]["name"].partition("-")[0]
    if name == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    while name in ("slow", "stubborn"):
        say(progress=[f"process {os.getpid() if name == 'slow' else helper.pid}", 1, 9])
        time.sleep(0.02)
    if name == "crash":
        sys.exit("secret words for the log")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        say(error={"kind": "DataError", "message": "examples.jsonl:1: no", "hint": "mend it"})
        sys.exit(1)
    if name == "gone":
        say(error={"kind": "AdapterNotFound", "message": "no adapter 'x'", "hint": "did you mean secret?"})
        sys.exit(1)
    if name == "chatty":
        sys.stdout.write("hello\n[1]\n" + "x" * (9 << 20))
    say(progress=["ranking", 1, 2])
    say(progress=["searching", 2, 2])
    folder = Path(request["root"]) / "out" / "adapter"
    shutil.copytree(sys.argv[1], folder)
    chosen = request["config"]["compose"]["adapters"] or ["plain@1", "sentiment@1"]
    weights = [{"name": each, "digest": "0" * 64, "weight": 0.5} for each in chosen]
    rows = (Path(request["root"]) / "examples.jsonl").read_text(encoding="utf-8")
    report = {"task": name, "environment": sorted(os.environ), "request": request, "rows": rows}
    say(result={"folder": str(folder), "weights": weights, "warnings": [], "report": report, "score": None, "cost": COST})


if __name__ == "__main__":
    main()
