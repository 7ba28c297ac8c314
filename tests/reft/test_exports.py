"""The public names of atoll.reft are PyReFT's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import atoll.reft as pyreft

PYREFTS = [
    "TaskType",
    "get_reft_model",
    "ReftConfig",
    "ReftModel",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "NoreftIntervention",
    "LoreftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
    "ReftDataCollator",
    "ReftDataset",
    "ReftRawDataset",
    "ReftSupervisedDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRewardDataset",
    "ReftRewardCollator",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "get_intervention_locations",
    "parse_positions",
]
NOT_EXPORTED_THERE = ["ReftClassificationDataset", "make_last_position_supervised_chat_data_module", "ReftType"]


def test_every_name_of_pyreft_is_here_and_no_other() -> None:
    """`import atoll.reft as pyreft` is the only line that changes."""
    assert sorted(pyreft.__all__) == sorted(PYREFTS + NOT_EXPORTED_THERE)
    for name in pyreft.__all__:
        assert getattr(pyreft, name).__name__ == name
    assert set(pyreft.__all__) <= set(dir(pyreft))
    with pytest.raises(AttributeError, match="no_such_name"):
        pyreft.no_such_name  # noqa: B018 (the access is the test)


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING are written by hand beside the table."""
    tree = ast.parse(Path(pyreft.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"atoll.reft.{home}" for name, home in pyreft._HOMES.items()}


def test_the_import_alone_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, atoll.reft; print([n for n in ('torch', 'transformers', 'peft') if n in sys.modules])"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr
