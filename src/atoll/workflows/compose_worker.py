"""A composition as a process of its own: `python -m atoll.workflows.compose_worker`, a JSON request on its input, JSON lines on its output.

    in    {"config": a ComposeConfig, "root": folder of its rows, "hub": {"root", "database_url", "blob_url"}, "nice": 10, "parent": process id}
    out   {"progress": [stage, done, total]} now and then, and at last one of
          {"result": {"folder", "weights", "warnings", "report", "score", "cost"}}    as ComposeOutcome has them, and the run's cost; the adapter's
                                                                                      folder is not published
          {"error": {"kind", "message", "hint"}}    kind: the class's name in errors.py; bugs are a traceback on stderr

The one idea: whoever starts it keeps its cores, its memory and its hub. It runs behind everything else, is the first that the system ends when
memory is short, writes below `root` only, and ends with the process that started it.

Used by the server (server/processes.py starts it, server/compose_jobs.py publishes what it made).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from atoll.errors import AtollError, Interrupted

if TYPE_CHECKING:
    from atoll.workflows.compose import ComposeOutcome

OUT = "out"  # below root: what is made
REPORT_S = 0.1  # between two lines of progress: a search reports every candidate
PARENT_S = 1.0  # between two looks at whether the parent is still there
INTERRUPTED = 130


def main() -> int:
    """Answer one request; returns the exit status."""
    out = _own_output()
    request = json.load(sys.stdin)
    _step_back(int(request.get("nice", 0)))
    _end_with(request.get("parent"))
    try:
        outcome = compose(request, out)
    except (Interrupted, KeyboardInterrupt):
        _say(out, error=_told(Interrupted("the composition was interrupted"), request))
        return INTERRUPTED
    except AtollError as error:
        _say(out, error=_told(error, request))
        return 1
    whole = outcome.to_json()
    warnings = [_without_root(warning, request) for warning in outcome.warnings]
    made = {"folder": whole["adapter_folder"], "weights": whole["weights"], "warnings": warnings, "report": whole["report"], "score": outcome.score}
    _say(out, result={**made, "cost": _cost(outcome.adapter_folder.parent)})
    return 0


def compose(request: Mapping[str, Any], out: IO[str]) -> ComposeOutcome:
    """Compose what the request asks for, without publishing it, and write progress to `out`. Raises what compose_and_publish raises."""
    from atoll.config_compose import ComposeConfig
    from atoll.hub.store import Hub
    from atoll.workflows.compose import compose_and_publish

    hub, root = request["hub"], Path(request["root"])
    said = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= REPORT_S:
            said = now
            _say(out, progress=[stage, done, total])

    return compose_and_publish(
        ComposeConfig(**request["config"]),
        root=root,
        out=root / OUT,
        hub=Hub(Path(hub["root"]), hub.get("database_url"), hub.get("blob_url")),
        publish=False,
        progress=progress,
    )


def _cost(folder: Path) -> Any:
    """What the composition in a folder took, as it was marked there when it was done."""
    from atoll.workflows.training import RESULT_FILE

    return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))["cost"]


def _told(error: AtollError, request: Mapping[str, Any]) -> dict[str, str]:
    return {"kind": type(error).__name__, "message": _without_root(error.message, request), "hint": _without_root(error.hint, request)}


def _without_root(text: str, request: Mapping[str, Any]) -> str:
    """Text about rows without the folder that they are in, which is nobody's business."""
    return text.replace(f"{request['root']}/", "")


def _say(out: IO[str], **what: Any) -> None:
    out.write(json.dumps(what, separators=(",", ":"), allow_nan=False) + "\n")
    out.flush()


def _own_output() -> IO[str]:
    """The output for our lines alone: what libraries print goes to the error output from now on."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _step_back(nice: int) -> None:
    """Run behind others, and be the first to go when memory runs out."""
    with contextlib.suppress(OSError):
        os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _end_with(parent: int | None) -> None:
    """Watch for the end of the process that started this one: nobody would read what it makes."""
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_S)
        if os.getpgrp() == os.getpid():  # with everything that was started here
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
