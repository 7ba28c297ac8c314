"""Likeness of texts: what it must rank first, and its value by hand."""

from __future__ import annotations

import math

import pytest

from atoll.compose.text_similarity import similarity


def test_a_card_about_the_task_is_likelier_than_any_other() -> None:
    """The measure exists for this: no example is needed to find the adapters whose task sounds like the new one."""
    cards = [
        "Translate a sentence from English to French.",
        "Classify the sentiment of a film review as positive or negative.",
        "Write a SQL query that answers the question.",
        "",
    ]
    found = similarity("Is this review of a restaurant positive or negative? Sentiment classification", cards)
    assert found.index(max(found)) == 1
    assert found[3] == 0.0
    assert all(0 <= value <= 1 for value in found)


def test_other_forms_of_a_word_still_match() -> None:
    """Cards are written by strangers: "classifying" must be near "classification", which words alone would not see."""
    near, far = similarity("classification of toxicity", ["classifying toxic comments", "adding large numbers"])
    assert near > 0.05 > far == 0.0


def test_what_all_cards_say_counts_for_little() -> None:
    """Two cards that share only boilerplate with the description must not beat the one that shares its subject."""
    boiler = "This is a LoRA adapter for a base language model, about "
    subjects = ["poetry", "chess", "physics", "cooking", "travel", "history", "music", "football", "gardening", "painting"]
    found = similarity(boiler + "chemistry", [*(boiler + subject for subject in subjects), "chemistry questions"])
    assert found[-1] > 2 * max(found[:-1]) > 0


def test_the_value_by_hand() -> None:
    """The docstring's formula on words: "a" is in both texts, "b" in one; and a text is wholly like itself, in any case."""
    rare, common = math.log(3 / 1), math.log(3 / 2)  # n = 2 texts
    words = common / math.sqrt(common**2 + rare**2)
    # A one-letter word between its two spaces is one n-gram, so n-grams count here as words do.
    assert similarity("a", ["a b"])[0] == pytest.approx(words)
    assert similarity("Good Morning", ["good morning"]) == [pytest.approx(1.0)]
    assert similarity("", ["anything", ""]) == [0.0, 0.0]
