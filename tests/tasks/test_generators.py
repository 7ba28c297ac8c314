"""The built-in tasks: rows that can be trusted as data (disjoint, repeatable, balanced) and answers that are right."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import string
from collections import Counter
from datetime import date, datetime, timedelta
from fractions import Fraction
from functools import cache
from typing import Any

import pytest

from atoll.errors import TaskError
from atoll.tasks.drawing import Draw, Generator, known_and_held_out
from atoll.tasks.generators import builtin_names, describe, draw_parts, generate
from atoll.tasks.vocabulary import FIRST_NAMES, MONTHS, ORDINAL_WORDS

NAMES = builtin_names()
CLASSES = ("dates", "support_intents", "clauses")
# sha256 over the rows of generate(name, train=6, validation=3, test=6, seed=17), first 16 digits.
DIGESTS = {
    "clauses": "cd95ae3a1b79f9df",
    "data_to_text": "d4bfdc09edb06f50",
    "date_format": "74b921f337cca27f",
    "dates": "fee9fa150bdd32cb",
    "entities_json": "e679bacbd37eed8d",
    "list_operations": "1d48f9e945fecf56",
    "review_explained": "f87491b1cce47cf6",
    "support_intents": "da45289b57cfc7c5",
    "text_to_sql": "a81cb8000b13e619",
    "tool_calls": "61e32888a7f799c0",
    "unit_conversion": "89c5117ce8bac267",
    "word_problems": "ef07af840c670950",
}


@cache
def made(name: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A middle-sized draw of a task, made once for all tests; do not change it."""
    return generate(name, train=600, validation=60, test=200, seed=17)


def every_row(name: str) -> list[dict[str, Any]]:
    return [row for rows in made(name)[1].values() for row in rows]


def input_text(task: dict[str, Any], row: dict[str, Any]) -> str:
    return re.sub(r"[\W_]+", "", " ".join(str(row[field]) for field in task["input_fields"]).lower())


def test_the_tasks_that_guides_and_examples_name_exist():
    """A land file that says builtin:support_intents must keep working: removing or renaming a task breaks it."""
    wanted = {"clauses", "data_to_text", "date_format", "dates", "entities_json", "list_operations", "review_explained", "support_intents"}
    assert wanted | {"text_to_sql", "tool_calls", "unit_conversion", "word_problems"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_fields_that_the_description_promises(name: str):
    """The loader renders prompts from the description alone: a missing field would only show in the middle of a training job."""
    task, parts = made(name)
    assert task["name"] == name
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 600, "validation": 60, "test": 200} == task["num_examples"]
    used = {field for _, field, _, _ in string.Formatter().parse(task["template"]) if field}
    assert used == set(task["input_fields"])
    assert task["target"] not in used
    for row in every_row(name):
        assert set(task["fields"]) == set(row)
        assert isinstance(row[task["target"]], str)
        assert row[task["target"]] == row[task["target"]].strip() != ""
        assert row[task["target"]].isprintable()
        assert not re.search(r"[{}\[\]|]", row[task["input_fields"][-1]].strip("[]")) or name == "list_operations"


