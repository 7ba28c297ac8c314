"""`atoll hub …`: each command's effect, and its data on stdout."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.conftest import write_tiny_base

from atoll.hub import Hub
from atoll.model.fingerprint import describe_base


@pytest.fixture
def adapter(trained_home, tmp_path):
    """A folder with a trained adapter."""
    [folder] = (trained_home / "hub" / "adapters").iterdir()
    return shutil.copytree(folder, tmp_path / "adapter")


def test_publish_list_show_and_export_agree(atoll, adapter, tmp_path):
    """What goes in comes out, bit for bit, and is found in between."""
    assert atoll("hub", "publish", adapter, "acme/colours", "--tag", "stable", "-m", "first", "--licence", "MIT").out == "acme/colours@1\n"
    [version] = atoll("hub", "list", "--json").json()
    assert (version["name"], version["tags"], version["message"], version["licence"]) == ("acme/colours", ["stable"], "first", "MIT")
    assert "acme/colours@1" in atoll("hub", "list").out
    assert [found["digest"] for found in atoll("hub", "search", "colours", "mit", "--json").json()] == [version["digest"]]
    card = atoll("hub", "show", "acme/colours:stable", "--json").json()
    assert card["digest"] == version["digest"]
    assert card["manifest"]["prompt"]["template"] == "{text} is"
    assert atoll("hub", "show", "acme/colours").out.startswith("# acme/colours\n")
    assert atoll("hub", "export", "acme/colours", tmp_path / "out").out == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_a_stranger_s_adapter_can_be_bound_to_a_base(atoll, adapter, tiny_base_dir):
    """--base writes the base's hashes into the version, so that serving it elsewhere is noticed."""
    (adapter / "manifest.json").unlink()
    assert atoll("hub", "publish", adapter, "bound", "--base", tiny_base_dir).code == 0
    assert atoll("hub", "pull", adapter, "loose").code == 0
    bound, loose = (atoll("hub", "show", name, "--json").json()["manifest"]["base"] for name in ("bound", "loose"))
    assert len(bound["weights_fingerprint"]) == 64
    assert loose.get("weights_fingerprint") is None


def test_an_adapter_is_not_bound_to_a_base_that_it_cannot_fit(atoll, adapter, tmp_path, trained_home):
    """It could never be used, and the advice would be to use the base that it names. Of equal shapes but another name, a word is enough."""
    (adapter / "manifest.json").unlink()
    narrow = write_tiny_base(tmp_path / "narrow", hidden_size=32)
    refused = atoll("hub", "publish", adapter, "bound", "--base", narrow)
    assert (
        refused.code == 1
        and "does not fit the base" in refused.err
        and "the base's model.layers.0.mlp.down_proj has 32" in refused.err
        and "made for" not in refused.err
    )
    assert atoll("hub", "list", "--json").json() == []
    Hub().publish(adapter, "bound", base={"name": str(narrow), **describe_base(narrow).to_json()})  # the library takes the caller's word
    asked = atoll("generate", "--adapter", "bound", "--dtype", "float32", "a red thing is")
    assert asked.code == 1 and "does not fit" in asked.err and "--base" not in asked.err
    twin = write_tiny_base(tmp_path / "twin")
    bound = atoll("hub", "publish", adapter, "bound", "--base", twin)
    assert bound.code == 0 and "was trained on" in bound.err and "twin" in bound.err
    assert "warning" not in atoll("hub", "publish", adapter, "again", "--base", write_tiny_base(tmp_path / "copy/tiny-llama")).err


def test_labels_move_and_yanked_versions_leave_bare_names(atoll, adapter):
    """Tags and yanking are how a team steers what others use."""
    atoll("hub", "publish", adapter, "colours")
    assert atoll("hub", "tag", "colours@1", "stable", "--json").json()["tags"] == ["stable"]
    assert atoll("hub", "untag", "colours:stable", "--json").json()["tags"] == []
    assert atoll("hub", "yank", "colours@1", "--json").json()["yanked"]
    assert atoll("hub", "list", "--json").json() == []
    assert atoll("hub", "show", "colours").code == 1
    assert not atoll("hub", "yank", "colours@1", "--undo", "--json").json()["yanked"]
    assert len(atoll("hub", "list", "--json").json()) == 1


def test_verify_finds_a_changed_byte_and_ends_with_1(atoll, adapter, atoll_home):
    """A cron job can watch the hub."""
    atoll("hub", "publish", adapter, "colours")
    good = atoll("hub", "verify")
    assert (good.code, good.out) == (0, "")
    assert "1 version read, 0 problems found" in good.err
    [blob] = (path for path in (atoll_home / "hub" / "blobs").rglob("*") if path.is_file() and path.stat().st_size > 5000)
    blob.chmod(0o644)
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    bad = atoll("hub", "verify", "--json")
    assert bad.code == 1
    assert {problem["ref"] for problem in bad.json()} == {"colours@1"}
    assert "| colours@1 |" in atoll("hub", "verify", "colours").out


def test_deleting_asks_a_person_and_needs_yes_from_a_script(atoll, adapter, monkeypatch):
    """One wrong line in a script should not empty a hub."""
    import sys

    atoll("hub", "publish", adapter, "colours")
    refused = atoll("hub", "delete", "colours", stdin="")
    assert refused.code == 2
    assert "--yes" in refused.err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert atoll("hub", "list", "--json").json()
    gone = atoll("hub", "delete", "colours", "--yes")
    assert (gone.code, gone.out) == (0, "colours@1\n")
    freed = atoll("hub", "gc", "--json").json()
    assert freed["freed_bytes"] > 0
    assert atoll("hub", "list").out == ""


def test_runs_are_listed_with_what_became_of_them(atoll, trained):
    """A training that failed at night is looked for in the morning."""
    [run] = atoll("runs", "list", "--name", "colours", "--json").json()
    assert (run["name"], run["status"]) == ("colours", "finished")
    assert "finished" in atoll("runs", "list").out
    assert atoll("runs", "list", "--name", "nobody", "--json").json() == []


def test_every_listing_is_json_when_asked(atoll, trained):
    """Data to stdout, so that it can be piped: also when there is nothing."""
    for command in (["list"], ["list", "--all"], ["search", "nothing-like-it"], ["verify"]):
        assert isinstance(json.loads(atoll("hub", *command, "--json").out), list)
