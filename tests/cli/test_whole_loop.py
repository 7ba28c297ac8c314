"""The loop through the command line, once, on the tiny base: train, hub, generate, eval, leaderboard, land."""

from __future__ import annotations

import json

import pytest


def test_train_publish_find_generate_evaluate_and_rank(atoll, job, tmp_path):
    """Each command must find what the one before it left: this is what a new user does in the first ten minutes."""
    trained = atoll("train", job, "--out", "run")
    assert trained.code == 0, trained.err
    assert trained.out == "colours@1\n"
    assert "trained 2 steps" in trained.err
    assert "try it: atoll generate --adapter colours" in trained.err

    listed = atoll("hub", "list", "--json").json()
    assert [(version["name"], version["number"], version["rank"]) for version in listed] == [("colours", 1, 4)]

    answer = atoll("generate", "--adapter", "colours", "--dtype", "float32", "-n", 4, "--json", "a red thing").json()
    assert (answer["prompt"], answer["adapter"], answer["num_tokens"]) == ("a red thing is", "colours@1", 4)

    asked = ["rows.jsonl", "--model", "colours", "--template", "{text} is", "--target", "colour", "--rows", 3, "--dtype", "float32"]
    measured = atoll("eval", *asked, "--set", "generation.max_new_tokens=3")
    assert measured.code == 0, measured.err
    assert "colours" in measured.out
    assert (tmp_path / "runs/eval/rows/leaderboard.json").is_file()

    board = atoll("leaderboard", "runs/eval/rows", "--json").json()
    assert [entry["kind"] for entry in board["rows"][0]["entries"]] == ["base", "lora"]
    [cost] = board.pop("costs").values()
    assert cost["tokens"] > 0 and cost["seconds"] > 0 and cost["price"] is None
    assert board == json.loads((tmp_path / "runs/eval/rows/leaderboard.json").read_text())

    again = atoll("train", job, "--out", "run", "--json")
    assert again.json()["reused"]
    assert atoll("runs", "list", "--json").json()[0]["status"] == "finished"


@pytest.fixture
def land_file(tmp_path, tiny_base_dir, monkeypatch):
    """Two built-in tasks with a few rows."""
    config = {
        "base": str(tiny_base_dir),
        "defaults": {
            "data": {"max_train_rows": 6, "max_validation_rows": 2, "max_test_rows": 3},
            "adapter": {"r": 2},
            "trainer": {"dtype": "float32", "max_steps": 2, "batch_size": 3},
            "generation": {"max_new_tokens": 3},
        },
        "tasks": ["builtin:date_format", "builtin:unit_conversion"],
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    return tmp_path / "small.yaml"


def test_a_land_prints_its_leaderboard_and_writes_it(atoll, land_file, tmp_path):
    """stdout is the leaderboard and nothing else, so that it can be kept; the file says the same."""
    result = atoll("land", land_file)
    assert result.code == 0, result.err
    assert [line.split("|")[1].strip() for line in result.out.splitlines()[4:]] == ["date_format", "unit_conversion"]
    assert "training date_format" in result.err and "done unit_conversion" in result.err
    assert "runs/small/leaderboard.json" in result.err

    again = atoll("land", land_file, "--json")
    board = again.json()
    assert all(cost["seconds"] > 0 for cost in board.pop("costs").values())
    assert board == json.loads((tmp_path / "runs/small/leaderboard.json").read_text())
    assert "train date_format" not in again.err

    merged = atoll("leaderboard")
    assert "date_format" in merged.out
    assert "from runs/small" in merged.err


def test_a_task_that_fails_is_a_sentence_and_exit_code_1(atoll, land_file, monkeypatch):
    """The other tasks are done and shown, but a script must notice."""
    from atoll.errors import TrainingError
    from atoll.train.job import TrainingJob

    def finish_step(job):
        if "date_format" in job.folder.parts:
            raise TrainingError("the loss at step 1 is nan", hint="lower trainer.learning_rate")
        original(job)

    original = TrainingJob.finish_step
    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    result = atoll("land", land_file)
    assert result.code == 1
    assert "unit_conversion" in result.out
    assert "warning: task date_format failed: the loss at step 1 is nan (hint: lower trainer.learning_rate)\n" in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_in_the_middle_says_how_to_go_on(atoll, land_file, monkeypatch):
    """Whoever stops a land of an hour wants to know that it is not lost."""
    from atoll.workflows import landing

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(landing, "run_plans_in", stop)
    result = atoll("land", land_file)
    assert (result.code, result.out) == (130, "")
    assert "run the same command again" in result.err
