"""Cross-validation: who sees what, means and errors by hand, and how it ends early."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from atoll.compose.cross_validation import Finished, Fold, cross_validated
from atoll.errors import Interrupted, TrainingError

FOLDS = [(0, 3), (1, 4), (2,)]


def known(fold: Fold) -> Tensor:
    """Example e has the loss e."""
    return torch.tensor([float(example) for example in fold.held_out])


def worse(fold: Fold) -> Tensor:
    return known(fold) + 1.0 + fold.number


def test_every_example_is_held_out_once_from_what_is_measured_on_it() -> None:
    """The one promise: a contestant learns from the other folds only."""
    seen: list[Fold] = []
    found = cross_validated({"a": lambda fold: (seen.append(fold), known(fold))[1]}, FOLDS)
    assert [(fold.learn, fold.held_out) for fold in seen] == [((1, 2, 4), (0, 3)), ((0, 2, 3), (1, 4)), ((0, 1, 3, 4), (2,))]
    assert found.results["a"].losses.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found.folds == tuple(FOLDS)
    assert not found.stopped


def test_means_and_errors_by_hand() -> None:
    """The mean is over examples; its error over folds, whose examples share what was learned. Gains are paired, so a hard fold is no noise."""
    found = cross_validated({"a": known, "b": worse}, FOLDS)
    assert found.results["a"].mean == 2.0
    assert found.results["a"].folds == (1.5, 2.5, 2.0)
    assert found.results["a"].stderr == pytest.approx(0.5 / math.sqrt(3))
    mean, stderr = found.gain("a", over="b")
    assert mean == pytest.approx((1 + 1 + 2 + 2 + 3) / 5)
    assert stderr == pytest.approx(1.0 / math.sqrt(3))
    assert cross_validated({"a": known}, [(0, 1)]).results["a"].stderr is None, "one fold says nothing about its error"


def test_a_contestant_that_fails_is_out_and_the_others_go_on() -> None:
    """One training that diverges must not take the table with it; nor may its finished folds be compared with others' means."""

    def diverges(fold: Fold) -> Tensor:
        if fold.number == 1:
            raise TrainingError("the loss is nan: training diverged")
        return known(fold)

    found = cross_validated({"a": known, "b": diverges}, FOLDS)
    assert list(found.results) == ["a"]
    assert found.failures == {"b": "the loss is nan: training diverged"}
    assert found.results["a"].mean == 2.0
    assert not found.stopped


@pytest.mark.parametrize("how", ["asked", "raised"])
def test_stopped_it_returns_the_folds_that_all_contestants_finished(how: str) -> None:
    """Whatever is returned compares all on the same examples: half a fold would not."""
    calls: list[int] = []

    def stops(fold: Fold) -> Tensor:
        calls.append(fold.number)
        if fold.number == 1 and how == "raised":
            raise Interrupted("stopped within")
        return known(fold)

    found = cross_validated({"a": stops, "b": worse}, FOLDS, stop_asked=lambda: how == "asked" and len(calls) == 2)
    assert calls == [0, 1]
    assert found.stopped
    assert found.folds == ((0, 3),)
    assert found.results["a"].mean == 1.5
    assert found.results["b"].folds == (2.5,)
    assert found.results["a"].losses.isnan().tolist() == [False, True, True, False, True]
    nothing = cross_validated({"a": known}, FOLDS, stop_asked=lambda: True)
    assert nothing.stopped
    assert nothing.results == {}
    assert nothing.folds == ()


def test_ctrl_c_keeps_the_finished_folds() -> None:
    """The first one asks; what is under way ends by itself or at the next contestant, and nothing is torn."""
    later: list[int] = []

    def interrupts(fold: Fold) -> Tensor:
        if fold.number == 1:
            signal.raise_signal(signal.SIGINT)
        return known(fold)

    found = cross_validated({"a": interrupts, "b": lambda fold: (later.append(fold.number), known(fold))[1]}, FOLDS)
    assert found.stopped
    assert found.folds == (FOLDS[0],)
    assert later == [0]


def test_what_was_kept_is_gone_on_with() -> None:
    """A second run takes the finished folds as they are, and the same comes out, failures too."""

    def diverges(fold: Fold) -> Tensor:
        raise TrainingError("the loss is nan: training diverged")

    contestants, kept, calls = {"a": known, "b": worse, "c": diverges}, list[Sequence[Finished]](), list[int]()
    whole = cross_validated(contestants, FOLDS, keep=lambda done: kept.append(list(done)))
    assert [len(done) for done in kept] == [1, 2, 3]
    again = cross_validated({**contestants, "a": lambda fold: (calls.append(fold.number), known(fold))[1]}, FOLDS, earlier=kept[1])
    assert calls == [2] and again.to_json() == whole.to_json() and again.failures == whole.failures
    assert again.gain("a", over="b") == whole.gain("a", over="b")


def test_progress_names_fold_and_contestant() -> None:
    told: list[tuple[str, int, int]] = []
    cross_validated({"a": known, "b": worse}, [(0,), (1,)], report=lambda *seen: told.append(seen))
    assert told == [("fold 1: a", 0, 4), ("fold 1: b", 1, 4), ("fold 2: a", 2, 4), ("fold 2: b", 3, 4), ("cross-validation", 4, 4)]


def test_its_json_is_the_same_for_the_same_numbers() -> None:
    """It goes into manifests, whose digest is the version: no times in it, and nothing that JSON cannot say."""
    first, second = (cross_validated({"a": known, "b": worse}, FOLDS).to_json() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["results"]["a"] == {"loss": 2.0, "stderr": pytest.approx(0.2886751), "folds": [1.5, 2.5, 2.0]}
    stopped = cross_validated({"a": known}, FOLDS, stop_asked=lambda: True).to_json()
    assert json.loads(json.dumps(stopped, allow_nan=False)) == {"folds": [], "stopped": True, "results": {}, "failures": {}}
