"""load_task: every form of data ends as the same TaskData, and whatever is wrong with it is said with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from atoll.config import DataConfig
from atoll.data.task import Example, Task, TaskData, digest, load_task
from atoll.errors import AtollError, ConfigError, DataError, TaskError

TASK_JSON: dict[str, Any] = {
    "name": "moods",
    "title": "Moods of messages",
    "family": "classification",
    "fields": {"text": "a message (input)", "mood": "good or bad (target)"},
    "input_fields": ["text"],
    "target": "mood",
    "label_set": ["bad", "good"],
    "metric": "accuracy",
    "instruction": "Name the mood.",
    "template": "Message: {text}\nMood:",
    "licence": "made up",
}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def moods(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"message {number}", "mood": ("good", "bad")[number % 2]} for number in range(start, start + count)]


def task_folder(folder: Path, description: dict[str, Any] | None = None, **parts: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TASK_JSON if description is None else description))
    for part, rows in (parts or {"train": moods(6), "validation": moods(2, 6), "test": moods(4, 8)}).items():
        jsonl(folder / f"{part}.jsonl", rows)
    return folder


def refused(kind: type[AtollError], **settings: Any) -> str:
    """Message and hint of the error that loading with these settings raises."""
    with pytest.raises(kind) as caught:
        load_task(DataConfig(**settings))
    assert caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


def sizes(data: TaskData) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def test_a_task_folder_gives_the_published_prompts(tmp_path: Path) -> None:
    """instruction, empty line, template; a space and the target: what scores on these folders are defined by."""
    data = load_task(DataConfig(path=str(task_folder(tmp_path / "moods"))))
    assert sizes(data) == (6, 2, 4)
    assert data.train[0] == Example(
        "Name the mood.\n\nMessage: message 0\nMood:",
        " good",
        {"text": "message 0", "mood": "good"},
        f"{tmp_path}/moods/train.jsonl:1",
    )
    task = data.task
    assert (task.name, task.title, task.metric, task.label_set, task.inferred) == ("moods", "Moods of messages", "accuracy", ("bad", "good"), False)
    assert task.description["licence"] == "made up"


def test_after_a_prompt_that_ends_a_line_the_completion_has_no_space(tmp_path: Path) -> None:
    """The other half of the rule: code tasks end their prompt in a line end."""
    folder = task_folder(tmp_path / "t", {**TASK_JSON, "template": "{text}\nCode:\n"})
    assert load_task(DataConfig(path=str(folder))).train[0].completion == "good"


def test_validation_and_test_may_be_missing_but_not_train(tmp_path: Path) -> None:
    """Many data sets have no test part; none can train without rows."""
    assert sizes(load_task(DataConfig(path=str(task_folder(tmp_path / "a", train=moods(3)))))) == (3, 0, 0)
    assert "no train.jsonl" in refused(DataError, path=str(task_folder(tmp_path / "b", test=moods(3))))
    rows = jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "completion": "c", "split": "test"}])
    assert "no rows to train on" in refused(DataError, path=str(rows))


def test_settings_override_a_task_folder(tmp_path: Path) -> None:
    """Trying another template or metric must not need a copy of the folder; it is another version, though."""
    folder = str(task_folder(tmp_path / "moods"))
    plain = load_task(DataConfig(path=folder))
    changed = load_task(DataConfig(path=folder, template="{text} is", instruction="", metric="exact_match", chat=True), name="mine")
    assert (changed.train[0].prompt, changed.train[0].completion) == ("message 0 is", "good")
    assert (changed.task.name, changed.task.metric, changed.task.chat) == ("mine", "exact_match", True)
    assert changed.version != plain.version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": None}, "target"),
        ({"labels_set": ["a"], "label_set": None}, "unknown key 'labels_set' | did you mean 'label_set'?"),
        ({"label_set": "good"}, "label_set is 'good', expected a list"),
        ({"metric": 3}, "metric is 3, expected a text"),
        ({"chat": "yes"}, "chat is 'yes'"),
        ({"databases": {"a": 1}}, "databases is"),
    ],
)
def test_a_malformed_description_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A misspelt key of task.json would leave the metric or the labels at a default, unnoticed."""
    description = {key: value for key, value in {**TASK_JSON, **change}.items() if value is not None}
    assert said in refused(TaskError, path=str(task_folder(tmp_path / "t", description)))


