"""`atoll tasks` and `atoll schema`: what there is to look at before the first file of one's own."""

from __future__ import annotations

import json

from atoll.config import DataConfig
from atoll.data.task import load_task
from atoll.tasks.generators import builtin_names


def test_every_built_in_task_is_listed(atoll):
    """A task that is not listed is one that nobody tries."""
    assert [task["name"] for task in atoll("tasks", "--json").json()] == list(builtin_names())
    assert all(f"builtin:{name}" in atoll("tasks").out for name in builtin_names())


def test_examples_show_prompt_and_answer(atoll):
    """One sees what the model will see."""
    shown = atoll("tasks", "dates", "--rows", 2)
    assert shown.out.count("--- example") == 2
    assert "Options:" in shown.out
    examples = atoll("tasks", "text_to_sql", "--rows", 2, "--json").json()["examples"]
    assert [set(example) for example in examples] == [{"prompt", "completion", "row"}] * 2


def test_a_written_task_is_a_task_folder_equal_to_the_built_in_one(atoll, tmp_path):
    """The folder is the template for tasks of one's own, so it must load, and mean the same."""
    folder = tmp_path / "mine"
    assert atoll("tasks", "text_to_sql", "--write", folder, "--train", 8, "--validation", 2, "--test", 3).out == f"{folder}\n"
    written = load_task(DataConfig(path=str(folder)))
    built_in = load_task(DataConfig(path="builtin:text_to_sql", max_train_rows=8, max_validation_rows=2, max_test_rows=3))
    assert written.version == built_in.version
    again = atoll("tasks", "dates", "--write", folder)
    assert again.code == 1
    assert "not an empty folder" in again.err


def test_an_unknown_task_is_named_with_the_nearest(atoll):
    """As everywhere."""
    result = atoll("tasks", "date")
    assert result.code == 1
    assert "did you mean 'dates'?" in result.err
    assert atoll("tasks", "--write", "x").code == 2


def test_the_schema_checks_the_files_of_the_examples(atoll, tmp_path):
    """An editor that trusts the schema must not mark a good file as wrong, nor a bad one as good."""
    from pathlib import Path

    import jsonschema
    import yaml

    examples = Path(__file__).parents[2] / "examples"
    for kind in ("train", "land"):
        schema = atoll("schema", kind).json()
        good = yaml.safe_load((examples / f"{kind}.yaml").read_text())
        good.get("trainer", good.get("defaults", {}).get("trainer", {})).update(learning_rate=5e-4)  # YAML 1.1 reads 5e-4 as text
        jsonschema.validate(good, schema)
        assert not jsonschema.Draft202012Validator(schema).is_valid({**good, "nonsense": 1})
    assert atoll("schema", "--write", tmp_path).out.splitlines() == [str(tmp_path / f"{kind}.schema.json") for kind in ("train", "land", "compose")]
    assert json.loads((tmp_path / "land.schema.json").read_text()) == schema
