"""A task: prompts, answers, parts and metric; and load_task, the one way from a data setting to it.

Whatever form the data has (prompt and completion columns, chat messages, any columns with a template, a task folder, BIG-Bench Hard's JSON, a
built-in generator), it ends as one TaskData: a Task that says how rows become prompts and how answers are scored, and Examples in three parts. In
every Example `row[task.target]` is the answer without any prefix, so evaluation needs to know nothing about forms.

Used by train (examples), eval (task, test examples), workflows (version) and the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from atoll.config import BUILTIN, DataConfig
from atoll.data.prompt import PromptFormat, Turn, as_text, column, read_conversation
from atoll.data.rows import Row, read_rows
from atoll.data.split import PARTS, split_by_column, split_by_ratios
from atoll.errors import ConfigError, DataError, TaskError

BUILTIN_SIZES = {"train": 600, "validation": 100, "test": 200}
# The keys of task.json that change what is trained or scored; all others describe and are kept in Task.description.
TEXT_KEYS = ("name", "title", "family", "metric", "match", "instruction", "template", "target", "references", "gold_field", "database")
LIST_KEYS = ("label_set", "entity_types", "other_metrics")
OTHER_KEYS = ("chat", "databases", "database_field")
# Labels are guessed only where a guess is safe: few, short, and each with several rows.
MAX_GUESSED_LABELS, MAX_GUESSED_LABEL_CHARS, MIN_ROWS_PER_GUESSED_LABEL = 20, 40, 5


@dataclass(frozen=True)
class Example:
    """One prompt and what should follow it.

    prompt: the text before the chat template, if any; of a conversation, its last turn. completion: what the model writes, prefix included, without
    EOS. row: the columns, with the answer under the task's target. where: "file:line". messages: the turns before the answer, of chat data, else
    None.
    """

    prompt: str
    completion: str
    row: Mapping[str, Any]
    where: str
    messages: tuple[Turn, ...] | None = None

    @property
    def turns(self) -> str | tuple[Turn, ...]:
        """What encode_prompt takes: the conversation if there is one, else the prompt's text."""
        return self.prompt if self.messages is None else self.messages


@dataclass(frozen=True)
class DatabaseByRow:
    """Which SQL script makes the database that a row is about: row[column] names it. task.json: `databases` and `database_field`."""

    scripts: Mapping[str, str]
    column: str

    def __call__(self, row: Mapping[str, Any]) -> str:
        """The script. Raises TaskError if the row names none of them."""
        name = str(row.get(self.column))
        if name not in self.scripts:
            raise TaskError(f"a row names the database {name!r}, but the task has {', '.join(map(repr, self.scripts))}", hint="correct `databases`")
        return self.scripts[name]


@dataclass(frozen=True)
class Task:
    """How rows become prompts, and how answers are scored. The fields are the keys of task.json, and a few of ours.

    template: None means "{prompt}". conversations: the rows hold messages (then chat is True). completion_prefix: see PromptFormat.
    label_set: every allowed answer, or None where answers are open. inferred: label_set, and metric if none was given, were guessed from the answers.
    gold_field, references: columns to score against, not target. database: SQL script of the database for queries, or one a row.
    description: the rest of task.json (licence, notes, fields, …), which changes no result.
    """

    name: str
    title: str = ""
    family: str = ""
    metric: str = "exact_match"
    match: str | None = None
    label_set: tuple[str, ...] | None = None
    instruction: str = ""
    template: str | None = None
    target: str = "completion"
    references: str | None = None
    gold_field: str | None = None
    entity_types: tuple[str, ...] = ()
    other_metrics: tuple[str, ...] = ()
    chat: bool = False
    conversations: bool = False
    completion_prefix: str = " "
    database: str | DatabaseByRow | None = None
    inferred: bool = False
    description: Mapping[str, Any] = field(default_factory=dict)

    def prompt_format(self, stop: Sequence[str] = ()) -> PromptFormat:
        """What goes into the manifest of an adapter trained on this task."""
        template = "{prompt}" if self.template is None else self.template
        return PromptFormat(template, self.instruction, self.target, self.chat, tuple(stop), self.completion_prefix)

    def result_fields(self) -> dict[str, Any]:
        """The fields that change what is trained or scored, as JSON: all but the names and the description."""
        names = ("metric", "match", "label_set", "instruction", "template", "target", "references", "gold_field", "entity_types", "other_metrics")
        database = asdict(self.database) if isinstance(self.database, DatabaseByRow) else self.database
        return {**{name: getattr(self, name) for name in (*names, "chat", "conversations", "completion_prefix")}, "database": database}


