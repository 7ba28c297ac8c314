"""The hub: where adapters are kept, found, trusted and shared, with the runs that made them and the scores they got.

A version of an adapter is its content: the sha256 over its files. Files are stored once each under their own sha256, never change, and an index row
makes them visible only when all of them are safely on disk. Names, numbers and tags are aliases that resolve to a digest.

Used by workflows, compose, the server and the command line; itself it uses only model/, config and errors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.hub.card import Card
    from atoll.hub.compatibility import Verdict, verdict
    from atoll.hub.ledger import Run, Score
    from atoll.hub.records import Version
    from atoll.hub.store import GcReport, Hub, Problem

__all__ = ["Card", "GcReport", "Hub", "Problem", "Run", "Score", "Verdict", "Version", "verdict"]

_HOME = {"Card": "card", "Run": "ledger", "Score": "ledger", "Version": "records", "Verdict": "compatibility", "verdict": "compatibility"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command line shows its help without loading the database library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME.get(name, 'store')}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"sqlalchemy", "alembic", "fsspec"}:
            raise
        from atoll.errors import HubError

        raise HubError(f"the hub needs {error.name}, which is not installed", hint='pip install "atoll[hub]"') from error
    return getattr(module, name)
