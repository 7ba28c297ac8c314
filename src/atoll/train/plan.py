"""What a training job will do, before it does it: its rows, its prompts, its steps, its identity, and what it will cost.

A plan is made from a config and a base; `--dry-run` shows it, and loop.train_jobs carries out its `training_job`, alone or among others. What
it costs is measured on the machine at hand, with a forward and backward on some of the job's own rows, because no table of speeds stays true.

Used by workflows and the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.config import Section, TrainConfig
from atoll.config_adapter import LoraAdapterConfig
from atoll.config_quantization import QuantizationConfig
from atoll.data.batches import epoch_batches, micro_batches
from atoll.data.encode import Encoded, encode_examples
from atoll.data.masking import Masking
from atoll.data.prompt import PromptFormat
from atoll.data.task import TaskData
from atoll.errors import ConfigError
from atoll.model.adapter import AdapterSpec
from atoll.model.loss import LOGIT_BYTES
from atoll.model.reft import tensor_shapes
from atoll.train.classes import check_texts, class_labels
from atoll.train.spec import edited_places, first_layer, spec_over

if TYPE_CHECKING:
    from atoll.model.base import Base
    from atoll.model.decoder import Decoder
    from atoll.train.entering import Room
    from atoll.train.job import TrainingJob, TrainResult
    from atoll.train.team import Team

_MEASURED_TOKENS = 1000
_FORWARD_SHARE = 0.4  # of a training step's time: what a validation pass costs a token
_PROCESS_BYTES = 500 << 20  # python, torch and transformers as loaded
_NO_MATTER = {"checkpoint_every", "logging_every", "device", "fsdp", "reuse_mib", "log_to"}  # the trainer's keys that do not decide the weights,
_OF_REFT = {"reft_learning_rate", "reft_weight_decay"}  # and those that do not where there is no ReFT
_LATER_ADAPTER = ("reft", "use_dora", "init_lora_weights", "loraplus_lr_ratio")
_LATER_TRAINER = ("neftune_noise_alpha", "mlm_probability", "optimizer", "momentum", "warmup_steps", "final_fraction", "cycles", "decay_fraction")
_MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "adafactor": 0}  # vectors of an optimizer's state; Adafactor's are small
_FORMAT = 2  # raise when the same config would train other weights than before, so that old checkpoints are not resumed


@dataclass(frozen=True)
class TrainingPlan:
    """A job ready to run. digest identifies everything that decides its weights: config, rows, prompts, base.

    labels: the classes in the order of the classifier's outputs, where the base is an encoder. masking: rows are texts, of which tokens are hidden.
    """

    config: TrainConfig
    base: Base
    data: TaskData
    train: Encoded
    validation: Encoded
    prompt: PromptFormat
    spec: AdapterSpec
    digest: str
    labels: tuple[str, ...] = ()
    masking: Masking | None = None

    @property
    def decoder(self) -> Decoder:
        """What is trained over: the base's, or its blocks as a model that tells hidden tokens."""
        return self.base.decoder if self.masking is None else self.base.decoder.masked_lm()

    @property
    def total_steps(self) -> int:
        from atoll.train.job import total_steps

        return total_steps(len(self.train.rows), self.config.trainer)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: how many rows lost the beginning of their prompt, and where the first one stands; what has no effect here."""
        name = self.data.task.name
        cut = tuple(
            f"{name}: {part.num_cut} of {len(part.rows)} {which} rows lost the beginning of their prompt to fit {part.max_length} tokens "
            f"(first: {part.cut[0]})"
            for which, part in (("training", self.train), ("validation", self.validation))
            if part.num_cut
        )
        unedited = (f"{name}: {self.num_unedited} of {len(self.train.rows)} training rows have no edited token",) if self.num_unedited else ()
        whole = self.config.trainer.fsdp and self.base.decoder.shards is None
        return cut + unedited + ((f"{name}: trainer.fsdp has no effect in one process, which holds the whole base",) if whole else ())

    @property
    def num_unedited(self) -> int:
        """Training rows whose prompts have no token at the positions of a ReFT adapter: the base answers them as ever.

        Beside a LoRA, which learns from them all the same, they count only where all are such and the ReFT part stays as it was made.
        """
        if not self.spec.reft:
            return 0
        count = sum(not edited_places(row, self.spec) for row in self.train.rows)
        return count if not self.spec.target_modules or count == len(self.train.rows) else 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: r (d_in + d_out) a site of LoRA, d_out more under DoRA, and each ReFT site's tensors."""
        shape = self.base.decoder.shape
        sites = self.spec.sites(shape.num_layers, shape.linears)
        lora = sum(self.spec.rank_at(site) * sum(shape.linears[site.target]) for site in sites)
        lora += sum(shape.linears[site.target][0] for site in sites) if self.spec.use_dora else 0
        shapes = [tensor_shapes(self.spec.reft[site.part], site.layer, shape.hidden) for site in self.spec.edit_sites(shape.num_layers)]
        head = self.base.decoder.head_shapes(len(self.labels)).values() if self.labels else ()
        return int(lora + sum(map(math.prod, head)) + sum(math.prod(size) for tensors in shapes for size in tensors.values()))

    @property
    def first_layer(self) -> int:
        """The first block that the adapter changes."""
        return first_layer(self.spec, self.base.decoder.shape.num_layers, self.base.decoder.shape.linears)


