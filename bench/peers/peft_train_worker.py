"""transformers' Trainer with PEFT, or TRL's SFTTrainer, as a contestant of the training bench. Runs in an environment with torch, transformers, peft,
accelerate, and trl for the latter.

Both get the base in bfloat16, dynamic padding, rows of like length together, and a loss on completions alone; TRL with its default, chunked loss.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from protocol import run_worker


class PeftTraining:
    """One epoch over given rows from fresh factors, whenever asked."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(options["threads"])
        self._options, self._trl = options, bool(options["trl"])

    def details(self) -> dict[str, Any]:
        from importlib.metadata import version

        names = ("trl", "peft", "transformers", "torch") if self._trl else ("peft", "transformers", "torch")
        return {name: version(name) for name in names}

    def train(self, rows: list[dict[str, Any]], batch: int) -> dict[str, Any]:
        """Seconds of an epoch, and the loss of each step. Loading and wrapping the model are not timed."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = self._options
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(options["base"])
        model = AutoModelForCausalLM.from_pretrained(options["base"], dtype=torch.bfloat16)
        lora = LoraConfig(r=options["rank"], lora_alpha=2 * options["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "output_dir": folder,
                "num_train_epochs": 1,
                "per_device_train_batch_size": batch,
                "learning_rate": options["learning_rate"],
                "lr_scheduler_type": "constant",
                "weight_decay": 0.0,
                "bf16": True,
                "train_sampling_strategy": "group_by_length",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
            }
            if self._trl:
                trainer = _sft_trainer(model, lora, tokenizer, rows, settings)
            else:
                trainer = _trainer(get_peft_model(model, lora), tokenizer, rows, settings)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def _trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    items = [{"input_ids": row["ids"], "labels": [-100] * row["num_prompt"] + row["ids"][row["num_prompt"] :]} for row in rows]
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding="longest")
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=items, data_collator=collator, processing_class=tokenizer)


def _sft_trainer(model: Any, lora: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masks = [[0] * row["num_prompt"] + [1] * (len(row["ids"]) - row["num_prompt"]) for row in rows]
    data = Dataset.from_list([{"input_ids": row["ids"], "completion_mask": mask} for row, mask in zip(rows, masks, strict=True)])
    config = SFTConfig(**settings, completion_only_loss=True, max_length=None, gradient_checkpointing=False)
    return SFTTrainer(model=model, args=config, train_dataset=data, peft_config=lora, processing_class=tokenizer)


if __name__ == "__main__":
    run_worker(PeftTraining)
