"""What the service tells whoever counts: plain method calls on the event loop, one a request or a load, never one a token.

Used by http/metrics.py, which turns them into histograms. A subclass overrides what it wants; the service works without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.engine.request import Completion

Kind = Literal["generate", "stream", "score", "embed"]


class Observer:
    """Does nothing."""

    def accepted(self, kind: Kind, adapter: str) -> None:
        """A request was queued. adapter: its name, "" for the base."""

    def refused(self, kind: Kind, error: AtollError) -> None:
        """A request was not queued: it does not fit, or the server is full, draining or broken."""

    def finished(self, kind: Kind, adapter: str, seconds: float, completion: Completion | None) -> None:
        """A request ended, one way or another; scores and embeddings have no completion."""

    def stepped(self, seconds: Sequence[float]) -> None:
        """The engine took these steps since the last call."""

    def loaded(self, adapter: str, source: str, seconds: float) -> None:
        """An adapter was loaded and registered."""

    def load_failed(self, adapter: str, source: str, error: AtollError) -> None:
        """An adapter could not be loaded."""

    def evicted(self, adapter: str) -> None:
        """An adapter was unregistered to make room."""
