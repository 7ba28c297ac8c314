"""train/plan.py and spec.py: what a config asks for is what is trained, and a job's identity covers all that decides its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.config import REFT_LEARNING_RATE, TrainConfig
from atoll.config_adapter import LoraAdapterConfig, ReftAdapterConfig
from atoll.data.task import load_task
from atoll.errors import ConfigError
from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
from atoll.model.base import Base, load_base
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.sites import TARGETS, module_name
from atoll.train.plan import TrainingPlan, estimate_cost, plan_training, training_job, with_manifest
from atoll.train.spec import adapter_spec


def carried_out(plan: TrainingPlan, folder: Path) -> Adapter:
    """The adapter of a plan, trained alone, with its manifest."""
    return with_manifest(plan, training_job(plan, folder).run()).adapter


def test_the_spec_is_what_the_config_asks_for() -> None:
    """From the YAML's adapter section to the file's config, with its defaults: all linears, alpha twice the rank."""
    assert adapter_spec("tiny", LoraAdapterConfig(), 3, 64) == AdapterSpec("tiny", 16, 32.0, TARGETS)
    asked = LoraAdapterConfig(
        r=8,
        alpha=12,
        dropout=0.1,
        target_modules=["v_proj", "q_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 3.0},
        layers_to_transform=[2, 0],
    )
    assert adapter_spec("tiny", asked, 3, 64) == AdapterSpec(
        base="tiny",
        rank=8,
        alpha=12.0,
        target_modules=("q_proj", "v_proj"),
        dropout=0.1,
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 3.0},
        layers_to_transform=(2, 0),
    )


def reft_part(num_layers: int = 4, **config: Any) -> ReftSpec:
    (part,) = adapter_spec("tiny", ReftAdapterConfig(**config), num_layers, 64).reft
    return part


def test_a_reft_spec_is_what_the_config_asks_for() -> None:
    """Alone and beside a LoRA; layers from the end become numbers of this base."""
    alone = adapter_spec("tiny", ReftAdapterConfig(type="loreft", rank_pattern={-1: 8}), 4, 64)
    assert alone == AdapterSpec("tiny", 8, 8.0, (), reft=(ReftSpec("loreft", 4, None, rank_pattern={3: 8}),))
    assert alone.kind == "reft"
    both = adapter_spec("tiny", LoraAdapterConfig(r=8, reft=ReftAdapterConfig(type="direft", positions="l1", activation="relu")), 4, 64)
    assert both == AdapterSpec("tiny", 8, 16.0, TARGETS, reft=(ReftSpec("direft", positions=Positions(last=1), activation="relu"),))
    assert both.kind == "lora+reft"
    asked = reft_part(type="noreft", rank=2, layers=[-1, 0], component="mlp_output", positions=[0, -1], tied=False, dropout=0.1, bias=True)
    listed = Positions(listed=(0, -1))
    assert asked == ReftSpec("noreft", 2, (0, 3), "mlp_output", listed, tied=False, dropout=0.1, bias=True)
    assert [reft_part(layers=layers).layers for layers in ("all", "last", "2;0", [-2])] == [None, (3,), (0, 2), (2,)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"layers": [4]}, r"names block 4, but the base has 4 \(0 to 3, or -4 to -1\)"),
        ({"layers": [-5]}, "names block -5, but the base has 4"),
        ({"rank_pattern": {7: 2}}, "names block 7, but the base has 4"),
        ({"layers": [3, -1]}, r"name a block twice: \[3, -1\] of 4 blocks are \[3, 3\]"),
        ({"rank_pattern": {3: 2, -1: 4}}, "rank_pattern names a block twice"),
        ({"layers": "last", "rank_pattern": {0: 2}}, "rank_pattern names block 0, which is not edited"),
        ({"rank": 65}, "the ReFT rank is 65, but the base's hidden states have 64 dimensions"),
        ({"rank_pattern": {0: 100}}, "the ReFT rank is 100, but"),
    ],
)
def test_what_the_base_does_not_have_is_refused(config: dict[str, Any], said: str) -> None:
    """Before any work, in the words of the file."""
    with pytest.raises(ConfigError, match=said):
        reft_part(**config)


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32")


def plan_of(base: Base, **changes: Any) -> TrainingPlan:
    """A plan of a generated task of 30 rows."""
    config = TrainConfig(**{"base": "tiny", "data": {"path": "builtin:dates", "max_train_rows": 20, "max_validation_rows": 5}, **changes})
    return plan_training(config, base, load_task(config.require_data()))


def test_a_plan_counts_every_parameter_that_is_trained(base: Base) -> None:
    """The dry run's number is the adapter's."""
    for adapter in (
        {"r": 2},
        {"type": "loreft", "tied": False, "rank_pattern": {1: 7}},
        {"type": "consreft", "layers": [1]},
        {"type": "noreft", "bias": True},
        {"r": 2, "reft": {"rank": 3}},
    ):
        plan = plan_of(base, adapter=adapter)
        shape = base.decoder.shape
        assert plan.num_parameters == new_adapter(plan.spec, shape.linears, shape.num_layers, torch.Generator()).num_parameters
    assert plan_of(base, adapter={"type": "loreft", "layers": [2, 1]}).first_layer == 1
    assert plan_of(base, adapter={"layers_to_transform": [2], "reft": {"layers": "last"}}).first_layer == 2
    assert plan_of(base, adapter={"layers_to_transform": [2], "reft": {}}).first_layer == 0


def test_a_shared_base_is_no_other_job(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that several processes began with fsdp is gone on with by one; and one process is told that it holds everything."""
    upper = {"adapter": {"layers_to_transform": [1, 2]}}
    alone = plan_of(base, **upper, trainer={"fsdp": True})
    assert alone.warnings == ("dates: trainer.fsdp has no effect in one process, which holds the whole base",)
    monkeypatch.setattr(base.decoder, "shards", object())
    monkeypatch.setattr(base.decoder, "can_enter", False)
    shared = plan_of(base, **upper, trainer={"fsdp": True})
    assert shared.warnings == ()
    assert shared.digest == alone.digest == plan_of(base, **upper).digest


