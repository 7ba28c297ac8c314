"""When two answers count as the same."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest

from atoll.eval.matching import (
    answer_is_marked_and_whole,
    find_numbers,
    normalise_label,
    normalise_words,
    read_first_number,
    read_json,
    read_marked_number,
    read_number,
    read_spans,
    same_json,
    unfence,
)

NUMBERS = {
    "10": 10,
    "10.": 10,
    " $1,234.50 ": Fraction("1234.5"),
    "-3": -3,
    "−3": -3,
    "-$5": -5,
    "$-5": -5,
    "50%": 50,
    "5kg": 5,
    ".5": Fraction(1, 2),
    "3/4": Fraction(3, 4),
    "1e3": 1000,
    "2.5E-1": Fraction(1, 4),
    "The answer is 42.": 42,
    "5 + 3 = 8": 8,
    "10-5": 5,
    "(10)-5": 5,
    "1,234,567": 1234567,
    "0.10": Fraction(1, 10),
    "007": 7,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_a_number_is_read_whatever_is_written_around_it(text, number):
    """Commas, currency, percent, units and a closing full stop are how people write numbers; none may make a right answer wrong."""
    assert read_number(text) == number


@pytest.mark.parametrize("text", ["", "ten", "A4", "x2", "3/0", "9" * 400, "nan", "inf"])
def test_what_is_no_number_is_no_answer(text):
    """A name with a digit, a division by zero or a model that repeats one digit must not be scored as a value."""
    assert read_number(text) is None


def test_ten_is_not_one_and_equality_is_exact():
    """Substring matching once counted "10" as "1"; and rounding would make big neighbours equal."""
    assert read_number("10") != read_number("1")
    assert read_number("1000000000001") != read_number("1000000000000")
    assert read_number("0.1") == read_number("0.10")


def test_any_number_survives_being_written_with_commas_and_currency():
    """A number read back from its written form is the number, for many random ones."""
    rng = random.Random(3)
    for _ in range(500):
        value = rng.choice([rng.randint(-(10**9), 10**9), rng.randint(-9999, 9999)])
        text = f"{'-' if value < 0 else ''}{rng.choice(['', '$', '€'])}{abs(value):,}{rng.choice(['', '.', '%', ' apples', '.25'])}"
        expected = Fraction(value) + (Fraction(1, 4) if text.endswith(".25") else 0) * (-1 if value < 0 else 1)
        assert read_number(f"so it is {text}") == expected, text


def test_only_the_first_marked_number_counts():
    """As in GSM8K's scorer: what comes after the answer is another problem, and a marker without a number is no answer."""
    assert read_marked_number("2 + 2 = 4\n#### 4\n\nProblem: 7 apples\n#### 7") == 4
    assert read_marked_number("no marker, so 5 then 6") == 6
    assert read_marked_number("so 5\n#### none") is None
    assert read_marked_number("####\n9") is None
    assert read_marked_number("#### $1,080 in total") == 1080


def test_a_cut_text_with_a_whole_answer_line_still_has_its_answer():
    """A base that never stops has still answered; but a number at the very end may be half a number."""
    assert answer_is_marked_and_whole("#### 15\nAnd now")
    assert not answer_is_marked_and_whole("#### 15")
    assert not answer_is_marked_and_whole("15\n")


def test_a_score_is_the_first_number():
    """ "3.5 out of 5" is a rating of 3.5; a number too large for a rating scale is none."""
    assert read_first_number("3.5 out of 5") == 3.5
    assert read_first_number("none") is None
    assert read_first_number("1" + "0" * 200) is None


def test_labels_ignore_case_spaces_and_a_full_stop_only():
    """Anything more lenient would turn wrong labels into right ones."""
    assert normalise_label("  Sci/Tech.\n") == "sci/tech"
    assert normalise_label("not   entailment") == "not entailment"
    assert normalise_label("not_entailment") != normalise_label("entailment")


def test_words_are_squads():
    """Articles and punctuation carry no answer."""
    assert normalise_words("The U.S. Army, a force") == ["us", "army", "force"]


def test_json_is_compared_by_value():
    """Key order and number form are writing; list order, types and truth values are content."""
    pairs = [('{"a": 1, "b": [1, 2]}', '{"b": [1.0, 2], "a": 1}', True), ("[1, 2]", "[2, 1]", False), ("true", "1", False), ("null", "null", True)]
    for first, second, same in pairs:
        assert same_json(read_json(first)[0], read_json(second)[0]) is same
    assert same_json({"a": [True]}, {"a": [1]}) is False


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} and more', '{"a": 1, "a": 2}', "NaN", "[" * 100_000, "1" * 5000, "{'a': 1}"])
def test_broken_json_is_no_answer_and_no_crash(text):
    """Model output is hostile input to a parser."""
    assert read_json(text) is None


def test_json_in_a_code_fence_is_read():
    """Chat models wrap JSON in Markdown; that is writing, not content."""
    assert read_json('Here:\n```json\n{"a": 1}\n```') == ({"a": 1},)
    assert unfence("```python\nx = 1") == "x = 1"
    assert unfence(" plain ") == "plain"


SPANS = {
    "none": [],
    "None.": [],
    "{}": [],
    "person: Jane | City: Oslo | person: Jane": [("person", "Jane"), ("city", "Oslo"), ("person", "Jane")],
    "object_name: letty fox: her luck": [("object_name", "letty fox: her luck")],
    '{"person": ["Jane", "Jane"], "city": "Oslo", "date": null, "size": 3}': [
        ("person", "Jane"),
        ("person", "Jane"),
        ("city", "Oslo"),
        ("size", "3"),
    ],
}


@pytest.mark.parametrize(("text", "pairs"), SPANS.items())
def test_both_forms_of_spans_give_pairs(text, pairs):
    """The same entities in either form must be worth the same."""
    assert read_spans(text) == Counter(pairs)


@pytest.mark.parametrize("text", ["Jane lives in Oslo", "person:", "person: Jane | and so on", "[1]", '{"person": {"x": 1}}', '{"person": [true]}'])
def test_other_forms_of_spans_are_no_answer(text):
    """A sentence that happens to hold a name is not an answer in the asked form."""
    assert read_spans(text) is None


def test_numbers_come_in_order():
    """A table with columns of numbers must not lose or merge any."""
    assert find_numbers("1, 2 and 3,4") == [1, 2, 3, 4]
