"""Loading configuration files: which form they have, overrides, places in messages, and the schemas for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.config import LandConfig, TrainConfig
from atoll.config_file import json_schemas, load_config, parse_overrides, to_yaml, write_schemas
from atoll.errors import ConfigError, StorageError
from atoll.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent
TRAIN = "base: tiny\ndata:\n  path: rows.jsonl\ntrainer:\n  learning_rate: 5e-4\n"
LAND = "base: tiny\ndefaults:\n  adapter: {r: 8}\ntasks:\n  - builtin:dates\n  - name: v1.5\n    data: {path: b.csv}\n    adapter: {alpha: 4}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "file.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(file: Path, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(file, **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_training_file_loads_with_its_folder_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a file start from the file's folder, wherever the command runs."""
    write(tmp_path, TRAIN)
    monkeypatch.chdir(tmp_path)
    loaded = load_config("file.yaml", kind="train")
    assert isinstance(loaded.config, TrainConfig)
    assert (loaded.root, loaded.source, loaded.warnings) == (tmp_path, "atoll", ())
    assert loaded.config.data.path == "rows.jsonl"
    assert loaded.config.trainer.learning_rate == 5e-4


def test_a_land_file_is_known_by_its_tasks(tmp_path: Path) -> None:
    """One loader serves both commands; each refuses the other's file and names the right command."""
    land = write(tmp_path, LAND)
    loaded = load_config(land)
    assert isinstance(loaded.config, LandConfig)
    assert [job.name for job in loaded.config.jobs()] == ["dates", "v1.5"]
    assert "atoll land" in refusal(land, kind="train").hint
    train = write(tmp_path, TRAIN)
    assert "atoll train" in refusal(train, kind="land").hint
    assert "Ludwig" in refusal(write(tmp_path, "base_model: x\nadapter: lora\noutput_feature: y\n"), kind="land").message


def test_a_problem_is_given_with_file_line_and_key(tmp_path: Path) -> None:
    """The user jumps to the line."""
    file = write(tmp_path, TRAIN.replace("5e-4", "-1"))
    assert refusal(file).message == f"{file}:5: trainer.learning_rate is -1: must be above 0"
    file = write(tmp_path, TRAIN.replace("learning_rate", "learning_rte"))
    assert refusal(file).message == f"{file}:5: trainer.learning_rte is not a key that Atoll knows"
    assert refusal(file).hint == "did you mean trainer.learning_rate?"
    file = write(tmp_path, "data: rows.csv\n")
    assert refusal(file).message == f"{file}: base is missing"
    file = write(tmp_path, "base: tiny\ndefaults: {}\n")
    assert refusal(file).message == f"{file}: tasks is missing"
    file = write(tmp_path, LAND.replace("alpha: 4", "alpha: 0"))
    assert refusal(file).message.startswith(f"{file}:8: tasks[1].adapter.alpha is 0")


def test_a_land_whose_tasks_contradict_the_defaults_fails_when_it_is_loaded(tmp_path: Path) -> None:
    """Not after the first five tasks have been trained."""
    text = LAND.replace("{r: 8}", "{rank_pattern: {up_proj: 4}}").replace("alpha: 4", "target_modules: [q_proj]")
    message = refusal(write(tmp_path, text)).message
    assert "file.yaml: tasks[1] (v1.5), with the defaults: adapter: rank_pattern names 'up_proj'" in message


def test_a_file_that_mixes_two_forms_is_refused(tmp_path: Path) -> None:
    """Guessing between the two would drop one half of the file."""
    error = refusal(write(tmp_path, "base: tiny\nbase_model: other\n"))
    assert error.message.endswith("file.yaml:2: base_model is a key of Ludwig's form, but base (line 1) is one of Atoll's")


def test_yes_and_no_are_labels_and_true_is_not(tmp_path: Path) -> None:
    """By YAML 1.1 both would silently become booleans, and no answer would ever match."""
    labels = "base: tiny\ndata: {path: a.csv, label_set: [%s]}\n"
    loaded = load_config(write(tmp_path, labels % "yes, no"), kind="train")
    assert loaded.config.data.label_set == ("yes", "no")
    assert "label_set[0] is True: must be text" in refusal(write(tmp_path, labels % "true, false")).message


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    """`--set` changes one value and leaves its neighbours; sections that the file lacks are made."""
    overrides = parse_overrides(["trainer.epochs=1", "trainer.learning_rate=1e-3", "adapter.target_modules=[q_proj]", "trainer.max_length=null"])
    config = load_config(write(tmp_path, TRAIN), "train", overrides).config
    assert (config.trainer.epochs, config.trainer.learning_rate, config.adapter.targets) == (1, 1e-3, ("q_proj",))
    assert config.data.path == "rows.jsonl"


