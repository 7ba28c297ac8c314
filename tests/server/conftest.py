"""Fixtures of the server's tests: a live server that all share, and one that a test sets up itself. What it serves: live_server.py.

`live` is shared by the whole session and must be left as it was found; `serve(**settings)` makes another, for tests that change or break something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.server.live_server import Live, fill_hub, serving

from atoll.model.base import Base, load_base


@pytest.fixture(scope="session")
def served_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny Llama in float32."""
    return load_base(str(tiny_base_dir), dtype="float32", home=tmp_path_factory.mktemp("server-home"))


@pytest.fixture(scope="session")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("live")
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base)) as running:
            yield running


@pytest.fixture
def serve(served_base: Base, tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """A server for one test; keywords are ServeConfig's, `keys` the arguments of add_key by name: {"ann": {"scopes": ["infer"]}}."""
    from atoll.serving.keys import add_key

    with ExitStack() as stack:

        def start(keys: dict[str, dict[str, Any]] | None = None, **settings: Any) -> Live:
            made = {name: add_key(tmp_path / "keys.json", name, **options) for name, options in (keys or {}).items()}
            if made:
                settings["keys_file"] = tmp_path / "keys.json"
            running = stack.enter_context(serving(served_base, fill_hub(tmp_path / "server", served_base), **settings))
            running.keys.update(made)
            return running

        yield start