@dataclass(frozen=True)
class TaskData:
    """A task with its rows. version: sha256 over Task.result_fields and every row of every part, so any change of input is noticed."""

    task: Task
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    version: str

    @property
    def test_version(self) -> str:
        """sha256 over the task and the test rows alone: equal for two scores that were measured on the same thing, however much each trained on."""
        return digest(self.task, {"test": self.test})


def load_task(data: DataConfig, *, name: str | None = None, root: Path | None = None) -> TaskData:
    """The task and examples that a data setting describes; relative paths start at `root` (the YAML file's folder), or at the working directory.

    The parts come from files of their own, from a split column, or from seeded ratios; a part may be empty, but not train. max_*_rows keep the
    first rows of a part (for a built-in task: they are the sizes to generate, 600/100/200 without them). Settings override what a task folder says.

    Raises DataError (files, rows), TaskError (task.json, labels), ConfigError (settings that contradict each other or the columns).
    """
    description, parts, unsplit = _read(data, root)
    every = unsplit or [row for part in PARTS for row in parts[part]]
    if not unsplit and not parts["train"]:
        raise DataError(f"{_source_name(data)} has no rows to train on", hint="mark some rows as train, or give a file as train")
    task = _make_task(data, description, every[0], name or description.get("name") or Path(_source_name(data).removeprefix(BUILTIN)).stem)
    if unsplit:
        parts = _split(unsplit, data, task)
    limits = {"train": data.max_train_rows, "validation": data.max_validation_rows, "test": data.max_test_rows}
    examples = {part: tuple(example for row in parts[part][: limits[part]] for example in _examples(task, row)) for part in PARTS}
    if not examples["train"]:
        raise DataError(f"{_source_name(data)} has no rows to train on", hint="mark some rows as train, raise max_train_rows, or change the ratios")
    task = _with_labels(task, [example for part in PARTS for example in examples[part]], data, description)
    return TaskData(task, examples["train"], examples["validation"], examples["test"], digest(task, examples))


