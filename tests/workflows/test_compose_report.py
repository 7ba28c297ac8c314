"""What the figures say: gains and their errors, and the sentences that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from atoll.errors import DataError
from atoll.eval.score import Score
from atoll.workflows.compose_advice import advice
from atoll.workflows.compose_report import Gain, Line, Listed, Report, options_gain, score_gain, scores_stderr


def score(values: list[float], options: float | None = None) -> Score:
    """A score of accuracy with these values of rows."""
    n = len(values)
    facts: dict[str, Any] = {"task": "t", "task_version": "v", "metric": "accuracy", "metric_version": 1, "match": None, "n": n}
    facts |= {"value": sum(values) / n, "stderr": 0.1, "failures": 0, "model": "m", "kind": "composed", "digest": "d", "prompt_style": "plain"}
    facts |= {"prompt_hash": "p", "rows_hash": "r", "prompts_cut": 0, "max_new_tokens": 4, "stop": ()}
    return Score(**facts, options_value=options, options_stderr=0.05, evidence=tuple((value,) for value in values))


def test_a_gain_is_paired_by_rows() -> None:
    """Rows that are hard for both cancel: equal answers but for one leave the error of that one."""
    mine, other = [score([1, 1, 0, 0, 1, 1, 0, 0])], [score([1, 0, 0, 0, 1, 1, 0, 0])]
    gain = score_gain(mine, other)
    assert gain.value == pytest.approx(0.125)
    assert gain.stderr == pytest.approx(0.125)  # sd of (0, 1, 0, 0, …) over sqrt(8)
    assert score_gain(mine, mine) == Gain(0.0, 0.0) and not score_gain(mine, mine).is_clear


def test_the_spread_over_seeds_is_part_of_a_gains_error() -> None:
    """Three seeds that gain 0, 0.5 and 1 do not prove a gain of a half."""
    base = [score([0, 0, 0, 0])] * 3
    mine = [score([0, 0, 0, 0]), score([1, 1, 0, 0]), score([1, 1, 1, 1])]
    gain = score_gain(mine, base)
    assert gain.value == pytest.approx(0.5) and gain.stderr is not None and gain.stderr > 0.28
    assert scores_stderr(mine) == pytest.approx(0.096225, abs=1e-5)


def test_options_are_compared_where_labels_are_closed() -> None:
    assert options_gain([score([1, 0])], [score([1, 0])]) is None
    gain = options_gain([score([1, 0], 0.75)], [score([1, 0], 0.5)])
    assert gain is not None and gain.value == pytest.approx(0.25) and gain.stderr == pytest.approx(0.05 * 2**0.5)


def test_few_folds_need_a_larger_gain() -> None:
    """Two standard errors over three folds are nothing: Student's t has 2 degrees of freedom there."""
    assert Gain(0.25, 0.1).is_clear and not Gain.over_folds(0.25, 0.1, 3).is_clear and not Gain.over_folds(0.25, 0.1, 5).is_clear
    assert Gain.over_folds(0.25, 0.1, 20).is_clear and not Gain(1.0, None).is_clear


def report(
    versus: dict[str, tuple[float, float]],
    *,
    measure: str = "score",
    options: tuple[float, float] | None = None,
    over_base: dict[str, tuple[float, float]] | None = None,
    rows: int = 100,
    scores: tuple[float, ...] = (0.7, 0.8),
    option: float = 0.55,
) -> Report:
    """A report in which the composition gains so much, with such an error, over each contestant, and these over the base."""
    gains = {name: Gain(*gain) for name, gain in (over_base or {}).items()}
    lines = [
        Line(name, what="intents@1" if name == "best single" else "", seconds=12.0, options=(0.5,), loss=2.0, loss_stderr=0.1, gain=gains.get(name))
        for name in versus
    ]
    return Report(
        task="t",
        base="tiny",
        metric="accuracy",
        examples=5,
        test_rows=rows,
        candidates=9,
        method="gradient",
        form="cat",
        rank=8,
        seeds=(0, 1),
        seed=1,
        chosen_by="held-out loss of its search",
        search={"value": 1.0, "held_out": 1.1, "evaluations": 120.0, "seconds": 2.0, "stopped_by": "budget"},
        shortlist=(Listed("intents@1", "d", 0.5, 1.0, None, 0.2),),
        lines=(*lines, Line("composed", scores=scores, options=(option,), gain=Gain(0.2, 0.01), loss=1.0, loss_stderr=0.1)),
        measure=measure,
        versus={name: Gain(*gain) for name, gain in versus.items()},
        options_gain=None if options is None else Gain(*options),
        took={"search": 2.0},
    )