@dataclass(frozen=True)
class CostEstimate:
    """seconds of training and peak memory_bytes of the process, extrapolated from `measured_tokens` tokens."""

    seconds: float
    memory_bytes: int
    tokens_per_s: float
    measured_tokens: int


def plan_training(config: TrainConfig, base: Base, data: TaskData, *, stop: tuple[str, ...] = ()) -> TrainingPlan:
    """Encode the rows and fix everything that decides the result. stop goes into the adapter's prompt format.

    Raises DataError and ConfigError as encode_examples and Masking.check do, and BaseMismatch when layers_to_transform names a layer that the base
    lacks.
    """
    trainer = config.trainer
    masking, decoder = None, base.decoder
    if trainer.mlm_probability is not None:
        check_texts(data, config)
        decoder, masking = decoder.masked_lm(), Masking.of(base.tokenizer, trainer.mlm_probability, trainer.seed)
    if trainer.train_on_prompt and decoder.whole_prompts and not decoder.classifies:
        raise ConfigError(
            "trainer.train_on_prompt is on, but this base's encoder reads prompts and predicts none of their tokens", hint="leave it out"
        )
    classes = class_labels(data, config) if decoder.classifies else ()
    encoded = [
        encode_examples(
            examples,
            base.tokenizer,
            max_length,
            train_on_prompt=trainer.train_on_prompt,
            chat=data.task.chat,
            context=base.context_length,
            eos_ids=base.eos_ids,
            classes=classes,
            whole=masking is not None,
        )
        for examples, max_length in ((data.train, trainer.max_length), (data.validation, None if trainer.max_length == "p95" else trainer.max_length))
    ]
    if masking is not None:
        for part in encoded:
            for row in part.rows:
                masking.check(row)
    prompt = data.task.prompt_format(stop)
    shape = base.decoder.shape
    spec = spec_over(base.name, config.adapter, decoder)
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "base": base.fingerprint.digest,
        "adapter": _without_defaults(config.adapter, _LATER_ADAPTER),
        "trainer": _without_defaults(config.trainer, _LATER_TRAINER, _NO_MATTER if spec.reft else _NO_MATTER | _OF_REFT),
        "prompt": prompt.to_json(),
        "rows": [[row.token_ids, row.first_label, *([row.num_prompt] if spec.reft else [])] for part in encoded for row in part.rows],
    }
    lowest = first_layer(spec, shape.num_layers, shape.linears)
    if lowest and type(decoder).can_enter:  # whether or not this one is held in parts
        # then rows enter there one by one (train.entering), which decides last bits
        identity["first_layer"] = lowest
    if classes:
        identity["labels"] = classes
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return TrainingPlan(config, base, data, encoded[0], encoded[1], prompt, spec, digest, classes, masking)


