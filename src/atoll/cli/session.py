"""A base in an engine, with adapters of the hub opened by name: what `generate` and `chat` ask.

An adapter is opened whole or not at all: its reference is resolved, its fit to the base checked, its prompt format read, and then it is registered
with the engine under its digest. The base is the one asked for, or else the one that the first adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.cli.options import DEFAULT_BASE
from atoll.cli.output import warn
from atoll.cli.progress import progress_bar
from atoll.cli.rounding import AS_TRAINED, Rounding
from atoll.errors import BaseMismatch, ConfigError

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat
    from atoll.engine.engine import Engine
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base


@dataclass(frozen=True)
class OpenAdapter:
    """A version of the hub that fits the base, and the prompt format it was trained with (None: it brought none)."""

    version: Version
    adapter: Adapter
    prompt: PromptFormat | None


class Session:
    """Made by open_session. `adapters` by the reference they were asked for with."""

    def __init__(self, base: Base, hub: Hub | None, *, ignore_quantization: bool = False) -> None:
        self.base, self.adapters = base, dict[str, OpenAdapter]()
        self._ignore_quantization = ignore_quantization
        self._hub = hub
        self._engine: Engine | None = None

    def open(self, ref: str) -> OpenAdapter:
        """The adapter that `ref` means. Raises AdapterNotFound, BaseMismatch and what reading its files raises."""
        if ref not in self.adapters:
            self._hub = self._hub or _open_hub()
            self.adapters[ref] = _open(self._hub, ref, self.base, self._ignore_quantization)
            if self._engine is not None:
                self._register(self._engine, self.adapters[ref])
        return self.adapters[ref]

    def start(self, max_rows: int, max_row_tokens: int) -> Engine:
        """The engine, made at the first call with every adapter opened so far; those opened later join it."""
        from atoll.engine.config import EngineConfig
        from atoll.engine.engine import Engine

        if self._engine is None:
            tokens = min(max_row_tokens, self.base.context_length)
            self._engine = Engine(self.base, EngineConfig(max_rows=max_rows, max_row_tokens=tokens))
            for adapter in self.adapters.values():
                self._register(self._engine, adapter)
        return self._engine

    @staticmethod
    def _register(engine: Engine, opened: OpenAdapter) -> None:
        if not engine.is_registered(opened.version.digest):
            engine.register(opened.version.digest, opened.adapter)


def open_session(refs: Sequence[str], base_name: str | None, dtype: str, rounding: Rounding = AS_TRAINED) -> Session:
    """Load the base and open the adapters `refs`. Raises what resolving, loading and opening raise."""
    hub = _open_hub() if refs else None
    versions = [hub.resolve(ref) for ref in refs] if hub is not None else []
    name = base_name or _recorded_base(versions)
    from atoll.model.base import load_base

    with progress_bar() as progress:
        base = load_base(name, dtype=dtype, quantization=rounding.of(hub, refs), progress=progress)
    session = Session(base, hub, ignore_quantization=rounding.ignore)
    for ref in refs:
        session.open(ref)
    return session


def _recorded_base(versions: Sequence[Version]) -> str:
    if not versions:
        return DEFAULT_BASE
    if versions[0].base is None:
        raise ConfigError(f"{versions[0].ref} does not say what base it was trained on", hint="name it with --base")
    return versions[0].base


def _open(hub: Hub, ref: str, base: Base, ignore_quantization: bool) -> OpenAdapter:
    from atoll.data.prompt import PromptFormat
    from atoll.model.adapter_files import read_adapter
    from atoll.model.fingerprint import tensor_shapes

    version = hub.resolve(ref)
    verdict = hub.check_base(version.ref, base.fingerprint.to_json(), tensor_shapes(base.path), ignore_quantization=ignore_quantization)
    if not verdict.usable:
        other = f": --base {version.base}" if version.base not in (None, base.name) else ""
        raise BaseMismatch(
            f"{version.ref} does not fit the base {base.title!r}: {verdict.reason}", hint=verdict.hint(f"use the base that it was trained on{other}")
        )
    if verdict.kind != "exact":
        warn(f"{version.ref} fits {base.title}, but it may have been trained on another base: {verdict.reason}")
    adapter = read_adapter(hub.path(version))
    own = adapter.manifest.get("prompt")
    return OpenAdapter(version, adapter, PromptFormat.from_json(own) if own else None)


def _open_hub() -> Hub:
    from atoll.hub import Hub

    return Hub()
