"""Write the file list of docs/structure.md from the first line of every module's docstring: `python docs/make_structure.py`.

The page above the mark is written by hand; below it each file has one sentence, and that sentence stands in the file itself. A test holds page and
disk together.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "src" / "atoll", ROOT / "docs" / "structure.md"
MARK = "<!-- below: written by docs/make_structure.py from the docstrings -->"


def listing() -> str:
    """One heading a folder with its own sentence, one list item a file."""
    lines: list[str] = []
    folders = [SOURCE, *sorted(path.parent for path in SOURCE.glob("*/**/__init__.py"))]
    for folder in folders:
        name = "" if folder == SOURCE else f"{folder.relative_to(SOURCE).as_posix()}/"
        lines += ["", f"### `{name or 'atoll/'}`", "", sentence(folder / "__init__.py"), ""]
        own = [path for path in folder.rglob("*.py") if path.parent == folder or (folder != SOURCE and not (path.parent / "__init__.py").exists())]
        files = sorted(path for path in own if path.name != "__init__.py")
        lines += [f"- `{path.relative_to(SOURCE).as_posix()}` — {sentence(path)}" for path in files]
    return "\n".join(lines) + "\n"


def sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def page() -> str:
    """The page as it should be: the hand-written part as it is, and the listing."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + listing()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
