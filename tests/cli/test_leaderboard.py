"""`atoll leaderboard`: several files as one table."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from adapters import publish, random_reft
from atoll.cli.output import size
from atoll.eval.baseline import Baseline
from atoll.eval.leaderboard import Leaderboard, LeaderboardEntry, LeaderboardRow, RowNote, write_leaderboard
from atoll.hub import Hub
from atoll.model.base import load_base


def entry(model, kind, value, **changes):
    facts = {"digest": model[0] * 64, "stderr": 0.02, "failures": 0, "p_vs_base": None if kind == "base" else 0.0001, "options_value": None}
    return LeaderboardEntry(**{"model": model, "kind": kind, "value": value, **facts, **changes})


def board(task, *entries, fingerprint="f" * 64, name="tiny"):
    row = LeaderboardRow(task, "v" * 64, "accuracy", 100, (entry("tiny", "base", 0.4), *entries))
    return Leaderboard(name, fingerprint, (row,))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working directory with two boards of one base."""
    monkeypatch.chdir(tmp_path)
    write_leaderboard(tmp_path / "runs/a", board("dates", entry("dates", "lora", 0.8)))
    write_leaderboard(tmp_path / "runs/b", board("intents", entry("intents", "lora", 0.41, p_vs_base=0.5)))
    return tmp_path


def test_boards_below_runs_are_merged_into_one_table(atoll, runs):
    """A week of work in ten folders is one table."""
    result = atoll("leaderboard")
    assert "| dates" in result.out
    assert "0.800 ± 0.020 | +0.400 | <0.001 | better" in result.out
    assert "| +0.010 |  0.500 | no difference" in result.out
    assert "options" not in result.out  # no task has a closed label set
    merged = atoll("leaderboard", "runs/a", "runs/b/leaderboard.json", "--json").json()
    assert [row["task"] for row in merged["rows"]] == ["dates", "intents"]


def test_boards_of_two_bases_are_two_tables_and_not_one_json(atoll, runs):
    """Scores of different bases must never stand in one table as if they could be compared."""
    write_leaderboard(runs / "runs/c", board("dates", fingerprint="e" * 64, name="other"))
    shown = atoll("leaderboard").out
    assert shown.count("fingerprint") == 2
    assert "base only" in shown
    refused = atoll("leaderboard", "--json")
    assert (refused.code, refused.out) == (1, "")
    assert "different bases" in refused.err


def test_kinds_and_sizes_are_shown_where_adapters_differ_in_kind(atoll, runs, tiny_base_dir, tmp_path):
    """LoRA against ReFT is a question of parameters as much as of scores; a board of LoRAs alone stays narrow."""
    assert "kind" not in atoll("leaderboard").out and "parameters" not in atoll("leaderboard").out
    base = load_base(str(tiny_base_dir), dtype="float32")
    version = publish(Hub(), random_reft(base.decoder), "edits", tmp_path)
    write_leaderboard(runs / "runs/c", board("dates", entry("edits", "reft", 0.7, digest=version.digest)))
    shown = [[cell.strip() for cell in line.split("|")] for line in atoll("leaderboard").out.splitlines()]
    head = next(cells for cells in shown if "kind" in cells)
    by_kind = {cells[head.index("kind")]: cells for cells in shown[shown.index(head) + 2 :] if len(cells) > 1}
    assert by_kind["reft"][head.index("parameters")] == f"{version.num_parameters:,}"
    assert by_kind["reft"][head.index("size")] == size(version.size_bytes)
    assert by_kind["lora"][head.index("parameters")] == "-"  # the hub here does not have it


def test_missing_and_broken_boards_are_named(atoll, runs):
    """A typing slip is not an empty leaderboard."""
    assert "runs/x does not exist" in atoll("leaderboard", "runs/x").err
    (runs / "bad.json").write_text("{}")
    result = atoll("leaderboard", "bad.json")
    assert result.code == 1
    assert "bad.json" in result.err


def test_nothing_to_show_is_said(atoll, tmp_path, monkeypatch):
    """With the command that would make one."""
    monkeypatch.chdir(tmp_path)
    result = atoll("leaderboard")
    assert result.code == 1
    assert "atoll land" in result.err


def test_the_constant_answer_and_the_prompt_style_are_shown_where_they_are_known(capsys):
    """An accuracy of 0.6 means little where the majority answer has 0.6."""
    from atoll.cli.leaderboard import show_board

    note = RowNote(Baseline("yes", 0.6, 0.6, 0.05, 100), "chat")
    show_board(board("dates", entry("mine", "lora", 0.6, failures=7, options_value=0.7)), {"dates": note})
    shown = capsys.readouterr().out
    assert "|    0.600 | 0.400 ± 0.020 (chat) | mine" in shown
    assert "|   0.700 |        7 | better" in shown


def test_what_training_cost_is_a_column_and_beside_the_json(atoll, runs):
    """The question after "how good" is "for how much": a price where there was a rate, else the time of the processors."""
    assert "cost" not in atoll("leaderboard").out.splitlines()[2]
    cost = {"tokens": 1000, "seconds": 60.0, "cpu_seconds": 90.0, "peak_memory_bytes": 1 << 30, "energy_joules": None}
    facts = {"status": "finished", "started": datetime(2030, 1, 2, tzinfo=UTC)}
    Hub().record_run("train", {}, digest="d" * 64, cost={**cost, "price": 0.25, "currency": "EUR"}, **facts)
    Hub().record_run("train", {}, digest="i" * 64, cost=cost, **facts)
    shown = atoll("leaderboard").out
    assert "0.25 EUR" in shown and "1 min 30 s CPU" in shown
    told = atoll("leaderboard", "--json").json()
    assert told["costs"]["d" * 64]["price"] == 0.25 and told["costs"]["i" * 64]["cpu_seconds"] == 90.0
    (runs / "merged.json").write_text(json.dumps(told))
    assert "0.25 EUR" in atoll("leaderboard", "merged.json").out