def test_a_description_that_is_no_json_and_a_folder_without_one_are_named(tmp_path: Path) -> None:
    """The message names the file that is wrong or missing."""
    folder = task_folder(tmp_path / "t")
    (folder / "task.json").write_text("{")
    assert "task.json could not be read as JSON" in refused(TaskError, path=str(folder))
    (folder / "task.json").write_text("[]")
    assert "expected a JSON object" in refused(TaskError, path=str(folder))
    (folder / "task.json").unlink()
    assert "is a folder without task.json" in refused(DataError, path=str(folder))


def test_an_answer_outside_the_label_set_is_named_by_file_and_line(tmp_path: Path) -> None:
    """A typo in a label would otherwise be learned, and scored as wrong for ever."""
    folder = task_folder(tmp_path / "t", train=[*moods(2), {"text": "x", "mood": "goood"}])
    message = refused(TaskError, path=str(folder))
    assert "train.jsonl:3: the answer 'goood' is not among the 2 labels of task 'moods' | did you mean 'good'?" in message


def test_prompt_and_completion_columns_are_taken_literally(tmp_path: Path) -> None:
    """Whoever writes both columns has decided about the space between them; nothing is added or stripped."""
    rows = jsonl(tmp_path / "own.jsonl", [{"prompt": "a:", "completion": "b ", "split": 0}, {"prompt": " a ", "completion": " b", "split": 2}])
    data = load_task(DataConfig(path=str(rows)))
    assert [(example.prompt, example.completion) for example in (*data.train, *data.test)] == [("a:", "b "), (" a ", " b")]
    assert data.task.name == "own"
    assert data.task.prompt_format(["###"]).to_json() == {
        "template": "{prompt}",
        "instruction": "",
        "target": "completion",
        "chat": False,
        "stop": ["###"],
        "completion_prefix": "",
    }


def test_any_columns_work_with_a_template_and_a_target(tmp_path: Path) -> None:
    """A CSV of the user's own, as it is: text, numbers as targets, a split column of another name."""
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["review", "stars", "part"], ["fine,\nreally", 4, "train"], ["bad", 1, "eval"]])
    data = load_task(DataConfig(path=str(path), template="{review} =>", target="stars", instruction="Rate.", split_column="part"))
    assert sizes(data) == (1, 1, 0)
    assert (data.train[0].prompt, data.train[0].completion) == ("Rate.\n\nfine,\nreally =>", " 4")


def test_the_manifest_format_renders_the_training_prompts_again(tmp_path: Path) -> None:
    """Serving renders with the format in the manifest; it must give the very prompts of training."""
    data = load_task(DataConfig(path=str(task_folder(tmp_path / "moods"))))
    form = data.task.prompt_format()
    assert [form.render(example.row) for example in data.train] == [example.prompt for example in data.train]
    assert [form.completion_for(example.row) for example in data.train] == [example.completion for example in data.train]


def test_a_conversation_gives_an_example_for_each_answer(tmp_path: Path) -> None:
    """Each assistant turn is learned after the turns before it; the answer stands under the target for evaluation."""
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = load_task(DataConfig(path=str(jsonl(tmp_path / "chat.jsonl", [{"messages": messages, "split": "train"}]))))
    first, second = data.train
    assert (first.messages, first.prompt, first.completion) == (tuple(messages[:2]), "u1", "a1")
    assert (second.messages, second.completion, second.row[data.task.target]) == (tuple(messages[:4]), "a2", "a2")
    assert (data.task.chat, data.task.conversations, second.turns) == (True, True, tuple(messages[:4]))


