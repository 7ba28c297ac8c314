"""A tiny base in float32 and pools over it, shared by the tests of compose."""

from __future__ import annotations

import pytest
from tests.adapters import decoder_of
from tests.compose.scenes import equal_adapters, mixed_adapters
from tests.conftest import tiny_model

from atoll.compose.pool import Pool
from atoll.model.decoder import Decoder


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture(scope="session")
def pool(decoder: Decoder) -> Pool:
    """Adapters that differ in rank, alpha, targets and layers."""
    return Pool.of(mixed_adapters(decoder), decoder, ["one", "two", "three", "four"], ["d1", "d2", None, "d4"])


@pytest.fixture(scope="session")
def equals(decoder: Decoder) -> Pool:
    """Adapters of one shape, as the product form needs them."""
    return Pool.of(equal_adapters(decoder), decoder)
