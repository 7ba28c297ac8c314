"""The settings of a composition: what is accepted, what is refused, and how files and options become them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.compose.search import METHODS as SEARCHED
from atoll.config_compose import METHODS, ComposeConfig, ComposeSettings
from atoll.config_file import load_compose, load_config, to_yaml
from atoll.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_the_methods_are_those_of_the_search() -> None:
    """They are listed twice, since settings know nothing of what carries them out."""
    assert METHODS == SEARCHED


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method that is misspelt": ({"method": "gradients"}, "did you mean gradient"),
    "nevergrad without a name": ({"method": "nevergrad"}, "did you mean nevergrad:NGOpt"),
    "a name behind a method without one": ({"method": "cmaes"}, "must be one of"),
    "bounds the wrong way round": ({"bounds": [1, -1]}, "a smaller and a larger"),
    "no adapters": ({"top_k": 0}, "at least 1"),
    "no time": ({"time_s": 0}, "above 0"),
    "everything held out": ({"hold_out": 1}, "below 1"),
    "a key that is not known": ({"topk": 3}, "did you mean compose.top_k"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_setting_is_one_sentence_with_a_way_out(kind: str) -> None:
    changes, words = REFUSED[kind]
    with pytest.raises(ConfigError) as caught:
        ComposeConfig(base="tiny", compose=changes)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_folds_are_for_searches_by_gradient() -> None:
    assert ComposeSettings().takes_folds and ComposeSettings(method="gradient_per_layer").takes_folds
    for without in ({"method": "cma"}, {"hold_out": 0.2}):
        assert not ComposeSettings(**without).takes_folds


def test_all_rows_of_a_single_file_are_examples_unless_ratios_say_otherwise() -> None:
    """Whoever has five rows wants none of them to become a test set."""
    assert ComposeConfig(base="tiny", data="few.jsonl").require_data().ratios == (1.0, 0.0, 0.0)
    halves = {"path": "few.jsonl", "ratios": [0.5, 0, 0.5]}
    assert ComposeConfig(base="tiny", data=halves).require_data().ratios == (0.5, 0.0, 0.5)
    with pytest.raises(ConfigError, match="no examples"):
        ComposeConfig(base="tiny").require_data()


def test_the_example_file_is_read_and_written_back(tmp_path: Path) -> None:
    loaded = load_config(ROOT / "examples" / "compose.yaml", "compose")
    assert loaded.config.compose.k == 10 and loaded.config.data.label_set and (loaded.root / str(loaded.config.data.path)).is_file()
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(loaded.config), encoding="utf-8")
    assert load_config(again).config == loaded.config


def test_options_alone_are_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file, places in messages are the options'; files are below the working directory."""
    monkeypatch.chdir(tmp_path)
    loaded = load_compose({"base": "tiny", "data.train": "few.jsonl", "compose.top_k": 3, "compose.adapters": ["a", "b@2"]})
    assert loaded.config.data.train == str(tmp_path / "few.jsonl") and loaded.config.compose.adapters == ("a", "b@2")
    with pytest.raises(ConfigError, match=r"--set compose\.method: compose\.method is 'magic'"):
        load_compose({"base": "tiny", "compose.method": "magic"})
    with pytest.raises(ConfigError, match=r"^--method: compose\.method is 'magic'"):
        load_compose({"base": "tiny", "compose.method": "magic"}, {"compose.method": "--method"})


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("base: tiny\ncompose: {k: 5}\n", "train", "atoll compose"),
        ("base: tiny\ncompose: {k: 5}\n", "land", "atoll compose"),
        ("base: tiny\ntrainer: {epochs: 1}\n", "compose", "atoll train"),
        ("base: tiny\ntasks: [builtin:dates]\n", "compose", "atoll land"),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_command(tmp_path: Path, text: str, kind: Any, hint: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="expected a") as caught:
        load_config(file, kind)
    assert hint in caught.value.hint


def test_a_file_without_a_compose_section_is_one_when_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("base: tiny\ndata: {train: few.jsonl}\n")
    assert isinstance(load_config(file, "compose").config, ComposeConfig)
