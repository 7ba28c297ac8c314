"""What Hugging Face's Trainer and PEFT saved is published with one command, and answers as it does there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.hub import Hub

ROWS = [("say a:", " one"), ("say b:", " two"), ("say c:", " one"), ("say d:", " two")]


@pytest.fixture
def trained(tiny_base_dir: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA that transformers' Trainer trained for two steps, with a checkpoint, and saved; and PEFT's model of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir)
    rows = []
    for prompt, completion in ROWS:
        ids = tokenizer(prompt + completion)["input_ids"]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries among themselves
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        arguments = TrainingArguments(
            str(out), max_steps=2, save_steps=1, per_device_train_batch_size=1, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return out, trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainers_folder_is_published_by_one_command_and_answers_alike(atoll: Any, trained: tuple[Path, Any], tiny_base_dir: Path) -> None:
    """The checkpoint, which is named where the folder around it is given; the saved folder, whose other files are left out, a pickle never."""
    out, trainer = trained
    around = atoll("hub", "publish", out, "mine")
    assert around.code == 1 and f"the newest adapter inside is {out / 'checkpoint-2'}" in around.err
    inside = atoll("hub", "publish", out / "checkpoint-2", "mine", "--base", tiny_base_dir)
    assert inside.code == 0 and inside.out.strip() == "mine@1" and "left out: optimizer.pt" in inside.err
    trainer.save_model()
    saved = atoll("hub", "publish", out, "saved", "--base", tiny_base_dir, "--json").json()
    assert "training_args.bin" in saved["left_out"] and "checkpoint-2/" in saved["left_out"]

    prompt = trainer.processing_class("say b:", return_tensors="pt")
    with torch.no_grad():
        theirs = trainer.model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    answer = atoll("generate", "--adapter", "mine", "--dtype", "float32", "--max-new-tokens", 8, "--plain", "--json", "say b:")
    told = answer.json()
    assert answer.code == 0 and told["token_ids"] == [token for token in theirs if token != 2][: len(told["token_ids"])] and told["token_ids"]
    digests = {Hub().resolve(name).digest for name in ("mine", "saved")}
    assert len(digests) >= 1

    weights = out / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused = atoll("hub", "publish", out, "pickled")
    assert refused.code == 1 and "adapter_model.bin is a pickle" in refused.err and "safe_serialization=True" in refused.err
