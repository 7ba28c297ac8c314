"""A composition that is asked of a server is made on the base that it serves, rounded alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from atoll.config_compose import ComposeConfig
from atoll.model.base import Base
from atoll.server.compose_body import ComposeBody, _rounding, config_of
from atoll.serving.config import ComposeLimits

ROW = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("name", ["", "nf4", "fp4-single", "int8"])
def test_the_worker_gets_the_rounding_of_the_base_that_is_served(name: str) -> None:
    """As JSON, which it is sent as, and back."""
    fake = SimpleNamespace(name="tiny", dtype=torch.float32, decoder=SimpleNamespace(device="cpu"), fingerprint=SimpleNamespace(quantization=name))
    body = ComposeBody(**cast(dict[str, Any], {"name": "new", "examples": [ROW]}))
    config = config_of(body, (), cast(Base, fake), ComposeLimits())
    again = ComposeConfig(**{**config.model_dump(mode="json"), **_rounding(config)})
    assert (again.quantization.name if again.quantization else "") == name and again == config


def test_fewer_seeds_than_usual_do_not_split_examples_that_nobody_draws() -> None:
    """A limit of the server is no wish of the user for seeds."""
    fake = SimpleNamespace(name="tiny", dtype=torch.float32, decoder=SimpleNamespace(device="cpu"), fingerprint=SimpleNamespace(quantization=""))
    limits = ComposeLimits(max_seeds=2)
    for extra, wanted in (({}, 1), ({"k": 1}, 2), ({"seeds": 2}, 2)):
        body = ComposeBody(**cast(dict[str, Any], {"name": "new", "examples": [ROW, ROW], "test": [ROW], **extra}))
        assert config_of(body, (), cast(Base, fake), limits).compose.seeds == wanted
