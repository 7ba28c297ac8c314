"""Every help text has a description and examples, and every example is a command line that is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from atoll.cli.main import app

ROOT = Path(__file__).parents[2]


def commands(command=None, path=("atoll",)):
    """(path, command) of the program and each of its commands, at any depth."""
    command = command or typer.main.get_command(app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def examples_of(command) -> list[str]:
    """The command lines below "Examples:" in a command's help text."""
    _, _, below = (command.help or "").partition("Examples:")
    return [line.strip() for line in below.splitlines() if line.strip()]


def arguments_of(example: str) -> list[str]:
    """The words after `atoll`, without what is piped in or away."""
    [own] = [part.strip() for part in re.split(r" \| | > ", example) if part.strip().startswith("atoll ")]
    return shlex.split(own)[1:]


ALL = list(commands())
EXAMPLES = [(" ".join(path), example) for path, command in ALL for example in examples_of(command)]


@pytest.mark.parametrize(("path", "command"), ALL, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_every_command_says_what_it_does_and_shows_how(path, command):
    """A command without an example is one that nobody uses right the first time."""
    description = command.help.partition("\n")[0]
    assert description.endswith(".")
    assert examples_of(command), f"{' '.join(path)} has no examples"
    assert all(f"{' '.join(path[:2])}" in example or path == ("atoll",) for example in examples_of(command))
    for parameter in command.params:
        assert parameter.help or parameter.name == "help", f"{' '.join(path)}: {parameter.name} has no help"


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_is_understood(path, example):
    """An option that was renamed must be renamed in the examples too."""
    ran = []
    root = typer.main.get_command(app)
    for place, command in commands(root):
        if not getattr(command, "commands", None):
            command.callback = lambda place=place, **values: ran.append(place)
    assert root.main(args=arguments_of(example), prog_name="atoll", standalone_mode=False) in (None, 0)
    assert ran, "the example does not run a command"
    assert " ".join(ran[0]).startswith(path)


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES if "examples/" in example])
def test_files_that_examples_name_exist(example):
    """The first thing a user does is to paste an example."""
    for word in arguments_of(example):
        if word.startswith("examples/"):
            assert (ROOT / word).is_file()


def test_command_lists_are_not_cut(atoll):
    """The list of commands is the map of the program: each line must be a whole sentence at 80 columns."""
    for group in ([], ["hub"], ["runs"]):
        listed = atoll(*group, "--help").out.partition("Commands:")[2]
        assert listed.strip()
        assert "..." not in listed
