"""API keys: what the file holds, who a key is, and what changes while a server runs."""

from __future__ import annotations

import json
import logging

import pytest

from atoll.errors import ConfigError, KeyRefused, NotAllowed
from atoll.serving.keys import EVERYBODY, Caller, Keys, add_key, read_keys, remove_key


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_known_by_its_hash_alone(file):
    """Whoever reads the file must not be able to use what it holds."""
    key = add_key(file, "ann")
    text = file.read_text()
    assert key not in text
    assert key.removeprefix("atoll_")[:16] not in text
    assert Keys(file).caller(key) == Caller("ann", frozenset({"infer"}), None)
    assert file.stat().st_mode & 0o077 == 0


def test_two_keys_are_never_the_same(file):
    """256 random bits each; a constant would be a master key."""
    keys = {add_key(file, f"key{number}") for number in range(8)}
    assert len(keys) == 8
    assert all(len(key) > 40 for key in keys)


def test_a_wrong_or_missing_key_is_refused(file):
    """The whole point."""
    add_key(file, "ann")
    keys = Keys(file)
    for wrong in ("atoll_x", "", "ann", read_keys(file).keys[0].sha256):
        with pytest.raises(KeyRefused, match="not known"):
            keys.caller(wrong)
    with pytest.raises(KeyRefused, match="has none"):
        keys.caller(None)


def test_without_a_file_everybody_may_do_everything():
    """Such a server is this machine's alone; a key that a client insists on sending changes nothing."""
    keys = Keys()
    assert not keys.required
    assert keys.caller(None) == keys.caller("sk-whatever") == EVERYBODY


def test_anonymous_callers_may_only_infer(file):
    """Beside keys, nobody in particular must not publish or manage."""
    add_key(file, "ann", ["admin"])
    caller = Keys(file, allow_anonymous=True).caller(None)
    assert caller.may("infer")
    assert not caller.may("publish")
    with pytest.raises(NotAllowed, match="admin"):
        caller.require("admin")


def test_a_revoked_key_is_refused_by_a_running_server(file):
    """A leaked key must not live until the next restart, nor a new one wait for it."""
    first = add_key(file, "ann")
    keys = Keys(file)
    second = add_key(file, "bob", ["infer", "admin"])
    assert keys.caller(second).key_id == "bob"
    remove_key(file, "ann")
    with pytest.raises(KeyRefused):
        keys.caller(first)
    assert keys.caller(second).may("admin")


@pytest.mark.parametrize("text", ["{", "[]", '{"keys": [{"id": "x"}]}', '{"keys": [], "extra": 1}'])
def test_a_broken_file_changes_nothing_and_is_logged(file, text, caplog):
    """A slip in an editor must neither lock everybody out nor let everybody in."""
    key = add_key(file, "ann")
    keys = Keys(file)
    file.write_text(text)
    with caplog.at_level(logging.ERROR):
        assert keys.caller(key).key_id == "ann"
    assert "stay as they were" in caplog.text
    with pytest.raises(KeyRefused):
        keys.caller("other")
    with pytest.raises(ConfigError):
        Keys(file)


def test_work_that_goes_on_after_its_request_asks_again(file):
    """What was allowed an hour ago may not be now."""
    assert Keys().again(Caller("ann")) is EVERYBODY
    key = add_key(file, "ann", ["publish"], ["a_*"])
    keys = Keys(file)
    before = keys.caller(key)
    assert keys.again(before) == before
    remove_key(file, "ann")
    with pytest.raises(KeyRefused, match="no longer known"):
        keys.again(before)


def test_a_file_may_be_yaml(file):
    """People write configuration in YAML."""
    key = add_key(file, "ann", adapters=["acme/*"])
    [record] = json.loads(file.read_text())["keys"]
    other = file.with_suffix(".yaml")
    other.write_text(f"keys:\n- id: ann\n  sha256: {record['sha256']}\n  adapters: ['acme/*']\n")
    assert Keys(other).caller(key).adapters == ("acme/*",)


def test_names_of_keys_are_unique_and_plain(file):
    """A key's name stands in logs and metrics."""
    add_key(file, "ann")
    with pytest.raises(ConfigError, match="already"):
        add_key(file, "ann")
    with pytest.raises(ConfigError):
        add_key(file, "an\nn")
    with pytest.raises(ConfigError, match="no key 'bob'"):
        remove_key(file, "bob")


@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        (None, "anything", True),
        (("red",), "red", True),
        (("red",), "RED", True),  # one name in the hub
        (("red",), "red2", False),
        (("org_*",), "org_a", True),
        (("org_*",), "other/org_a", False),
        (("acme/*",), "acme/sql", True),
        (("acme/*",), "acme", False),
        (("acme/*",), "hf:acme/sql", False),  # another place, another adapter
        (("acme/*",), "local:acme/sql", False),
        ((), "red", False),
        ((), "", True),  # the base
    ],
)
def test_an_allow_list_holds_names_and_patterns(patterns, name, allowed):
    """One pattern that matches too much opens another team's adapters."""
    assert Caller("k", adapters=patterns).allows(name) is allowed
