"""What users get wrong, through the command line: one sentence, a way out, exit code 1, nothing on stdout, nothing half done."""

from __future__ import annotations

import json
import shutil
import struct

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from atoll.cli.main import run
from atoll.workflows import locked


def refused(result, *words):
    """The result is a refusal whose one sentence has `words`."""
    assert (result.code, result.out) == (1, ""), result.err
    lines = [line for line in result.err.splitlines() if not line.startswith(("loading", "warning"))]
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (lines[1] == "" and lines[2].startswith("hint: ") and len(lines) == 3), result.err
    for word in words:
        assert word in lines[0]


ROWS = {
    "a missing column": ('{"text": "a", "color": "red"}\n' * 9, ["rows.jsonl:1", "'colour'"]),
    "an empty file": ("", ["rows.jsonl", "no rows"]),
    "bytes that are not UTF-8": (b'{"text": "caf\xe9", "colour": "red"}\n', ["rows.jsonl:1", "0xe9", "not UTF-8"]),
    "a line that is not JSON": ('{"text": "a", "colour": "red"}\n{"text": \n', ["rows.jsonl:2", "not JSON"]),
    "an empty answer": ('{"text": "a", "colour": "red"}\n' + '{"text": "b", "colour": " "}\n' * 9, ["rows.jsonl:", "empty"]),
}


@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry run"])
@pytest.mark.parametrize("kind", ROWS)
def test_bad_rows_are_named_by_file_and_line(atoll, job, tmp_path, kind, dry):
    """A user with ten thousand rows must be told which one."""
    text, words = ROWS[kind]
    (tmp_path / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(atoll("train", job, *(["--dry-run"] if dry else [])), *words)
    assert not (tmp_path / "atoll-home" / "hub" / "hub.db").exists()


SETTINGS = {
    "a template with an unknown field": (["--set", "data.template='{txt} is'"], ["rows.jsonl:", "'txt'"]),
    "a template with a broken brace": (["--set", "data.template='{text is'"], ["data.template"]),
    "a rank of 0": (["--set", "adapter.r=0"], ["adapter.r", "at least 1"]),
    "a rank that is text": (["--set", "adapter.r=many"], ["adapter.r", "whole number"]),
    "a key that is misspelt": (["--set", "trainer.epoch=1"], ["trainer.epoch"]),
    "a setting without a value": (["--set", "trainer.epochs"], ["trainer.epochs"]),
    "a name that climbs": (["--name", "../../etc/x"], ["name"]),
    "rows that are not there": (["--data", "nothing.jsonl"], ["nothing.jsonl", "does not exist"]),
    "a base that is not there": (["--base", "./no-base"], ["no-base"]),
    "a length beyond the context": (["--set", "trainer.max_length=100000"], ["max_length", "512"]),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_bad_settings_are_refused_before_any_work(atoll, job, tmp_path, kind):
    """The sentence names the setting, wherever it came from; no folder of a run appears."""
    arguments, words = SETTINGS[kind]
    refused(atoll("train", job, "--out", "run", *arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "land"])
def test_a_file_of_the_wrong_kind_or_none_is_named(atoll, job, tmp_path, command):
    """The two kinds of file are easily confused; the hint has the right command."""
    refused(atoll(command, "nothing.yaml"), "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    refused(atoll(command, "list.yaml"), "list.yaml")
    if command == "land":
        result = atoll("land", job)
        refused(result, "expected a land file")
        assert "atoll train" in result.err


@pytest.fixture
def adapter(trained_home, tmp_path):
    """An adapter's folder that may be damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(trained_home))
        assert run(["hub", "export", "colours", str(tmp_path / "adapter")]) == 0
    return tmp_path / "adapter"


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pad(folder):
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"\0" * 100)


def lie_about_the_header(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def put_nan(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first] = numpy.full_like(tensors[first], numpy.nan)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")


def ask_for_dora(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))


def remove_config(folder):
    (folder / "adapter_config.json").unlink()


DAMAGES = {truncate: [], pad: [], lie_about_the_header: [], put_nan: ["nan"], make_pickle: ["pickle"], ask_for_dora: ["use_dora"], remove_config: []}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["publish", "pull"])
def test_a_damaged_or_hostile_adapter_does_not_enter_the_hub(atoll, adapter, command, damage):
    """A pickle runs code, a NaN answers nonsense, an ignored option is silently another adapter."""
    damage(adapter)
    result = atoll("hub", command, adapter, "theirs")
    refused(result)
    assert all(word in result.err.lower() for word in DAMAGES[damage])
    assert atoll("hub", "list", "--json").json() == []


@pytest.mark.parametrize("name", ["../up", "a/../b", "/etc/x", "a/b/c", "latest", "a b", ""])
def test_a_name_that_could_climb_or_confuse_is_refused(atoll, adapter, name):
    """Names come from colleagues and strangers."""
    refused(atoll("hub", "publish", adapter, name), "cannot be the name")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_of_several_files_the_bad_one_is_named_and_nothing_begins(atoll, job, tmp_path, dry):
    """Who starts ten trainings wants to know which of them to mend, and that the others have not run."""
    other = json.loads(job.read_text()) | {"name": "other"}
    other["data"]["path"] = "missing.jsonl"
    (tmp_path / "other.yaml").write_text(json.dumps(other))
    ended = atoll("train", job, "other.yaml", *dry)
    assert ended.code == 1 and "error: other.yaml: data file" in ended.err and not (tmp_path / "runs").exists()
    assert dry or "nothing was trained" in ended.err


def test_a_full_disk_stores_nothing_and_says_so(atoll, adapter, monkeypatch):
    """Publishing checks for room first; half an adapter must never be visible."""
    usage = shutil.disk_usage(adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(atoll("hub", "publish", adapter, "theirs"), "1,000 free")
    assert atoll("hub", "list", "--json").json() == []


def test_an_adapter_of_another_base_is_refused(atoll, trained, tmp_path, tiny_base_dir):
    """It would answer, and wrongly."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other-base"
    shutil.copytree(tiny_base_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    tensors = load_file(other / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:, :64] if "down_proj" in name else tensor[:64] if "gate_proj" in name or "up_proj" in name else tensor).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(atoll("generate", "--adapter", "colours", "--base", other, "a red thing"), "colours@1", "does not fit")
    refused(atoll("eval", "builtin:date_format", "--model", "colours", "--base", other, "--rows", 2, "--out", tmp_path / "out"), "colours@1")


def test_an_adapter_that_is_not_there_is_named_with_the_nearest(atoll, trained):
    """A typing slip must not be an answer of the bare base."""
    result = atoll("generate", "--adapter", "colour", "hi")
    refused(result, "'colour'")
    assert "did you mean colours?" in result.err


@pytest.mark.parametrize("kind", ["land", "train"])
def test_a_folder_that_another_process_works_in_is_busy(atoll, job, tmp_path, tiny_base_dir, kind):
    """Two lands in one folder would write each other's checkpoints."""
    (tmp_path / "land.yaml").write_text(json.dumps({"base": str(tiny_base_dir), "tasks": ["builtin:date_format"]}))
    with locked(tmp_path / "out"):
        refused(atoll(kind, f"{kind}.yaml", "--out", tmp_path / "out"), "in use by another")


def test_an_out_folder_that_cannot_be_made_is_a_sentence(atoll, job, tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "taken").write_text("")
    refused(atoll("train", job, "--out", tmp_path / "taken"), "taken")