def test_a_conversation_stays_in_one_part(tmp_path: Path) -> None:
    """Ratios split rows, not turns: the first answer in train and the second in test would leak."""
    rows = [{"messages": [{"role": role, "content": f"{number}"} for role in ("user", "assistant") * 2]} for number in range(30)]
    data = load_task(DataConfig(path=str(jsonl(tmp_path / "chat.jsonl", rows))))
    places = [{example.where for example in part} for part in (data.train, data.validation, data.test)]
    assert sizes(data) == (48, 6, 6)
    assert not places[0] & places[1] | places[0] & places[2] | places[1] & places[2]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["user"], "no assistant turn"),
        (["assistant", "user"], "begins with the answer"),
        (["user", "tool", "assistant"], "message 2 has role 'tool'"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_named(roles: list[str], said: str, tmp_path: Path) -> None:
    """It would be a row without a label."""
    good = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "split": 0}
    path = jsonl(tmp_path / "chat.jsonl", [good, {"messages": [{"role": role, "content": "x"} for role in roles], "split": 0}])
    message = refused(DataError, path=str(path))
    assert f"{path}:2" in message
    assert said in message


def test_an_instruction_is_not_mixed_into_conversations(tmp_path: Path) -> None:
    """Where it would go is the data's decision (a system turn), not ours."""
    path = jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}])
    assert "system turn" in refused(ConfigError, path=str(path), instruction="Be brief.")


def test_separate_files_are_the_parts(tmp_path: Path) -> None:
    """Relative paths start at the YAML's folder; a split column inside separate files is an ordinary column."""
    for part, count in (("train", 3), ("validation", 2), ("test", 1)):
        jsonl(tmp_path / f"{part}.jsonl", [{**row, "split": "whatever"} for row in moods(count)])
    settings = {"template": "{text}", "target": "mood"}
    data = load_task(DataConfig(train="train.jsonl", validation="validation.jsonl", test="test.jsonl", **settings), root=tmp_path)
    assert sizes(data) == (3, 2, 1)
    assert sizes(load_task(DataConfig(train="train.jsonl", **settings), root=tmp_path)) == (3, 0, 0)


def test_without_a_split_seeded_ratios_split(tmp_path: Path) -> None:
    """The same file and seed give the same parts; equal inputs fall into one part even with unequal answers."""
    rows = [{"text": f"message {number // 2}", "mood": f"{number}"} for number in range(100)]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    data = load_task(DataConfig(path=path, template="{text}", target="mood"))
    assert sizes(data) == (80, 10, 10)
    assert not {example.prompt for example in data.train} & {example.prompt for example in (*data.validation, *data.test)}
    assert load_task(DataConfig(path=path, template="{text}", target="mood", seed=1)).version != data.version


def test_at_most_the_first_rows_of_a_part_are_used(tmp_path: Path) -> None:
    """A smaller run is the beginning of the larger one; its test version says that the scores compare."""
    folder = str(task_folder(tmp_path / "moods"))
    whole = load_task(DataConfig(path=folder))
    data = load_task(DataConfig(path=folder, max_train_rows=3, max_validation_rows=1))
    assert (data.train, data.validation, data.test) == (whole.train[:3], whole.validation[:1], whole.test)
    assert data.version != whole.version
    assert data.test_version == whole.test_version
    assert load_task(DataConfig(path=folder, max_test_rows=2)).test_version != whole.test_version