@pytest.mark.parametrize("name", NAMES)
def test_no_input_occurs_twice_or_in_two_parts(name: str):
    """An input of test that is also in train would let an adapter score by memory; case, punctuation and spacing do not make it another one."""
    task, _ = made(name)
    assert max(Counter(input_text(task, row) for row in every_row(name)).values()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_on_every_machine(name: str):
    """Task versions, resumed jobs and published scores rest on the rows: they may change only when somebody changes this digest on purpose."""
    _, parts = generate(name, train=6, validation=3, test=6, seed=17)
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_more_training_rows_leave_the_other_rows_alone(name: str):
    """A learning curve compares sizes of train: test must stay, and the small train must be the start of the large one."""
    _, small = generate(name, train=20, validation=10, test=20, seed=3)
    _, large = generate(name, train=50, validation=10, test=20, seed=3)
    assert small["test"] == large["test"]
    assert small["validation"] == large["validation"]
    assert small["train"] == large["train"][:20]
    assert generate(name, train=20, validation=10, test=20, seed=4)[1] != small


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_complete_and_even(name: str):
    """A majority class would let a constant answer look like a model."""
    task, parts = made(name)
    for part in ("train", "test"):
        counts = Counter(row[task["target"]] for row in parts[part])
        assert set(counts) == set(task["label_set"])
        assert max(counts.values()) - min(counts.values()) <= 1
        assert max(counts.values()) / len(parts[part]) < 0.2


def test_train_never_draws_a_held_out_word():
    """Held-out words are the whole defence against memorising; one leak and test measures recall."""
    known, held_out = known_and_held_out(FIRST_NAMES)
    train, test = Draw("a", train=True), Draw("a", train=False)
    assert {train.pick(FIRST_NAMES) for _ in range(2000)} == set(known)
    picked = [test.pick(FIRST_NAMES) for _ in range(2000)]
    assert set(picked) == set(FIRST_NAMES)
    assert 0.4 < sum(name in held_out for name in picked) / 2000 < 0.6


@pytest.mark.parametrize(
    ("name", "part_of_row"),
    [
        ("text_to_sql", lambda row: row["schema"].split("(")[0]),
        ("tool_calls", lambda row: row["tool"]),
        ("data_to_text", lambda row: row["record"].split(":")[0]),
        ("review_explained", lambda row: row["review"].split(")")[0]),
        ("entities_json", lambda row: json.loads(row["entities"]).get("company", [""])[0].split(" ")[0]),
        ("list_operations", lambda row: row["task"]),
        ("clauses", lambda row: next((word for word in ("Supplier", "Landlord", "Distributor", "Tenant", "User") if word in row["clause"]), "")),
    ],
)
def test_whole_subjects_occur_in_test_only(name: str, part_of_row: Any):
    """Schemas, tools, kinds of records, firms and wordings: some must be new in test, and some not."""
    _, parts = made(name)
    train, test = ({part_of_row(row) for row in parts[part]} for part in ("train", "test"))
    assert test - train
    assert test & train


def test_every_gold_query_runs_and_finds_something():
    """SQL is scored by running it: a gold query that fails or is always empty would make every answer right or wrong."""
    task, _ = made("text_to_sql")
    empty = 0
    connections: dict[str, sqlite3.Connection] = {}
    for row in every_row("text_to_sql"):
        key = row["database"]
        if key not in connections:
            connections[key] = sqlite3.connect(":memory:")
            connections[key].executescript(task["databases"][key])
        found = connections[key].execute(row["query"]).fetchall()
        empty += not found or found == [(None,)]
    for connection in connections.values():
        connection.close()
    assert empty == 0
    assert len(connections) == len(task["databases"]) == 32


def test_the_schema_of_a_prompt_is_the_schema_of_its_database():
    """A column that the prompt names but the database lacks would punish right answers."""
    task, _ = made("text_to_sql")
    for row in every_row("text_to_sql"):
        for table, columns in re.findall(r"(\w+)\(([^)]*)\)", row["schema"]):
            created = re.search(rf"CREATE TABLE {table} \((.*?)\);", task["databases"][row["database"]])
            assert created
            assert [column.split()[0] for column in created[1].split(", ")] == columns.split(", ")


def test_entities_stand_in_their_sentence_and_no_name_is_left_over():
    """The JSON is what the sentence says: each value verbatim, and no capitalised company or person outside it."""
    for row in every_row("entities_json"):
        entities = json.loads(row["entities"])
        assert set(entities) <= {"person", "company", "city", "date"}
        rest = row["sentence"]
        for value in (value for values in entities.values() for value in values):
            assert value in rest
            rest = rest.replace(value, "", 1)
        assert not re.search(r"(?<!^)(?<![\"“])\b[A-Z]\w+ [A-Z]\w+", rest)
        for values in entities.values():
            places = [row["sentence"].index(value) for value in values]
            assert places == sorted(places)


def test_a_tool_call_fits_a_signature_that_the_prompt_shows():
    """The right tool must be on offer, and its arguments must come from the request."""
    for row in every_row("tool_calls"):
        call = json.loads(row["call"])
        signatures = dict(re.findall(r"(\w+)\(([^)]*)\)", row["tools"]))
        assert len(signatures) == 4
        assert set(call) == {"tool", "arguments"}
        assert set(call["arguments"]) <= set(signatures[call["tool"]].split(", "))
        assert call["arguments"]
        for value in call["arguments"].values():
            assert str(value).lower() in row["request"].lower()


def test_an_explanation_is_made_of_the_reviews_own_clauses():
    """The metric compares explanations word by word: a reason that the review does not give could not be found."""
    counts: Counter[str] = Counter()
    for row in every_row("review_explained"):
        answer = json.loads(row["answer"])
        assert answer == {"label": row["label"], "explanation": row["explanation"]}
        counts[row["label"]] += 1
        if row["label"] != "neutral":
            for clause in re.split(r", but (?=the )| and (?=the )", answer["explanation"]):
                assert clause.lower() in row["review"].lower()
    assert set(counts) == {"positive", "negative", "mixed", "neutral"}
    assert max(counts.values()) <= 0.26 * 860


def test_every_wording_of_a_record_says_all_of_it():
    """References are the truth that ROUGE compares with: none may drop or invent a value."""
    task, parts = made("data_to_text")
    for part, rows in parts.items():
        for row in rows:
            assert row["text"] in row["references"]
            assert len(row["references"]) == (1 if part == "train" else 4)
            values = [field.split(": ", 1)[1] for field in row["record"].split("; ")[1:]]
            for text in row["references"]:
                assert all(value in text for value in values if value not in ("yes", "no"))
    assert task["references"] == "references"


def evaluated(expression: str) -> Fraction:
    """The value of digits, + - * / and brackets."""
    assert re.fullmatch(r"[\d+\-*/() ]+", expression)
    return Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction}))


