"""ReftConfig: every form that PyReFT takes, and JSON that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import AdapterFormatError, ConfigError
from atoll.reft import LoreftIntervention, NoreftIntervention, ReftConfig
from atoll.reft.config import CONFIG_FILE, RepresentationConfig
from atoll.reft.interventions import CLASSES


def made(cls: Any = LoreftIntervention, **kwargs: Any) -> Any:
    return cls(**{"embed_dim": 16, "low_rank_dimension": 2, **kwargs})


def test_a_dict_a_list_and_named_tuples_say_the_same() -> None:
    """PyReFT's own forms; its files hold lists in the order of the fields."""
    intervention = made()
    as_dict = {"layer": 3, "component": "mlp_output", "low_rank_dimension": 2, "intervention": intervention}
    as_list = [3, "mlp_output", "pos", 1, 2, None, intervention]
    forms = [as_dict, [as_dict], [as_list], RepresentationConfig(3, "mlp_output", intervention=intervention)]
    assert len({str(ReftConfig(representations=form)) for form in forms}) == 1
    assert ReftConfig(representations=as_dict).representations[0].layer == 3


def test_keys_are_those_of_pyrefts_files() -> None:
    """A layer that is named twice, and paths, in which a dot becomes an underscore."""
    components = [(1, "block_output"), (2, "block_output"), (1, "block_output"), (0, "model.layers[15].output")]
    config = ReftConfig(representations=[{"layer": layer, "component": name, "intervention": made()} for layer, name in components])
    assert config.keys == [
        "layer_1_comp_block_output_unit_pos_nunit_1#0",
        "layer_2_comp_block_output_unit_pos_nunit_1#0",
        "layer_1_comp_block_output_unit_pos_nunit_1#1",
        "comp_model_layers[15]_output_unit_pos_nunit_1#0",
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_json_keeps_every_keyword(name: str, tmp_path: Path) -> None:
    """PyReFT's file has the class alone: dtype, act_fn, dropout and add_bias are gone, and NoReFT cannot be read at all."""
    kwargs = {"dtype": torch.float16, "dropout": 0.25, "act_fn": "gelu", "add_bias": True, "subspace_partition": [[0, 1], [1, 2]]}
    intervention = made(CLASSES[name], **kwargs)
    config = ReftConfig(
        representations=[
            {"component": "roberta.encoder.layer[3].output", "intervention": intervention, "intervention_link_key": 7},
            {"layer": 5, "component": "attention_input", "intervention": made(), "group_key": 1},
        ]
    )
    config.save_pretrained(tmp_path)
    again = ReftConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    restored = again.representations[0].intervention
    assert type(restored) is CLASSES[name]
    assert restored.settings == intervention.settings
    assert (restored.dtype, restored.dropout.p, type(restored.act_fn)) == (torch.float16, 0.25, type(intervention.act_fn))
    assert {key: value.shape for key, value in restored.state_dict().items()} == {k: v.shape for k, v in intervention.state_dict().items()}
    assert again.representations[0].component == "roberta.encoder.layer[3].output"
    assert again.representations[1].group_key == 1


def test_one_intervention_at_two_places_comes_back_as_one() -> None:
    """Shared weights stay shared."""
    intervention = made()
    config = ReftConfig(representations=[{"layer": layer, "intervention": intervention} for layer in (0, 1)])
    first, second = ReftConfig.from_dict(json.loads(config.to_json_string())).representations
    assert first.intervention is second.intervention


def test_classes_for_all_or_for_each() -> None:
    """intervention_types, for representations without a class of their own."""
    entries = [{"layer": layer, "low_rank_dimension": 2} for layer in (0, 1)]
    assert ReftConfig(representations=entries, intervention_types=LoreftIntervention).intervention_types == [LoreftIntervention] * 2
    both = [LoreftIntervention, NoreftIntervention]
    config = ReftConfig(representations=entries, intervention_types=both)
    assert config.intervention_types == both
    assert ReftConfig.from_dict(config.to_dict()).intervention_types == both


def test_the_rank_is_the_interventions() -> None:
    """PyReFT fails to load where the entry lacks it."""
    assert ReftConfig(representations={"layer": 0, "intervention": made()}).representations[0].low_rank_dimension == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layers": 3, "intervention": 1}, "'layers'"),
        ({"layer": 3}, "no intervention"),
        ({"layer": 3, "intervention": made(), "intervention_type": LoreftIntervention}, "must have one"),
        ({"layer": 3, "intervention": made(), "unit": "h.pos"}, "unit"),
        ({"layer": 3, "intervention": made(), "source_representation": 1}, "source_representation"),
        ("block_output", "str"),
    ],
)
def test_wrong_entries_are_named(wrong: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ReftConfig(representations=wrong)


def test_a_misspelt_key_gets_the_right_one() -> None:
    with pytest.raises(ConfigError) as caught:
        ReftConfig(representations={"layer": 1, "low_rank_dim": 4, "intervention": made()})
    assert "low_rank_dimension" in caught.value.hint


def test_other_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="serial"):
        ReftConfig(representations=[], mode="serial")


def _damaged(change: Any) -> str:
    data = ReftConfig(representations={"layer": 0, "intervention": made()}).to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        _damaged(lambda data: data.update(atoll_reft_format=2)),
        _damaged(lambda data: data.update(more=1)),
        _damaged(lambda data: data["representations"][0].update(layer=1)),
        _damaged(lambda data: data["representations"][0].pop("unit")),
        _damaged(lambda data: data["representations"][0]["intervention"].update(type="os:system")),
        _damaged(lambda data: data["representations"][0]["intervention"].update(type="subprocess:Popen")),
        _damaged(lambda data: data["representations"][0]["intervention"].update(low_rank_dimension="many")),
        _damaged(lambda data: data["representations"][0]["intervention"].pop("embed_dim")),
        _damaged(lambda data: data["representations"][0].update(intervention={"same_as": "another"})),
        _damaged(lambda data: data["representations"][0].update(intervention=None)),
        _damaged(lambda data: data.update(representations=3)),
    ],
)
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    """A file from elsewhere is an error in one sentence, never a traceback, and never a reason to run anything."""
    (tmp_path / CONFIG_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(AdapterFormatError):
        ReftConfig.from_pretrained(tmp_path)
