"""config_sweep.py: a sweep becomes the trainings that it says, named by their values, and a wrong one is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.config import is_valid_name
from atoll.config_file import load_config
from atoll.config_sweep import LoadedSweep, is_sweep, load_sweep
from atoll.errors import ConfigError

HEAD = "base: tiny\nname: tickets\ndata: builtin:dates\n"


def load(tmp_path: Path, sweep: str, head: str = HEAD, **overrides: Any) -> LoadedSweep:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{head}sweep:\n" + "".join(f"  {line}\n" for line in sweep.splitlines()))
    return load_sweep(path, overrides)


def test_lists_are_a_grid_in_the_order_of_the_file(tmp_path: Path) -> None:
    """The last key changes fastest; each point is a whole configuration."""
    loaded = load(tmp_path, "adapter.r: [4, 8]\ntrainer.learning_rate: [1e-4, 5e-4]")
    assert [point.name for point in loaded.points] == [
        "tickets-r_4-learning_rate_0.0001",
        "tickets-r_4-learning_rate_0.0005",
        "tickets-r_8-learning_rate_0.0001",
        "tickets-r_8-learning_rate_0.0005",
    ]
    config = loaded.points[2].loaded.config
    assert config.model_dump()["adapter"]["r"] == 8 and config.trainer.learning_rate == 1e-4 and config.name == loaded.points[2].name
    assert loaded.name == "tickets" and loaded.keys == ("adapter.r", "trainer.learning_rate") and loaded.best_by == "validation_loss"


def test_samples_of_a_grid_are_different_points_and_of_the_seed(tmp_path: Path) -> None:
    """The same seed draws the same; more samples than points are all points."""
    text = "adapter.r: [1, 2, 3, 4]\ntrainer.seed: [0, 1, 2]\nsamples: 5\nseed: 3"
    names = [point.name for point in load(tmp_path, text).points]
    assert len(set(names)) == 5 and names == [point.name for point in load(tmp_path, text).points]
    assert names != [point.name for point in load(tmp_path, text, **{"sweep.seed": 4}).points]
    assert len(load(tmp_path, text, **{"sweep.samples": 50}).points) == 12


def test_ranges_are_drawn_evenly_or_in_their_logarithm(tmp_path: Path) -> None:
    """Whole numbers where both ends are; never outside."""
    text = "adapter.r: {min: 2, max: 6}\ntrainer.learning_rate: {min: 1e-5, max: 1e-3, log: true}\ntrainer.epochs: [1, 2]\nsamples: 40"
    values = [point.values for point in load(tmp_path, text).points]
    ranks, rates = [value["adapter.r"] for value in values], sorted(value["trainer.learning_rate"] for value in values)
    assert len(values) == 40 and set(ranks) <= {2, 3, 4, 5, 6} and all(isinstance(rank, int) for rank in ranks)
    assert 1e-5 <= rates[0] < rates[20] < 4e-4 and rates[-1] <= 1e-3  # evenly drawn, the middle one would be near 5e-4


def test_names_tell_all_points_apart_and_are_names(tmp_path: Path) -> None:
    """Long ones and equal ones get a hash; keys that end alike keep more of themselves; the hub could not take others."""
    loaded = load(tmp_path, "adapter.target_modules: [[q_proj, v_proj], all-linear]\nquantization: [null, {bits: 4}]")
    assert [point.name for point in loaded.points][:2] == [
        "tickets-target_modules_q_proj.v_proj-quantization_none",
        "tickets-target_modules_q_proj.v_proj-quantization_bits_4",
    ]
    loaded = load(tmp_path, "data.seed: [1]\ntrainer.seed: [2]")
    assert loaded.points[0].name == "tickets-data_seed_1-trainer_seed_2"
    odd = load(tmp_path, f"data.instruction: [{'a' * 120}, {'b' * 120}, 'one..two', 'one .two', 'One .two']")
    names = [point.name for point in odd.points]
    assert len({name.casefold() for name in names}) == 5 and all(map(is_valid_name, names))


def test_a_file_without_a_name_is_called_after_its_data(tmp_path: Path) -> None:
    """As the adapter of a plain training is."""
    assert load(tmp_path, "adapter.r: [4]", "base: tiny\ndata: builtin:dates\n").points[0].name == "dates-r_4"
    assert load(tmp_path, "adapter.r: [4]", name="mine").points[0].name == "mine-r_4"


@pytest.mark.parametrize(
    ("sweep", "message", "hint"),
    [
        ("adapter.rr: [4]", r"sweep.yaml:5: sweep.adapter.rr is not a key of a training file", "did you mean adapter.r?"),
        ("learning_rate: [1e-4]", "sweep.learning_rate is not a key", "did you mean trainer.learning_rate?"),
        ("sample: 3\nadapter.r: [4]", "sweep.sample is not a key", "did you mean samples?"),
        ("adapter.r: 4", "sweep.adapter.r is a number, expected a list", "outside the sweep"),
        ("adapter.r: []", "is an empty list", "values to try"),
        ("adapter.r: [4, 8, 4]", "has 4 more than once", "keep one"),
        ("trainer: {epochs: [1, 2]}", "sweep.trainer is a mapping", r"trainer.epochs: \[...\]"),
        ("trainer.learning_rate: {min: 1e-5, max: 1e-3}", "is a range, and nothing says how many", "samples: 10"),
        ("trainer.learning_rate: {min: 0, max: 1, log: true}\nsamples: 2", "is no range", "1e-5"),
        ("trainer.learning_rate: {min: 1, max: 0.5}\nsamples: 2", "is no range", "1e-5"),
        ("adapter.r: [4, 0]", r"sweep.yaml:5: adapter.r is 0: must be at least 1", "Rank"),
        ("name: [a, b]", "names follow from the values", "once"),
        ("samples: 3", "names no key", "adapter.r"),
        ("samples: 0\nadapter.r: [4]", "sweep.samples is 0", ""),
        ("best_by: metrik\nadapter.r: [4]", "expected validation_loss or metric", "did you mean metric?"),
        ("adapter: [{r: 4}]\nadapter.r: [4]", "inside another swept key", ""),
        (f"trainer.seed: {list(range(40))}\nadapter.r: {list(range(1, 41))}", "has 1600 trainings", "samples"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(tmp_path: Path, sweep: str, message: str, hint: str) -> None:
    """With the line, and what was probably meant, before anything is loaded."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, sweep)
    import re

    assert re.search(hint, caught.value.hint or "")


