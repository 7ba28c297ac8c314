"""The classes of a job whose base is an encoder: what its classifier tells apart, in the order of its outputs.

Used by plan.py.
"""

from __future__ import annotations

from atoll.config import TrainConfig
from atoll.config_adapter import LoraAdapterConfig
from atoll.data.task import TaskData
from atoll.errors import ConfigError


def class_labels(data: TaskData, config: TrainConfig) -> tuple[str, ...]:
    """The task's label set. Raises ConfigError where answers are open, or where the settings mean something that an encoder does not do."""
    labels = data.task.label_set
    if not labels or len(labels) < 2:
        raise ConfigError(
            f"the base is an encoder, which chooses among classes, but task {data.task.name!r} has no closed set of labels",
            hint="name them in data.label_set, or choose a base that writes text",
        )
    if not isinstance(config.adapter, LoraAdapterConfig):
        raise ConfigError(
            "an encoder's classifier is trained beside a LoRA, but the adapter is ReFT alone", hint="put the ReFT part under adapter.reft"
        )
    if config.trainer.train_on_prompt:
        raise ConfigError("trainer.train_on_prompt is on, but an encoder is not trained to write its prompt", hint="leave it out")
    if data.task.chat:
        raise ConfigError("the data is a chat, but an encoder reads one text", hint="give prompt and completion columns")
    return tuple(labels)


def check_texts(data: TaskData, config: TrainConfig) -> None:
    """Raise ConfigError for settings that mean nothing where an encoder tells hidden tokens."""
    if not isinstance(config.adapter, LoraAdapterConfig):
        raise ConfigError("trainer.mlm_probability trains a LoRA, but the adapter is ReFT alone", hint="put the ReFT part under adapter.reft")
    if config.trainer.train_on_prompt:
        raise ConfigError("trainer.train_on_prompt is on, but trainer.mlm_probability decides which tokens are learned", hint="leave one of them out")
    if data.task.chat:
        raise ConfigError("the data is a chat, but an encoder reads one text", hint="give prompt and completion columns")
