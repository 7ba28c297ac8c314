"""Files written for Ludwig and Predibase: what each key becomes, and that none is ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.config import TrainConfig
from atoll.config_file import LoadedConfig, load_config
from atoll.errors import ConfigError
from atoll.ludwig_keys import RULES, base_name

ARTICLE = """\
prompt:
  template: >-
    FILL IN YOUR PROMPT TEMPLATE HERE
output_feature: label_and_explanation
preprocessing:
  split:
    type: fixed
    column: split
adapter:
  type: lora
quantization:
  # Uses bitsandbytes.
  bits: 4
base_model: mistralai/Mistral-7b-v0.1
"""

LONG = """\
model_type: llm
base_model: mistral-7b
input_features:
  - {name: instruction, type: text}
output_features:
  - name: output
    type: text
prompt:
  template: |-
    ### Instruction: {instruction}
    ### Input: {input}
    ### Response:
preprocessing:
  split: {type: random, probabilities: [0.9, 0.05, 0.05]}
  global_max_sequence_length: 256
adapter: {type: lora, r: 4, alpha: 8, dropout: 0.1, target_modules: [k_proj, v_proj]}
quantization: {bits: 4}
generation: {temperature: 0.1, max_new_tokens: 64}
trainer:
  type: finetune
  learning_rate: 5e-4
  batch_size: 2
  gradient_accumulation_steps: 8
  epochs: 2
  early_stop: 3
  optimizer: {type: adamw, betas: [0.9, 0.99], weight_decay: 0.01}
  learning_rate_scheduler: {decay: linear, warmup_fraction: 0.1}
  gradient_clipping: {clipglobalnorm: 0.5}
  enable_gradient_checkpointing: true
backend: {type: local}
"""

FIGURE_4 = """\
model_type: llm
base_model: mistralai/Mistral-7B-v0.1
input_features:
  - name: prompt
    type: text
    preprocessing: {max_sequence_length: 1194}
output_features:
  - name: answer
    type: text
    preprocessing: {max_sequence_length: null}
prompt:
  template: "<s>[INST] {realized_prompt} [/INST]"
  global_max_sequence_length: 1196
adapter: {type: lora, r: 8, target_modules: [v_proj, q_proj]}
trainer:
  type: finetune
  optimizer: {type: adam}
  batch_size: 1
  gradient_accumulation_steps: 16
  train_steps: 40000
  learning_rate: 0.0002
  eval_steps: 100
  eval_batch_size: 1
  steps_per_checkpoint: 1000
  learning_rate_scheduler: {decay: cosine, warmup_fraction: 0.03}