def test_big_bench_hard_files_are_tasks(tmp_path: Path) -> None:
    """Its files have examples of input and target and no parts; a template of one's own is used if given."""
    path = tmp_path / "dates.json"
    path.write_text(json.dumps({"canary": "c", "examples": [{"input": f"When is {number}?", "target": f"({number})"} for number in range(10)]}))
    data = load_task(DataConfig(path=str(path)))
    assert (sizes(data), data.task.name, data.task.target) == ((8, 1, 1), "dates", "target")
    assert data.train[0].prompt == f"Question: {data.train[0].row['input']}\nAnswer:"
    assert data.train[0].completion.startswith(" (")
    assert load_task(DataConfig(path=str(path), template="{input}")).train[0].prompt == data.train[0].row["input"]


def test_builtin_tasks_load_with_the_sizes_asked_for() -> None:
    """`builtin:NAME` needs no file; the limits are the sizes to generate."""
    data = load_task(DataConfig(path="builtin:dates", max_train_rows=20, max_validation_rows=5, max_test_rows=7))
    assert sizes(data) == (20, 5, 7)
    assert data.task.name == "dates"
    assert data.train[0].where == "builtin:dates:train 1"
    again = load_task(DataConfig(path="builtin:dates", max_train_rows=20, max_validation_rows=5, max_test_rows=7))
    assert again.version == data.version
    assert "dates" in refused(TaskError, path="builtin:datez")


def test_an_sql_task_knows_the_database_of_each_row() -> None:
    """Execution accuracy runs each query on the database its question is about."""
    data = load_task(DataConfig(path="builtin:text_to_sql", max_train_rows=5, max_validation_rows=1, max_test_rows=1))
    assert callable(data.task.database)
    assert "CREATE TABLE" in data.task.database(data.test[0].row).upper()
    with pytest.raises(TaskError, match="names the database 'None'"):
        data.task.database({})


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({}, DataError, "the columns are 'text', 'mood', expected prompt and completion, or messages"),
        ({"template": "{text}"}, ConfigError, "not which column holds the answer | set target; columns: text, mood"),
        ({"target": "mood"}, ConfigError, "no template says what the prompt is"),
        ({"template": "{txt}", "target": "mood"}, DataError, "no column 'txt'; the columns are 'text', 'mood' | did you mean 'text'?"),
        ({"template": "{text}", "target": "moods"}, DataError, "no column 'moods'; the columns are 'text', 'mood' | did you mean 'mood'?"),
        ({"template": "{text}", "target": "mood", "gold_field": "gold"}, DataError, "no column 'gold'"),
        ({"template": "{text}", "target": "mood", "references": "refs"}, DataError, "no column 'refs'"),
        ({"template": "{text}", "target": "mood", "split_column": "part"}, DataError, "no column 'part'"),
        ({"template": "{text:>9}", "target": "mood"}, ConfigError, "has a format behind the column's name"),
    ],
)
def test_settings_that_do_not_fit_the_columns_say_which_there_are(settings: Any, kind: type[AtollError], said: str, tmp_path: Path) -> None:
    """Missing columns are the commonest mistake; the sentence holds what was found and what would do."""
    assert said in refused(kind, path=str(jsonl(tmp_path / "a.jsonl", moods(10))), **settings)


def test_a_template_from_a_folder_must_not_show_the_answer(tmp_path: Path) -> None:
    """A prompt that holds the target trains to perfection and is worth nothing."""
    assert "would hold the answer" in refused(ConfigError, path=str(task_folder(tmp_path / "t", {**TASK_JSON, "template": "{text} {mood}"})))


def test_a_null_target_and_a_row_that_lacks_a_column_are_named_by_line(tmp_path: Path) -> None:
    """Every row is checked, not the first alone."""
    settings: dict[str, Any] = {"template": "{text}", "target": "mood"}
    null = jsonl(tmp_path / "null.jsonl", [*moods(2), {"text": "x", "mood": None}])
    assert f"{null}:3: target column 'mood' is null" in refused(DataError, path=str(null), **settings)
    lacking = jsonl(tmp_path / "lacking.jsonl", [*moods(2), {"mood": "good"}])
    assert f"{lacking}:3: no column 'text'" in refused(DataError, path=str(lacking), **settings)


