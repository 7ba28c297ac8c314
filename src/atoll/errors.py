"""Every error that a user, a file or a request can cause.

One tree, so that a caller catches `AtollError` and the command line prints one sentence. Each error names the thing, what was found and what
was expected; its `hint` says the way out. Mistakes of our own stay AssertionError, TypeError and the like: those are bugs, with a traceback.
"""

from __future__ import annotations


class AtollError(Exception):
    """Root of the tree. `message` is one sentence; `hint` is the way out, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(AtollError):
    """A YAML file or an option has an unknown key, a wrong type or a value out of range."""


class DataError(AtollError):
    """A data file is missing, malformed, empty, or has a row that cannot be used; names file and line."""


class TaskError(AtollError):
    """A task's description is incomplete or contradicts its rows."""


class BaseNotFound(AtollError):
    """A base model is neither in the cache nor on this disk, and could not be fetched."""


class BaseFormatError(AtollError):
    """A base model's files are damaged or describe an architecture that Atoll cannot run."""


class BaseMismatch(AtollError):
    """An adapter was made for another base than the one at hand."""


class AdapterFormatError(AtollError):
    """An adapter's files are damaged, hostile or incomplete."""


class UnsupportedAdapter(AtollError):
    """An adapter is well-formed but uses an option that Atoll does not apply; applying the rest would be silently wrong."""


class TrainingError(AtollError):
    """A training job cannot start or go on: no labels, loss not finite, checkpoint of another job."""


class HubError(AtollError):
    """The hub refused an operation."""


class AdapterNotFound(HubError):
    """No adapter, version or tag of that name in the hub."""


class NameRefused(HubError):
    """A name does not match the pattern of hub names, or is reserved or taken."""


class IntegrityError(HubError):
    """Stored bytes no longer match their digest."""


class StorageError(AtollError):
    """The disk refused a write (full, read-only, no permission); nothing half-written was left."""


class Busy(AtollError):
    """Another process holds the lock of this directory."""


class EngineError(AtollError):
    """The engine could not carry out a request that was accepted."""


class RequestRefused(AtollError):
    """A request's parameters are out of range or do not fit the engine's limits."""


class QueueFull(EngineError):
    """As many requests wait as may wait; `retry_after_s` says when to ask again."""

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class KeyRefused(AtollError):
    """A request came without an API key, or with one that is not known."""


class NotAllowed(AtollError):
    """An API key is known, but may not do this."""


class PoolFull(EngineError):
    """No adapter slot can be freed: all resident adapters are pinned or in use."""


class Interrupted(AtollError):
    """The user pressed Ctrl-C; what was finished is kept and the same command resumes."""
