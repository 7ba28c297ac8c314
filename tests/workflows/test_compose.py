"""Composing end to end on a tiny base: what is made, published, kept, found again and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import decoder_of, publish, random_adapter
from tests.conftest import tiny_model
from tests.workflows.scenes import config_of, rows, write_rows

from atoll.errors import BaseMismatch, Busy, ConfigError, DataError, Interrupted, NameRefused, StorageError, TrainingError
from atoll.eval.score import read_outputs
from atoll.hub.store import Hub
from atoll.model import composed
from atoll.model.adapter_files import read_adapter
from atoll.model.base import Base
from atoll.model.fingerprint import tensor_shapes
from atoll.workflows import compose as compose_module
from atoll.workflows import compose_and_publish, locked
from atoll.workflows import compose_controls as controls_module
from atoll.workflows.compose_plan import plan_composition
from atoll.workflows.compose_report import Report

SHOWN = ["base", "majority", "best single", "uniform", "random adapters", "k-shot LoRA", "in-context", "composed"]
CONTESTANTS = ["base", "best single", "uniform", "random adapters", "k-shot LoRA", "in-context", "composed"]


@pytest.fixture
def both(examples: Path, tests_file: Path) -> dict[str, Any]:
    return {"train": str(examples), "test": str(tests_file)}


def test_the_result_is_an_ordinary_adapter_that_says_what_it_was_made_of(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """The published version is the weighted sum of its parents, fits its base exactly, and is asked in the words of the examples."""
    outcome = compose_and_publish(config_of(base, examples, controls=False, compose={"method": "gradient"}), out=tmp_path / "out", hub=hub)
    version = outcome.version
    assert version is not None and version.ref == "warmth@1" and version.kind == "composed" and not outcome.reused
    card = hub.show("warmth")
    assert [(parent.digest, parent.weight) for parent in card.parents] == [(part.digest, part.weight) for part in outcome.weights]
    assert hub.check_base("warmth", base.fingerprint.to_json(), tensor_shapes(base.path)).kind == "exact"
    made, parents = read_adapter(hub.path(version)), [read_adapter(hub.path(hub.resolve(part.name))) for part in outcome.weights]
    wanted = composed.cat(parents, [part.weight for part in outcome.weights])
    for site, module in wanted.modules.items():
        torch.testing.assert_close(made.modules[site].b @ made.modules[site].a, module.b @ module.a)
    manifest = made.manifest
    assert manifest["prompt"]["template"] == "{prompt}" and manifest["prompt"]["stop"] == ["\n"] and manifest["task"] == "warmth"
    assert manifest["composition"]["method"] == "gradient" and len(manifest["composition"]["examples"]) == 64
    assert manifest["composition"]["num_examples"] == 4
    assert [run.status for run in hub.runs(name="warmth", kind="compose")] == ["finished"]
    assert [run.digest for run in hub.runs(name="warmth", kind="compose")] == [version.digest]


def test_every_control_is_measured_on_examples_that_it_has_not_seen(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """Held-out losses of all contestants are in the report and in the manifest; without test rows there are no scores, and still advice."""
    outcome = compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub)
    report = outcome.report
    assert [line.name for line in report.lines] == SHOWN and "50% of the examples" in report.lines[1].note
    measured = [line for line in report.lines if line.name != "majority"]
    assert all(line.loss is not None and line.loss_stderr is not None and not line.scores for line in measured)
    assert report.measure == "loss" and set(report.versus) == set(CONTESTANTS) - {"composed"} and report.advice
    assert report.seeds == (0,) and report.examples == 4 and report.candidates == 4 and len(report.shortlist) == 3
    assert set(report.took) == {"reading", "ranking", "search", "cross-validation"}
    figures = read_adapter(outcome.adapter_folder).manifest["composition"]["controls"]
    assert set(figures) == set(CONTESTANTS) and figures["base"]["loss"] == report.lines[0].loss
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert Report.from_json(on_disk) == report


def test_test_rows_are_asked_of_all_contestants_of_every_seed(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    """One score a seed for each, with raw outputs kept; the ledger gets the base's and the published adapter's, not those of throw-away adapters."""
    config = config_of(base, both, compose={"k": 2, "seeds": 2})
    outcome = compose_and_publish(config, out=tmp_path / "out", hub=hub)
    report = outcome.report
    assert report.measure == "score" and report.test_rows == 10 and report.seeds == (0, 1) and report.metric == "accuracy"
    assert [line.name for line in report.lines if line.name != "majority"] == CONTESTANTS
    for line in report.lines:
        if line.name != "majority":
            assert len(line.scores) == len(line.options) == 2 and line.spread is not None, line
    outputs = list((tmp_path / "out" / "scores" / "warmth").glob("*.outputs.jsonl"))
    assert outputs and all(len(read_outputs(path)) == 10 for path in outputs)
    assert outcome.version is not None
    assert [score.task for score in hub.scores(outcome.version.digest)] == ["warmth"]
    assert {score.digest for score in hub.scores(task="warmth")} == {outcome.version.digest, base.fingerprint.digest}
    assert report.chosen_by == "loss, less the base's, on the examples that each leaves out"
    assert len(hub.list("warmth")) == 1


def test_without_controls_the_composition_is_still_scored_beside_the_base(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    report = compose_and_publish(config_of(base, both, controls=False), out=tmp_path / "out", hub=hub).report
    assert [line.name for line in report.lines if line.name != "majority"] == ["base", "composed"]
    assert report.seeds == (0,) and next(iter(report.versus)) == "base"


def test_the_same_inputs_are_found_again_and_changed_ones_are_not(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """Composing twice costs once; another example or another adapter in the hub is another composition."""
    config, out = config_of(base, examples, controls=False), tmp_path / "out"
    first = compose_and_publish(config, out=out, hub=hub)
    again = compose_and_publish(config, out=out, hub=hub)
    assert again.reused and again.version == first.version
    assert (again.report, again.weights, again.warnings) == (first.report, first.weights, first.warnings)
    write_rows(examples, rows(4, start=50))
    changed = compose_and_publish(config, out=out, hub=hub)
    assert not changed.reused and changed.version is not None and changed.version.number == 2
    publish(hub, random_adapter(base.decoder, 3, seed=77), "smells", tmp_path / "made", base=base.describe())
    assert not compose_and_publish(config, out=out, hub=hub).reused


def test_a_result_that_could_not_be_published_is_published_by_the_same_command(
    base: Base, hub: Hub, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is not done again for a hub that was busy; a damaged result is."""
    config, out = config_of(base, examples, controls=False), tmp_path / "out"

    def busy(*_: Any, **__: Any) -> None:
        raise Busy("the hub is in use by another Atoll process")

    with monkeypatch.context() as patch, pytest.raises(Busy):
        patch.setattr(Hub, "publish", busy)
        compose_and_publish(config, out=out, hub=hub)
    found = compose_and_publish(config, out=out, hub=hub)
    assert found.reused and found.version is not None and found.version.ref == "warmth@1"
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    again = compose_and_publish(config, out=out, hub=hub)
    assert not again.reused and again.version == found.version


