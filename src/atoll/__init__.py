"""One base language model, hundreds of small adapters: train, compose, serve and measure them.

    import atoll
    loaded = atoll.load_config("train.yaml")

The public names are those in `__all__`; each is fetched from its module on first use, so that `import atoll` loads neither torch nor pydantic.
Training from Python is `atoll.train_and_publish`, composing `atoll.compose_and_publish`: the plain words are the packages that hold the stages.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow _HOMES; tests/test_init.py holds the two equal
    from atoll.config import LandConfig, TrainConfig
    from atoll.config_compose import ComposeConfig
    from atoll.config_file import load_config
    from atoll.engine.engine import Engine
    from atoll.engine.request import Request, SamplingParams
    from atoll.errors import AtollError
    from atoll.hub.store import Hub
    from atoll.model.adapter_files import read_adapter
    from atoll.model.base import load_base
    from atoll.workflows import compose_and_publish, evaluate, land, prompt_ids, train_and_publish

    __version__: str

_HOMES = {
    "AtollError": "atoll.errors",
    "ComposeConfig": "atoll.config_compose",
    "Engine": "atoll.engine.engine",
    "Hub": "atoll.hub.store",
    "LandConfig": "atoll.config",
    "Request": "atoll.engine.request",
    "SamplingParams": "atoll.engine.request",
    "TrainConfig": "atoll.config",
    "compose_and_publish": "atoll.workflows",
    "evaluate": "atoll.workflows",
    "land": "atoll.workflows",
    "load_base": "atoll.model.base",
    "load_config": "atoll.config_file",
    "prompt_ids": "atoll.workflows",
    "read_adapter": "atoll.model.adapter_files",
    "train_and_publish": "atoll.workflows",
}

__all__ = [
    "AtollError",
    "ComposeConfig",
    "Engine",
    "Hub",
    "LandConfig",
    "Request",
    "SamplingParams",
    "TrainConfig",
    "__version__",
    "compose_and_publish",
    "evaluate",
    "land",
    "load_base",
    "load_config",
    "prompt_ids",
    "read_adapter",
    "train_and_publish",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, once (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("atoll")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