def test_the_answer_of_a_story_is_what_its_numbers_give():
    """Each number of the expression stands in the story, and no other; the answer is its value, a whole number above zero."""
    for row in every_row("word_problems"):
        assert evaluated(row["expression"]) == int(row["answer"]) > 0
        assert set(re.findall(r"\d+", row["question"])) == set(re.findall(r"\d+", row["expression"]))
    counts = Counter(row["answer"] for row in every_row("word_problems"))
    assert counts.most_common(1)[0][1] / 860 < 0.1


def parsed_list(text: str) -> list[Any]:
    if text.startswith("["):
        return list(json.loads(text))
    items = re.split(r", | / ", text)
    return [int(item) if item.isdigit() else item for item in items]


def test_lists_come_out_as_the_task_says():
    """Recomputed from the printed list; the result keeps the list's format."""
    expected = {
        "sort": sorted,
        "reverse": lambda items: list(reversed(items)),
        "first": lambda items: [items[0], items[1]],
        "last": lambda items: [items[-2], items[-1]],
        "unique": lambda items: [item for place, item in enumerate(items) if item not in items[:place]],
        "upper": lambda items: [item.upper() for item in items],
        "ascending": lambda items: sorted(items, key=int),
        "descending": lambda items: sorted(items, key=lambda number: -number),
        "even": lambda items: [number for number in items if str(number)[-1] in "02468"],
        "above": lambda items: [number for number in items if number >= 51],
    }
    kinds = Counter()
    for row in every_row("list_operations"):
        kinds[row["skill"], row["format"]] += 1
        assert parsed_list(row["result"]) == expected[row["skill"]](parsed_list(row["list"]))
        assert row["result"].startswith("[") == row["list"].startswith("[") == (row["format"] == "json")
    assert len(kinds) == 30
    assert max(kinds.values()) - min(kinds.values()) <= 3  # one round apart in each part


def test_a_conversion_there_and_back_gives_the_amount():
    """Both directions of a pair of units must use one factor, and the well-known ones must be right."""
    known = {("hours", "minutes"): 60, ("days", "hours"): 24, ("feet", "inches"): 12, ("kilometres", "metres"): 1000, ("pounds", "ounces"): 16}
    factors: dict[frozenset[str], set[Fraction]] = {}
    for row in every_row("unit_conversion"):
        factor = Fraction(row["answer"]) / Fraction(row["amount"])
        factors.setdefault(frozenset((row["from"], row["to"])), set()).add(max(factor, 1 / factor))
        assert row["amount"] in row["question"]
    assert all(len(found) == 1 for found in factors.values())
    for pair, factor in known.items():
        assert factors[frozenset(pair)] == {Fraction(factor)}