def test_a_jobs_identity_covers_what_decides_its_weights_and_nothing_else(base: Base) -> None:
    """A changed position must not resume an old checkpoint; more memory, or settings of a part that there is not, must."""
    reft, lora = {"type": "loreft"}, {"r": 2}
    assert (
        len({plan_of(base, adapter=a).digest for a in (reft, lora, {**reft, "positions": "l1"}, {**lora, "reft": {}}, {**reft, "tied": False})}) == 5
    )
    for adapter in (reft, lora, {**lora, "reft": {}}):
        same = {plan_of(base, adapter=adapter, trainer=trainer).digest for trainer in ({}, {"reuse_mib": 0}, {"checkpoint_every": None})}
        assert len(same) == 1
    decayed = {"reft_weight_decay": 0.1}
    assert plan_of(base, adapter=lora, trainer=decayed).digest == plan_of(base, adapter=lora).digest
    assert plan_of(base, adapter=reft, trainer=decayed).digest != plan_of(base, adapter=reft).digest


def test_a_reft_plan_runs_and_says_what_it_is(base: Base, tmp_path: Path) -> None:
    """From the plan to an adapter with a manifest that the hub can read."""
    plan = plan_of(base, adapter={"type": "loreft", "layers": "last", "positions": "l2"}, trainer={"max_steps": 4, "batch_size": 8})
    adapter = carried_out(plan, tmp_path)
    assert adapter.manifest["kind"] == "reft"
    assert adapter.manifest["training"]["config"]["adapter"]["positions"] == "l2"
    assert adapter.manifest["training"]["config"]["trainer"]["learning_rate"] == REFT_LEARNING_RATE
    assert adapter.num_parameters == plan.num_parameters
    adapter.check_fits(base.decoder.shape.linears, base.decoder.shape.num_layers)
    both = carried_out(plan_of(base, adapter={"r": 2, "reft": {}}, trainer={"max_steps": 2}), tmp_path / "both")
    assert both.manifest["kind"] == "lora+reft"
    assert both.modules
    assert both.edits


def test_the_cost_of_every_kind_can_be_estimated(base: Base) -> None:
    """Also where the lower blocks run once, and where a row has no edited token."""
    costs = {}
    for name, adapter in (
        ("lora", {"r": 2}),
        ("all", {"type": "loreft"}),
        ("last", {"type": "loreft", "layers": "last"}),
        ("none", {"type": "loreft", "positions": [300]}),
    ):
        costs[name] = estimate_cost(plan_of(base, adapter=adapter))
        assert costs[name].seconds > 0
    assert costs["last"].memory_bytes < costs["all"].memory_bytes < costs["lora"].memory_bytes


def test_rows_without_an_edited_token_are_counted(base: Base) -> None:
    """They cost a forward and teach nothing."""
    lengths = sorted(row.num_prompt for row in plan_of(base).train.rows)
    assert lengths[0] < lengths[-1]
    some = {"positions": [lengths[-1] - 1]}  # a place that the longest prompts alone have
    plan = plan_of(base, adapter={"type": "loreft", **some})
    assert plan.num_unedited == sum(length < lengths[-1] for length in lengths)
    assert f"{plan.num_unedited} of 20 training rows have no edited token" in plan.warnings[-1]
    assert plan_of(base, adapter={"type": "loreft"}).num_unedited == 0
    assert plan_of(base, adapter={"reft": some}).num_unedited == 0, "a LoRA learns from them"
    assert plan_of(base, adapter={"reft": {"positions": [lengths[-1]]}}).num_unedited == 20, "but then nothing trains the ReFT part"


@pytest.mark.parametrize("targets", [TARGETS, ("c_attn", "c_proj", "c_fc")])
def test_a_module_that_no_base_has_is_refused_with_those_of_this_one(targets: tuple[str, ...]) -> None:
    """Llama's names help nobody who trains a GPT-2; a near miss is refused before the base is loaded, see test_config."""
    config = LoraAdapterConfig(target_modules=("foo",))
    with pytest.raises(ConfigError, match=f"names 'foo', but a block of this base has {', '.join(map(module_name, targets))}$"):
        adapter_spec("tiny", config, 2, 64, targets)
