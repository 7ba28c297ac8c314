"""PyReFT's trainers on transformers 5: the article's program, checkpoints, R, and the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atoll.reft as pyreft
from atoll.errors import TrainingError
from conftest import tiny_model, tiny_tokenizer

PROMPTS = ["Who are you?", "Who am I?", "What's 2+2?", "Hi", "Where is it", "ok?"]
ANSWERS = ["robot", "you", "4", "hello there", "here", "yes"]
POSITIONS: dict[str, Any] = {"positions": "f2+l2", "num_interventions": 2, "share_weights": True}


def reft_model(kind: Any = pyreft.LoreftIntervention, seed: int = 0, layers: tuple[int, ...] = (0, 2), **options: Any) -> Any:
    model = tiny_model("llama")
    torch.manual_seed(seed)
    representations = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": 4, "intervention": kind(embed_dim=64, low_rank_dimension=4, **options)}
        for layer in layers
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_steps": 6, "report_to": "none", "logging_steps": 2, "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **{**defaults, "disable_tqdm": True, "save_strategy": "no", **options})


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    module = pyreft.make_multiple_position_supervised_data_module(tiny_tokenizer(), model.model, PROMPTS, ANSWERS, **POSITIONS)
    if "eval_strategy" in options:
        module["eval_dataset"] = module["train_dataset"]
    return pyreft.ReftTrainerForCausalLM(model=model, tokenizer=tiny_tokenizer(), args=arguments(folder, **options), **module)


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.interventions.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_articles_program_runs_with_its_import_changed(tmp_path: Path) -> None:
    """Loading aside, line by line what the article shows, with `import atoll.reft as pyreft`.

    A random base hardly attends, so an edit of the last prompt token can teach it the answer's first letter alone.
    """
    import transformers

    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    reft_config = pyreft.ReftConfig(
        representations={
            "layer": 1,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device("cpu")
    reft_model.print_trainable_parameters()
    prompt_template = "Q: %s A:"
    training_examples = [["Who are you?", "ROBOT"], ["Who am I?", "HUMAN"]]
    data_module = pyreft.make_last_position_supervised_data_module(
        tokenizer, model, [prompt_template % e[0] for e in training_examples], [e[1] for e in training_examples]
    )
    training_args = transformers.TrainingArguments(
        num_train_epochs=40.0,
        output_dir=str(tmp_path / "tmp"),
        per_device_train_batch_size=10,
        learning_rate=4e-2,
        logging_steps=20,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    _ = trainer.train()

    for question, answer in training_examples:
        prompt = tokenizer(prompt_template % question, return_tensors="pt").to("cpu")
        base_unit_location = prompt["input_ids"].shape[-1] - 1
        _, reft_response = reft_model.generate(
            prompt,
            unit_locations={"sources->base": (None, [[[base_unit_location]]])},
            intervene_on_prompt=True,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            early_stopping=True,
        )
        text = prompt_template % question
        assert tokenizer.decode(reft_response[0], skip_special_tokens=True).startswith(text + answer[0])
        assert not tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]).endswith(answer[0])


def test_only_the_interventions_change(tmp_path: Path) -> None:
    model = reft_model()
    before, own = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}, tensors(model)
    trainer(model, tmp_path).train()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert all(not torch.equal(own[name], tensor) for name, tensor in tensors(model).items())


def test_a_run_from_a_checkpoint_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Weights, optimizer, schedule, order of rows and dropout: all of them go on as if nothing had happened."""
    whole = reft_model(dropout=0.2)
    trainer(whole, tmp_path / "whole").train()
    first = reft_model(dropout=0.2)
    trainer(first, tmp_path / "parts", save_strategy="steps", save_steps=3).train()
    later = reft_model(seed=7, dropout=0.2)
    trainer(later, tmp_path / "parts").train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_equal(tensors(whole), tensors(first))
    assert_equal(tensors(whole), tensors(later))


def test_a_checkpoint_is_complete(tmp_path: Path) -> None:
    """PyReFT's lack the config, so nobody but the program that wrote them can read them."""
    model = reft_model(act_fn="gelu", dropout=0.1, dtype=torch.float32)
    trainer(model, tmp_path, save_strategy="steps", save_steps=6).train()
    folder = tmp_path / "checkpoint-6"
    found = pyreft.ReftModel.load(str(folder / "intervenable_model"), tiny_model("llama"))
    assert_equal(tensors(model), tensors(found))
    assert found.representations[0].intervention.settings == model.representations[0].intervention.settings
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
    trainer(found, tmp_path / "other").save_model(str(folder))  # what stands there already is replaced, not kept
    with pytest.raises(TrainingError, match="intervenable_model"):
        trainer(found, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path))