def read_date(text: str) -> date:
    """A date as people write it, read without the generator's code."""
    text = re.sub(r"\b(\d+)(st|nd|rd|th)\b", r"\1", text)
    for index in range(len(ORDINAL_WORDS), 0, -1):  # thirty-first before first
        text = re.sub(rf"(?<!-)\b{ORDINAL_WORDS[index - 1]}\b", str(index), text)
    month = "|".join(name for full in MONTHS for name in (full, f"{full[:3]}\\.", full[:3]))
    patterns = (
        rf"(?P<d>\d+)(?: of)?[ -](?P<m>{month}),?[ -](?P<y>\d{{4}})",
        rf"(?P<m>{month})(?: the)? (?P<d>\d+), (?P<y>\d{{4}})",
        r"(?P<y>\d{4})/(?P<m>\d+)/(?P<d>\d+)",
        r"(?P<m>\d+)/(?P<d>\d+)/(?P<y>\d{4})",
        r"(?P<d>\d+)\.(?P<m>\d+)\.(?P<y>\d{4})",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            name = found["m"]
            number = int(name) if name.isdigit() else [full[:3] for full in MONTHS].index(name[:3]) + 1
            return date(int(found["y"]), number, int(found["d"]))
    raise AssertionError(f"no date in {text!r}")


def test_the_date_of_a_sentence_is_the_one_it_is_labelled_with():
    """Read back by another parser; a weekday that is named must be that day's."""
    for row in every_row("date_format"):
        day = read_date(row["text"])
        assert day.isoformat() == row["iso"], row["text"]
        weekday = re.search(r"\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b", row["text"])
        assert not weekday or weekday[0] == day.strftime("%A")


def test_the_marked_option_is_the_date_and_the_only_one():
    """Two equal options, or a letter that marks another date, would make the answer a matter of luck."""
    for row in every_row("dates"):
        options = dict(re.findall(r"(\([A-F]\)) (\d\d/\d\d/\d{4})", row["options"]))
        assert len(set(options.values())) == 6
        assert datetime.strptime(options[row["answer"]], "%m/%d/%Y").date().isoformat() == row["date"]


def test_the_answers_of_plain_date_questions_follow_from_the_calendar():
    """Where the story says outright how a date lies to today, the answer is recomputed from the text alone."""
    told = {
        "Today is ": 0,
        "It is ": 0,
        "Yesterday was ": -1,
        "Tomorrow is ": 1,
        "The day before yesterday was ": -2,
        "The day after tomorrow is ": 2,
    }
    moves = {
        "today": 0,
        "yesterday": -1,
        "tomorrow": 1,
        "24 hours later": 1,
        "one week ago from today": -7,
        "one week from today": 7,
        "10 days ago": -10,
    }
    moves |= {"two weeks from today": 14, "3 days from now": 3, "10 days from now": 10, "the day before yesterday": -2}
    checked = 0
    for row in every_row("dates"):
        story, asked = re.fullmatch(r"(.*[.?]) What is the date (.*) in MM/DD/YYYY\?", row["question"]).groups()
        start = next((start for start in told if re.match(rf"{start}(\d|[A-Z][a-z]+ \d)", story)), None)
        if start is None or asked not in moves or not re.search(r"\d{4}( today)?\.$", story):
            continue
        today = read_date(story) - timedelta(told[start])
        assert (today + timedelta(moves[asked])).isoformat() == row["date"], row["question"]
        checked += 1
    assert checked > 60


def test_an_unknown_name_gets_the_nearest_one():
    """A typing error in a land file should cost one look, not a search through the documentation."""
    with pytest.raises(TaskError, match="no built-in task 'text_to_sq1'") as caught:
        generate("text_to_sq1", train=1, validation=1, test=1)
    assert "did you mean 'text_to_sql'?" in caught.value.hint
    assert "word_problems" in caught.value.hint
    with pytest.raises(TaskError, match="'zzz'"):
        describe("zzz")


def test_impossible_sizes_are_refused():
    """A negative size, or more rows than the words can form, must not end in a short or endless draw."""
    with pytest.raises(TaskError, match="validation is -1 rows"):
        generate("dates", train=1, validation=-1, test=1)
    tiny = Generator({"name": "coin"}, ("only",), lambda draw, kind: {"text": draw.any(("head", "tail", "Head!", "edge"))}, ("text",))
    parts = draw_parts(tiny, {"train": 1, "validation": 1, "test": 1}, seed=1)
    assert sorted(rows[0]["text"].lower().strip("!") for rows in parts.values()) == ["edge", "head", "tail"]
    with pytest.raises(TaskError, match="train got 1 of the 2 asked for"):
        draw_parts(tiny, {"train": 2, "validation": 1, "test": 1}, seed=1)


def test_a_part_may_be_empty():
    """Asking only for test rows is how a finished adapter is measured."""
    _, parts = generate("clauses", train=0, validation=0, test=3, seed=5)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [0, 0, 3]


def test_a_template_is_filled_with_different_words_and_tidied():
    """Slots of one list differ within a sentence, a repeated slot does not, and English stays readable."""
    draw = Draw("fill", train=False)
    text, chosen = draw.fill("[So|] {name} met {name2} and {name} bought a {thing} .", {"name": ("Ann", "Bob"), "thing": "orange"})
    assert chosen["name"] != chosen["name2"]
    assert text.removeprefix("So ") == f"{chosen['name']} met {chosen['name2']} and {chosen['name']} bought an orange."
