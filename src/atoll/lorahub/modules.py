"""From what a program calls its modules to folders with adapters: a folder, a name of the local hub, or an id of the Hugging Face hub.

They are looked for in this order; "hf:owner/name" means the last at once. What can be known of a module without its base is known here: which base it
says it was made for, by its manifest before its config, and that all of them say the same.

Used by algorithm.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AdapterFormatError, AdapterNotFound, BaseMismatch, ConfigError, HubError, NameRefused
from atoll.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_manifest, read_object
from atoll.model.base import EMBEDDED

if TYPE_CHECKING:
    from atoll.hub.store import Hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*")
_HUB_PACKAGES = ("sqlalchemy", "alembic", "fsspec")


@dataclass(frozen=True)
class Module:
    """A module as it was named, its folder, its digest if it is a version of the local hub, and what its manifest and config call its base."""

    name: str
    folder: Path
    digest: str | None
    recorded: str
    configured: str

    @property
    def base(self) -> str:
        """What to load: the manifest's base before the config's, which may be a name of elsewhere, but what is found here before what is not."""
        named = [base for base in (self.recorded, self.configured) if base]
        return next((base for base in named if _may_be_loaded(base)), next(iter(named), ""))


def find_modules(names: Iterable[str | Path], hub: Hub | None = None) -> list[Module]:
    """The modules of these names. Raises ConfigError for none, AdapterNotFound, HubError, and BaseMismatch where they name different bases."""
    given = [] if isinstance(names, str | Path) or not isinstance(names, Iterable) else list(names)
    if not given:
        raise ConfigError("no LoRA modules are given", hint="give a list of names: folders, adapters of the local hub, or Hugging Face ids")
    modules = []
    for name in given:
        if not isinstance(name, str | Path):
            raise ConfigError(
                f"the LoRA module {name!r} is {type(name).__name__}, expected a name",
                hint="give folders, adapters of the local hub, or Hugging Face ids",
            )
        folder, digest = _find(str(name), hub)
        base = read_manifest(folder).get("base")
        recorded = base.get("name") if isinstance(base, dict) else None
        configured = read_object(folder / CONFIG_FILE).get("base_model_name_or_path")
        modules.append(Module(str(name), folder, digest, str(recorded or ""), str(configured or "")))
    _check_one_base(modules)
    return modules


def base_of(modules: Sequence[Module]) -> str:
    """The base that the modules name. Raises ConfigError where none does."""
    named = [module.base for module in modules if module.base]
    if not named:
        raise ConfigError("no module's config says which base it was made for", hint="give model_name_or_path")
    return next((base for base in named if _may_be_loaded(base)), named[0])


def _may_be_loaded(base: str) -> bool:
    """Whether a base of that name is here or may be fetched, without looking further than this disk."""
    return base.lower() in EMBEDDED or Path(base).expanduser().exists() or bool(_HUB_ID.fullmatch(base))


def _check_one_base(modules: Sequence[Module]) -> None:
    """By the last part of the names, in any case: copies of a base lie in different folders, and under different owners."""
    named = [module for module in modules if module.base]
    for module in named[1:]:
        if not _agree(module, named[0]):
            raise BaseMismatch(
                f"module {module.name!r} was made for base {module.base!r}, but {named[0].name!r} for {named[0].base!r}",
                hint="compose modules of one base",
            )


def _agree(one: Module, other: Module) -> bool:
    """By the manifests where both have one; a module that has none may name what the other's config names."""
    if one.recorded and other.recorded:
        return _short(one.recorded) == _short(other.recorded)
    return bool(_shorts(one) & _shorts(other))


def _shorts(module: Module) -> set[str]:
    return {_short(base) for base in (module.recorded, module.configured) if base}


def _short(base: str) -> str:
    return base.rstrip("/").rsplit("/", 1)[-1].casefold()


def _find(name: str, hub: Hub | None) -> tuple[Path, str | None]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if not name.startswith("hf:"):
        found = _in_hub(name, hub)
        if found is not None:
            return found
    repository = name.removeprefix("hf:")
    if not _HUB_ID.fullmatch(repository):
        raise AdapterNotFound(
            f"no module {name!r}: it is no folder, no adapter of the local hub and no Hugging Face id like owner/name",
            hint="atoll hub list shows names",
        )
    return _fetched(repository), None


def _in_hub(name: str, hub: Hub | None) -> tuple[Path, str] | None:
    """The folder and digest of a version of the local hub, None where it has none of that name."""
    if hub is None:
        if any(find_spec(package) is None for package in _HUB_PACKAGES):
            return None
        from atoll.hub.store import Hub as LocalHub

        hub = LocalHub()
    try:
        version = hub.resolve(name)
    except (AdapterNotFound, NameRefused):
        return None
    return hub.path(version), version.digest


def _fetched(repository: str) -> Path:
    """The folder of a repository in Hugging Face's cache, fetched if its two files are not there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = [try_to_load_from_cache(repository, file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:
        # The client lets its HTTP library's errors through, and which library that is depends on its version.
        if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith(("httpx", "requests", "urllib3", "huggingface_hub")):
            raise
        raise HubError(
            f"module {repository!r} could not be fetched from the Hugging Face hub: {str(error).strip().splitlines()[0]}",
            hint="check the name and the connection, or give a folder",
        ) from error
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterFormatError(
            f"module {repository!r} has no {WEIGHTS_FILE} on the Hugging Face hub",
            hint="modules from before 2024 may be pickles, which can run code: save it anew by PEFT in a place you trust, and give the folder",
        )
    return folder