quantization: {bits: 4, bnb_4bit_compute_dtype: bfloat16}
"""

SHORT = "base_model: tiny\noutput_feature: label\nprompt: {template: 'Text: {text}'}\nadapter: lora\n"


def load(folder: Path, text: str, **overrides: Any) -> LoadedConfig[TrainConfig]:
    file = folder / "ludwig.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, "train", overrides)


def refusal(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert "\n" not in caught.value.message and "ludwig.yaml" in caught.value.message
    return caught.value


def test_the_articles_file_loads_byte_for_byte(tmp_path: Path) -> None:
    """LoRA Land published this file; what it leaves out becomes LoRA Land's settings and Ludwig's LoRA."""
    loaded = load(tmp_path, ARTICLE)
    config = loaded.config
    assert loaded.source == "predibase"
    assert config.base == "mistralai/Mistral-7B-v0.1"  # the hub's spelling of the article's 7b
    assert (config.data.template, config.data.target, config.data.split_column) == (
        "FILL IN YOUR PROMPT TEMPLATE HERE",
        "label_and_explanation",
        "split",
    )
    assert (config.adapter.r, config.adapter.scaling_alpha, config.adapter.dropout, config.adapter.targets) == (8, 16, 0.05, ("q_proj", "v_proj"))
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.schedule, trainer.warmup_fraction, trainer.batch_size, trainer.epochs) == (2e-4, "cosine", 0.03, 16, 3)
    assert trainer.max_steps is None and trainer.early_stop_patience == 5
    assert config.quantization is not None and config.quantization.bits == 4
    assert ["no {column}" in warning for warning in loaded.warnings] == [True]
    assert config.data.path is None
    with pytest.raises(ConfigError):
        config.require_data()


def test_the_long_form_is_translated_key_by_key(tmp_path: Path) -> None:
    """Every number of the file must reach the training; those without effect are named."""
    loaded = load(tmp_path, LONG)
    config, trainer = loaded.config, loaded.config.trainer
    assert loaded.source == "ludwig" and config.base == "mistralai/Mistral-7B-v0.1"
    assert config.data.columns == ("instruction", "input") and config.data.target == "output"
    assert config.data.ratios == (0.9, 0.05, 0.05) and config.data.split_column is None
    assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout, config.adapter.targets) == (4, 8, 0.1, ("k_proj", "v_proj"))
    assert (trainer.learning_rate, trainer.batch_size, trainer.epochs, trainer.early_stop_patience) == (5e-4, 16, 2, 3)
    assert (trainer.schedule, trainer.warmup_fraction, trainer.max_grad_norm, trainer.max_length) == ("linear", 0.1, 0.5, 256)
    assert (trainer.betas, trainer.weight_decay) == ((0.9, 0.99), 0.01)
    assert config.generation.max_new_tokens == 64
    named = [warning.split(": ")[1].split()[0] for warning in loaded.warnings]
    assert sorted(named) == ["generation.temperature", "preprocessing.split", "trainer.enable_gradient_checkpointing"]
    checkpointing = next(warning for warning in loaded.warnings if "checkpointing" in warning)
    assert "ludwig.yaml:29: trainer.enable_gradient_checkpointing is known but has no effect here: " in checkpointing


@pytest.mark.parametrize("section", ["prompt", "preprocessing"])
def test_the_papers_file_loads_with_its_length_in_either_place(tmp_path: Path, section: str) -> None:
    """40,000 forward passes of one row, 16 accumulated, are 2,500 optimizer steps of 16 rows; taking them as steps would train 16 times too long."""
    text = FIGURE_4
    if section == "preprocessing":
        text = text.replace("  global_max_sequence_length: 1196\n", "") + "preprocessing: {global_max_sequence_length: 1196}\n"
    loaded = load(tmp_path, text)
    config, trainer = loaded.config, loaded.config.trainer
    assert (trainer.batch_size, trainer.max_steps, trainer.max_length) == (16, 2500, 1196)
    assert (trainer.eval_every, trainer.checkpoint_every, config.data.max_validation_rows) == (63, 63, 100)
    assert (config.data.columns, config.data.target) == (("realized_prompt",), "answer")
    said = " ".join(loaded.warnings)
    assert "40000 of them are 2500 optimizer steps of 16 rows" in said
    assert "input_features[0].preprocessing.max_sequence_length is known but has no effect here: the limit of the whole row counts" in said
    assert "quantization.bnb_4bit_compute_dtype" in said


def test_data_comes_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ludwig's files have no data path; overrides use Atoll's own keys, also over a translated file."""
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path, SHORT, **{"data.path": "rows.csv", "trainer.epochs": 1}).config
    assert config.require_data().path == str(tmp_path / "rows.csv")
    assert config.trainer.epochs == 1


