"""The composing bench: its arithmetic, and what it makes of lorahub's candidates. Nothing is timed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/compose.py and what it imports from its folder, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import compose

    yield compose
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("compose", "peers"):
            del sys.modules[name]


def test_the_help_text_works_without_any_peer() -> None:
    result = subprocess.run([sys.executable, str(BENCH / "compose.py"), "--help"], capture_output=True, text=True, check=True)
    assert "--lorahub" in result.stdout and "--t5" in result.stdout


def test_lorahubs_last_module_is_what_its_candidate_before_left_there(bench: Any) -> None:
    """The first candidate is zero, so the last module is gone then; later its weight repeats what stood in the model."""
    candidates = [[0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 2.0]]
    assert bench.effective(candidates) == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.25, 1.0, 0.0], [0.5, 2.0, 0.0]]
    assert bench.effective([[1.0, 0.5]]) == [[1.0, 0.5]], "before the first candidate the last module is still its own"


def test_losses_are_compared_where_weights_are_what_a_search_may_give(bench: Any) -> None:
    assert bench.largest_difference([1.0, 9.0], [1.5, 2.0], [[0.5, -1.5], [0.0, 7.0]]) == 0.5


def test_outputs_are_of_one_length_and_seeds_give_other_examples(bench: Any) -> None:
    """A mean over examples is then a mean over tokens, which is what lorahub's loss is."""
    inputs, outputs = bench.make_examples(0)
    assert len(inputs) == len(outputs) == bench.NUM_EXAMPLES
    assert {len(text) for text in outputs} == {bench.LABEL_TOKENS - 1}
    assert bench.make_examples(1) != (inputs, outputs) == bench.make_examples(0)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(bench: Any) -> None:
    found = {"lorahub": [8.0, 10.0, 30.0], "atoll": [1.0, 2.0, 3.0], "short": [1.0]}
    assert bench.ratio(found, "lorahub", "atoll") == 8.0
    assert bench.ratio(found, "lorahub", "short") is None, "a contestant that failed in a round has no ratio"
    assert bench.ratio(found, "lorahub", "absent") is None


def test_of_several_variants_the_best_is_claimed_and_all_are_told(bench: Any) -> None:
    found = {"lorahub_evaluation_s": [1.0], "atoll_product_float32_evaluation_s": [0.5], "atoll_product_bfloat16_evaluation_s": [0.125]}
    ratios, every = bench.summarise(found)
    assert ratios == {"evaluation_vs_lorahub": 8.0, "time_to_loss_vs_lorahub": None, "time_to_best_vs_lorahub": None, "evaluation_vs_naive": None}
    assert every == {"evaluation_vs_lorahub_product_float32": 2.0, "evaluation_vs_lorahub_product_bfloat16": 8.0}
    assert bench.notes_of("evaluation_vs_lorahub", every) == "product_bfloat16 8.00, product_float32 2.00"
