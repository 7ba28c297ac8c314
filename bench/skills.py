"""Generated tasks in which skills combine: every cell of a grid is a task that needs the skill of its row and the skill of its column.

    .venv/bin/python bench/skills.py --out FOLDER [--family domain_format] [--train 200] [--validation 20] [--test 60] [--seed 17]

    domain_format       what is asked (intent of a message, type of a clause, a date, the word after a marked one) x how the answer is written
                        (plain, JSON, XML, capitals). The prompt shows the domain and says nothing of the format.
    operation_language  which of some numbers is the answer (first, last, largest, smallest) x the language of its name. All prompts are alike: which
                        number, and in what language, is known from the completions alone.

A cell that is left out when adapters are trained can be made of others: its row's skill is in the adapters of the same row, its column's in those of
the same column, and no adapter has both. A few examples show what is wanted, and are too few to learn it from. So composing has something to win
here, by construction; whether it does is for compose_evidence.py to say.

Rows depend on the family, the sizes and the seed alone. Cells of a row of the grid have the same test inputs, no test input is a training input of
any cell, and no training input is in two cells. Each cell is written as a task folder (task.json and three JSONL files).

Used by compose_evidence.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atoll.files import write_file
from atoll.tasks import classification, dates
from atoll.tasks.drawing import Draw, Generator, Row
from atoll.tasks.generators import SHARED_DESCRIPTION, draw_parts
from atoll.tasks.reasoning import LIST_WORDS

PARTS = ("train", "validation", "test")
VALUE, ANSWER = "value", "answer"  # columns: the bare value, and what is written, which is the value in the cell's format or language


@dataclass(frozen=True)
class Domain:
    """A row of a grid: inputs, the value of an input, the prompt, and all values where they are a closed set. Several may share a generator."""

    generator: Generator
    value: Callable[[Row], str]
    template: str
    values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Family:
    """A grid. columns: from a bare value to what the cell's answer is."""

    title: str
    domains: Mapping[str, Domain]
    columns: Mapping[str, Callable[[str], str]]

    @property
    def cells(self) -> tuple[str, ...]:
        """The tasks' names, row by row."""
        return tuple(cell_name(domain, column) for domain in self.domains for column in self.columns)


@dataclass(frozen=True)
class Sizes:
    """Rows of each cell."""

    train: int = 200
    validation: int = 20
    test: int = 60


Cell = tuple[dict[str, Any], dict[str, list[Row]]]  # the task dict, and rows of train, validation and test


def cell_name(domain: str, column: str) -> str:
    return f"{domain}-{column}"


def split_name(cell: str) -> tuple[str, str]:
    """(row, column) of a cell."""
    domain, _, column = cell.partition("-")
    return domain, column


def make_cells(name: str, sizes: Sizes, seed: int) -> dict[str, Cell]:
    """Every cell of a family by its name. Raises TaskError where the family's words cannot form so many different rows."""
    family = FAMILIES[name]
    cells = {}
    for generator in dict.fromkeys(domain.generator.description["name"] for domain in family.domains.values()):
        sharing = {title: domain for title, domain in family.domains.items() if domain.generator.description["name"] == generator}
        wanted = [cell_name(title, column) for title in sharing for column in family.columns]
        first = next(iter(sharing.values())).generator
        drawn = draw_parts(first, {"train": len(wanted) * sizes.train, "validation": len(wanted) * sizes.validation, "test": sizes.test}, seed)
        for place, cell in enumerate(wanted):
            title, column = split_name(cell)
            parts = {
                part: drawn[part][place * size : (place + 1) * size] for part, size in (("train", sizes.train), ("validation", sizes.validation))
            }
            domain, write = sharing[title], family.columns[column]
            rows = {part: [_answered(row, domain, write) for row in given] for part, given in {**parts, "test": drawn["test"]}.items()}
            cells[cell] = (_task(name, cell, domain, write, sizes, seed), rows)
    return {cell: cells[cell] for cell in family.cells}