def _without_defaults(section: Section, later: Collection[str], excluded: set[str] | None = None) -> dict[str, Any]:
    """A section's values; keys that came later are left out where they have their default, so that jobs from before them keep their identity."""
    fields = type(section).model_fields
    values = section.model_dump(mode="json", exclude=excluded)
    return {name: value for name, value in values.items() if name not in later or value != fields[name].default}


def training_job(plan: TrainingPlan, folder: Path, team: Team | None = None, room: Room | None = None) -> TrainingJob:
    """The job of a plan, from its start; team: the processes that share it; room: shared with other jobs (train.entering).

    Raises ConfigError for a start that the base's linears cannot give.
    """
    from atoll.train.job import TrainingJob
    from atoll.train.start import start_adapter
    from atoll.train.team import ALONE

    decoder, trainer, adapter = plan.decoder, plan.config.trainer, plan.config.adapter
    of_lora = (adapter.init_lora_weights, adapter.loraplus_lr_ratio) if isinstance(adapter, LoraAdapterConfig) else ("default", None)
    start = start_adapter(plan.spec, decoder, trainer.seed, of_lora[0], num_classes=len(plan.labels))
    train_rows, validation_rows = plan.train.rows, plan.validation.rows
    more: dict[str, Any] = {"removed": start.removed, "b_ratio": of_lora[1], "masking": plan.masking, "team": team or ALONE, "room": room}
    told: dict[str, Any] = {"title": plan.config.name or plan.data.task.name, "settings": plan.config.model_dump(mode="json")}
    return TrainingJob(decoder, start.adapter, train_rows, validation_rows, trainer, folder, plan.digest, **more, **told)


def with_manifest(plan: TrainingPlan, result: TrainResult) -> TrainResult:
    """The result of the plan's job, its adapter with the manifest."""
    return dataclasses.replace(result, adapter=dataclasses.replace(result.adapter, manifest=_manifest(plan, result)))


def _manifest(plan: TrainingPlan, result: TrainResult) -> dict[str, Any]:
    """What PEFT's config has no field for. All of it follows from the job: a resumed run is the same version. Times are in the run's record."""
    progress, task = result.progress, plan.data.task
    return {
        "format": 1,
        "kind": plan.spec.kind,
        "name": plan.config.name or task.name,
        "description": task.title,
        "task": task.name,
        "base": plan.base.describe(),
        "prompt": plan.prompt.to_json(),
        "quantization": QuantizationConfig.named(rounded).record() if (rounded := plan.base.fingerprint.quantization) else None,
        "parents": [],
        **({"labels": list(plan.labels)} if plan.labels else {}),
        "training": {
            "config": plan.config.model_dump(mode="json", exclude={"base": True, "name": True, "cost": True, "trainer": {"log_to"}}),
            "job": plan.digest,
            "data": {"task": task.name, "version": plan.data.version, **plan.train.report()},
            "steps": progress.step,
            "total_steps": result.total_steps,
            "stopped_early": progress.stopped_early,
            "best_step": progress.best_step or progress.step,
            "tokens": progress.tokens,
            "label_tokens": progress.label_tokens,
            "train_loss": progress.train_loss,
            "validation_losses": progress.evaluations,
        },
    }


