"""What a composition says of itself is what it is: compressed adapters are measured, layers shown, leaks told, late publishing complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import publish, random_adapter
from tests.compose.scenes import strong
from tests.workflows.scenes import config_of, rows, write_rows

from atoll.compose.objective import FewShot
from atoll.compose.pool import Pool
from atoll.compose.result import losses_of
from atoll.compose.search import Found
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter
from atoll.model.base import Base
from atoll.workflows import compose as compose_module
from atoll.workflows import compose_and_publish
from atoll.workflows import compose_controls as controls_module
from atoll.workflows import compose_search as search_module
from atoll.workflows.compose_draws import encoded
from atoll.workflows.compose_plan import plan_composition

PLAIN = {"folds": None, "seeds": 1}


def test_held_out_losses_are_those_of_the_compressed_adapter(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """With a rank, the table is about what is published; and what compressing kept stands in the report."""
    settings = {"method": "uniform", **PLAIN}
    whole = compose_and_publish(config_of(base, examples, compose=settings), out=tmp_path / "a", hub=hub, publish=False).report
    small = compose_and_publish(config_of(base, examples, compose={**settings, "rank": 1}), out=tmp_path / "b", hub=hub, publish=False).report
    assert whole.energy_kept == 1 and 0 < small.energy_kept < 1
    lines = [report.line("composed") for report in (whole, small)]
    assert all(line is not None for line in lines) and lines[0].loss != lines[1].loss  # type: ignore[union-attr]
    assert whole.line("uniform").loss == small.line("uniform").loss  # type: ignore[union-attr]


def test_losses_of_a_composition_are_those_of_the_adapter_that_is_made(base: Base, hub: Hub, examples: Path) -> None:
    plan = plan_composition(config_of(base, examples), hub, base=base)
    adapters, few = [candidate.load() for candidate in plan.candidates], plan.draws[0].few
    pool, weights = Pool.of(adapters, base.decoder), torch.tensor([0.5, -1.0, 0.7, 0.2])
    exact = losses_of(pool, weights, base.decoder, few.rows)
    torch.testing.assert_close(losses_of(pool, weights, base.decoder, few.rows, rank=64), exact)
    assert not torch.allclose(losses_of(pool, weights, base.decoder, few.rows, rank=1), exact, atol=1e-6, rtol=0)


def test_weights_by_layer_are_listed_and_those_of_absent_layers_are_nought(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """An adapter of two layers has two weights, of which the mean is shown; the listing has them as the manifest has."""
    partial = random_adapter(base.decoder, 2, seed=8, layers_to_transform=(0, 2))
    publish(hub, partial, "partial", tmp_path / "made", base=base.describe())
    settings = {"method": "gradient_per_layer", "adapters": ["partial", "sizes"], **PLAIN}
    outcome = compose_and_publish(config_of(base, examples, compose=settings, controls=False), out=tmp_path / "out", hub=hub)
    listed = {one.name: one for one in outcome.report.shortlist}
    own, whole = listed["partial@1"], listed["sizes@1"]
    assert own.layers == (0, 2) and own.layer_weights is not None and own.layer_weights[1] == 0 and whole.layers is None
    assert own.by_layer is not None and len(own.by_layer) == 2 and own.weight == pytest.approx(sum(own.by_layer) / 2)
    parents = {parent["name"]: parent for parent in read_adapter(outcome.adapter_folder).manifest["parents"]}
    assert parents["partial@1"]["layer_weights"] == list(own.layer_weights) and parents["partial@1"]["layers"] == [0, 2]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["shortlist"][0]["layer_weights"] is not None
    page = hub.show("warmth").markdown()
    assert "mean weight" in page and " … " in page and "Each layer has its own weight" in page
    assert "## Composition" in page and "gradient\\_per\\_layer" in page


def test_a_result_that_is_published_later_brings_its_score_and_its_run(
    base: Base, hub: Hub, examples: Path, tests_file: Path, tmp_path: Path
) -> None:
    config = config_of(base, {"train": str(examples), "test": str(tests_file)}, controls=False)
    first = compose_and_publish(config, out=tmp_path / "out", hub=hub, publish=False)
    assert first.score is not None and hub.runs() == ()
    for _ in range(2):
        found = compose_and_publish(config, out=tmp_path / "out", hub=hub)
        assert found.reused and found.version is not None
        assert [score.value for score in hub.scores(found.version.digest, history=True)] == [first.score["value"]]
        assert [(run.status, run.cost is not None) for run in hub.runs(digest=found.version.digest)] == [("finished", True)]


def test_test_rows_that_are_examples_are_told(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "test.jsonl", [*rows(2), *rows(4, start=90)])
    plan = plan_composition(config_of(base, {"train": str(examples), "test": str(same)}), hub, base=base)
    assert any("2 of 6 test rows equal examples" in warning and "test.jsonl:1" in warning for warning in plan.warnings)
    clean = write_rows(tmp_path / "clean.jsonl", rows(6, start=90))
    plan = plan_composition(config_of(base, {"train": str(examples), "test": str(clean)}), hub, base=base)
    assert not any("equal" in warning for warning in plan.warnings)


def test_equal_inputs_are_held_out_together(base: Base, hub: Hub, tmp_path: Path) -> None:
    twice = write_rows(tmp_path / "few.jsonl", [*rows(3), *rows(3)])
    plan = plan_composition(config_of(base, twice), hub, base=base)
    few, _ = encoded(plan.draws[0].examples, plan.data, base)
    for num in (2, 3, 5):
        found = few.folds(num, seed=1)
        assert len(found) == min(num, 3) and sorted(index for fold in found for index in fold) == list(range(6))
        assert all(index + 3 in fold for fold in found for index in fold if index < 3)
    apart = FewShot(few.rows[:3])
    assert sorted(map(len, apart.folds(2, seed=1))) == [1, 2]


def test_examples_that_are_all_alike_cannot_be_held_out_and_are_told(base: Base, hub: Hub, tmp_path: Path) -> None:
    """Held out they would have been seen, and every gain would look certain."""
    same = write_rows(tmp_path / "few.jsonl", rows(1) * 4)
    outcome = compose_and_publish(config_of(base, same), out=tmp_path / "out", hub=hub, publish=False)
    assert not outcome.report.versus and all(line.loss is None for line in outcome.report.lines)
    for words in (
        "no held-out losses: all examples have the same input",
        "of 4 examples all have the same input",
        "all 4 examples have the same answer",
    ):
        assert any(words in warning for warning in outcome.warnings), words


def test_what_ends_during_the_controls_leaves_the_adapter_and_the_finished_folds(
    base: Base, hub: Hub, examples: Path, tests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that is killed: nothing of ours runs any more. The same command goes on where it was."""
    config, out = config_of(base, {"train": str(examples), "test": str(tests_file)}), tmp_path / "out"

    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(compose_module, "test_scores", killed)
        with pytest.raises(RuntimeError, match="killed"):
            compose_and_publish(config, out=out, hub=hub)
    assert read_adapter(out / "adapter").manifest["composition"] and not (out / "result.json").exists()
    assert "ended during the controls" in json.loads((out / "report.json").read_text())["stopped"]
    earlier: list[int] = []
    original = controls_module.cross_validated

    def watched(*given: Any, **named: Any) -> Any:
        earlier.append(len(named["earlier"]))
        return original(*given, **named)

    monkeypatch.setattr(controls_module, "cross_validated", watched)
    outcome = compose_and_publish(config, out=out, hub=hub)
    assert earlier == [2] and not outcome.reused and not outcome.report.stopped and not (out / "held_out.json").exists()
    fresh = compose_and_publish(config, out=tmp_path / "fresh", hub=hub, publish=False)
    assert earlier == [2, 0] and [line.loss for line in fresh.report.lines] == pytest.approx([line.loss for line in outcome.report.lines])