def test_overrides_reach_a_task_by_number_or_name(tmp_path: Path) -> None:
    """Also a task in its short form, and a name with a dot in it."""
    file = write(tmp_path, LAND)
    overrides = parse_overrides(["tasks.dates.adapter.r=2", "tasks.v1.5.adapter.r=3", "tasks.1.trainer.epochs=7", "defaults.trainer.epochs=9"])
    first, second = load_config(file, "land", overrides).config.jobs()
    assert (first.adapter.r, first.trainer.epochs, first.data.path) == (2, 9, "builtin:dates")
    assert (second.adapter.r, second.trainer.epochs, second.adapter.alpha) == (3, 7, 4)
    assert refusal(file, overrides={"tasks.date.adapter.r": 1}).hint == "did you mean tasks.dates?"


def test_a_data_path_on_the_command_line_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike a path in the file: the shell completed it from where the user stands."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = write(tmp_path, "base: ./model\n")
    for key in ("data.path", "data"):
        assert load_config(file, "train", {key: "rows.csv"}).config.data.path == str(tmp_path / "elsewhere" / "rows.csv")
    assert load_config(file, "train", {"data.path": "builtin:dates"}).config.data.path == "builtin:dates"
    assert load_config(file, "train").config.base == str(tmp_path / "model")
    assert load_config(file, "train", {"base": "./model"}).config.base == str(tmp_path / "elsewhere" / "model")
    assert load_config(file, "train", {"base": "org/model"}).config.base == "org/model"


def test_a_wrong_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    """A line of the file would be the wrong place to look."""
    file = write(tmp_path, TRAIN)
    assert refusal(file, overrides={"trainer.epochs": 0}).message == "--set trainer.epochs: trainer.epochs is 0: must be above 0"
    assert refusal(file, overrides={"trainer.epoch": 1}).hint == "did you mean trainer.epochs?"
    assert "which has no keys" in refusal(file, overrides={"base.name": 1}).message
    for setting in ("trainer.epochs", "=3", "a..b=3"):
        with pytest.raises(ConfigError, match="is not key=value"):
            parse_overrides([setting])


def test_what_is_valid_but_surprising_is_a_warning(tmp_path: Path) -> None:
    """Blocks that cost time at every step, and a template that shows nothing of the row, must not pass unseen."""
    loaded = load_config(write(tmp_path, TRAIN + "quantization: {bits: 8, resident: int8}\n"))
    assert len(loaded.warnings) == 1 and "quantization.resident int8 saves memory and costs time" in loaded.warnings[0]
    assert load_config(write(tmp_path, TRAIN + "quantization: {bits: 8}\n")).warnings == ()
    loaded = load_config(write(tmp_path, LAND.replace("path: b.csv", "path: b.csv, template: Answer, target: y")))
    assert loaded.warnings == ("v1.5: data.template has no {column}, so every prompt is the same text: 'Answer'",)


def test_settings_that_an_adapter_has_no_use_for_are_named(tmp_path: Path) -> None:
    """A weight decay that is not applied must not look as if it were."""

    def warned(adapter: str, trainer: str) -> str:
        return "\n".join(load_config(write(tmp_path, f"base: tiny\nadapter: {adapter}\ntrainer: {trainer}\n")).warnings)

    assert "trainer.weight_decay has no effect" in warned("{type: loreft}", "{weight_decay: 0.1}")
    assert "trainer.reft_learning_rate has no effect" in warned("{type: loreft}", "{reft_learning_rate: 2e-3}")
    assert "trainer.reft_weight_decay has no effect" in warned("{r: 4}", "{reft_weight_decay: 0.1}")
    assert "tied: false has no effect: positions l1" in warned("{type: loreft, tied: false, positions: l1}", "{}")
    assert warned("{r: 4, reft: {tied: false}}", "{weight_decay: 0.1, reft_learning_rate: 1e-3, reft_weight_decay: 0.1}") == ""


