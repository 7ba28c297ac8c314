"""`atoll compose` through the command line: what it prints, what it publishes, and what it says to bad input."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from tests.adapters import publish, random_adapter

from atoll.compose import few_shot_lora
from atoll.hub.store import Hub
from atoll.model.base import load_base

QUICK = ["--dtype", "float32", "--budget", 20, "--top-k", 2, "--set", "compose.folds=2", "--set", "compose.control_folds=2"]
QUICK += ["--set", "generation.max_new_tokens=3"]


@pytest.fixture(scope="module")
def made_hub(tiny_base_dir, tmp_path_factory):
    """Three LoRAs of the tiny base, to be copied."""
    root, base = tmp_path_factory.mktemp("hub"), load_base(str(tiny_base_dir), dtype="float32")
    for number, name in enumerate(("colours", "shapes", "sizes")):
        publish(Hub(root), random_adapter(base.decoder, 2 + number, seed=number), name, tmp_path_factory.mktemp("made"), base=base.describe())
    return root


@pytest.fixture
def few(made_hub, atoll_home, tmp_path, monkeypatch):
    """A hub at hand, and four examples in the working directory."""
    shutil.copytree(made_hub, atoll_home / "hub")
    original = few_shot_lora.few_shot_trainer
    monkeypatch.setattr(few_shot_lora, "few_shot_trainer", lambda *given: original(*given).model_copy(update={"max_steps": 2}))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few.jsonl", 4)
    write(tmp_path / "test.jsonl", 10)
    return tmp_path / "few.jsonl"


def write(path, num):
    rows = [{"text": f"thing {index}", "feel": ("warm", "cold")[index % 2]} for index in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TASK = ["--examples", "few.jsonl", "--template", "{text} is", "--target", "feel"]


def test_a_table_the_parts_and_advice_are_printed_and_the_result_is_published(atoll, few, tmp_path):
    """What a user sees: every contestant, what was weighed, what to do, and the name under which it can be asked at once."""
    result = atoll("compose", *TASK, *QUICK, "--publish", "warmth")
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines]
    wanted = ["contestant", "---", "base", "majority", "best single", "uniform", "random adapters", "k-shot LoRA", "in-context", "composed"]
    assert [names[0], "---", *names[2:10]] == wanted
    assert "warmth: 2 of 3 adapters" in result.out and "of its layers" in result.out
    assert "published: warmth@1" in result.err and "took: reading" in result.err
    assert atoll("hub", "list", "--kind", "composed", "--json").json()[0]["name"] == "warmth"
    answer = atoll("generate", "--adapter", "warmth", "--dtype", "float32", "-n", 3, "--json", "thing 9").json()
    assert (answer["prompt"], answer["adapter"]) == ("thing 9 is", "warmth@1")
    again = atoll("compose", *TASK, *QUICK, "--publish", "warmth")
    assert "the result was found and kept" in again.err and again.out == result.out


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(atoll, few, tmp_path):
    result = atoll("compose", *TASK, *QUICK, "--test", "test.jsonl", "--k", 3, "--dry-run")
    assert result.code == 0, result.err
    assert "3, of which the best 2 are searched over by gradient_per_layer: colours@1, shapes@1, sizes@1" in result.out
    assert "3 of 4, 3 seeds, of which one is kept by rows that each leaves out" in result.out and "⟦" in result.out
    assert "cross-validation     about" in result.out and "190 answers of at most 3 tokens" in result.out
    found = atoll("compose", *TASK, *QUICK, "--no-controls", "--dry-run", "--json").json()
    assert found["seeds"] == [0] and list(found["estimate"]["seconds"]) == ["ranking", "search"] and len(found["prompts"]) == 2
    assert not (tmp_path / "runs").exists()


def test_training_instead_is_one_command_away(atoll, few, tmp_path, monkeypatch):
    """Where LoRA on the same examples is as good, the command that trains it is printed, and works from anywhere."""
    result = atoll("compose", *TASK, *QUICK, "--set", "compose.method=uniform", "--set", "compose.folds=0")
    file = tmp_path / "runs" / "compose" / "few" / "train.yaml"
    assert "to train on the examples instead: atoll train runs/compose/few/train.yaml" in result.err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trained = atoll("train", file, "--set", "trainer.dtype=float32", "--set", "trainer.log_to=[]")
    assert trained.code == 0, trained.err
    assert atoll("hub", "show", "few-lora", "--json").json()["kind"] == "lora"


def test_publishing_over_a_trained_adapter_is_told(atoll, few):
    result = atoll("compose", *TASK, *QUICK, "--no-controls", "--publish", "colours")
    assert "colours@1 is an adapter of kind lora: the composition becomes the newest version of colours" in result.err
    again = atoll("compose", *TASK, *QUICK, "--no-controls", "--publish", "colours", "--top-k", 1)
    assert "published: colours@" in again.err and "of kind lora" not in again.err


def test_json_has_all_of_it_and_test_rows_are_scored(atoll, few, tmp_path):
    result = atoll("compose", *TASK, *QUICK, "--test", "test.jsonl", "--seeds", 1, "--json")
    assert result.code == 0, result.err
    found = result.json()
    assert found["version"] is None and found["report"]["measure"] == "score" and len(found["weights"]) <= 2
    scored = {line["name"] for line in found["report"]["lines"] if line["scores"]}
    assert {"base", "majority", "best single", "uniform", "random adapters", "k-shot LoRA", "in-context", "composed"} == scored
    assert found == {**json.loads(json.dumps(found)), "report": json.loads((tmp_path / "runs/compose/few/report.json").read_text())}
    assert atoll("hub", "list", "--kind", "composed", "--json").json() == []
    table = atoll("compose", *TASK, *QUICK, "--test", "test.jsonl", "--seeds", 1)
    assert "| options |" in table.out and "10 test rows (accuracy)" in table.out and "found and kept" in table.err


def test_a_file_says_the_same_and_options_override_it(atoll, few, tmp_path, tiny_base_dir):
    """A name in the file publishes; --no-controls prints no comparison."""
    config = {
        "base": str(tiny_base_dir),
        "name": "warmth",
        "data": {"path": "few.jsonl", "template": "{text} is", "target": "feel"},
        "compose": {"dtype": "float32", "budget": 20, "folds": 2, "top_k": 3},
        "controls": True,
    }
    (tmp_path / "few.yaml").write_text(json.dumps(config))
    result = atoll("compose", "few.yaml", "--no-controls", "--top-k", 1, "--exclude", "colours", "--out", "here")
    assert result.code == 0, result.err
    assert "1 of 2 adapters" in result.out and "contestant" not in result.out and "published: warmth@1" in result.err
    assert (tmp_path / "here" / "report.json").is_file()


def test_ctrl_c_during_the_search_keeps_the_best_so_far_and_says_so(atoll, few, monkeypatch):
    """The exit code is 0: there is a result."""
    from atoll.compose import run

    pressed = []
    original = run.Run.check

    def check(self):
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        original(self)

    monkeypatch.setattr(run.Run, "check", check)
    result = atoll("compose", *TASK, *QUICK, "--no-controls", "--publish", "warmth")
    assert result.code == 0 and pressed, result.err
    assert "not all was done: the search was stopped, and its best so far is kept" in result.err
    assert "published: warmth@1" in result.err


REFUSED = {
    "no examples": (["--examples", "empty.jsonl"], ["empty.jsonl", "no rows"]),
    "a file that is not there": (["--examples", "nothing.jsonl"], ["nothing.jsonl", "does not exist"]),
    "a column that is not there": ([*TASK, "--target", "mood"], ["few.jsonl:1", "'mood'"]),
    "a name that climbs": ([*TASK, "--publish", "../../x"], ["name"]),
    "an unknown method": ([*TASK, "--method", "magic"], ["--method", "'magic'"]),
    "more folds than examples": ([*TASK, "--set", "compose.folds=9"], ["4 examples", "9 folds"]),
    "an adapter that is not there": ([*TASK, "--from", "colour"], ["'colour'"]),
    "a base that is not there": ([*TASK, "--base", "./no-base"], ["no-base"]),
    "an unknown way to rank": ([*TASK, "--retrieve", "luck"], ["--retrieve", "'luck'"]),
    "a share above one": ([*TASK, "--hold-out", 2], ["--hold-out"]),
    "a setting of training": ([*TASK, "--set", "trainer.epochs=1"], ["trainer"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_one_sentence_and_leaves_nothing(atoll, few, tmp_path, kind):
    arguments, words = REFUSED[kind]
    (tmp_path / "empty.jsonl").write_text("")
    result = atoll("compose", *arguments)
    assert (result.code, result.out) == (1, ""), result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), result.err
    assert "Traceback" not in result.err and not (tmp_path / "runs").exists()


def test_a_hub_without_adapters_says_how_to_get_some(atoll, tmp_path, monkeypatch, tiny_base_dir):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few.jsonl", 4)
    result = atoll("compose", *TASK, "--base", tiny_base_dir)
    assert result.code == 1 and "the hub has no LoRA adapters" in result.err and "atoll train" in result.err


def test_nevergrad_that_is_not_installed_is_said_at_once(atoll, few, monkeypatch):
    """Before the base is loaded, not after the ranking."""
    import importlib

    original = importlib.import_module

    def without(name, *given):
        if name == "nevergrad":
            raise ModuleNotFoundError("No module named 'nevergrad'", name="nevergrad")
        return original(name, *given)

    monkeypatch.setattr(importlib, "import_module", without)
    result = atoll("compose", *TASK, "--method", "nevergrad:NGOpt")
    assert result.code == 1 and "nevergrad, which is not installed" in result.err and "loading" not in result.err


@pytest.mark.parametrize("arguments", [[], ["--test", "test.jsonl"], ["--examples", "builtin:dates", "--test", "test.jsonl"]])
def test_options_that_do_not_go_together_are_wrong_usage(atoll, few, arguments):
    result = atoll("compose", *arguments)
    assert result.code == 2 and "--examples" in result.err


def test_adapters_of_several_bases_need_a_name(atoll, few, tmp_path):
    """Nobody should find out from a table which base was meant."""
    from tests.adapters import decoder_of
    from tests.conftest import tiny_model

    publish(Hub(), random_adapter(decoder_of(tiny_model("llama")), 2), "other", tmp_path / "made", base={"name": "another-base"})
    result = atoll("compose", *TASK)
    assert result.code == 1 and "2 bases" in result.err and "--base" in result.err
