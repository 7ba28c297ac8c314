"""The entry point: errors as sentences, exit codes, and an answer to --help before torch could be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from atoll.cli import pull
from atoll.errors import DataError, Interrupted


def fail_with(monkeypatch, error):
    """Makes `atoll pull` raise `error` in the middle."""

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(pull, "progress_bar", broken)


def test_help_answers_without_torch_and_in_less_than_a_second():
    """A slow --help makes every typo slow; one import of torch at module level is enough to break this."""
    script = """
import sys, time
from atoll.cli.main import run
code = run(["--help"])
loaded = [name for name in ("torch", "transformers", "sqlalchemy", "numpy") if name in sys.modules]
print(time.process_time(), code, ",".join(loaded), sep="|", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, code, loaded = done.stderr.strip().split("|")
    assert (code, loaded) == ("0", "")
    assert float(seconds) < 1.0  # of processor time, so that a busy machine does not count
    assert "Examples:" in done.stdout


def test_the_version_is_the_package_s(atoll):
    """A bug report begins with it."""
    from importlib.metadata import version

    result = atoll("--version")
    assert (result.code, result.out) == (0, f"atoll {version('atoll')}\n")


def test_an_expected_error_is_one_sentence_and_a_hint(atoll, monkeypatch):
    """Nobody should need to read a traceback to learn that a file is missing."""
    fail_with(monkeypatch, DataError("rows.jsonl:3: no column 'text'", hint="did you mean 'txt'?"))
    result = atoll("pull", "x")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: rows.jsonl:3: no column 'text'\n\nhint: did you mean 'txt'?\n"


def test_markup_and_control_characters_in_an_error_are_shown_not_obeyed(atoll, monkeypatch):
    """File names and adapter names come from strangers: they must not colour or move the terminal."""
    fail_with(monkeypatch, DataError("[red]file[/red] \x1b[2Jname.jsonl"))
    assert atoll("pull", "x").err == "error: [red]file[/red] \\x1b[2Jname.jsonl\n"


@pytest.mark.parametrize("error", [Interrupted("stopped after step 3", hint="run it again"), KeyboardInterrupt()])
def test_ctrl_c_ends_with_130(atoll, monkeypatch, error):
    """Shells and schedulers tell an interrupted command from a failed one by this code."""
    fail_with(monkeypatch, error)
    assert atoll("pull", "x").code == 130


def test_a_path_of_the_user_s_is_a_sentence_and_a_bug_of_ours_a_traceback(atoll, monkeypatch):
    """A full disk is not a bug; a TypeError is one, and hiding it would cost its place."""
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "/root/x"))
    result = atoll("pull", "x")
    assert result.code == 1
    assert result.err.startswith("error: /root/x: permission denied\n")
    fail_with(monkeypatch, TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        atoll("pull", "x")


def test_a_missing_extra_names_what_to_install(atoll, monkeypatch):
    """Without the hub's database library the way out is one pip command, not an ImportError."""
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'sqlalchemy'", name="sqlalchemy.orm"))
    assert 'pip install "atoll[hub]"' in atoll("pull", "x").err
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'other'", name="other"))
    with pytest.raises(ModuleNotFoundError):
        atoll("pull", "x")


def test_debugging_shows_where_an_error_came_from(atoll, monkeypatch):
    """ATOLL_DEBUG is how a user gets a traceback for a report."""
    fail_with(monkeypatch, DataError("bad"))
    monkeypatch.setenv("ATOLL_DEBUG", "1")
    with pytest.raises(DataError):
        atoll("pull", "x")


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["train", "x.yaml", "--nonsense"], ["generate"], ["generate", "hi", "--field", "x"]])
def test_wrong_usage_ends_with_2_and_says_so_on_stderr(atoll, arguments):
    """Scripts tell a wrong command line from a failed job."""
    result = atoll(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: atoll" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
def test_a_reader_that_goes_away_is_no_error():
    """`atoll schema | head -1` must not end in a BrokenPipeError."""
    command = f"{sys.executable} -m atoll.cli.main schema land | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_a_terminal_that_lacks_a_character_gets_an_answer_all_the_same():
    """An answer in Greek on an ASCII terminal must not be an encoding error."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "atoll.cli.main", "tasks", "dates", "--rows", "1"], capture_output=True, text=True, check=True, env=environment
    )
    assert "\\u27e6" in done.stdout  # ⟦


def test_threads_are_set_before_torch_is_imported(tmp_path):
    """torch reads the number once: set later, the option would do nothing."""
    script = "import os; from atoll.cli.main import run; run(['--threads', '3', 'tasks', '--json']); print(os.environ['OMP_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    listed, _, threads = done.stdout.rpartition("]\n")
    assert threads == "3\n"
    assert json.loads(listed + "]")