CLEAR, EVEN, WORSE = (0.2, 0.05), (0.02, 0.05), (-0.2, 0.05)
ALL = dict.fromkeys(("base", "uniform", "random adapters", "k-shot LoRA", "in-context"), CLEAR)
SAID: dict[str, tuple[Report, list[str]]] = {
    "it beats everything": (report({**ALL, "best single": (0.15, 0.05)}), ["Use it", "intents@1 (difference +0.150 ± 0.050)"]),
    "it beats what was measured": (
        report({"base": CLEAR, "majority": CLEAR}),
        ["better than all that was measured", "Not measured: best single, uniform, random adapters, k-shot LoRA, in-context"],
    ),
    "no better than the base": (report({"base": EVEN, "best single": EVEN}), ["cannot tell the composition from the base", "give more examples"]),
    "no better than the base, one adapter is": (
        report({"base": EVEN, "best single": EVEN}, over_base={"best single": CLEAR}),
        ["cannot tell the composition from the base", "intents@1 alone is better (over the base: difference +0.200 ± 0.050): use it"],
    ),
    "worse than the base": (report({"base": WORSE, "uniform": WORSE}), ["worse than the base", "use the base as it is"]),
    "one adapter does as well": (report({"base": CLEAR, "best single": EVEN}), ["better than the base", "intents@1 alone does as well, as far as"]),
    "one adapter is better": (report({"base": CLEAR, "best single": WORSE}), ["intents@1 alone is better (difference -0.200 ± 0.050): use it"]),
    "random adapters do as well": (report({"base": CLEAR, "random adapters": EVEN}), ["that it helps what these adapters know is not shown"]),
    "equal weights do as well": (report({"base": CLEAR, "uniform": EVEN}), ["Equal weights do as well"]),
    "training is better": (report({"base": CLEAR, "k-shot LoRA": WORSE}), ["train instead, made in 12 s."]),
    "examples in the prompt are better": (report({"base": EVEN, "in-context": WORSE}, over_base={"in-context": CLEAR}), ["put them there"]),
    "a constant answer does as well": (report({"base": CLEAR, "majority": EVEN}), ["most common answer does as well"]),
    "only the form has changed": (report({"base": CLEAR}, options=EVEN), ["in the form of the answers", "0.500 against 0.550"]),
    "knowledge is lost": (report({"base": CLEAR}, options=WORSE, option=0.3), ["worse than the base (0.500 against 0.300)", "lost some"]),
    "it knows more than it writes": (report({"base": CLEAR}, options=CLEAR, option=0.95), ["knows more than it writes", "95%", "75%"]),
    "by loss": (report({"base": CLEAR, "uniform": EVEN}, measure="loss"), ["held-out loss less by 0.200 ± 0.050"]),
    "too few rows": (report({"base": CLEAR}, rows=2), ["There are 2 test rows, too few", "1.000 nats a label token, the base 2.000"]),
    "nothing is right": (report({"base": (0.0, 0.0)}, scores=(0.0, 0.0)), ["single test row right", "the base 2.000 (± 0.100 and 0.100)"]),
}


@pytest.mark.parametrize("kind", SAID)
def test_the_advice_follows_from_the_figures(kind: str) -> None:
    found, words = SAID[kind]
    said = " ".join(advice(found))
    for each in words:
        assert each in said
    assert "uniform" not in said or kind in ("it beats what was measured", "equal weights do as well")
    assert ("Use it" in said) == (kind == "it beats everything")


@pytest.mark.parametrize(
    ("examples", "known"), [(5, "56 % against 25 %"), (14, "56 % against 25 %"), (15, "43 % against 35 %"), (100, "50 % against 39 %")]
)
def test_without_figures_the_advice_is_to_compare(examples: int, known: str) -> None:
    """And what is known of compositions of about so many examples, which with many speaks for training."""
    [said] = advice(replace(report({}), examples=examples))
    assert said.startswith("Nothing was compared") and known in said and "with controls" in said


def test_a_report_comes_back_from_its_file() -> None:
    """What a server or a later run reads is what was written."""
    found = report({"base": CLEAR, "uniform": EVEN}, options=EVEN)
    assert Report.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    with pytest.raises(DataError, match="expected form"):
        Report.from_json({"task": "t"})


def test_figures_for_the_manifest_have_no_times() -> None:
    """The same composition on a slower machine is the same version."""
    assert report({"base": CLEAR}).figures() == {
        "base": {"loss": 2.0, "loss_stderr": 0.1, "options": [0.5]},
        "composed": {"loss": 1.0, "loss_stderr": 0.1, "scores": [0.7, 0.8], "options": [0.55]},
    }