@pytest.mark.parametrize(
    ("change", "path", "meant"),
    [
        ("trainer: {learning_rte: 1}\n", "trainer.learning_rte", "did you mean trainer.learning_rate?"),
        ("trainer: {optimizer: {typ: adam}}\n", "trainer.optimizer.typ", "did you mean trainer.optimizer.type?"),
        ("learning_rate: 1\n", "learning_rate", "did you mean trainer.learning_rate?"),
        ("base_modle: x\n", "base_modle", "did you mean base_model?"),
        ("preprocessing: {splits: {}}\n", "preprocessing.splits", "did you mean preprocessing.split?"),
        ("input_features: [{name: text, typ: text}]\n", "input_features[0].typ", "did you mean input_features[0].type?"),
        ("quantization: {zebra: 1}\n", "quantization.zebra", "keys of quantization: bits"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path: Path, change: str, path: str, meant: str) -> None:
    """A typing mistake must not become a default."""
    error = refusal(tmp_path, SHORT + change)
    assert f"ludwig.yaml:5: {path} is not a key of Ludwig's LLM configuration" in error.message
    assert error.hint.startswith(meant)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainer: {type: dpo}\n", "trainer.type 'dpo' is not supported"),
        ("trainer: {type: none}\n", "asks for no training"),
        ("trainer: {type: finetun}\n", "trainer.type is 'finetun', which is not known"),
        ("trainer: {optimizer: {type: lamb}}\n", "trainer.optimizer.type 'lamb' is not supported"),
        ("trainer: {optimizer: muon}\n", "'muon' is not supported"),
        ("trainer: {optimizer: {type: sgd, nesterov: true}}\n", "trainer.optimizer.nesterov is known but not supported: sgd has plain momentum"),
        ("trainer: {learning_rate_scheduler: {decay: one_cycle}}\n", "decay 'one_cycle' is not supported"),
        ("trainer: {gradient_clipping: {clipvalue: 1.0}}\n", "gradient_clipping.clipvalue is known but not supported"),
        ("trainer: {increase_batch_size_on_plateau: 2}\n", "known but not supported"),
        ("trainer: {layers_to_freeze_regex: '.*'}\n", "known but not supported"),
        ("preprocessing: {split: {type: stratify, column: y}}\n", "preprocessing.split.type 'stratify' is not supported"),
        ("preprocessing: {split: {type: datetime}}\n", "'datetime' is not supported"),
        ("preprocessing: {split: {type: hash}}\n", "'hash' is not supported"),
        ("preprocessing: {sample_ratio: 0.5}\n", "preprocessing.sample_ratio is known but not supported"),
        ("adapters: {a: {type: lora}}\n", "adapters is known but not supported: one file trains one adapter"),
        ("hyperopt: {parameters: {}}\n", "hyperopt is known but not supported"),
        ("trust_remote_code: true\n", "trust_remote_code is known but not supported"),
        ("model_parameters: {embedding_noise_alpha: 5}\n", "model_parameters.embedding_noise_alpha is known but not supported"),
        ("model_parameters: {rope_scaling: {type: linear, factor: 2.0}}\n", "rope_scaling is known but not supported"),
        ("model_type: ecd\n", "model_type is 'ecd'"),
        ("output_features: [{name: y, type: text}]\n", "output_feature and output_features are both given"),
        ("input_features: [{name: a, type: text}, {name: b, type: text}]\n", "input_features has 2 entries"),
        ("input_features: [{name: a, type: image}]\n", "input_features[0].type 'image' is not supported"),
        ("input_features: [text]\n", "input_features[0] must be keys with values, but this is text"),
        ("input_features: {name: text}\n", "input_features must not be a mapping"),
        ("trainer: [1]\n", "trainer must not be a list"),
        ("trainer: fast\n", "trainer must be keys with values, but this is text"),
        ("trainer: {batch_size: 1.5}\n", "trainer.batch_size is 1.5: must be a whole number from 1, or auto"),
        ("trainer: {batch_size: 3, gradient_accumulation_steps: 2, effective_batch_size: 8}\n", "trainer.effective_batch_size is 8, which is not"),
        ("trainer: {learning_rate: -1}\n", "trainer.learning_rate is -1: must be above 0"),
        ("trainer: {early_stop: 0}\n", "trainer.early_stop is 0: must be at least 1"),
        ("trainer: {learning_rate_scheduler: {warmup_fraction: 2}}\n", "trainer.learning_rate_scheduler.warmup_fraction is 2: must be below 1"),
        ("preprocessing: {split: {type: random, probabilities: [0.5, 0.1, 0.1]}}\n", "preprocessing.split.probabilities is [0.5, 0.1, 0.1]"),
        ("preprocessing: {global_max_sequence_length: long}\n", "preprocessing.global_max_sequence_length is 'long'"),
        ("quantization: {bits: 3}\n", "quantization.bits is 3: must be 4 or 8"),
    ],
)
def test_what_would_change_the_result_is_refused_in_the_files_own_words(tmp_path: Path, change: str, said: str) -> None:
    """Dropping such a key would train something else under the same name; naming Atoll's key instead of the file's would confuse."""
    assert said in refusal(tmp_path, SHORT + change).message


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("ia3", "adapter.type 'ia3' is not supported"),
        ("{type: adalora}", "adapter.type 'adalora' is not supported"),
        ("{type: lorra}", "adapter.type is 'lorra', which is not known"),
        ("{type: lora, init_lora_weights: loftq}", "adapter.init_lora_weights 'loftq' is not supported"),
        (
            "{type: lora, use_dora: true, init_lora_weights: pissa}",
            "use_dora cannot start with init_lora_weights pissa: DoRA learns",
        ),
        ("{type: lora, bias_type: all}", "adapter.bias_type is known but not supported"),
        ("{type: lora, pretrained_adapter_weights: a}", "known but not supported"),
        ("{type: lora, r: 0}", "adapter.r is 0: must be at least 1"),
        ("{type: lora, target_modules: [queries]}", "'queries' is not a linear layer"),
        ("{type: lora, lora_alpha: 3}", "adapter.lora_alpha is not a key"),
        ("null", "adapter is missing; without one, Ludwig trains the whole base"),
    ],
)
def test_other_adapters_and_options_are_refused_by_name(tmp_path: Path, adapter: str, said: str) -> None:
    """An adapter of another kind trained as plain LoRA would look like a success."""
    assert said in refusal(tmp_path, SHORT.replace("adapter: lora", f"adapter: {adapter}")).message