def estimate_cost(plan: TrainingPlan) -> CostEstimate:
    """Time forward and backward on the job's first micro-batches, some thousand tokens (after one to warm up), and count what is held at once.

    What a job makes of each row once and keeps (train.entering) is timed apart and counted once a row.
    memory_bytes = process + base + float32 vectors of the adapter (values, gradient, best, the optimizer's) + activations of the largest micro-batch
    + what is kept.
    """
    from atoll.train.job import entering_states
    from atoll.train.rows import adapter_batch, label_batch
    from atoll.train.start import start_adapter
    from atoll.train.weights import TrainableAdapter

    decoder, trainer = plan.decoder, plan.config.trainer
    shape = decoder.shape
    start = start_adapter(plan.spec, decoder, 0, num_classes=len(plan.labels)).adapter
    in_base = isinstance(plan.config.adapter, LoraAdapterConfig) and plan.config.adapter.starts_in_base
    removed = start.modules if in_base else None
    weights = TrainableAdapter(start, shape.linears, decoder.device, shape.groups, weight=decoder.weight, removed=removed)
    kept = entering_states(decoder, plan.first_layer, len(plan.train.rows), trainer)
    lengths = [len(row.token_ids) for row in plan.train.rows]
    steps = epoch_batches(lengths, trainer.batch_size, trainer.seed, 0)
    seconds, once, tokens, warm = 0.0, 0.0, 0, False
    for micro in [micro for step in steps for micro in micro_batches(step, lengths, trainer.micro_batch_tokens)]:
        rows = [row if plan.masking is None else plan.masking.hide(row, "") for row in (plan.train.rows[index] for index in micro)]
        packed = label_batch(rows, decoder.device)
        started = time.perf_counter()
        entering = kept.of(rows) if kept is not None else None
        entered = time.perf_counter()
        hidden = decoder.forward(packed.batch, adapter_batch(packed, [weights]), entering=entering)
        loss = decoder.label_losses(hidden, packed.labels).sum()
        if loss.requires_grad:
            loss.backward()
        if warm:
            seconds, once = seconds + time.perf_counter() - entered, once + entered - started
            tokens += packed.batch.num_tokens
        warm = True
        if tokens >= _MEASURED_TOKENS:
            break
    if not tokens:  # one micro-batch in all: it has warmed up, time it as it is
        tokens, seconds, once = packed.batch.num_tokens, time.perf_counter() - entered, entered - started
    evaluations = len(plan.validation.rows) and max(1, plan.total_steps // (trainer.eval_every or len(steps)))
    of_validation = sum(len(row.token_ids) for row in plan.validation.rows)
    work = sum(lengths) * plan.total_steps / len(steps) + _FORWARD_SHARE * evaluations * of_validation
    rows_once = (sum(lengths) + of_validation) * once / tokens if kept is not None else 0.0
    return CostEstimate(work * seconds / tokens + rows_once, _memory_bytes(plan, kept is not None), tokens / (seconds + once), tokens)


def _memory_bytes(plan: TrainingPlan, keeps: bool) -> int:
    shape, item = plan.base.decoder.shape, plan.base.dtype.itemsize
    lengths = sorted((len(row.token_ids) for row in plan.train.rows), reverse=True)
    tokens = min(lengths[0] * plan.config.trainer.batch_size, max(plan.config.trainer.micro_batch_tokens, lengths[0]))
    q, kv = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    scores = shape.num_heads * min(lengths[0], 512)
    a_token_a_layer = 2 * 4 * shape.hidden + item * (2 * shape.hidden + 3 * (q + 2 * kv) + 2 * q + 3 * shape.mlp + scores)
    base = plan.base.decoder.linear_bytes + item * shape.vocabulary * shape.hidden
    with_gradients = tokens * (shape.num_layers - plan.first_layer) * a_token_a_layer
    every_token = sum(lengths) + sum(len(row.token_ids) for row in plan.validation.rows)
    kept = min(every_token * shape.hidden * 4, plan.config.trainer.reuse_mib << 20) if keeps else 0
    vectors = 3 + _MOMENTS[plan.config.trainer.optimizer]
    return _PROCESS_BYTES + base + vectors * 4 * plan.num_parameters + with_gradients + kept + 4 * LOGIT_BYTES
