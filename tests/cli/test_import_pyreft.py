"""`atoll hub import-pyreft`: a folder of PyReFT's becomes an adapter of the hub, or one sentence."""

from __future__ import annotations

import pytest

from pyreft_files import write_folder


@pytest.fixture
def theirs(tmp_path):
    """What PyReFT leaves of a LoReFT of two layers of the tiny base."""
    write_folder(tmp_path / "theirs", [("loreft", 0, "block_output"), ("loreft", 2, "block_output")])
    return tmp_path / "theirs"


def test_a_pyreft_folder_is_published_and_asked_like_any_adapter(atoll, theirs, tiny_base_dir):
    """Bound to its base, with the positions that its author knows; the same folder again is the same version."""
    command = ["hub", "import-pyreft", theirs, "acme/old", "--base", tiny_base_dir, "--positions", "f2+l2"]
    assert atoll(*command).out == "acme/old@1\n"
    assert atoll(*command).out == "acme/old@1\n"
    card = atoll("hub", "show", "acme/old", "--json").json()
    [part] = card["config"]["reft"]
    assert (card["kind"], part["method"], part["layers"], part["positions"]) == ("reft", "loreft", [0, 2], "f2+l2")
    assert len(card["manifest"]["base"]["weights_fingerprint"]) == 64 and card["manifest"]["origin"] == {"source": "pyreft"}
    ask = ["generate", "--dtype", "float32", "--raw", "-n", 2, "--json", "--logprobs", 1, "a quiet lagoon"]
    edited, plain = atoll(*ask, "-a", "acme/old").json(), atoll(*ask, "--base", tiny_base_dir).json()
    assert edited["logprobs"][0]["logprob"] != plain["logprobs"][0]["logprob"]
    other = atoll("hub", "import-pyreft", theirs, "acme/old", "--base", tiny_base_dir, "--positions", "[0, -1]")
    assert (other.out, other.err.count("warning")) == ("acme/old@2\n", 0)
    assert "taken to be f7+l7" in atoll("hub", "import-pyreft", theirs, "acme/old", "--base", tiny_base_dir).err


def test_what_cannot_be_imported_is_one_sentence_and_publishes_nothing(atoll, theirs, tiny_base_dir, tmp_path):
    """Another base, positions that are none, a folder of something else; and publish names this command for such a folder."""
    from conftest import write_tiny_base

    narrow = write_tiny_base(tmp_path / "narrow", hidden_size=32)
    for options, words in (
        (["--base", narrow], "does not fit the base"),
        (["--base", tiny_base_dir, "--positions", "everywhere"], "cannot be read"),
        (["--base", tiny_base_dir, "--act-fn", "softmax"], "softmax"),
    ):
        refused = atoll("hub", "import-pyreft", theirs, "old", *options)
        assert (refused.code, refused.out) == (1, "") and words in refused.err and "Traceback" not in refused.err
    assert atoll("hub", "import-pyreft", theirs, "old", "--base", tiny_base_dir, "--positions", "[0, x]").code == 2
    assert atoll("hub", "import-pyreft", theirs, "old").code == 2
    assert "import-pyreft" in atoll("hub", "publish", theirs, "old").err
    assert atoll("hub", "list", "--json").json() == []
