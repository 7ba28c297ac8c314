"""Reading YAML: what values mean, and that every refusal names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.errors import ConfigError
from atoll.yaml_file import dump_yaml, key_hint, key_text, nearest, parse_value, read_yaml


def read(folder: Path, text: str | bytes) -> Any:
    """The values of a file with this text."""
    file = folder / "file.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("017", 17),
        ("1_000", 1000),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'5e-4'", "5e-4"),
    ],
)
def test_a_plain_value_means_what_people_expect(tmp_path: Path, text: str, value: Any) -> None:
    """By YAML 1.1 alone, `5e-4` would be text (no learning rate), `no` false (a lost label), 017 fifteen and 12:30 a number."""
    found = read(tmp_path, f"key: {text}\n").data["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3", "a is given twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", ":3", "a.b is given twice"),
        ("a: [1\nb: 2\n", ":2", "not valid YAML"),
        ("a: 1\n\tb: 2\n", ":2", "not valid YAML"),
        ("a: x: y\n", ":1", "not valid YAML"),
        ("---\na: 1\n---\nb: 1\n", ":3", "not valid YAML"),
        ("ok: 1\nbad: \x07\n", ":2", "control character U+0007"),
        ("a: 1\n1.5: b\n", ":2", "the key '1.5' is not text"),
        ("? [x]\n: b\n", ":1", "is not text"),
        ("a: &x [*x]\n", ":1", "a[0] contains itself"),
        ("a: !!python/object:os.system b\n", ":1", "python/object"),
        ("a: !!timestamp 2024-01-01\n", ":1", "timestamp"),
        ("a: !!int word\n", ":1", "a is not a value that can be read"),
        (f"a: {'9' * 6000}\n", ":1", "a is not a value that can be read"),
        ("[" * 3000, "", "nested too deeply"),
        ("- a\n- b\n", "", "holds a list"),
        ("just words\n", "", "holds text"),
        ("", "", "is empty"),
        ("# only a comment\n", "", "is empty"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, where: str, why: str) -> None:
    """A traceback, or a message without a place, would leave the user to search the file."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert f"file.yaml{where}" in caught.value.message
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    """A file saved as Latin-1 is a common mistake; guessing an encoding would change the prompts."""
    with pytest.raises(ConfigError, match=r"file\.yaml:2: byte 0xe9 is not UTF-8"):
        read(tmp_path, b"a: 1\nb: caf\xe9\n")


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    """Windows editors write one, and the key would not be found."""
    assert read(tmp_path, "\ufeffbase: x\n").data == {"base": "x"}


def test_a_missing_file_is_named_with_the_folder_that_was_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly always the user is in another folder than they think."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_yaml(Path("none.yaml"))
    assert "none.yaml" in caught.value.message and str(tmp_path) in caught.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_anchors_and_merge_keys_work_and_own_keys_win(tmp_path: Path) -> None:
    """Land files repeat settings; a merged key that the file sets itself is not a duplicate."""
    file = read(tmp_path, "a: &x {q: 1, r: 2}\nb:\n  <<: *x\n  q: 3\n")
    assert file.data["b"] == {"q": 3, "r": 2}


def test_where_names_the_line_of_a_key_or_of_what_encloses_it(tmp_path: Path) -> None:
    """An error about a missing key points at its section."""
    file = read(tmp_path, "base: x\ntasks:\n  - builtin:dates\n  - data:\n      path: y\n")
    assert file.where(("tasks", 1, "data", "path")).endswith("file.yaml:5")
    assert file.where(("tasks", 1, "data", "seed")).endswith("file.yaml:4")
    assert file.where(("nothing",)).endswith("file.yaml")


def test_written_yaml_reads_back_the_same(tmp_path: Path) -> None:
    """Text that looks like another type must be quoted when it is written, or a label becomes a number on the way back."""
    values = {
        "a": ["5e-4", "017", "true", "null", "~", "", "no", "<<", "12:30", "#x", "- y"],
        "b": 1e-8,
        "c": None,
        "d": "line\n\nline\n",
        "e": {"f": 3},
    }
    assert read(tmp_path, dump_yaml(values)).data == values


def test_a_value_from_the_command_line_is_yaml() -> None:
    """`--set trainer.learning_rate=5e-4` must give a number, `=null` nothing, `=[a, b]` a list."""
    assert [parse_value(text, "--set x") for text in ("5e-4", "null", "[a, b]", "", "plain words")] == [5e-4, None, ["a", "b"], None, "plain words"]
    with pytest.raises(ConfigError, match="--set x: '\\[a' is not a YAML value"):
        parse_value("[a", "--set x")


def test_a_key_is_suggested_by_likeness_and_by_section() -> None:
    """The two usual mistakes are a misspelt key and a key in the wrong section."""
    assert nearest("Learning-Rate", ["learning_rate", "schedule"]) == "learning_rate"
    assert nearest("zebra", ["learning_rate"]) is None
    assert key_hint("epoch", "trainer", ["epochs"], []) == "did you mean trainer.epochs?"
    assert key_hint("epochs", "", ["base"], ["trainer.epochs"]) == "did you mean trainer.epochs?"
    assert key_hint("zebra", "trainer", ["epochs", "seed"], []) == "keys of trainer: epochs, seed"
    assert key_text(("tasks", 0, "trainer", "r")) == "tasks[0].trainer.r"
