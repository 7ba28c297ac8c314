"""PyReFT's library under its own names: a program written for it runs with one line changed, on any transformers 5 decoder and on BERT or RoBERTa.

    import atoll.reft as pyreft

What differs is what was wrong there: saving loses nothing, places are true ones, R stays orthonormal, other people's hooks are left alone. Each name
is fetched from its module on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow _HOMES; tests/reft/test_exports.py holds the two equal
    from atoll.reft.collators import ReftDataCollator, ReftRewardCollator
    from atoll.reft.config import ReftConfig, ReftType, TaskType
    from atoll.reft.data import (
        ReftClassificationDataset,
        ReftDataset,
        ReftGenerationDataset,
        ReftPreferenceDataset,
        ReftRawDataset,
        ReftRewardDataset,
        ReftSupervisedDataset,
    )
    from atoll.reft.interventions import (
        ConsreftIntervention,
        DireftIntervention,
        LobireftIntervention,
        LoreftIntervention,
        NodireftIntervention,
        NoreftIntervention,
    )
    from atoll.reft.model import ReftModel, get_reft_model
    from atoll.reft.positions import get_intervention_locations, parse_positions
    from atoll.reft.rows import (
        make_last_position_supervised_chat_data_module,
        make_last_position_supervised_data_module,
        make_multiple_position_supervised_data_module,
    )
    from atoll.reft.trainer import (
        ReftTrainer,
        ReftTrainerForCausalLM,
        ReftTrainerForCausalLMDistributed,
        ReftTrainerForSequenceClassification,
    )

_HOMES = {
    "ConsreftIntervention": "interventions",
    "DireftIntervention": "interventions",
    "LobireftIntervention": "interventions",
    "LoreftIntervention": "interventions",
    "NodireftIntervention": "interventions",
    "NoreftIntervention": "interventions",
    "ReftClassificationDataset": "data",
    "ReftConfig": "config",
    "ReftDataCollator": "collators",
    "ReftDataset": "data",
    "ReftGenerationDataset": "data",
    "ReftModel": "model",
    "ReftPreferenceDataset": "data",
    "ReftRawDataset": "data",
    "ReftRewardCollator": "collators",
    "ReftRewardDataset": "data",
    "ReftSupervisedDataset": "data",
    "ReftTrainer": "trainer",
    "ReftTrainerForCausalLM": "trainer",
    "ReftTrainerForCausalLMDistributed": "trainer",
    "ReftTrainerForSequenceClassification": "trainer",
    "ReftType": "config",
    "TaskType": "config",
    "get_intervention_locations": "positions",
    "get_reft_model": "model",
    "make_last_position_supervised_chat_data_module": "rows",
    "make_last_position_supervised_data_module": "rows",
    "make_multiple_position_supervised_data_module": "rows",
    "parse_positions": "positions",
}

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "ReftClassificationDataset",
    "ReftConfig",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftModel",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "ReftType",
    "TaskType",
    "get_intervention_locations",
    "get_reft_model",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, once (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'atoll.reft' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"atoll.reft.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
