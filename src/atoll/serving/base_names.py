"""What the base of a server may be called: its name, its embedded alias or hub id, and the last part of each.

Used by operator.py, which gives none of them to an adapter, and by Predibase's path, which knows a base as a deployment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.model.base import Base


def names_of(base: Base) -> frozenset[str]:
    """All of them, casefolded."""
    from atoll.model.pull import EMBEDDED

    names = {base.name}
    for embedded in EMBEDDED.values():
        if base.name.casefold() in (embedded.name.casefold(), embedded.hub_id.casefold()):
            names |= {embedded.name, embedded.hub_id}
    return frozenset(part.casefold() for name in names for part in (name, name.rstrip("/").rpartition("/")[2]))
