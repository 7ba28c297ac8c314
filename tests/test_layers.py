"""Imports go one way, and nothing heavy is imported before it is needed.

The table below is the architecture: a part may import the parts above it, never one below. Every import statement of the package is read, also those
inside functions and under TYPE_CHECKING, so that a cycle cannot hide in a function.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "atoll"

# From the ground up. Parts of one line stand side by side and do not import each other. "config" is one part of several files.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files", "positions"),
    ("config",),
    ("model",),
    ("tasks",),
    ("data",),
    ("train",),
    ("hub",),
    ("compose",),
    ("engine",),
    ("eval",),
    ("workflows",),
    ("lorahub", "reft"),  # façades with other projects' names
    ("serving",),  # what answers requests, without HTTP
    ("http",),
    ("lorax",),
    ("openai",),
    ("server",),
    ("cli",),
)
CONFIG_FILES = (
    "config",
    "config_adapter",
    "config_compose",
    "config_cost",
    "config_file",
    "config_quantization",
    "config_section",
    "config_sweep",
    "config_trainer",
    "ludwig",
    "ludwig_keys",
    "model_errors",
    "yaml_file",
)
APART = {"model.positions": "positions"}  # of errors alone, so that a configuration's positions are read by the function that resolves them
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

MODEL_STANDS_ON = ("errors", "files", "positions", "config")

HEAVY = ("torch", "transformers")
LIGHT = ("errors", "config", "tasks", "data", "hub", "eval", "cli")  # importing any file of these must not bring in HEAVY; nor must `import atoll`
LIGHT_FILES = ("engine.scheduler",)  # plain Python, so that it can be tested and read without tensors


def modules() -> dict[str, Path]:
    """Dotted name under atoll ("" for the package itself) to file, for every Python file."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def part_of(module: str) -> str:
    """The part of the table that a module (dotted, under atoll) belongs to."""
    if module in APART:
        return APART[module]
    first = module.split(".", 1)[0]
    return "config" if first in CONFIG_FILES else first


def imports(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name under atoll) of everything of ours that a file imports, wherever in the file; `import atoll` alone gives ""."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(["atoll", *package[: len(package) - node.level + 1]]) if node.level else ""
            stem = ".".join(part for part in (start, node.module) if part)
            # `from atoll import errors` imports a module of ours by its last name
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == "atoll" else [stem]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [node.args[0].value] if called in ("import_module", "__import__") else []
        for name in names:
            if name == "atoll" or name.startswith("atoll."):
                yield node.lineno, name.removeprefix("atoll").lstrip(".")


def may_import(part: str, other: str) -> bool:
    """Whether the table lets `part` import `other`."""
    if part == other:
        return True
    if part == "model":
        return other in MODEL_STANDS_ON
    return RANK[other] < RANK[part]


@pytest.mark.parametrize("module", [name for name in modules() if name and part_of(name) in RANK])
def test_imports_go_one_way(module: str) -> None:
    """A later part imported by an earlier one makes both impossible to test, reuse or replace alone."""
    part, known = part_of(module), modules()
    for line, name in imports(module, known[module]):
        assert name, f"{module}:{line} imports the package itself; import the module that holds the name"
        if part_of(name) not in RANK and name not in known:
            continue  # `from atoll import load` in a façade: a public name, not a module
        assert may_import(part, part_of(name)), f"{module}:{line} imports {name}, but {part} may import only what stands above it in LAYERS"


def test_every_file_has_a_place_in_the_table() -> None:
    """A part that the table does not know could import anything."""
    strange = sorted({part_of(name) for name in modules() if name} - set(RANK) - {"__main__"})
    assert strange == [], f"give {strange} a place in LAYERS"
    assert set(CONFIG_FILES) >= {name for name in modules() if part_of(name) == "config"}


def test_model_stands_on_errors_and_config_alone() -> None:
    """The rule that keeps one forward: model/ knows of no stage that uses it."""
    for name, file in modules().items():
        if part_of(name) == "model":
            assert {part_of(other) for _, other in imports(name, file)} <= {*MODEL_STANDS_ON, "model"}, name


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    """Guards the tests above: a function-level, relative or dynamic import that went unseen would be a hole."""
    file = tmp_path / "x.py"
    file.write_text(
        "import atoll.data.rows\nfrom atoll import errors\nfrom atoll.eval.score import Score\nfrom . import store\nfrom ..train import loop\n"
        "def f():\n    from atoll.engine import Engine\n    import_module('atoll.cli.main')\n"
        "if TYPE_CHECKING:\n    import atoll.ui\nimport json, torch\n"
    )
    assert sorted(name for _, name in imports("hub.x", file)) == sorted(
        ["data.rows", "errors", "eval.score", "hub", "train", "engine", "cli.main", "ui"]
    )


@pytest.fixture(scope="module")
def heavy_imports() -> dict[str, str]:
    """For each light module, the heavy package that importing it brought in ("" for none), asked of one fresh interpreter."""
    light = ["atoll", *(f"atoll.{name}" for name in modules() if name and (part_of(name) in LIGHT or name in LIGHT_FILES))]
    program = (
        "import importlib, json, sys\n"
        "found = {}\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [package for package in {HEAVY!r} if package in sys.modules]\n"
        "    found[name] = heavy[0] if heavy else ''\n"
        "    if heavy:\n"
        "        break\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_light_modules_import_neither_torch_nor_transformers(heavy_imports: dict[str, str]) -> None:
    """torch takes seconds: `atoll --help`, a wrong YAML key or a hub listing must not wait for it."""
    guilty = {name: heavy for name, heavy in heavy_imports.items() if heavy}
    assert guilty == {}, f"{guilty}: import it inside the function that needs it"
    assert "atoll" in heavy_imports
    assert "atoll.config" in heavy_imports


def test_the_package_loads_its_public_names_on_demand(heavy_imports: dict[str, str]) -> None:
    """`import atoll` is cheap, and yet every name of __all__ is there."""
    import atoll

    assert heavy_imports["atoll"] == ""
    for name in atoll.__all__:
        assert getattr(atoll, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        atoll.no_such_name  # noqa: B018 (the access is the test)