def test_methods_beside_plain_lora_are_read_as_ludwig_means_them(tmp_path: Path) -> None:
    """The keys are Ludwig's own; only the noise stands in another section here."""
    adapter = "{type: lora, init_lora_weights: olora, loraplus_lr_ratio: 16}"
    text = SHORT.replace("adapter: lora", f"adapter: {adapter}") + "model_parameters: {neftune_noise_alpha: 5}\n"
    config = load(tmp_path, text).config
    assert (config.adapter.init_lora_weights, config.adapter.loraplus_lr_ratio, config.trainer.neftune_noise_alpha) == ("olora", 16, 5)
    assert load(tmp_path, SHORT.replace("adapter: lora", "adapter: {type: lora, use_dora: true}")).config.adapter.use_dora
    assert (
        load(tmp_path, SHORT.replace("adapter: lora", "adapter: {type: lora, init_lora_weights: true}")).config.adapter.init_lora_weights == "default"
    )


def test_values_that_ask_for_what_happens_anyway_are_passed_over(tmp_path: Path) -> None:
    """Ludwig writes its resolved configurations with every default; a page of warnings would hide the one that counts."""
    text = SHORT.replace("adapter: lora", "adapter: {type: lora, use_dora: false, bias_type: none, loraplus_lr_ratio: null, postprocessor: {}}")
    text += (
        "trainer: {regularization_lambda: 0.0, should_shuffle: true, compile: false, enable_gradient_checkpointing: false, gradient_clipping: {}}\n"
    )
    text += "model_parameters: {neftune_noise_alpha: 0, rope_scaling: {}}\nhyperopt: null\ntrust_remote_code: false\nbackend: local\nadapters: null\n"
    text += "generation: {do_sample: false, num_beams: 1, repetition_penalty: 1.0}\nludwig_version: '0.10'\nquantization: null\n"
    assert load(tmp_path, text).warnings == ()


def test_batch_and_length_keys_agree_on_optimizer_steps(tmp_path: Path) -> None:
    """Any two of batch size, accumulation and effective batch fix the third."""

    def steps(keys: str) -> tuple[int, int | None]:
        trainer = load(tmp_path, SHORT + f"trainer: {{train_steps: 100, {keys}}}\n").config.trainer
        return trainer.batch_size, trainer.max_steps

    assert steps("batch_size: auto") == (16, 100)
    assert steps("batch_size: 4") == (4, 100)
    assert steps("batch_size: 4, gradient_accumulation_steps: 3") == (12, 34)
    assert steps("gradient_accumulation_steps: 8") == (8, 13)
    assert steps("effective_batch_size: 8, batch_size: 2") == (8, 25)
    assert steps("effective_batch_size: 8, gradient_accumulation_steps: 4") == (8, 25)
    assert steps("effective_batch_size: 8") == (8, 100)


def test_ludwigs_ways_to_switch_something_off_work(tmp_path: Path) -> None:
    """A null schedule is a constant rate in Ludwig, -1 switches early stopping off, null gradient clipping is none."""
    trainer = load(tmp_path, SHORT + "trainer: {early_stop: -1, gradient_clipping: null, learning_rate_scheduler: {decay: null}}\n").config.trainer
    assert (trainer.early_stop_patience, trainer.max_grad_norm, trainer.schedule) == (None, 0, "constant")
    trainer = load(tmp_path, SHORT + "trainer: {optimizer: sgd, learning_rate_scheduler: {decay: inverse_sqrt}}\n").config.trainer
    assert (trainer.optimizer, trainer.momentum, trainer.schedule) == ("sgd", 0.0, "inverse_sqrt")
    trainer = load(tmp_path, SHORT + "trainer: {optimizer: {type: lion}}\n").config.trainer
    assert (trainer.optimizer, trainer.betas, trainer.momentum) == ("lion", (0.9, 0.99), 0.9)
    trainer = load(tmp_path, SHORT + "trainer: {learning_rate: auto, skip_all_evaluation: true, optimizer: paged_adamw_8bit}\n").config.trainer
    assert (trainer.early_stop_patience, trainer.max_grad_norm, trainer.schedule, trainer.learning_rate) == (None, 1, "cosine", 2e-4)


