"""The settings of a server: safe defaults, and one sentence for a wrong value."""

from __future__ import annotations

import pytest

from atoll.errors import ConfigError
from atoll.serving.config import ServeConfig


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1"])
def test_this_machine_needs_no_keys(host):
    """Trying it out must be one command."""
    assert ServeConfig(base="b", host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com"])
def test_an_address_that_others_reach_needs_keys(host, tmp_path):
    """A server that anybody on the network can use and manage is the most common hole of its kind."""
    with pytest.raises(ConfigError, match="needs keys") as caught:
        ServeConfig(base="b", host=host)
    assert "atoll keys add" in caught.value.message + caught.value.hint
    assert ServeConfig(base="b", host=host, keys_file=tmp_path / "keys.json").host == host
    with pytest.raises(ConfigError, match="allow_anonymous"):
        ServeConfig(base="b", host=host, keys_file=tmp_path / "keys.json", allow_anonymous=True)


def test_foreign_sources_are_off_by_default():
    """No request may make a fresh server fetch anything from anywhere."""
    config = ServeConfig(base="b")
    assert (config.local_root, config.allow_hf, config.s3_prefixes, config.cors_origins) == (None, False, (), ())


def test_what_a_composition_may_ask_is_bounded_and_can_be_turned_off():
    """Its limits are a section of their own; a typo in it is refused too."""
    config = ServeConfig(base="b", compose={"enabled": False, "max_top_k": 3})
    assert (config.compose.enabled, config.compose.max_top_k, config.compose.threads) == (False, 3, 1)
    with pytest.raises(ConfigError, match=r"compose\.max_topk"):
        ServeConfig(base="b", compose={"max_topk": 3})


def test_an_unknown_or_contradictory_setting_is_refused():
    """A typo in a limit would leave the limit off."""
    with pytest.raises(ConfigError, match="max_concurent_requests") as caught:
        ServeConfig(base="b", max_concurent_requests=3)
    assert "max_concurrent_requests" in caught.value.hint
    with pytest.raises(ConfigError, match="max_input_tokens"):
        ServeConfig(base="b", max_input_tokens=100, max_total_tokens=100)
