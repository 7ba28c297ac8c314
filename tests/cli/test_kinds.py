"""Every kind of adapter from the command line: publish, list, show, ask, talk, measure."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adapters import random_adapter, random_reft
from atoll.model.adapter_files import write_adapter
from atoll.model.base import load_base
from atoll.model.positions import Positions

KINDS = {"factors": "lora", "edits": "reft", "both": "lora+reft"}
ASK = ["--dtype", "float32", "--raw", "-n", 6]


@pytest.fixture
def folders(tiny_base_dir, tmp_path):
    """A folder of each kind, and one whose config says less than its tensors."""
    base = load_base(str(tiny_base_dir), dtype="float32")
    made = {
        "factors": random_adapter(base.decoder, 4),
        "edits": random_reft(base.decoder, 2, positions=Positions.parse("f3+l3"), layers=(0, 2)),
        "both": random_reft(base.decoder, 3, lora=4),
    }
    for name, adapter in made.items():
        manifest = {"format": 1, "kind": adapter.spec.kind, "base": base.describe() | {"name": str(tiny_base_dir)}, "prompt": None}
        write_adapter(tmp_path / name, replace(adapter, manifest=manifest))
    write_adapter(tmp_path / "bad", made["edits"])
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    return tmp_path


@pytest.fixture
def published(atoll, folders):
    for name in KINDS:
        assert atoll("hub", "publish", folders / name, name).out == f"{name}@1\n"
    return folders


def test_each_kind_is_published_listed_and_shown(atoll, published):
    """The list's column, the filter and the card agree."""
    assert {each["name"]: each["kind"] for each in atoll("hub", "list", "--json").json()} == KINDS
    for name, kind in KINDS.items():
        assert [each["name"] for each in atoll("hub", "list", "--kind", kind, "--json").json()] == [name]
        assert [each["name"] for each in atoll("hub", "search", name, "--kind", kind, "--json").json()] == [name]
    rows = [line for line in atoll("hub", "list").out.splitlines() if line.startswith("| edits@1")]
    assert len(rows) == 1 and "| reft " in rows[0] and f"{2 * (4 * 64 * 2 + 4):,}" in rows[0]
    card = atoll("hub", "show", "edits").out
    assert "## Edits" in card and "f3\\+l3" in card and "| loreft | 0, 2 | 4 |" in card
    unknown = atoll("hub", "list", "--kind", "loreft")
    assert unknown.code == 1 and "no kind 'loreft'" in unknown.err and "lora+reft" in unknown.err


def test_a_folder_that_says_less_than_it_holds_is_refused_in_one_line(atoll, folders):
    """A config of plain LoRA over tensors of edits: applying the half that it names would be another adapter."""
    refused = atoll("hub", "publish", folders / "bad", "bad")
    assert refused.code == 1 and refused.out == "" and refused.err.startswith("error: ") and "Traceback" not in refused.err
    assert atoll("hub", "list", "--json").json() == []


def test_rows_of_every_kind_are_answered_in_one_batch_as_alone(atoll, published):
    """generate --input mixes adapters; each row says what it says by itself, and no two kinds say it alike."""
    names = [None, *KINDS]
    rows = published / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a quiet lagoon", "adapter": name}) + "\n" for name in names))
    base = json.loads((published / "factors" / "manifest.json").read_text())["base"]["name"]
    answers = [json.loads(line)["text"] for line in atoll("generate", "--input", rows, "--base", base, *ASK).out.splitlines()]
    alone = [atoll("generate", *(["-a", name] if name else []), "--base", base, *ASK, "--json", "a quiet lagoon").json() for name in names]
    assert answers == [each["text"] for each in alone]
    assert [each["adapter"] for each in alone] == [None, *(f"{name}@1" for name in KINDS)]
    ranked = atoll("generate", "-a", "edits", *ASK, "--json", "--logprobs", 1, "a quiet lagoon").json()["logprobs"][0]["logprob"]
    assert ranked != atoll("generate", "--base", base, *ASK, "--json", "--logprobs", 1, "a quiet lagoon").json()["logprobs"][0]["logprob"]


def test_a_conversation_goes_on_with_edits(atoll, published):
    """Each turn is a longer prompt, whose last tokens are others: the edits move along with it."""
    base = json.loads((published / "factors" / "manifest.json").read_text())["base"]["name"]
    told = {}
    for name in ("edits", None):
        result = atoll("chat", *(["-a", name] if name else ["--base", base]), "--dtype", "float32", "-n", 4, stdin="hello\nand then?\n")
        assert result.code == 0, result.err
        told[name] = result.out
    assert told["edits"] != told[None]


def test_edits_are_measured_under_their_kind(atoll, published):
    """The board says what each entry is, and what it costs."""
    data = published / "tickets.jsonl"
    rows = [{"prompt": f"thing {i}:", "completion": f" {'red' if i % 2 else 'blue'}", "split": "train" if i < 8 else "test"} for i in range(14)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["eval", data, *(each for name in KINDS for each in ("--model", name)), "--dtype", "float32", "--out", published / "out"]
    shown = atoll(*asked)
    assert shown.code == 0, shown.err
    board = json.loads((published / "out" / "leaderboard.json").read_text())
    assert {entry["kind"] for entry in board["rows"][0]["entries"]} == {"base", *KINDS.values()}
    [row] = [line for line in shown.out.splitlines() if "| edits@1" in line]
    assert "| reft " in row and f"{2 * (4 * 64 * 2 + 4):,}" in row
    assert f"| edits@1 | reft | {2 * (4 * 64 * 2 + 4):,} |" in (published / "out" / "leaderboard.md").read_text()
    assert atoll(*asked).out == shown.out  # read from the files of the first time
