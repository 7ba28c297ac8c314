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
from atoll.workflows.comparing import ended_unseen

if TYPE_CHECKING:
    from atoll.hub.ledger import Run
    from atoll.hub.store import Hub


@contextlib.contextmanager
def recorded_run(hub: Hub | None, kind: str, name: str, config: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Keep the hub's record of a run in `folder`; what the body puts into the dict joins it, however the run ends. Without a hub nothing is recorded.

    The caller holds the run's folder, so a run in it that still counts as running has died; its record is closed with what its log says by now.
    """
    found: dict[str, Any] = {}
    if hub is None:
        yield found
        return
    started, place = datetime.now(UTC), str(folder.absolute())

    def record(status: str, run_id: int | None = None, **facts: Any) -> int:
        return hub.record_run(kind, config, status=status, started=started, name=name, run_id=run_id, folder=place, **facts).id

    for run in hub.runs(kind=kind, status="running"):
        if run.folder == place or (run.folder is None and run.name == name and run.config == config):
            _close(hub, ended_unseen(run))
    run_id = record("running")
    try:
        yield found
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        record(status, run_id, finished=datetime.now(UTC), message=str(error)[:500], **found)
        raise
    record("finished", run_id, finished=datetime.now(UTC), **found)


def _close(hub: Hub, run: Run) -> None:
    """Record what is known of a run that died. When it did is not."""
    facts: dict[str, Any] = {"status": run.status, "message": run.message, "progress": run.progress}
    hub.record_run(run.kind, run.config, started=run.started, name=run.name, folder=run.folder, run_id=run.id, **facts)
