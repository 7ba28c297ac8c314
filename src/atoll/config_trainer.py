"""The settings of training: a file's `trainer` section.

Used by config.py and train.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from atoll.config_section import Section

LION_BETAS = (0.9, 0.99)
REFT_LEARNING_RATE = 4e-3  # of a ReFT adapter where the user gives none
REFT_RATE_BESIDE_LORA = 1e-3  # of a ReFT part beside a LoRA, which moves the same states: at 4e-3 the two overshoot together
Schedule: TypeAlias = Literal["cosine", "linear", "constant", "cosine_with_restarts", "inverse_sqrt", "warmup_stable_decay"]


class TrainerConfig(Section):
    """How it is trained."""

    epochs: float = Field(default=3.0, gt=0, description="Times the training rows are gone through. Not used when max_steps is given.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps in all; decides the length instead of epochs.")
    batch_size: int = Field(default=16, ge=1, description="Rows of one optimizer step, however they are divided into forward passes.")
    micro_batch_tokens: int = Field(
        default=2048, ge=1, description="Most tokens of one forward pass (a longer row goes alone); for memory and speed."
    )
    learning_rate: float = Field(
        default=5e-4,
        gt=0,
        le=1,
        description=f"Highest learning rate, after the warmup. Where it is not given, an adapter of a ReFT type gets {REFT_LEARNING_RATE:g}.",
    )
    reft_learning_rate: float = Field(
        default=REFT_RATE_BESIDE_LORA,
        gt=0,
        le=1,
        description="The same for a ReFT part trained together with a LoRA; learning_rate is the LoRA's then.",
    )
    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = Field(
        default="adamw",
        description="sgd wants a much higher learning rate, lion (which needs bitsandbytes) a lower one; adafactor's step is absolute, "
        "of AdamW's size.",
    )
    schedule: Schedule = Field(
        default="cosine",
        description="Learning rate after the warmup. cosine and linear fall over all steps, cosine_with_restarts so in each of `cycles`, "
        "warmup_stable_decay in the last decay_fraction of the steps, inverse_sqrt with the root of the steps since the warmup began.",
    )
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises from 0.")
    warmup_steps: int | None = Field(default=None, ge=0, description="The same as a number of steps; decides instead of warmup_fraction.")
    final_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of the highest learning rate at which schedules that fall end.")
    cycles: int = Field(default=2, ge=1, description="Times that cosine_with_restarts falls.")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="Share of the steps after the warmup in which warmup_stable_decay falls.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight decay of LoRA's factors and of a classifier: decoupled (AdamW), but for sgd, where it joins the gradient.",
    )
    reft_weight_decay: float = Field(default=0.0, ge=0, description="The same for ReFT's W; its projection R and its biases are never decayed.")
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="NEFTune: uniform noise on the embeddings while training, of size alpha / sqrt(tokens * width); 5 is usual."
    )
    mlm_probability: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Over an encoder: learn the texts (prompt and completion as one) instead of classes. Each token is hidden with this probability, "
        "anew in every step, and told from the others; 0.15 is usual.",
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are scaled down to this norm; 0 turns it off.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="Averaging factors of AdamW and Lion. Where they are not given, Lion's are 0.9 and 0.99."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    eval_every: int | None = Field(default=None, ge=1, description="Steps between measurements of the validation loss; without it, once an epoch.")
    early_stop_patience: int | None = Field(default=3, ge=1, description="Stop after so many measurements without a better one; null turns it off.")
    checkpoint_every: int | None = Field(
        default=50, ge=1, description="Steps between checkpoints that a killed job resumes from; null turns them off."
    )
    reuse_mib: int = Field(
        default=1024,
        ge=0,
        description="Most memory in MiB for what the blocks below the first changed one make of each row, which is the same in every epoch. "
        "Jobs that train at once share it. Rows beyond it are computed again, to the same numbers.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapter's start, the order of rows, and dropout.")
    device: str = Field(default="cpu", min_length=1, description="Where to compute: cpu, or cuda (cuda:1, …) on a machine that has it.")
    fsdp: bool = Field(
        default=False,
        description="Several processes hold the base together: each a part of every block, gathered while the block is computed (FSDP's full shard). "
        "Same result, less memory, more traffic. Without effect in one process.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Number format of the base while training; the adapter itself is float32."
    )
    max_length: int | Literal["p95"] | None = Field(
        default=None,
        description="Longest row in tokens; longer prompts lose their beginning. p95: of the training rows. null: the base's context.",
    )
    train_on_prompt: bool = Field(default=False, description="Learn the prompt's tokens too, not only the completion's.")
    logging_every: int = Field(default=1, ge=1, description="Steps between entries of the log.")
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",), description="Where the curve goes besides log.jsonl; W&B is offline unless logged in. [] for nowhere."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_sharding(cls, values: Any) -> Any:
        """Keys of other trainers for which "not a key" would be half an answer."""
        for key in ("fsdp_config", "deepspeed"):
            if isinstance(values, dict) and values.get(key):
                raise ValueError(f"{key} is another trainer's; fsdp: true shares the base out over the processes")
        return values

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers from 0 to below 1")
        return betas

    @field_validator("max_length", mode="before")
    @classmethod
    def _check_length(cls, value: Any) -> Any:
        if value is None or value == "p95":
            return value
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if not isinstance(value, int) or value < 2:
            raise ValueError("must be a number of tokens from 2, p95, or null")
        return value