def test_a_composition_that_is_not_published_leaves_the_hub_as_it_was(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    before = hub.list()
    outcome = compose_and_publish(config_of(base, both, controls=False), out=tmp_path / "out", hub=hub, publish=False)
    assert outcome.version is None and read_adapter(outcome.adapter_folder).manifest["kind"] == "composed"
    assert hub.list() == before and hub.runs() == () and hub.scores() == ()


def test_composed_and_reft_adapters_are_left_out_unless_they_are_named(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """What was composed before would bring its parents in twice; edits of hidden states have no weights to search."""
    found = compose_and_publish(config_of(base, examples, controls=False, compose={"top_k": 10}), out=tmp_path / "a", hub=hub, publish=False)
    assert {listed.name for listed in found.report.shortlist} == {"colours@1", "shapes@1", "sizes@1", "sounds@1"}
    assert any("1 adapter with ReFT edits left out" in warning for warning in found.warnings)
    some = {"adapters": ["mixture", "sizes"], "top_k": 10}
    named = compose_and_publish(config_of(base, examples, controls=False, compose=some), out=tmp_path / "b", hub=hub, publish=False)
    assert {listed.name for listed in named.report.shortlist} == {"mixture@1", "sizes@1"}
    less = {"exclude": ["Sizes@1", "smels", "colours@7"], "top_k": 10}
    left = compose_and_publish(config_of(base, examples, controls=False, compose=less), out=tmp_path / "c", hub=hub, publish=False)
    assert {listed.name for listed in left.report.shortlist} == {"colours@1", "shapes@1", "sounds@1"}
    assert any("smels is excluded, but there is no such adapter" in warning for warning in left.warnings)
    assert any("colours@7 is excluded, but it is colours@1 that is composed" in warning for warning in left.warnings)


def test_an_adapter_of_unknown_origin_is_composed_with_a_warning(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    publish(hub, random_adapter(base.decoder, 2, seed=5), "stranger", tmp_path / "made")
    outcome = compose_and_publish(config_of(base, examples, controls=False), out=tmp_path / "out", hub=hub, publish=False)
    assert any("stranger@1 composed, though not known to have been trained on exactly this base" in warning for warning in outcome.warnings)


def test_an_adapter_of_other_weights_is_left_out_unless_it_is_named(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """Its shapes fit, but what it changes are other weights: nobody would have asked for that."""
    other = {**base.describe(), "name": "elsewhere", "weights_fingerprint": "0" * 64}
    publish(hub, random_adapter(base.decoder, 2, seed=6), "alien", tmp_path / "made", base=other)
    plan = plan_composition(config_of(base, examples), hub, base=base)
    assert "alien@1" not in {version.ref for version in plan.versions}
    assert any(warning.startswith("alien@1 left out: made for other weights (elsewhere) than") for warning in plan.warnings)
    named = plan_composition(config_of(base, examples, compose={"adapters": ["alien", "sizes"]}), hub, base=base)
    assert {version.ref for version in named.versions} == {"alien@1", "sizes@1"}
    assert any("alien@1 composed, though its base had another weights" in warning for warning in named.warnings)
    only = config_of(base, examples, compose={"exclude": ["colours", "shapes", "sizes", "sounds"]})
    with pytest.raises(ConfigError, match="alien@1 fits in shape, but was made for other weights") as error:
        plan_composition(only, hub, base=base)
    assert "--from" in error.value.hint


def test_the_result_is_compressed_to_the_rank_that_is_asked_for(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    compose = {"rank": 3, "method": "uniform", "folds": None}
    outcome = compose_and_publish(config_of(base, examples, controls=False, compose=compose), out=tmp_path / "out", hub=hub)
    assert outcome.version is not None and outcome.version.rank == 3 and outcome.report.rank == 3
    assert 0 < read_adapter(outcome.adapter_folder).manifest["composition"]["energy_kept"] < 1


@pytest.mark.parametrize("method", ["gradient_per_layer", "cma", "uniform", "best_single"])
def test_every_method_makes_an_adapter(base: Base, hub: Hub, examples: Path, tmp_path: Path, method: str) -> None:
    compose = {"method": method, "folds": None, "budget": 20}
    outcome = compose_and_publish(config_of(base, examples, controls=False, compose=compose), out=tmp_path / "out", hub=hub)
    assert outcome.version is not None and outcome.report.method == method
    assert all((part.layer_weights is not None) == (method == "gradient_per_layer") for part in outcome.weights)


def test_conversations_are_composed_for_and_shown_as_earlier_turns(base: Base, hub: Hub, tmp_path: Path) -> None:
    """Chat data has no prompt column: every contestant is asked inside the base's chat template."""

    def chats(path: Path, num: int) -> str:
        turns = [[{"role": "user", "content": f"thing {n}?"}, {"role": "assistant", "content": ("warm", "cold")[n % 2]}] for n in range(num)]
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
        return str(path)

    data = {"train": chats(tmp_path / "few.jsonl", 4), "test": chats(tmp_path / "test.jsonl", 10)}
    outcome = compose_and_publish(config_of(base, data, compose={"seeds": 1}), out=tmp_path / "out", hub=hub)
    assert read_adapter(outcome.adapter_folder).manifest["prompt"]["chat"] is True
    assert {line.name for line in outcome.report.lines if line.scores} == {*CONTESTANTS, "majority"}
    assert {path.name.split("-")[1] for path in (tmp_path / "out" / "scores" / "warmth").glob("*.json")} == {"chat"}


def test_a_file_of_big_bench_hard_and_a_task_folder_bring_their_own_prompts(base: Base, hub: Hub, tmp_path: Path) -> None:
    """The same data settings as everywhere: BBH's JSON is split by ratios, a folder keeps its parts and its name."""
    found = [{"input": f"thing {n}?", "target": ("(A)", "(B)")[n % 2]} for n in range(12)]
    (tmp_path / "bbh.json").write_text(json.dumps({"examples": found}))
    data = {"path": str(tmp_path / "bbh.json"), "ratios": [0.5, 0, 0.5]}
    report = compose_and_publish(config_of(base, data, controls=False), out=tmp_path / "a", hub=hub, publish=False).report
    assert (report.examples, report.test_rows, report.task) == (6, 6, "warmth")
    folder = tmp_path / "task"
    folder.mkdir()
    description = {"name": "feelings", "template": "{input}", "target": "target", "metric": "accuracy", "label_set": ["(A)", "(B)"]}
    (folder / "task.json").write_text(json.dumps(description))
    write_rows(folder / "train.jsonl", found[:4])
    outcome = compose_and_publish(config_of(base, folder, controls=False), out=tmp_path / "b", hub=hub)
    assert outcome.report.task == "feelings" and outcome.version is not None and outcome.version.ref == "warmth@1"
    assert read_adapter(outcome.adapter_folder).manifest["labels"] == ["(A)", "(B)"]


def test_an_engine_that_fails_costs_the_scores_and_not_the_composition(
    base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of search are not thrown away for a machine out of memory; the same command measures again."""
    from atoll.model.decoder import Decoder

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    config = config_of(base, both, controls=False)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", out_of_memory)
        outcome = compose_and_publish(config, out=tmp_path / "out", hub=hub)
    assert outcome.version is not None and any("could not be scored" in warning for warning in outcome.warnings)
    again = compose_and_publish(config, out=tmp_path / "out", hub=hub)
    assert not again.reused and again.report.measure == "score"


# ---- stopping ----


def test_a_stop_during_the_search_keeps_the_best_so_far_and_is_not_taken_for_the_whole(
    base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path
) -> None:
    """The search ends, other seeds and the controls are left out, the result says so; the same command later does all of it."""
    config, stages = config_of(base, both, compose={"k": 2}), list[str]()

    def asked() -> bool:
        return any("searching" in stage for stage in stages)

    stopped = compose_and_publish(config, out=tmp_path / "out", hub=hub, progress=lambda stage, *_: stages.append(stage), stop_asked=asked)
    assert stopped.version is not None and stopped.report.search["stopped_by"] == "interrupted"
    assert "the search was stopped" in stopped.report.stopped and "1 of 3 seeds" in stopped.report.stopped
    assert "the controls were stopped" in stopped.report.stopped and stopped.report.lines == ()
    whole = compose_and_publish(config, out=tmp_path / "out", hub=hub)
    assert not whole.reused and whole.report.stopped == "" and whole.version is not None and whole.version.number == 2


def test_a_stop_during_the_controls_leaves_out_the_rest_of_them(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    """What was finished is reported; the adapter is the same as ever."""
    stages: list[str] = []

    def asked() -> bool:
        return any("evaluate" in stage for stage in stages)

    report = compose_and_publish(
        config_of(base, both), out=tmp_path / "out", hub=hub, progress=lambda stage, *_: stages.append(stage), stop_asked=asked
    ).report
    assert report.stopped.startswith("the controls were stopped") and report.measure == "loss"
    assert [line.name for line in report.lines] == SHOWN and not any(line.scores for line in report.lines)


def test_ctrl_c_ends_the_search_and_the_next_one_the_controls(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    """The first Ctrl-C of each phase is a wish, not an exception: there is a whole result at the end."""
    import signal

    pressed: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        for phase in ("searching", "controls"):
            if phase in stage and phase not in pressed:
                pressed.append(phase)
                signal.raise_signal(signal.SIGINT)

    outcome = compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub, progress=progress)
    assert pressed == ["searching", "controls"] and outcome.version is not None
    assert "the search was stopped" in outcome.report.stopped and "the controls were stopped" in outcome.report.stopped


def test_a_stop_before_the_first_search_makes_nothing(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub, stop_asked=lambda: True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert [run.status for run in hub.runs(kind="compose")] == ["interrupted"]


def test_a_result_that_cannot_be_written_does_not_take_the_place_of_the_last(
    base: Base, hub: Hub, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the adapter of before stays whole, and nothing is marked as done."""
    config, out = config_of(base, examples, controls=False), tmp_path / "out"
    first = compose_and_publish(config, out=out, hub=hub)
    before = (first.adapter_folder / "adapter_model.safetensors").read_bytes()
    write_rows(examples, rows(4, start=50))

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(compose_module, "write_adapter", full)
    with pytest.raises(StorageError):
        compose_and_publish(config, out=out, hub=hub)
    assert (first.adapter_folder / "adapter_model.safetensors").read_bytes() == before and not (out / "result.json").exists()
    assert [run.status for run in hub.runs(kind="compose")] == ["failed", "finished"]
    monkeypatch.undo()


def test_a_control_that_fails_is_left_out_with_its_reason(
    base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on the examples may diverge; what was composed is not worth less for it."""
    from atoll.compose import controls

    def diverged(*_: Any, **__: Any) -> None:
        raise TrainingError("the loss at step 3 is nan: training diverged")

    monkeypatch.setattr(controls, "train_on_examples", diverged)
    monkeypatch.setattr(controls_module, "train_on_examples", diverged)
    report = compose_and_publish(config_of(base, both, compose={"seeds": 1}), out=tmp_path / "out", hub=hub).report
    failed = report.line("k-shot LoRA")
    assert failed is not None and "training diverged" in failed.note and failed.loss is None and not failed.scores
    composed_line = report.line("composed")
    assert composed_line is not None and composed_line.scores and "k-shot LoRA" not in report.versus


# ---- what is refused ----


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "more folds than examples": ({"compose": {"folds": 5}}, ConfigError, "4 examples cannot be cut into 5 folds"),
    "more drawn than there are": ({"compose": {"k": 9}}, DataError, "k is 9, but there are 4 examples"),
    "folds of a method that has none": ({"compose": {"method": "cma"}}, ConfigError, "knows no folds"),
    "an optimiser that there is not": ({"compose": {"method": "nevergrad:NGOptt", "folds": None}}, ConfigError, "no optimiser 'NGOptt'"),
    "an adapter with edits by name": ({"compose": {"adapters": ["edits"]}}, ConfigError, "edits@1 is reft"),
    "everything excluded": ({"compose": {"adapters": ["sizes"], "exclude": ["sizes"]}}, ConfigError, "every LoRA adapter named is excluded"),
    "an adapter of elsewhere": ({"compose": {"adapters": ["hf:a/b"]}}, ConfigError, "'hf:a/b' names an adapter of elsewhere"),
    "a reserved name": ({"name": "latest"}, NameRefused, "reserved"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_composed_is_said_before_any_work(base: Base, hub: Hub, examples: Path, tmp_path: Path, kind: str) -> None:
    changes, error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        compose_and_publish(config_of(base, examples, **changes), out=tmp_path / "out", hub=hub)
    assert not (tmp_path / "out").exists()


def test_an_empty_hub_and_a_hub_of_other_bases_are_told_apart(base: Base, examples: Path, tmp_path: Path) -> None:
    hub = Hub()
    with pytest.raises(ConfigError, match="the hub has no LoRA adapters"):
        compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub)
    adapter = random_adapter(decoder_of(tiny_model("llama", hidden_size=32)), 2)
    publish(hub, adapter, "wide", tmp_path / "made")
    with pytest.raises(ConfigError, match="none of the hub's 1 LoRA adapters was made for"):
        compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub)
    with pytest.raises(BaseMismatch, match="wide@1 does not fit"):
        compose_and_publish(config_of(base, examples, compose={"adapters": ["wide"]}), out=tmp_path / "out", hub=hub)


def test_two_compositions_in_one_folder_are_refused(base: Base, hub: Hub, examples: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(Busy, match="in use by another"):
        compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub)


def test_one_example_is_enough_and_has_no_held_out_loss(base: Base, hub: Hub, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", rows(1))
    outcome = compose_and_publish(config_of(base, one, compose={"folds": None}), out=tmp_path / "out", hub=hub)
    assert outcome.version is not None and outcome.report.lines == ()
    assert "Nothing was compared" in outcome.report.advice[0]
    assert any("no held-out losses" in warning for warning in outcome.warnings)