def test_no_source_or_two_sources_are_refused(tmp_path: Path) -> None:
    """Which of two paths was meant is not guessed."""
    assert "names no file" in refused(ConfigError)
    assert "both a path and validation" in refused(ConfigError, path="a.jsonl", validation="b.jsonl")
    assert "does not exist" in refused(DataError, path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["yes", "no"] * 5, ("accuracy", ("no", "yes"), True)),
        (["yes", "no"] * 4 + ["yes"], ("exact_match", None, False)),  # fewer than five rows a label
        (["yes"] * 20, ("exact_match", None, False)),  # a single label is no classification
        ([f"answer {number}" for number in range(21)] * 5, ("exact_match", None, False)),  # too many
        (["x" * 41, "y"] * 10, ("exact_match", None, False)),  # too long for labels
        ([1, 2] * 10, ("accuracy", ("1", "2"), True)),
    ],
)
def test_labels_are_guessed_only_where_that_is_safe(answers: list[Any], expected: tuple[Any, ...], tmp_path: Path) -> None:
    """A wrong guess would turn an open task into a closed one; a right one gives option scoring for free. The task says that it guessed."""
    rows = [{"text": f"t{number}", "answer": answer, "split": 0} for number, answer in enumerate(answers)]
    task = load_task(DataConfig(path=str(jsonl(tmp_path / "a.jsonl", rows)), template="{text}", target="answer")).task
    assert (task.metric, task.label_set, task.inferred) == expected


def test_a_given_metric_or_label_set_is_not_guessed_over(tmp_path: Path) -> None:
    """What the user says holds; references mean ROUGE-L."""
    path = str(jsonl(tmp_path / "a.jsonl", [{**row, "refs": ["a", "b"], "split": 0} for row in moods(20)]))
    settings: dict[str, Any] = {"path": path, "template": "{text}", "target": "mood"}
    assert load_task(DataConfig(**settings, metric="rouge_l")).task.label_set is None
    assert load_task(DataConfig(**settings, references="refs")).task.metric == "rouge_l"
    given = load_task(DataConfig(**settings, label_set=("good", "bad", "ugly"))).task
    assert (given.metric, given.label_set, given.inferred) == ("accuracy", ("good", "bad", "ugly"), False)
    guessed = load_task(DataConfig(**settings, metric="accuracy")).task
    assert (guessed.metric, guessed.label_set, guessed.inferred) == ("accuracy", ("bad", "good"), True)


def test_the_version_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    """A finished task is redone when its input changed, and only then: not when the folder moved or a note was rewritten."""
    first = load_task(DataConfig(path=str(task_folder(tmp_path / "a")))).version
    moved = load_task(DataConfig(path=str(task_folder(tmp_path / "b", {**TASK_JSON, "title": "Other", "licence": "other"})))).version
    assert first == moved
    assert len(first) == 64
    parts = {"validation": moods(2, 6), "test": moods(4, 8)}
    changed = [
        load_task(DataConfig(path=str(task_folder(tmp_path / "c", train=[*moods(5), {"text": "message 5!", "mood": "bad"}], **parts)))),
        load_task(DataConfig(path=str(task_folder(tmp_path / "d", {**TASK_JSON, "metric": "exact_match"})))),
        load_task(DataConfig(path=str(task_folder(tmp_path / "e", train=moods(6), validation=moods(4, 8), test=moods(2, 6))))),
    ]
    assert len({first, *(data.version for data in changed)}) == 4


def test_the_version_is_pinned() -> None:
    """Stored scores name it: a change of the digest must be a decision."""
    task = Task("t", template="{a}", target="b")
    rows = [Example("1", " é", {"b": "é", "a": 1}, "f:1")]
    assert digest(task, {"train": rows}) == digest(task, {"train": [Example("", "", {"a": 1, "b": "é"}, "g:2")]})
    assert digest(task, {"train": rows})[:16] == "71d727816be46fa1"
