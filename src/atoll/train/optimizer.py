"""The optimizer of a job, by name: torch's AdamW, SGD and Adafactor, and bitsandbytes' Lion.

All but Adafactor move each number by itself, so they get the job's flat vector in as few slices as settings differ. Adafactor (Shazeer & Stern 2018,
arXiv 1804.04235) keeps the second moment of a matrix by rows and columns and bounds the step of each tensor, so it gets the adapter's own tensors.
Its step is absolute here, as transformers' Trainer has it, not relative to a tensor's size: LoRA's B starts at zero and would hardly move.

Used by job.py.
"""

from __future__ import annotations

import importlib.util

import torch

from atoll.config import TrainerConfig
from atoll.errors import ConfigError
from atoll.train.weights import TrainableAdapter

_ABSOLUTE = 1.0  # Adafactor's step is learning rate * max(this, the tensor's root mean square)


def make_optimizer(weights: TrainableAdapter, config: TrainerConfig) -> torch.optim.Optimizer:
    """The optimizer over a job's weights; its groups have a "share" of the learning rate. Raises ConfigError where its package is not installed."""
    groups = weights.parameter_groups(config, by_tensor=config.optimizer == "adafactor")
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=config.learning_rate, eps=(None, _ABSOLUTE))
        case "lion":
            if importlib.util.find_spec("bitsandbytes") is None:
                raise ConfigError("optimizer lion needs the package bitsandbytes, which is not installed", hint='pip install "atoll[quant]"')
            from bitsandbytes.optim import Lion

            lion: torch.optim.Optimizer = Lion(groups, lr=config.learning_rate, betas=config.betas)
            return lion
        case _:
            return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
