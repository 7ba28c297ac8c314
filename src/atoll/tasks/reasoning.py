"""Three built-in tasks with a computed answer: `word_problems`, `list_operations` and `unit_conversion`.

`word_problems` are stories of one or two steps; each row keeps the expression that gives its answer. `list_operations` crosses skills (sort, filter,
count, ...) with list formats (commas, JSON, slashes),
so that one skill or one format can be told apart. Numbers are small: the step is to be learnt, not
long arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal

from atoll.tasks.drawing import Draw, Generator, Row, phrases, sentence, words
from atoll.tasks.vocabulary import CITIES, CONTAINERS, COUNTED_THINGS, FIRST_NAMES, SHOP_ITEMS, WEEKDAYS

# The expression of each kind of story, and stories. a, b, c are numbers; the last story in four occurs in validation and test only.
STORIES: dict[str, tuple[str, ...]] = {
    "a + b": phrases("""
        {name} has {a} {things} and buys {b} more. How many {things} does {name} have now?
        {name} picked {a} {things} and {name2} picked {b}. How many did they pick together?
        There are {a} {things} on the table and {b} in the drawer. How many {things} are there?
        On {day} {name} sold {a} {things}, the day after {b}. How many in all?
        {name} found {a} {things} in {city} and {b} at home. How many {things} are that?"""),
    "a - b": phrases("""
        {name} had {a} {things} and gave {b} to {name2}. How many {things} are left?
        There were {a} {things} in the shop. {b} were sold on {day}. How many remain?
        {name} has {a} {things}, {name2} has {b}. How many more does {name} have?
        Of {a} {things}, {b} broke on the way to {city}. How many are still whole?
        {name} needs {a} {things} and already has {b}. How many are missing?"""),
    "a * b": phrases("""
        {name} has {a} {boxes} with {b} {things} each. How many {things} is that?
        Each of {a} children gets {b} {things}. How many {things} are needed?
        A {item} costs {b} dollars. How much do {a} of them cost? / {name} makes {b} {things} every day. How many does {name} make in {a} days?
        There are {a} rows of {b} {things}. How many {things} are there?"""),
    "a / b": phrases("""
        {name} puts {a} {things} into {b} {boxes}, the same number in each. How many go into one?
        {b} friends share {a} {things} equally. How many does each get?
        {b} tickets to {city} cost {a} dollars. How much is one ticket? / {name} packs {a} {things}, {b} to a bag. How many bags are filled?
        {name} walked {a} km in {b} days, the same every day. How many km a day?"""),
    "a + b - c": phrases("""
        {name} had {a} {things}, bought {b} more and lost {c}. How many {things} are left?
        A bus left {city} with {a} people. {b} got on and {c} got off. How many are on it?
        {name} got {a} {things} and then {b} more. {name2} took {c}. How many remain?
        On {day} a shop had {a} {things}, got {b} and sold {c}. How many does it have?"""),
    "a * b + c": phrases("""
        {name} has {a} {boxes} of {b} {things} and {c} loose ones. How many {things} in all?
        {name} buys {a} tickets at {b} dollars and a snack for {c} dollars. What is the total?
        {name} saves {b} dollars a week for {a} weeks and gets {c} dollars from {name2}. How many dollars is that?
        {a} tables seat {b} people each, {c} people stand. How many people are there?"""),
    "a * b - c": phrases("""
        {name} buys {a} {boxes} with {b} {things} each and uses {c} {things}. How many are left?
        {name} works {a} hours for {b} dollars an hour and spends {c} dollars. How much is left?
        {a} shelves held {b} {things} each. {c} fell down. How many are still up?
        {name} prints {a} pages of {b} photos and throws {c} photos away. How many photos remain?"""),
    "(a + b) / c": phrases("""
        {name} has {a} {things} and {name2} has {b}. They put them into {c} equal piles. How many are in a pile?
        {a} girls and {b} boys form {c} equal teams. How many are in a team?
        {name} drove {a} km on {day} and {b} km the day after, in {c} equal stages. How long is a stage?
        {a} red and {b} blue {things} go into {c} {boxes} evenly. How many in each?"""),
    "a + a * b": phrases("""
        {name} has {a} {things}. {name2} has {b} times as many. How many have they together?
        A shop in {city} sold {a} {things} on {day} and {b} times as many the day after. How many in both days?
        One {item} costs {a} dollars, another {b} times as much. What do both cost?
        {name} ran {a} km and then cycled {b} times as far. How many km in all?"""),
    "a - b * c": phrases("""
        {name} has {a} dollars and buys {b} {things} for {c} dollars each. How many dollars are left?
        From {a} {things} {name} fills {b} bags with {c} each. How many are left over?
        A book has {a} pages. {name} reads {c} pages a day for {b} days. How many pages remain?
        Of {a} seats, {b} rows of {c} are taken. How many seats are free?"""),
}  # fmt: skip


def _numbers(draw: Draw, kind: str) -> dict[str, int]:
    """a, b and c such that the answer is a whole number above zero, and no number is the answer already."""
    small = draw.integer(2, 9)
    if kind == "a + b":
        return {"a": draw.integer(3, 60), "b": draw.integer(3, 39)}
    if kind == "a - b":
        rest = draw.integer(2, 50)
        taken = draw.integer(2, 40)
        return {"a": rest + taken, "b": taken}
    if kind in ("a * b", "a + a * b"):
        return {"a": draw.integer(2, 12), "b": small}
    if kind == "a / b":
        return {"a": small * draw.integer(2, 12), "b": small}
    if kind == "a + b - c":
        a, b = draw.integer(5, 40), draw.integer(3, 20)
        return {"a": a, "b": b, "c": draw.integer(2, a - 1)}
    if kind in ("a * b + c", "a * b - c"):
        a = draw.integer(2, 9)
        return {"a": a, "b": small, "c": draw.integer(1, a * small - 1)}
    if kind == "(a + b) / c":
        total = small * draw.integer(2, 9)
        a = draw.integer(1, total - 1)
        return {"a": a, "b": total - a, "c": small}
    c = draw.integer(2, 8)
    return {"a": small * c + draw.integer(1, 20), "b": small, "c": c}


def word_problem_row(draw: Draw, kind: str) -> Row:
    """One story whose answer is the expression `kind`."""
    numbers = _numbers(draw, kind)
    slots = {"name": FIRST_NAMES, "things": COUNTED_THINGS, "boxes": CONTAINERS, "city": CITIES, "day": WEEKDAYS, "item": SHOP_ITEMS}
    question = draw.say(draw.pick(STORIES[kind]), {**slots, **{letter: str(number) for letter, number in numbers.items()}})
    expression = "".join(str(numbers.get(letter, letter)) for letter in kind)
    a, b, c = numbers["a"], numbers["b"], numbers.get("c", 1)
    answers = {
        "a + b": a + b, "a - b": a - b, "a * b": a * b, "a / b": a // b, "a + b - c": a + b - c, "a * b + c": a * b + c, "a * b - c": a * b - c,
        "(a + b) / c": (a + b) // c, "a + a * b": a + a * b, "a - b * c": a - b * c,
    }  # fmt: skip
    return {"question": sentence(question), "answer": str(answers[kind]), "expression": expression, "kind": kind}


LIST_WORDS = words("""
    lamp, river, stone, bread, cloud, tiger, violin, candle, garden, mirror, pepper, rocket, silver, window, zebra, anchor, basket, copper, desert,
    engine, feather,
    guitar, hammer, island, jacket, kitten, ladder, marble, needle, orange, pocket, rabbit, saddle, teapot, umbrella, valley, walnut, yogurt,
    button, castle, dragon,
    eagle, forest, ginger, honey, igloo, jungle, kettle, lemon, meadow, nutmeg, otter, pebble, quilt, ribbon, salmon, tunnel, vessel, wagon, acorn,
    bridge, cactus,
    dune, ember""")  # fmt: skip

WORD_SKILLS: dict[str, tuple[tuple[str, ...], Callable[[list[str]], list[str]]]] = {
    "sort": (phrases("""
        Sort the words from A to Z. / Put the words in alphabetical order. / Order the list alphabetically.
        Arrange the words by the alphabet."""), sorted),
    "reverse": (phrases("""
        Reverse the order of the list. / Write the list backwards. / Give the list from last to first.
        Turn the list around."""), lambda items: items[::-1]),
    "first": (phrases("""
        Keep only the first two words. / Give the first two entries. / Which two words come first?
        Return just the two words at the start."""), lambda items: items[:2]),
    "last": (phrases("""
        Keep only the last two words. / Give the last two entries. / Which two words come last?
        Return just the two words at the end."""), lambda items: items[-2:]),
    "unique": (
        phrases("Remove the repeated words. / Give each word once, in order of appearance. / Drop all repeats. / Delete duplicates from the list."),
        lambda items: list(dict.fromkeys(items)),
    ),
    "upper": (phrases("""
        Write the words in capital letters. / Put every word in upper case. / Capitalise all letters.
        Change the list to capitals."""), lambda items: [item.upper() for item in items]),
}  # fmt: skip
NUMBER_SKILLS: dict[str, tuple[tuple[str, ...], Callable[[list[int]], list[int]]]] = {
    "ascending": (phrases("""
        Sort the numbers from smallest to largest. / Put the numbers in rising order. / Order the list, smallest first.
        Arrange the numbers upwards."""), sorted),
    "descending": (
        phrases("""
            Sort the numbers from largest to smallest. / Put the numbers in falling order. / Order the list, largest first.
            Arrange the numbers downwards."""),
        lambda items: sorted(items, reverse=True),
    ),
    "even": (phrases("""
        Keep the even numbers. / Give only the even numbers. / Remove all odd numbers.
        Leave just the even ones."""), lambda items: [n for n in items if n % 2 == 0]),
    "above": (phrases("""
        Keep the numbers above 50. / Give only the numbers over 50. / Remove everything up to 50.
        Leave just those greater than 50."""), lambda items: [n for n in items if n > 50]),
}  # fmt: skip
LIST_FORMATS = ("commas", "json", "slashes")


def formatted(items: list[str] | list[int], style: str) -> str:
    """`items` set apart by commas or slashes, or as JSON; one line always."""
    if style == "json":
        return json.dumps(items)
    return (", " if style == "commas" else " / ").join(str(item) for item in items)


def list_row(draw: Draw, kind: str) -> Row:
    """One list and what to do with it; `kind` is skill:format."""
    skill, style = kind.split(":")
    if skill in WORD_SKILLS:
        asked, apply = WORD_SKILLS[skill]
        items = draw.several(LIST_WORDS, draw.integer(3, 6))
        if skill == "unique":
            items = draw.shuffled([*items[:4], *draw.rng.sample(items[:4], 2 if len(items) > 3 else 1)])
        result = formatted(apply(items), style)
        given = formatted(items, style)
    else:
        asked, compute = NUMBER_SKILLS[skill]
        numbers = draw.rng.sample(range(1, 100), draw.integer(3, 6))
        while not compute(numbers):  # an empty list has no form with commas
            numbers = draw.rng.sample(range(1, 100), 6)
        result, given = formatted(compute(numbers), style), formatted(numbers, style)
    return {"task": draw.pick(asked), "list": given, "result": result, "skill": skill, "format": style}


# From, to, and the factor as a decimal text: one `from` is `factor` times `to`.
UNITS: tuple[tuple[str, str, str], ...] = tuple(
    (source, target, factor)
    for source, target, factor in (
        line.split("/")
        for line in words("""
            metres/centimetres/100, kilometres/metres/1000, hours/minutes/60, kilograms/grams/1000, minutes/seconds/60, litres/millilitres/1000,
            weeks/days/7,
            centimetres/millimetres/10, days/hours/24, tonnes/kilograms/1000, feet/inches/12, years/months/12, yards/feet/3, gallons/quarts/4,
            pounds/ounces/16,
            dollars/cents/100, dozens/pieces/12, metres/millimetres/1000, quarts/pints/2, decades/years/10, centuries/years/100, pints/cups/2""")
    )
)  # fmt: skip
CONVERSIONS = phrases("""
    How many {to} are {n} {from}? / Convert {n} {from} to {to}. / Express {n} {from} in {to}. / What is {n} {from} in {to}?
    {name} counted {n} {from}. How many {to} is that?
    {n} {from} in {to}: / {name} wrote down {n} {from}. Give it in {to}. / Turn {n} {from} into {to} for {name}.""")


def conversion_row(draw: Draw, direction: str) -> Row:
    """One conversion: `down` to the smaller unit (multiply), `up` to the larger (divide), `half` of a unit with a decimal."""
    larger, smaller, factor = draw.any(UNITS)
    easy = set(factor[1:]) == {"0"}  # only the decimal point moves: larger amounts are no harder
    amount = Decimal(draw.integer(2, 400 if easy else 40))
    if direction == "half":
        amount = Decimal(draw.integer(1, 200 if easy else 12)) + Decimal("0.5")
    product = (amount * Decimal(factor)).normalize()
    source, target, given, result = (smaller, larger, product, amount) if direction == "up" else (larger, smaller, amount, product)
    slots = {"from": source, "to": target, "n": f"{given:f}", "name": FIRST_NAMES}
    return {"question": draw.say(draw.pick(CONVERSIONS), slots), "answer": f"{result:f}", "from": source, "to": target, "amount": f"{given:f}"}


def generators() -> tuple[Generator, ...]:
    """`word_problems`, `list_operations` and `unit_conversion`."""
    problems = {
        "name": "word_problems",
        "title": "Arithmetic stories of one or two steps",
        "family": "arithmetic",
        "fields": {
            "question": "a story (input)",
            "answer": "a whole number (target)",
            "expression": "what gives the answer",
            "kind": "the expression's form",
        },
        "input_fields": ["question"],
        "target": "answer",
        "metric": "exact_match",
        "match": "number",
        "instruction": "Solve the problem and answer with the number alone.",
        "template": "Problem: {question}\nAnswer:",
        "notes": "A quarter of the stories of each kind occurs in validation and test only.",
    }
    lists = {
        "name": "list_operations",
        "title": "Sort, filter and shorten lists in three formats",
        "family": "list processing",
        "fields": {
            "task": "what to do (input)",
            "list": "the list (input)",
            "result": "the new list in the same format (target)",
            "skill": "what is done",
            "format": "commas, json or slashes",
        },
        "input_fields": ["task", "list"],
        "target": "result",
        "metric": "exact_match",
        "instruction": "Do what the task says and write the new list in the same format.",
        "template": "Task: {task}\nList: {list}\nResult:",
        "notes": "Ten skills times three formats, evenly. A quarter of the words and of the wordings occurs in validation and test only.",
    }
    units = {
        "name": "unit_conversion",
        "title": "Convert an amount to another unit",
        "family": "arithmetic",
        "fields": {
            "question": "an amount and a unit (input)",
            "answer": "the number (target)",
            "from": "unit given",
            "to": "unit asked for",
            "amount": "number given",
        },
        "input_fields": ["question"],
        "target": "answer",
        "metric": "exact_match",
        "match": "number",
        "instruction": "Convert the amount and answer with the number alone.",
        "template": "Question: {question}\nAnswer:",
        "notes": "No amount of a unit occurs in two parts, however it is worded. A quarter of the wordings occurs in validation and test only.",
    }
    kinds = tuple(f"{skill}:{style}" for skill in (*WORD_SKILLS, *NUMBER_SKILLS) for style in LIST_FORMATS)
    return (
        Generator(problems, tuple(STORIES), word_problem_row, ("question",)),
        Generator(lists, kinds, list_row, ("list",)),
        Generator(units, ("down", "up", "down", "up", "half"), conversion_row, ("from", "to", "amount")),
    )
