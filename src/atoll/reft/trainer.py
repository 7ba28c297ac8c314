"""PyReFT's trainers on the Trainer of transformers 5: batches with places, R kept orthonormal, checkpoints that a fresh process can read.

A checkpoint holds the whole ReFT adapter in `intervenable_model` (config and weights, as ReftModel.save writes them), so it loads by ReftModel.load
and resumes to the same bits. Everything about evaluation, saving and schedules is TrainingArguments', with transformers' own meaning.

Used by callers of atoll.reft; `atoll train` has a loop of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainerCallback

from atoll.errors import TrainingError
from atoll.reft.collators import ReftDataCollator
from atoll.reft.rows import IGNORE_INDEX

FOLDER = "intervenable_model"  # of a checkpoint; PyReFT's name
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_COLUMNS = (*_MODEL_INPUTS, "labels", "label", "label_ids", "intervention_locations", "subspaces")

_log = logging.getLogger(__name__)


class _Retract(TrainerCallback):  # type: ignore[misc]  # transformers has no annotations here
    """R back onto orthonormal rows after each optimizer step, before anything reads it."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unwrapped(kwargs["model"]).retract()


class ReftTrainer(Trainer):  # type: ignore[misc]
    """Trains a ReftModel's interventions, and what else of it requires gradients, for next-token prediction.

    Takes transformers.Trainer's arguments; `tokenizer` is the former name of processing_class. Weight decay acts on no R with orthonormal rows, on no
    bias and no norm. Gradient accumulation weighs tokens, not batches, as transformers does. Of several GPUs in one process it uses one; start one
    process a GPU (torchrun) for more.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.n_gpu > 1:  # torch's DataParallel would cut the batch, but not its places
            _log.warning("training on one of %d GPUs; start one process a GPU with torchrun to use them all", args.n_gpu)
            args._n_gpu = 1
        tokenizer = tokenizer if processing_class is None else processing_class
        if data_collator is None and tokenizer is not None:
            data_collator = self._collator(tokenizer)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, tokenizer, **kwargs)
        self._signature_columns = list(_COLUMNS)  # of a `datasets` data set; transformers would read them off ReftModel.forward
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = self._weighs_tokens, self._weighs_tokens
        self.add_callback(_Retract())

    _weighs_tokens = True  # whether the loss is a mean over the next tokens

    def _collator(self, tokenizer: Any) -> ReftDataCollator:
        """What makes batches if nobody gave a collator."""
        inner = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX) if self._weighs_tokens else DataCollatorWithPadding(tokenizer)
        return ReftDataCollator(data_collator=inner)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator  # rows of our data sets hold what their collator wants

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """transformers' names without those of R, which is a direction and has no size to decay."""
        return [name for name in super().get_decay_parameter_names(model) if "rotate_layer" not in name]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The edited model's loss of one batch; with num_items_in_batch, its share of the mean over so many tokens."""
        labels = inputs["labels"]
        if self.compute_loss_func is not None:
            outputs = self._edited(model, inputs)
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        outputs = self._edited(model, inputs, labels if self.label_smoother is None else None)
        loss = outputs["loss"] if self.label_smoother is None else self.label_smoother(outputs, labels, shift_labels=True)
        if num_items_in_batch is not None:
            loss = loss * (labels[..., 1:] != IGNORE_INDEX).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # torch averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """transformers' step; rows without labels give logits alone."""
        if inputs.get("labels") is not None:
            step: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return step
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self._edited(model, self._prepare_inputs(inputs))["logits"]
        return (None, None, None) if prediction_loss_only else (None, logits.detach(), None)

    def _edited(self, model: Any, inputs: dict[str, Any], labels: Tensor | None = None) -> Any:
        """The output of the edited model for a collated batch. Without places, every token is edited, as ReftModel does."""
        locations, subspaces = inputs.get("intervention_locations"), inputs.get("subspaces")
        _, outputs = model(
            {name: inputs[name] for name in _MODEL_INPUTS if name in inputs},
            unit_locations=None if locations is None else {"sources->base": (None, locations.transpose(0, 1).tolist())},
            labels=labels,
            subspaces=None if subspaces is None else subspaces.transpose(0, 1).tolist(),
        )
        return outputs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter with its config, the tokenizer and the arguments, over what stood there before. Of several processes one writes."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        unwrapped(self.model).save(str(folder / FOLDER), include_model=True)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint) / FOLDER
        if not (folder / "config.json").is_file():
            raise TrainingError(
                f"{resume_from_checkpoint} has no {FOLDER}/config.json, so it is no checkpoint of this trainer",
                hint="of a checkpoint that PyReFT wrote only the weights can be read, by reft_model.load_intervention",
            )
        unwrapped(self.model if model is None else model).load_intervention(str(folder), include_model=True)

    def _load_best_model(self) -> None:
        _log.info("the best model is %s (score %s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class ReftTrainerForCausalLM(ReftTrainer):
    """ReftTrainer by the name that PyReFT's examples use."""


class ReftTrainerForCausalLMDistributed(ReftTrainer):
    """ReftTrainer by PyReFT's name for several processes: each gets its share of every epoch, and the first one saves. Start them with torchrun."""


class ReftTrainerForSequenceClassification(ReftTrainer):
    """For models with a classification head: regression, one class of several, or several at once, by the base's config.problem_type.

    Without a problem type, one label is regression, whole-number labels are classes, others are several at once. The loss is computed in float32.
    """

    _weighs_tokens = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The edited model's loss of one batch, a mean over its rows."""
        outputs, labels = self._edited(model, inputs), inputs["labels"]
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = self._loss(unwrapped(model).model.config, outputs["logits"].float(), labels)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, config: Any, logits: Tensor, labels: Tensor) -> Tensor:
        kind = config.problem_type
        if kind is None:
            classes = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            kind = "regression" if config.num_labels == 1 else classes
        if kind == "regression":
            return F.mse_loss(logits.reshape(labels.shape), labels.float())
        if kind == "single_label_classification":
            return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1), label_smoothing=self.args.label_smoothing_factor)
        return F.binary_cross_entropy_with_logits(logits, labels.float())


def unwrapped(model: Any) -> Any:
    """The ReftModel inside what torch wraps for several processes or for compiling."""
    while not hasattr(model, "interventions"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model
