"""What a composition advises to do instead, as a file that does it: the training file of the LoRA that it is compared with.

Used by compose.py; the command line names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atoll.compose.few_shot_lora import FEW_SHOT_ADAPTER, few_shot_trainer
from atoll.config import BUILTIN, TrainConfig
from atoll.workflows.compose_plan import ComposePlan
from atoll.yaml_file import dump_yaml

TRAIN_FILE = "train.yaml"  # beside the result
_PLACES = ("path", "train", "validation", "test")  # settings of data that name files


def training_file(plan: ComposePlan, root: Path | None = None) -> str:
    """YAML for `atoll train`: the k-shot LoRA on all the examples that were given. root: the folder that the plan's relative paths start at."""
    data = plan.config.require_data().model_dump(mode="json", exclude_unset=True)
    for key in _PLACES:
        if (place := data.get(key)) is not None and not str(place).startswith(BUILTIN):
            data[key] = str(((root or Path()) / Path(place).expanduser()).resolve())
    trainer = few_shot_trainer(len(plan.data.train), plan.config.compose.seed).model_dump(mode="json", exclude_unset=True, exclude={"log_to"})
    settings: dict[str, Any] = {
        "base": str(plan.base.path.resolve()) if Path(plan.config.base).expanduser().is_dir() else plan.config.base,
        "name": f"{plan.name}-lora",
        "data": data,
        "adapter": {"type": FEW_SHOT_ADAPTER.type, **FEW_SHOT_ADAPTER.model_dump(mode="json", exclude_unset=True)},
        "trainer": trainer,
    }
    for section in ("generation", "quantization"):
        if section in plan.config.model_fields_set and (given := getattr(plan.config, section)) is not None:
            settings[section] = given.model_dump(mode="json", exclude_unset=True)
    TrainConfig.model_validate(settings)
    return "# LoRA trained on the same examples\n" + dump_yaml(settings)