def write_cells(folder: Path, name: str, sizes: Sizes, seed: int) -> dict[str, Path]:
    """Write every cell of a family as a task folder, and return the folders by cell."""
    folders = {}
    for cell, (task, rows) in make_cells(name, sizes, seed).items():
        folders[cell] = folder / cell
        write_file(folders[cell] / "task.json", json.dumps(task, indent=2, ensure_ascii=False) + "\n")
        for part in PARTS:
            write_file(folders[cell] / f"{part}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[part]))
    return folders


def _answered(row: Row, domain: Domain, write: Callable[[str], str]) -> Row:
    value = domain.value(row)
    return {**row, VALUE: value, ANSWER: write(value)}


def _task(family: str, cell: str, domain: Domain, write: Callable[[str], str], sizes: Sizes, seed: int) -> dict[str, Any]:
    """task.json of a cell. The label set, where there is one, is in the cell's own form: options are compared as they are written."""
    row, column = split_name(cell)
    labels = {"label_set": [write(value) for value in domain.values]} if domain.values else {}
    return {
        "name": cell,
        "title": f"{FAMILIES[family].title}: {row} x {column}",
        "family": family,
        "fields": {VALUE: "the answer without its form", ANSWER: "what is to be written (target)"},
        "target": ANSWER,
        "metric": "exact_match",
        "template": domain.template,
        **labels,
        "num_examples": {"train": sizes.train, "validation": sizes.validation, "test": sizes.test},
        "sampling": {"seed": seed},
        **SHARED_DESCRIPTION,
    }


# ---- domain x format ----

INTENTS = (
    "cancel_order",
    "track_order",
    "change_address",
    "get_refund",
    "return_item",
    "exchange_item",
    "damaged_item",
    "wrong_item",
    "talk_to_human",
    "file_complaint",
)
CLAUSES = (
    "termination",
    "confidentiality",
    "governing_law",
    "payment",
    "liability",
    "assignment",
    "force_majeure",
    "notices",
    "warranty",
    "insurance",
)
FORMATS: dict[str, Callable[[str], str]] = {
    "plain": lambda value: value,
    "json": lambda value: json.dumps({"answer": value}),
    "xml": lambda value: f"<answer>{value}</answer>",
    "capitals": lambda value: f"RESULT: {value.upper()}",
}


def _marked_row(draw: Draw, kind: str) -> Row:
    """A list of words, one of them between asterisks; the answer is the word after it."""
    words = draw.several(LIST_WORDS, draw.integer(4, 6))
    marked = draw.integer(0, len(words) - 2)
    shown = ", ".join(f"*{word}*" if place == marked else word for place, word in enumerate(words))
    return {"words": shown, "next": words[marked + 1]}


def _of(column: str) -> Callable[[Row], str]:
    return lambda row: str(row[column])


def _domains() -> dict[str, Domain]:
    support, clauses = classification.generators()
    _, date_format = dates.generators()
    marked = Generator({"name": "next_word"}, ("next",), _marked_row, ("words", "next"))
    return {
        "intent": Domain(replace(support, kinds=INTENTS), _of("intent"), "Message: {message}\nAnswer:", INTENTS),
        "clause": Domain(replace(clauses, kinds=CLAUSES), _of("label"), "Clause: {clause}\nAnswer:", CLAUSES),
        "date": Domain(date_format, _of("iso"), "Text: {text}\nAnswer:"),
        "word": Domain(marked, _of("next"), "List: {words}\nAnswer:"),
    }


# ---- operation x language ----

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "first": lambda numbers: numbers[0],
    "last": lambda numbers: numbers[-1],
    "largest": max,
    "smallest": min,
}
_NAMES = {
    "english": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty",
    "german": "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn zwanzig",
    "french": "un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit dix-neuf vingt",
    "spanish": "uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete dieciocho diecinueve veinte",
}
NUMBER_NAMES: dict[str, tuple[str, ...]] = {language: tuple(names.split()) for language, names in _NAMES.items()}
MOST = 20  # the largest number that has a name here


def _numbers_row(draw: Draw, kind: str) -> Row:
    """Four to six different numbers."""
    return {"numbers": ", ".join(map(str, draw.rng.sample(range(1, MOST + 1), draw.integer(4, 6))))}


def _named(operation: str) -> Callable[[Row], str]:
    return lambda row: str(OPERATIONS[operation]([int(number) for number in str(row["numbers"]).split(", ")]))


def _in(language: str) -> Callable[[str], str]:
    return lambda value: NUMBER_NAMES[language][int(value) - 1]


def _operations() -> dict[str, Domain]:
    numbers = Generator({"name": "some_numbers"}, ("numbers",), _numbers_row, ("numbers",))
    every = tuple(map(str, range(1, MOST + 1)))
    return {operation: Domain(numbers, _named(operation), "Numbers: {numbers}\nAnswer:", every) for operation in OPERATIONS}


FAMILIES = {
    "domain_format": Family("A domain and a format", _domains(), FORMATS),
    "operation_language": Family("An operation and a language", _operations(), {language: _in(language) for language in NUMBER_NAMES}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the task folders")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="domain_format")
    parser.add_argument("--train", type=int, default=Sizes.train, help="training rows of a cell")
    parser.add_argument("--validation", type=int, default=Sizes.validation)
    parser.add_argument("--test", type=int, default=Sizes.test)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    sizes = Sizes(arguments.train, arguments.validation, arguments.test)
    for folder in write_cells(arguments.out, arguments.family, sizes, arguments.seed).values():
        print(folder)


if __name__ == "__main__":
    main()