def test_a_rank_pattern_of_blocks_has_numbers_as_keys(tmp_path: Path) -> None:
    """`{3: 8}` is what one writes, and what is written back loads again."""
    config = load_config(write(tmp_path, "base: tiny\nadapter: {type: loreft, rank_pattern: {3: 8, -1: 2}}\n")).config
    assert isinstance(config, TrainConfig)
    assert config.adapter.rank_pattern == {3: 8, -1: 2}
    assert load_config(write(tmp_path, to_yaml(config))).config == config


@pytest.mark.parametrize("text", [TRAIN, TRAIN + "name: '007'\ngeneration: {stop: ['5e-4', \"a\\n\"]}\n", LAND])
def test_a_config_written_as_yaml_loads_to_an_equal_one(tmp_path: Path, text: str) -> None:
    """--dry-run prints it, and the user saves it."""
    config = load_config(write(tmp_path, text)).config
    again = load_config(write(tmp_path, to_yaml(config))).config
    assert again == config
    if isinstance(config, LandConfig) and isinstance(again, LandConfig):
        assert again.jobs() == config.jobs()


TRAIN_EXAMPLES = ("train.yaml", "train_reft.yaml", "train_gpt2.yaml", "train_bert.yaml", "train_t5.yaml")


@pytest.mark.parametrize("example", [*TRAIN_EXAMPLES, "land.yaml", "lora_land_article.yaml"])
def test_the_examples_load(example: str) -> None:
    """They are the first files that a user runs."""
    loaded = load_config(ROOT / "examples" / example)
    assert loaded.warnings == () or loaded.source != "atoll"
    if isinstance(loaded.config, TrainConfig) and loaded.config.data.path is not None and not loaded.config.data.path.startswith("builtin:"):
        assert (loaded.root / loaded.config.data.path).exists()


def test_the_example_tickets_are_varied_and_use_every_label() -> None:
    """Rows that repeat would make the example look better than it is."""
    rows = [json.loads(line) for line in (ROOT / "examples" / "tickets.jsonl").read_text(encoding="utf-8").splitlines()]
    config = load_config(ROOT / "examples" / "train.yaml", "train").config
    assert len({row["prompt"] for row in rows}) == len(rows) >= 60
    assert {row["completion"] for row in rows} == set(config.data.label_set or ())


@pytest.mark.parametrize(
    ("kind", "example"), [*(("train", example) for example in TRAIN_EXAMPLES), ("land", "land.yaml"), ("compose", "compose.yaml")]
)
def test_the_examples_satisfy_the_json_schema(kind: str, example: str) -> None:
    """Editors check files against the schema; it must not redden what the loader accepts, nor accept a misspelt key."""
    from jsonschema import Draft202012Validator

    schema = json_schemas()[kind]
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    data = read_yaml(ROOT / "examples" / example).data
    assert [error.message for error in validator.iter_errors(data)] == []
    assert list(validator.iter_errors({**data, "bases": 1}))
    section = "defaults" if kind == "land" else "data"
    assert list(validator.iter_errors({**data, section: {"adaptr": 1}}))


def test_the_schema_knows_both_kinds_of_adapter() -> None:
    """An editor completes `positions` under loreft, and accepts every form that the loader does."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(json_schemas()["train"])

    def is_valid(**adapter: Any) -> bool:
        return bool(validator.is_valid({"base": "tiny", "adapter": adapter}))

    for layers in ("all", "last", "2;10;18", [0, -1]):
        assert is_valid(type="loreft", layers=layers, positions=[0, -1], rank_pattern={"3": 8})
    assert is_valid(r=8, reft={"type": "direft", "positions": "l1"})
    assert not is_valid(type="loreft", layers="some")
    assert not is_valid(type="loreft", r=8)
    assert not is_valid(type="lora", positions="l1")


def test_the_committed_schemas_are_current(tmp_path: Path) -> None:
    """When this fails: python -c "from pathlib import Path; from atoll.config_file import write_schemas; write_schemas(Path('docs/schemas'))"."""
    for file in write_schemas(tmp_path / "schemas"):
        assert file.read_text(encoding="utf-8") == (ROOT / "docs" / "schemas" / file.name).read_text(encoding="utf-8"), file.name


def test_schemas_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    """The sentence names the file."""
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(StorageError, match=r"train\.schema\.json"):
        write_schemas(tmp_path / "taken")