def test_a_sweep_is_no_single_training(tmp_path: Path) -> None:
    """Whoever loads it as one is told, instead of training its first point."""
    loaded = load(tmp_path, "adapter.r: [4]")
    assert is_sweep(loaded.path)
    with pytest.raises(ConfigError, match="is a sweep"):
        load_config(loaded.path, "train")


def test_the_example_is_a_sweep() -> None:
    """Six trainings of a built-in task."""
    loaded = load_sweep(Path(__file__).parents[1] / "examples" / "sweep.yaml")
    assert len(loaded.points) == 6 and loaded.name == "support_intents" and loaded.warnings == ()


def test_paths_among_the_values_start_at_the_file(tmp_path: Path) -> None:
    """As they do outside the sweep."""
    loaded = load(tmp_path, "data.path: [one.jsonl, two.jsonl]", "base: tiny\nname: a\ndata: x.jsonl\n")
    assert [point.loaded.config.data.path for point in loaded.points] == ["one.jsonl", "two.jsonl"] and loaded.root == tmp_path


@pytest.mark.parametrize("given", ["adapter.r", "adapter", "adapter.r.x"])
def test_a_value_for_a_swept_key_is_refused(given: str, tmp_path: Path) -> None:
    """It would be lost in silence: the sweep's own values stand in every training."""
    with pytest.raises(ConfigError, match="sweeps over it") as refused:
        load(tmp_path, "adapter.r: [4, 8]", **{given: 32})
    assert "sweep.adapter" in refused.value.hint
