"""docs/structure.md and the disk agree: the page names every folder and file of the package, and nothing that is not there.

A package has a heading ("### `model/`") and a sentence under it, which stands for its __init__.py; every other file has one list item
("- `model/decoder.py` — sentence"). Paths are relative to src/atoll, folders end in a slash. Other backticked words are free, as long as they do not
look like such a path.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "atoll"
PAGE = ROOT / "docs" / "structure.md"

_PATH = re.compile(r"`([\w./-]+(?:\.py|/))`")
_ITEM = re.compile(r"^\s*[-*] `([\w./-]+\.py)` — \S.{10,}", re.MULTILINE)
_HEADING = re.compile(r"^#+ `([\w./-]+/)`\n\n[A-Z].{20,}", re.MULTILINE)


def page() -> str:
    assert PAGE.is_file(), "docs/structure.md is missing"
    return PAGE.read_text(encoding="utf-8")


def on_disk() -> set[str]:
    """Every Python file of the package, relative to src/atoll."""
    return {file.relative_to(SOURCE).as_posix() for file in SOURCE.rglob("*.py")}


def test_every_file_has_a_list_item_with_a_sentence() -> None:
    """Who looks for the place of a thing reads this page; a file that is missing there is found by nobody."""
    items = _ITEM.findall(page())
    missing = sorted({file for file in on_disk() if Path(file).name != "__init__.py"} - set(items))
    assert missing == [], "files without an item '- `path` — sentence' in docs/structure.md"
    assert sorted({item for item in items if items.count(item) > 1}) == [], "files with two items in docs/structure.md"


def test_every_package_has_a_heading_with_a_sentence() -> None:
    """A folder's sentence says what belongs into it."""
    packages = {f"{Path(file).parent.as_posix()}/".replace("./", "atoll/") for file in on_disk() if Path(file).name == "__init__.py"}
    assert sorted(packages - set(_HEADING.findall(page()))) == [], "packages without a heading '### `folder/`' and a sentence in docs/structure.md"


def test_the_page_names_nothing_that_is_not_there() -> None:
    """A page that was right last month sends readers to files that are gone."""
    places = (SOURCE, SOURCE.parent, ROOT)
    gone = sorted({path for path in _PATH.findall(page()) if not any((place / path).exists() for place in places)})
    assert gone == [], "paths in docs/structure.md that exist neither under src/atoll nor in the repository"


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("- `model/decoder.py` — the forward", ["model/decoder.py"]),
        ("the folder `model/` and the word `adapter`, then `hub/migrations/`", ["model/", "hub/migrations/"]),
        ("`tests/` mirror it; `__init__.py` too; `pip install -e .` is free", ["tests/", "__init__.py"]),
    ],
)
def test_the_reader_of_the_page(text: str, paths: list[str]) -> None:
    """Guards the tests above."""
    assert _PATH.findall(text) == paths