def digest(task: Task, parts: Mapping[str, Iterable[Example]]) -> str:
    """sha256 in hex over canonical JSON (sorted keys, no spaces) of the task's result fields and of each row; places and file names don't count."""
    state = hashlib.sha256()
    lines: list[Any] = [task.result_fields()]
    for part, examples in parts.items():
        lines += [part, *([example.row, example.messages] for example in examples)]
    for line in lines:
        state.update(json.dumps(line, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return state.hexdigest()


# ---- where the rows are ----------------------------------------------------------------------------------


def _read(data: DataConfig, root: Path | None) -> tuple[dict[str, Any], dict[str, list[Row]], list[Row]]:
    """(what task.json says or {}, rows by part, rows not yet split): one of the last two is empty."""
    files = {"train": data.train, "validation": data.validation, "test": data.test}
    given = [part for part, file in files.items() if file]
    if data.path and given:
        raise ConfigError(f"data has both a path and {', '.join(given)}", hint="give one path, or files for the parts")
    if given:
        if not data.train:
            raise ConfigError(f"data has {', '.join(given)} but no train", hint="give the file to train on as train")
        return {}, {part: read_rows(_resolve(file, root)) if file else [] for part, file in files.items()}, []
    if not data.path:
        raise ConfigError("data names no file", hint=f"set path to a .jsonl or .csv file, a task folder or {BUILTIN}NAME")
    if data.path.startswith(BUILTIN):
        return *_read_builtin(data), []
    path = _resolve(data.path, root)
    if path.is_dir():
        return *_read_folder(path), []
    bbh = {"template": "Question: {input}\nAnswer:", "target": "target"} if path.suffix.lower() == ".json" else {}
    rows = read_rows(path)
    return (bbh if {"input", "target"} <= set(rows[0].values) else {}), {}, rows


def _read_builtin(data: DataConfig) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    from atoll.tasks.generators import generate

    name = str(data.path).removeprefix(BUILTIN)
    asked = {"train": data.max_train_rows, "validation": data.max_validation_rows, "test": data.max_test_rows}
    sizes = {part: BUILTIN_SIZES[part] if size is None else size for part, size in asked.items()}
    description, rows = generate(name, train=sizes["train"], validation=sizes["validation"], test=sizes["test"], seed=data.seed)
    parts = {part: [Row(values, f"{BUILTIN}{name}:{part} {number}") for number, values in enumerate(rows[part], start=1)] for part in PARTS}
    return description, parts


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """A task folder: task.json beside train.jsonl and, optionally, validation.jsonl and test.jsonl."""
    path = folder / "task.json"
    if not path.is_file():
        raise DataError(f"{folder} is a folder without task.json", hint="give a file as path, or files as train, validation and test")
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} could not be read as JSON: {error}", hint="it holds one object in UTF-8") from error
    _check_description(description, path)
    if not (folder / "train.jsonl").is_file():
        raise DataError(
            f"task folder {folder} has no train.jsonl", hint="a task folder holds task.json, train.jsonl, validation.jsonl and test.jsonl"
        )
    files = {part: folder / f"{part}.jsonl" for part in PARTS}
    return description, {part: read_rows(file) if file.exists() else [] for part, file in files.items()}


def _check_description(description: Any, path: Path) -> None:
    """Types of the keys that matter, and no key that is a misspelling of one of them. Raises TaskError."""
    if not isinstance(description, dict):
        raise TaskError(
            f"{path} is a {type(description).__name__}, expected a JSON object", hint='for example {"target": "label", "template": "..."}'
        )
    for key in ("template", "target", "metric"):
        if key not in description:
            raise TaskError(f"{path} lacks {key!r}", hint="a task needs a template, a target and a metric")
    for key, value in description.items():
        if value is None:
            continue
        expected = ""
        if key in (*TEXT_KEYS, "database_field") and not isinstance(value, str):
            expected = "a text"
        elif key in LIST_KEYS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            expected = "a list of texts"
        elif key == "chat" and not isinstance(value, bool):
            expected = "true or false"
        elif key == "databases" and not (isinstance(value, dict) and all(isinstance(script, str) for script in value.values())):
            expected = "an object of SQL scripts by name"
        if expected:
            raise TaskError(f"{path}: {key} is {value!r:.80}, expected {expected}", hint="correct it in task.json")
    known = {*TEXT_KEYS, *LIST_KEYS, *OTHER_KEYS}
    for key in sorted(set(description) - known):
        near = get_close_matches(key, known - set(description), n=1, cutoff=0.85)
        if near:
            raise TaskError(f"{path} has the unknown key {key!r}", hint=f"did you mean {near[0]!r}?")


def _split(rows: list[Row], data: DataConfig, task: Task) -> dict[str, list[Row]]:
    """Parts by the named split column, else by a column called split if there is one, else by seeded ratios."""
    by = data.split_column or ("split" if any("split" in row.values for row in rows) else None)
    if by:
        return split_by_column(rows, by)

    def input_of(row: Row) -> str:
        return "\n".join(as_text(example.turns) for example in _examples(task, row)[:1])

    return split_by_ratios(rows, data.ratios, data.seed, input_of)


def _resolve(path: str, root: Path | None) -> Path:
    return (root or Path()) / Path(path).expanduser()


def _source_name(data: DataConfig) -> str:
    return str(data.path or data.train)


# ---- what the rows mean ----------------------------------------------------------------------------------


def _make_task(data: DataConfig, description: Mapping[str, Any], first: Row, name: str) -> Task:
    """The Task of a description and the settings over it; the form (template, literal columns or chat) is read off the settings and the first row."""
    known = {key: description[key] for key in (*TEXT_KEYS, "chat") if description.get(key) is not None}
    known |= {key: tuple(description[key]) for key in LIST_KEYS if description.get(key) is not None}
    overrides = {key: getattr(data, key) for key in ("template", "instruction", "target", "metric", "match", "label_set", "references", "gold_field")}
    known |= {key: value for key, value in overrides.items() if value is not None} | ({"chat": True} if data.chat else {}) | {"name": name}
    if description.get("databases") is not None:
        known["database"] = DatabaseByRow(description["databases"], description.get("database_field") or "database")
    rest = {key: value for key, value in description.items() if key not in (*TEXT_KEYS, *LIST_KEYS, *OTHER_KEYS)}
    template, target = known.get("template"), known.get("target")
    columns = list(first.values)
    if template is None and target is None and "messages" in columns:
        if known.get("instruction"):
            raise ConfigError("an instruction cannot be added to chat messages", hint="write it as a system turn in the data")
        return Task(**{**known, "chat": True, "conversations": True, "completion_prefix": "", "description": rest})
    if template is None and target is None and not {"prompt", "completion"} <= set(columns):
        raise DataError(
            f"{first.where}: the columns are {', '.join(map(repr, columns))}, expected prompt and completion, or messages",
            hint="or set template (a text with {column} in it) and target (the column with the answer)",
        )
    if template is None and "prompt" not in columns:
        raise ConfigError(f"target is {target!r}, but no template says what the prompt is", hint=f"set template; columns: {', '.join(columns)}")
    if target is None and "completion" not in columns:
        raise ConfigError("a template is given, but not which column holds the answer", hint=f"set target; columns: {', '.join(columns)}")
    literal = template is None and target is None
    task = Task(**{**known, "target": target or "completion", "completion_prefix": "" if literal else " ", "description": rest})
    if task.target in task.prompt_format().columns:
        raise ConfigError(
            f"the template names the target column {task.target!r}: the prompt would hold the answer", hint="take it out of the template"
        )
    return task


def _examples(task: Task, row: Row) -> list[Example]:
    """The example of a row, or one for each assistant turn of a conversation."""
    if task.conversations:
        return _chat_examples(row)
    form = task.prompt_format()
    for name in (task.gold_field, task.references):
        if name is not None:
            column(row.values, name, row.where)
    prompt = form.render(row.values, row.where)
    return [Example(prompt, form.completion_for(row.values, row.where), row.values, row.where)]


def _chat_examples(row: Row) -> list[Example]:
    """One example for each assistant turn that is to be learned: the turns before it are the prompt."""
    conversation = read_conversation(row.values, row.where)
    turns = tuple(turn for turn, _ in conversation)
    examples = []
    for number, (turn, learned) in enumerate(conversation):
        if not learned:
            continue
        if number == 0:
            raise DataError(f"{row.where}: the conversation begins with the answer", hint='begin with a user turn, or mark this one "weight": 0')
        values = {**row.values, "completion": turn["content"]}
        examples.append(Example(turns[number - 1]["content"], turn["content"], values, row.where, turns[:number]))
    if not examples:
        raise DataError(f"{row.where}: no assistant turn to learn from", hint="end the conversation with the answer")
    return examples


# ---- labels ----------------------------------------------------------------------------------------------


def _with_labels(task: Task, examples: Sequence[Example], data: DataConfig, description: Mapping[str, Any]) -> Task:
    """The task with its metric settled: as given, else accuracy for a label set, ROUGE-L for references, exact match. Checks a given label set."""
    if task.label_set is not None:
        _check_labels(task, examples)
    if task.label_set is not None or data.metric not in (None, "accuracy") or description.get("metric"):
        given = data.metric or description.get("metric") or "accuracy"
        return replace(task, metric=given)
    if task.references is not None and data.metric is None:
        return replace(task, metric="rouge_l")
    answers = [as_text(example.row[task.target]).strip() for example in examples]
    labels = sorted(set(answers))
    few = 2 <= len(labels) <= MAX_GUESSED_LABELS and len(answers) >= MIN_ROWS_PER_GUESSED_LABEL * len(labels)
    if few and all(0 < len(label) <= MAX_GUESSED_LABEL_CHARS for label in labels):
        return replace(task, metric="accuracy", label_set=tuple(labels), inferred=True)
    return replace(task, metric=data.metric or "exact_match")


def _check_labels(task: Task, examples: Sequence[Example]) -> None:
    """Raises TaskError if an answer is not in the label set: such a row can only be scored as wrong."""
    labels = set(task.label_set or ())
    for example in examples:
        answer = as_text(example.row[task.target]).strip()
        if answer not in labels:
            near = get_close_matches(answer, labels, n=1)
            raise TaskError(
                f"{example.where}: the answer {answer!r:.80} is not among the {len(labels)} labels of task {task.name!r}",
                hint=f"did you mean {near[0]!r}?" if near else "correct the row, or add the label to label_set",
            )
