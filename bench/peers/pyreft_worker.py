"""PyReFT's own trainer on LoReFT, as a contestant of the ReFT bench. Runs in an environment with pyreft 0.1.0 and torch, transformers, accelerate."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from protocol import run_worker, step_times


class PyreftTraining:
    """One epoch over the rows from fresh interventions, whenever asked: ReftTrainerForCausalLM with transformers' defaults."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(options["threads"])
        self._options = options
        self._model = AutoModelForCausalLM.from_pretrained(options["base"], dtype=torch.bfloat16)
        self._tokenizer = AutoTokenizer.from_pretrained(options["base"])

    def details(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {name: version(name) for name in ("pyreft", "pyvene", "transformers", "torch")}

    def train(self) -> dict[str, Any]:
        import pyreft
        import torch
        from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

        options, model = self._options, self._model
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        torch.manual_seed(0)
        config = pyreft.ReftConfig(
            representations=[
                {
                    "layer": layer,
                    "component": "block_output",
                    "low_rank_dimension": options["rank"],
                    "intervention": pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=options["rank"], dtype=torch.bfloat16),
                }
                for layer in range(layers)
            ]
        )
        reft_model = pyreft.get_reft_model(model, config)
        items = [self._item(row["ids"], row["num_prompt"], layers) for row in options["rows"]]
        collator = pyreft.ReftDataCollator(DataCollatorForSeq2Seq(self._tokenizer, model, label_pad_token_id=-100, padding="longest"))
        moments: list[float] = []

        class Trainer(pyreft.ReftTrainerForCausalLM):  # type: ignore[misc]
            """transformers since 4.46 hands over num_items_in_batch, which 0.1.0 does not take; its loss is the batch's mean either way."""

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                return super().compute_loss(model, inputs, return_outputs)

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                moments.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                moments.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=options["batch"],
                learning_rate=options["learning_rate"],
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = Trainer(
                model=reft_model,
                processing_class=self._tokenizer,
                args=arguments,
                train_dataset=items,
                eval_dataset=None,
                data_collator=collator,
                callbacks=[Clock()],
            )
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return step_times(moments, options["batch"], losses)

    def _item(self, ids: list[int], num_prompt: int, layers: int) -> dict[str, Any]:
        import pyreft
        import torch

        places = pyreft.get_intervention_locations(
            last_position=num_prompt, positions=self._options["positions"], num_interventions=layers, share_weights=True, pad_mode="last"
        )
        labels = [-100] * num_prompt + ids[num_prompt:]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "intervention_locations": places}


if __name__ == "__main__":
    run_worker(PyreftTraining)
