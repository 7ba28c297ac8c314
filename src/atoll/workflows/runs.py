"""The hub's record of a run: entered when it begins, completed when it ends, true however it ends.

Used by training.py and compose.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import Interrupted

if TYPE_CHECKING:
    from atoll.hub.store import Hub


@contextlib.contextmanager
def recorded_run(hub: Hub | None, kind: str, name: str, config: Mapping[str, Any], folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Keep the hub's record of a run in `folder`; what the body puts into the dict joins it, however the run ends. Without a hub nothing is recorded.

    The caller holds the run's folder, so a run of the same name and config that still counts as running has died.
    """
    found: dict[str, Any] = {}
    if hub is None:
        yield found
        return
    started = datetime.now(UTC)

    def record(status: str, run_id: int | None = None, **facts: Any) -> int:
        return hub.record_run(kind, config, status=status, started=started, name=name, run_id=run_id, folder=place, **facts).id

    place = str(folder.absolute()) if folder is not None else None
    for run in hub.runs(name=name, kind=kind):
        if run.status == "running" and run.config == config and run.folder in (None, place):
            record("interrupted", run.id, message="ended without a word")
    run_id = record("running")
    try:
        yield found
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        record(status, run_id, finished=datetime.now(UTC), message=str(error)[:500], **found)
        raise
    record("finished", run_id, finished=datetime.now(UTC), **found)
