"""What the tests of workflows share: rows, files of them, and quick compositions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.config_compose import ComposeConfig
from atoll.model.base import Base


def rows(num: int, start: int = 0) -> list[dict[str, str]]:
    kinds = ("warm", "cold")
    return [{"prompt": f"thing {start + number} is", "completion": f" {kinds[number % 2]}"} for number in range(num)]


def write_rows(path: Path, found: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def config_of(base: Base, data: dict[str, Any] | Path, *, compose: dict[str, Any] | None = None, **changes: Any) -> ComposeConfig:
    """A composition over the tiny base with few evaluations and folds."""
    quick = {"budget": 30, "top_k": 3, "dtype": "float32", "folds": 2, "control_folds": 2, **(compose or {})}
    rows = data if isinstance(data, dict) else {"path": str(data)}
    return ComposeConfig(**{"base": str(base.path), "name": "warmth", "data": rows, "generation": {"max_new_tokens": 3}, "compose": quick, **changes})
