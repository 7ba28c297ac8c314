"""The public names of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import atoll


def test_importing_atoll_loads_neither_torch_nor_pydantic() -> None:
    """`atoll --help` and a script's first line must not cost seconds."""
    code = "import sys, atoll; dir(atoll); print([name for name in ('torch', 'transformers', 'pydantic', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_config_loads_no_torch() -> None:
    """Checking a file is quick, also where torch takes seconds to load."""
    code = "import sys, atoll; atoll.load_config; atoll.TrainConfig(base='x'); print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", atoll.__all__)
def test_every_public_name_can_be_fetched(name: str) -> None:
    """The table of homes is text; a renamed class would only be noticed by a user."""
    assert getattr(atoll, name) is not None
    assert name in dir(atoll)


def test_the_three_lists_of_public_names_agree() -> None:
    """__all__, the table of homes, and the imports that type checkers see."""
    tree = ast.parse(Path(atoll.__file__).read_text(encoding="utf-8"))
    imports = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == atoll._HOMES
    assert sorted([*atoll._HOMES, "__version__"]) == sorted(atoll.__all__)


def test_no_public_name_is_also_a_subpackage() -> None:
    """Importing atoll.train.loop anywhere would replace a function atoll.train by the package, depending on the order of imports."""
    folder = Path(atoll.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules & set(atoll._HOMES) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """hasattr and copy rely on that kind of error."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        atoll.nothing  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    """It stands in pyproject.toml only."""
    assert atoll.__version__ == version("atoll")
