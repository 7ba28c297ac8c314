"""leaderboard.json has a fixed form; leaderboard.md says the same in a table."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from atoll.errors import BaseMismatch, DataError, TaskError
from atoll.eval.baseline import Baseline
from atoll.eval.leaderboard import (
    Leaderboard,
    LeaderboardEntry,
    RowNote,
    Size,
    beats,
    build_leaderboard,
    merge_leaderboards,
    read_leaderboard,
    render_markdown,
    write_leaderboard,
)
from atoll.eval.score import KINDS, Score
from atoll.hub.intake import KINDS as HUB_KINDS
from atoll.train.cost import Cost

N = 40


def score(model="tiny", kind="base", right=20, task="sst2", style="plain", **changes):
    """A score with `right` of 40 rows right."""
    values = tuple(float(row < right) for row in range(N))
    made = Score(
        task=task, task_version="v1", metric="accuracy", metric_version=1, match=None, n=N, value=right / N, stderr=0.07, failures=2, model=model,
        kind=kind, digest=f"{model}-digest", prompt_style=style, prompt_hash="p", rows_hash="r", prompts_cut=0, max_new_tokens=8, stop=("\n",),
        options_value=0.6, options_stderr=0.07, seconds=None, values=values, evidence=tuple((value,) for value in values),
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def board():
    scores = [
        score(right=10), score(right=20, style="chat"), score("sst2-lora", "lora", 38), score("mix", "composed", 19),
        score(task="agnews", right=5), score("agnews-lora", "lora", 6, task="agnews"),
    ]  # fmt: skip
    return build_leaderboard("tiny", "f" * 64, scores)


def test_the_file_has_exactly_the_fixed_form(board, tmp_path):
    """Other tools read it; a missing or an extra key breaks them."""
    path, page = write_leaderboard(tmp_path / "out", board)
    value = json.loads(path.read_text())
    assert value.keys() == {"base", "rows"} and value["base"] == {"name": "tiny", "fingerprint": "f" * 64}
    assert [row.keys() for row in value["rows"]] == [{"task", "task_version", "metric", "n", "entries"}] * 2
    for row in value["rows"]:
        for entry in row["entries"]:
            assert entry.keys() == {"model", "kind", "digest", "value", "stderr", "failures", "p_vs_base", "options_value"}
    assert read_leaderboard(path) == read_leaderboard(tmp_path / "out") == board
    assert Leaderboard.from_json({**value, "costs": {}}) == board  # as `atoll leaderboard --json` prints it
    assert page.read_text() == render_markdown(board)


def test_the_base_stands_first_and_in_its_better_style(board):
    """One base entry a row, and rows and entries in an order that does not depend on who finished first."""
    assert [row.task for row in board.rows] == ["agnews", "sst2"]
    assert [(entry.model, entry.value) for entry in board.rows[1].entries] == [("tiny", 0.5), ("sst2-lora", 0.95), ("mix", 0.475)]
    assert board.rows[1].base.p_vs_base is None and board.rows[1].entries[1].p_vs_base < 0.001


def test_without_a_base_there_is_no_p():
    """A board of adapters alone is legal: the base may be evaluated later."""
    board = build_leaderboard("tiny", "f", [score("a", "lora")])
    assert board.rows[0].base is None and board.rows[0].entries[0].p_vs_base is None
    assert "no base" in render_markdown(board)


def test_scores_of_other_rows_do_not_meet():
    """Another version of the task is another row; the same version with other rows is an error, not a p-value."""
    assert len(build_leaderboard("tiny", "f", [score(), score("a", "lora", task_version="v2")]).rows) == 2
    with pytest.raises(TaskError, match="cannot be compared"):
        build_leaderboard("tiny", "f", [score(), score("a", "lora", rows_hash="other")])


def test_beating_is_beyond_the_standard_error_of_the_difference():
    """A gain within the noise of both scores is no gain."""
    base = LeaderboardEntry("tiny", "base", "d", 0.5, 0.03, 0, None, None)
    edge = math.hypot(0.03, 0.04)
    assert beats(replace(base, kind="lora", value=0.5 + edge + 1e-6, stderr=0.04), base)
    assert not beats(replace(base, kind="lora", value=0.5 + edge - 1e-6, stderr=0.04), base)
    assert not beats(replace(base, kind="lora", value=0.9, stderr=None), base)


def test_merging_keeps_both_and_prefers_the_newer(board):
    """A second run adds its adapters and replaces what it measured again, and nothing else."""
    newer = build_leaderboard("tiny", "f" * 64, [score(right=22), score("sst2-lora", "lora", 39), score("new", "reft", 30), score(task="boolq")])
    merged = merge_leaderboards(board, newer)
    assert [row.task for row in merged.rows] == ["agnews", "boolq", "sst2"]
    assert [(entry.model, entry.value) for entry in merged.rows[2].entries] == [("tiny", 0.55), ("sst2-lora", 0.975), ("new", 0.75), ("mix", 0.475)]
    assert merge_leaderboards(board, board) == board
    with pytest.raises(BaseMismatch, match="different bases"):
        merge_leaderboards(board, replace(board, base_fingerprint="0" * 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("base"), r"leaderboard has other keys.*missing \['base'\]"),
        (lambda value: value["rows"][0].update(extra=1), r"rows\[0\] has other keys.*unknown \['extra'\]"),
        (lambda value: value["rows"][1]["entries"][0].pop("stderr"), r"rows\[1\].entries\[0\]"),
        (lambda value: value["rows"][0]["entries"][0].update(value="0.9"), r"entries\[0\].value is '0.9', expected float"),
        (lambda value: value["rows"][0]["entries"][0].update(failures=True), "failures is True"),
        (lambda value: value["rows"][0]["entries"][0].update(kind="gpt"), "kind is 'gpt'"),
        (lambda value: value["rows"][0].update(n="4"), "n is '4'"),
        (lambda value: value["rows"].append(value["rows"][0]), "two rows"),
        (lambda value: value.update(rows={}), "rows is dict"),
    ],
)
def test_another_form_is_refused_with_its_place(board, tmp_path, change, message):
    """A hand-edited or foreign file must not be read as something it is not."""
    value = board.to_json() | {}
    value = json.loads(json.dumps(value))
    change(value)
    path = tmp_path / "leaderboard.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        read_leaderboard(path)


def test_a_number_that_is_not_finite_is_never_written(board, tmp_path):
    """NaN is not JSON; a reader in another language would fail on the whole file."""
    row = board.rows[0]
    broken = replace(board, rows=(replace(row, entries=(replace(row.entries[0], value=math.nan),)),))
    with pytest.raises(DataError, match="value is nan"):
        write_leaderboard(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_the_page_says_it_in_words(board):
    """Readable without colour: majority class, base with its style, what the adapter is and weighs, gain, p and a verdict."""
    cost = Cost(1000, 600.0, 1234.4, price=0.0137, currency="EUR")
    notes = {
        "sst2": RowNote(Baseline("positive", 0.5, 0.512, 0.08, N), "chat", {"sst2-lora-digest": Size(12_345, 67_890)}, {"sst2-lora-digest": cost})
    }
    page = render_markdown(board, notes)
    line = next(line for line in page.splitlines() if "sst2-lora" in line)
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert cells == [
        "sst2", "accuracy", "40", "0.512", "0.500 ± 0.070 (chat)", "sst2-lora", "lora", "12,345", "67,890", "1,234", "0.014 EUR",
            "0.950 ± 0.070", "+0.450", "<0.001",
        "2 (base 2)", "0.600 (0.600)", "better",
    ]  # fmt: skip
    assert "| mix | composed | - | - | - | - | 0.475" in page
    assert "no difference" in next(line for line in page.splitlines() if "| mix |" in line)
    widths = {line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "How to read it" in page


def test_every_kind_of_the_hub_can_stand_on_a_board():
    """An adapter that was published and measured must not be refused when its board is read again."""
    assert set(KINDS) == {"base", "endpoint", *HUB_KINDS}
    board = build_leaderboard("tiny", "f", [score(), *(score(f"a-{kind}", kind, 30) for kind in HUB_KINDS)])
    assert Leaderboard.from_json(json.loads(json.dumps(board.to_json()))) == board


def test_a_name_with_a_bar_does_not_break_the_table():
    """Model names come from users."""
    page = render_markdown(build_leaderboard("tiny", "f", [score(), score("a|b\nc", "lora")]))
    assert "a\\|b c" in page


def test_an_empty_board_is_legal(tmp_path):
    """A first run that was interrupted before its first score."""
    board = Leaderboard("tiny", "f", ())
    write_leaderboard(tmp_path, board)
    assert read_leaderboard(tmp_path) == board