def test_a_lora_below_a_composition_of_its_name_is_still_composed(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """Publishing under an old name must not take the old adapter out of the next composition."""
    publish(hub, random_adapter(base.decoder, 2, seed=31), "sounds", tmp_path / "made", base=base.describe(), kind="composed")
    plan = plan_composition(config_of(base, examples), hub, base=base)
    assert {version.ref for version in plan.versions} == {"colours@1", "shapes@1", "sizes@1", "sounds@1"}
    assert any("sounds@1 used instead" in warning for warning in plan.warnings)


def test_an_adapter_far_larger_than_the_others_is_told(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    publish(hub, strong(random_adapter(base.decoder, 2, seed=32), 40.0), "huge", tmp_path / "made", base=base.describe())
    config = config_of(base, examples, controls=False, compose={"top_k": 10})
    outcome = compose_and_publish(config, out=tmp_path / "out", hub=hub, publish=False)
    assert [warning for warning in outcome.warnings if "check its alpha" in warning and "the update of huge@1 is" in warning]


def test_weights_that_are_all_nought_are_told(base: Base, hub: Hub, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = search_module.search

    def nothing(*given: Any, **named: Any) -> Found:
        found = original(*given, **named)
        found.weights.zero_()
        return found

    monkeypatch.setattr(search_module, "search", nothing)
    outcome = compose_and_publish(config_of(base, examples, controls=False), out=tmp_path / "out", hub=hub, publish=False)
    assert any("all weights that were found are 0" in warning for warning in outcome.warnings)
