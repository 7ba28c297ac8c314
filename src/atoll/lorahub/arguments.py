"""What LoraHub's two functions are given, checked: programs of many origins call them, with lists, arrays and columns.

Anything that is texts in order, of any kind of list, is taken; everything else is refused in one sentence before anything is loaded.

Used by algorithm.py; `number` also by objective.py and compatible.py, for what callables of one's own return.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from atoll.errors import ConfigError, DataError


def examples(inputs: Iterable[str], outputs: Iterable[str]) -> tuple[list[str], list[str]]:
    """The examples as two lists of texts. Raises DataError for none, or inputs without outputs."""
    given, wanted = texts("example_inputs", inputs), texts("example_outputs", outputs)
    if not given:
        raise DataError("there are no examples to learn from", hint="give a few inputs with their outputs; 5 are usual")
    check_pairs(given, wanted)
    return given, wanted


def check_pairs(inputs: list[str], outputs: list[str]) -> None:
    if len(inputs) != len(outputs):
        raise DataError(f"there are {len(inputs)} example inputs, but {len(outputs)} outputs", hint="give one output for each input")


def texts(name: str, given: Iterable[str]) -> list[str]:
    """A list, tuple, array or column of texts as a list. Raises DataError for what is none."""
    if isinstance(given, str | bytes):
        raise DataError(f"{name} is one text, expected a list of texts", hint="put it into a list")
    if not isinstance(given, Iterable) or isinstance(given, Mapping | Set) or getattr(given, "ndim", 1) != 1:
        raise DataError(f"{name} is {_called(given)}, expected a list of texts", hint="give a list, a tuple or one column")
    found = list(given)
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise DataError(f"{name}, entry {number} is {text!r:.60}, expected a text", hint="write numbers as texts, and leave empty rows out")
    return [str(text) for text in found]  # numpy's own kind of str, too


def count(name: str, given: Any, *, least: int = 1, most: int | None = None, hint: str) -> int:
    """A whole number, numpy's own kinds too. Raises ConfigError."""
    try:
        found = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {given!r:.60}, expected a whole number {bounds}", hint=hint)
    return found


def check_callable(name: str, given: Any, hint: str) -> None:
    if not callable(given):
        raise ConfigError(f"{name} is {given!r:.60}, expected a function", hint=hint)


def number(name: str, found: Any) -> float:
    """What a callable of one's own returned. Raises ConfigError where it is no number."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, for a tensor of several
        raise ConfigError(f"{name} returned {found!r:.60}, expected a number", hint=f"return one number from {name}") from error


def folder(given: str | Path) -> Path:
    """Where an adapter can be written. Raises ConfigError where a file stands in the way."""
    if not isinstance(given, str | Path) or not str(given):
        raise ConfigError(f"save_to is {given!r:.60}, expected the path of a folder", hint="leave it out to write nothing")
    path = Path(given)
    there = next((part for part in (path, *path.parents) if part.exists()), path.parent)
    if not there.is_dir():
        raise ConfigError(f"save_to is {str(given)!r}, but {there} is a file, expected a folder", hint="choose another folder")
    return path


def _called(given: object) -> str:
    return "None" if given is None else f"of type {type(given).__name__}"