def test_lengths_of_the_parts_add_up_when_there_is_no_limit_of_the_whole(tmp_path: Path) -> None:
    """Atoll limits whole rows; p95 is allowed wherever a length is."""
    features = "model_type: llm\nbase_model: tiny\nadapter: lora\ninput_features: [{name: q, type: text, preprocessing: {max_sequence_length: %s}}]\n"
    features += "output_features: [{name: a, type: text, preprocessing: {max_sequence_length: %s}}]\n"
    assert load(tmp_path, features % (100, 20)).config.trainer.max_length == 120
    assert load(tmp_path, features % ("p95", "null")).config.trainer.max_length == "p95"
    half = load(tmp_path, features % (100, "null"))
    assert half.config.trainer.max_length is None and "rows are limited as a whole" in half.warnings[0]
    both = SHORT.replace("'}", "', global_max_sequence_length: 9}") + "preprocessing: {global_max_sequence_length: 8}\n"
    assert "is 8, but prompt.global_max_sequence_length is 9" in refusal(tmp_path, both).message


def test_ludwigs_own_placeholders_are_resolved(tmp_path: Path) -> None:
    """{__sample__} is the input's column, {__task__} a text whose braces are text; retrieval does not exist here."""
    features = (
        "base_model: tiny\nadapter: lora\ninput_features: [{name: q, column: question, type: text}]\noutput_features: [{name: a, type: text}]\n"
    )
    data = load(tmp_path, features + "prompt: {task: 'as {json}', template: '{__task__}: {__sample__}'}\n").config.data
    assert (data.template or "").format(question="why?") == "as {json}: why?"
    data = load(tmp_path, features).config.data
    assert (data.template, data.target) == ("{question}", "a")
    loaded = load(tmp_path, features + "prompt: {task: Answer.}\n")
    assert (loaded.config.data.instruction, loaded.config.data.template) == ("Answer.", "{question}")
    assert "Ludwig's own wording" in loaded.warnings[0]
    assert "examples are not looked up" in refusal(tmp_path, features + "prompt: {template: '{__context__} {q}'}\n").message
    assert "prompt.task is not given" in refusal(tmp_path, features + "prompt: {template: '{__task__} {q}'}\n").message
    assert "prompt.retrieval.k is known but not supported" in refusal(tmp_path, features + "prompt: {retrieval: {type: null, k: 3}}\n").message


def test_required_keys_are_asked_for(tmp_path: Path) -> None:
    """The short form must say which column is the answer, and every form its base."""
    assert "output_features is missing" in refusal(tmp_path, "base_model: tiny\nadapter: lora\n").message
    assert "base_model is missing" in refusal(tmp_path, "output_feature: y\nadapter: lora\n").message
    assert "base_model is 7: must be text" in refusal(tmp_path, SHORT.replace("tiny", "7")).message
    assert "answer would stand in the prompt" in refusal(tmp_path, SHORT.replace("{text}", "{label}")).message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("mistralai/mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("zephyr-7b-beta", "HuggingFaceH4/zephyr-7b-beta"),
        ("Org/Own-Model", "Org/Own-Model"),
        ("./folder", "./folder"),
    ],
)
def test_a_base_is_found_in_any_case(written: str, meant: str) -> None:
    """The article itself misspells its base."""
    assert base_name(written) == meant


def test_every_rule_that_is_not_acted_on_says_why() -> None:
    """The reason is what makes a warning useful."""
    assert [path for path, rule in RULES.items() if rule.does in ("refused", "no effect") and not rule.why] == []
    parents = {path.rpartition(".")[0].removesuffix("[]") for path in RULES} - {""}
    assert {parent for parent in parents if RULES[parent].does != "section"} == set()