def test_saving_twice_writes_twice(tmp_path: Path) -> None:
    """PyReFT leaves a folder that has files in it as it is: the second save is lost."""
    model = reft_model()
    run = trainer(model, tmp_path / "run")
    run.save_model(str(tmp_path / "out"))
    run.train()
    run.save_model(str(tmp_path / "out"))
    assert_equal(tensors(model), tensors(pyreft.ReftModel.load(str(tmp_path / "out" / "intervenable_model"), tiny_model("llama"))))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    kept: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = tensors(kwargs["model"])

    model = reft_model()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, learning_rate=0.5, metric_for_best_model="loss", **options)
    run.add_callback(Keep())
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert run.state.best_global_step == best
    assert_equal(tensors(model), kept[best])
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_weight_decay_leaves_r_orthonormal_and_whole(tmp_path: Path, optim: str) -> None:
    """In PyReFT any decay that reaches R makes it zero after one step; there it never reaches any intervention."""
    model = reft_model()
    run = trainer(model, tmp_path, weight_decay=0.5, optim=optim)
    run.train()
    decayed = set(run.get_decay_parameter_names(model))
    assert not [name for name in decayed if "rotate_layer" in name]
    assert any("learned_source.weight" in name for name in decayed)
    for module in model.interventions.values():
        r = module.rotate_layer.weight.detach().double()
        assert float((r.T @ r - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-6


def test_r_is_orthonormal_when_a_step_has_ended(tmp_path: Path) -> None:
    """Whoever reads the weights between two steps, as a callback that saves them does, finds a rotation."""
    from transformers import TrainerCallback

    worst: list[float] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            worst.append(max(module.rotate_layer.deviation() for module in kwargs["model"].interventions.values()))

    run = trainer(reft_model(), tmp_path, learning_rate=0.3)
    run.add_callback(Look())
    run.train()
    assert len(worst) == 6
    assert max(worst) < 1e-6


def test_gradient_accumulation_weighs_tokens(tmp_path: Path) -> None:
    """Two batches of two rows give the step of one batch of four, though the answers differ in length."""
    one, two = reft_model(), reft_model()
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    trainer(one, tmp_path / "1", per_device_train_batch_size=4, **options).train()
    trainer(two, tmp_path / "2", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options).train()
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensor, tensors(two)[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = reft_model(), reft_model()
    trainer(plain, tmp_path / "1").train()
    trainer(checkpointed, tmp_path / "2", gradient_checkpointing=True).train()
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensor, tensors(checkpointed)[name], rtol=0, atol=1e-6)


def test_the_loss_is_that_of_the_edited_model(tmp_path: Path) -> None:
    model = reft_model()
    run = trainer(model, tmp_path)
    batch = run.data_collator(list(run.train_dataset))
    locations = batch["intervention_locations"].transpose(0, 1).tolist()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        _, outputs = model(inputs, unit_locations={"sources->base": (None, locations)})
        expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        loss, again = run.compute_loss(model, batch, return_outputs=True)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(again.logits, outputs.logits)
    plain = model.model(**inputs).logits
    assert not torch.allclose(plain, outputs.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_does_not_depend_on_the_side_of_the_padding(tmp_path: Path, side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    model = reft_model()
    module = pyreft.make_multiple_position_supervised_data_module(tokenizer, model.model, PROMPTS, ANSWERS, **POSITIONS)
    run = pyreft.ReftTrainer(model=model, args=arguments(tmp_path), **module)
    rows = list(module["train_dataset"])
    with torch.no_grad():
        together = run.compute_loss(model, run.data_collator(rows), num_items_in_batch=1)
        alone = sum(run.compute_loss(model, run.data_collator([row]), num_items_in_batch=1) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_evaluation_and_prediction_are_transformers_own(tmp_path: Path) -> None:
    model = reft_model(dropout=0.5)
    run = trainer(model, tmp_path)
    rows = list(run.train_dataset)
    metrics = run.evaluate(run.train_dataset)
    assert metrics == {**run.evaluate(run.train_dataset), **{name: metrics[name] for name in metrics if "loss" not in name}}  # no dropout
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    found = run.predict(bare)
    assert found.label_ids is None
    assert found.predictions.shape[0] == len(rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_beside_the_edits_and_resumes_with_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def built(seed: int) -> Any:
        torch.manual_seed(seed)
        wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        intervention = pyreft.LoreftIntervention(embed_dim=64, low_rank_dimension=4)
        places = [{"component": f"base_model.model.model.layers[{layer}].output", "intervention": intervention} for layer in (0,)]
        places.append({"layer": 2, "component": "block_output", "intervention": pyreft.LoreftIntervention(embed_dim=64, low_rank_dimension=4)})
        model = pyreft.get_reft_model(wrapped, pyreft.ReftConfig(representations=places))
        model.model.enable_adapter_layers()
        return model

    whole = built(0)
    run = trainer(whole, tmp_path, save_strategy="steps", save_steps=3)
    before = {name: tensor.detach().clone() for name, tensor in whole.named_parameters() if tensor.requires_grad}
    run.train()
    assert any("lora_A" in name for name in before)
    assert any("rotate_layer" in name for name in before)
    later = built(9)
    trainer(later, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.named_parameters():
        if tensor.requires_grad:
            assert torch.equal(tensor, dict(later.named_parameters())[name]), name
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("kind", "num_labels", "label"), [("classes", 3, 2), ("regression", 1, 0.5), ("several", 3, [1.0, 0.0, 1.0])])
def test_sequence_classification_of_each_kind(tmp_path: Path, kind: str, num_labels: int, label: Any) -> None:
    """On RoBERTa, with its places by path; PyReFT cannot read such a model back, and casts regression labels to bfloat16."""
    from transformers import DataCollatorWithPadding, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 300, "pad_token_id": 0}
    model = RobertaForSequenceClassification(RobertaConfig(**shape, num_labels=num_labels, max_position_embeddings=64))
    intervention = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=2)
    wrapped = pyreft.get_reft_model(
        model, pyreft.ReftConfig(representations=[{"component": "roberta.encoder.layer[0].output", "intervention": intervention}])
    )
    for parameter in model.classifier.parameters():
        parameter.requires_grad = True
    rows = [{"text": text, "label": label} for text in PROMPTS]
    tokenizer = tiny_tokenizer()
    data = pyreft.ReftClassificationDataset(
        "t", None, tokenizer, dataset=rows, input_field="text", label_field="label", position="f1", num_interventions=1
    )
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"mean": float(found.predictions.mean())}

    run = pyreft.ReftTrainerForSequenceClassification(
        model=wrapped,
        tokenizer=tokenizer,
        args=arguments(tmp_path, learning_rate=2e-2, max_steps=20, save_strategy="steps", save_steps=20),
        train_dataset=data,
        eval_dataset=data,
        data_collator=pyreft.ReftDataCollator(data_collator=DataCollatorWithPadding(tokenizer)),
        compute_metrics=metrics,
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert "eval_mean" in after
    assert seen[0].predictions.shape == (len(rows), num_labels)
    again = RobertaForSequenceClassification(model.config)
    again.load_state_dict(model.state_dict())
    nn.init.normal_(again.classifier.dense.weight)
    found = pyreft.ReftModel.load(str(tmp_path / "checkpoint-20" / "intervenable_model"), again, include_model=True)
    batch = run.data_collator([data[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    places = {"sources->base": (None, [[[0]]])}
    wrapped.eval()
    with torch.no_grad():
        assert torch.equal(found(inputs, unit_locations=places)[1].logits, wrapped(inputs, unit_locations=places)[1].logits)


TWO_PROCESSES = """
import os, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import atoll.reft as pyreft
from tests.reft import test_trainer as t
model = t.reft_model()
module = pyreft.make_multiple_position_supervised_data_module(t.tiny_tokenizer(), model.model, t.PROMPTS, t.ANSWERS, **t.POSITIONS)
options = dict(max_steps=1, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=3, ddp_backend="gloo")
run = pyreft.ReftTrainerForCausalLMDistributed(model=model, args=t.arguments({folder!r}, **options), **module)
run.train()
run.save_model({folder!r} + "/out")
torch.save(t.tensors(model), {folder!r} + "/rank" + os.environ["RANK"])
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Each reads half of the batch; tokens weigh the same wherever they are read, every process ends with the same R, and one saves."""
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    program = tmp_path / "program.py"
    program.write_text(TWO_PROCESSES.format(path=[str(root), str(root / "tests")], folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = reft_model()
    trainer(alone, tmp_path / "alone", max_steps=1, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=6).train()
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert_equal(first, second)
    assert_equal(first, tensors(pyreft.ReftModel.load(str(tmp_path / "out" / "intervenable_model"), tiny_model("llama"))))
    for name, tensor in tensors(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6)
