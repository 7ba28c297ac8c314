"""Every key of Ludwig's LLM configuration, and what Atoll does with it.

The one idea: a key is never ignored in silence. It is used; or it has no effect here and the reader is told so by name; or it would change the result
in a way that Atoll does not offer, and the file is refused by name. A value that asks for what happens anyway (`use_dora: false`) is passed over.

Used by ludwig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """What happens to a key. harmless: values that ask for what Atoll does anyway, as do null and empty ones. why: said to the reader."""

    does: Literal["section", "used", "no effect", "refused"]
    why: str = ""
    harmless: tuple[Any, ...] = ()

    def passes(self, value: Any) -> bool:
        """Whether there is nothing to say about `value`."""
        return value is None or value in ({}, []) or any(type(value) is type(item) and value == item for item in self.harmless)


SECTION, USED = Rule("section"), Rule("used")

ADAPTER_TYPES = (
    "lora", "adalora", "ia3", "vera", "loha", "lokr", "fourierft", "boft", "oft",
    "hra", "c3a", "vblora", "tinylora", "waveft", "ln_tuning", "adaption_prompt", "turbo", "turbo_lora",
)  # fmt: skip
STARTS = ("default", "gaussian", "olora", "pissa", "eva", "corda", "loftq", "orthogonal")  # the first four are offered
SPLIT_TYPES = ("fixed", "random", "stratify", "datetime", "hash")
TRAINER_TYPES = ("finetune", "none", "dpo", "kto", "orpo", "grpo")
DECAYS = ("cosine", "cosine_with_restarts", "linear", "constant", "exponential", "one_cycle", "inverse_sqrt", "polynomial", "wsd")
ADAM_LIKE = ("adam", "adamw", "paged_adam", "paged_adamw", "adam_8bit", "adamw_8bit", "paged_adam_8bit", "paged_adamw_8bit")
OTHERS = ("sgd", "lion", "adafactor")
OPTIMIZERS = (
    *ADAM_LIKE,
    *OTHERS,
    "lbfgs", "lamb", "lars", "adadelta", "adagrad", "adamax",
    "nadam", "radam", "rmsprop", "ftrl", "schedule_free_adamw", "muon",
)  # fmt: skip

_GREEDY = "evaluation decodes greedily, and a request to the server brings its own sampling settings"
_MEMORY = "Atoll divides an optimizer step into forward passes by tokens (trainer.micro_batch_tokens)"


def _no_effect(why: str, *harmless: Any) -> Rule:
    return Rule("no effect", why, harmless)


def _refused(why: str, *harmless: Any) -> Rule:
    return Rule("refused", why, harmless)


def _under(section: str, keys: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules by full path: `rule` for every name of a key that lists several names."""
    return {f"{section}.{name}": rule for names, rule in keys.items() for name in names.split()}


_TOP = {
    "base_model": USED,
    "model_type": USED,
    "prompt": SECTION,
    "input_features": SECTION,
    "output_features": SECTION,
    "output_feature": USED,
    "preprocessing": SECTION,
    "adapter": SECTION,
    "quantization": SECTION,
    "trainer": SECTION,
    "generation": SECTION,
    "model_parameters": SECTION,
    "adapters": _refused("one file trains one adapter; write adapter, or a land file with several tasks"),
    "hyperopt": _refused("Atoll does not search settings"),
    "trust_remote_code": _refused("Atoll never runs code that comes with a model", False),
    "backend": _no_effect("the work runs on this machine", "local", {"type": "local"}),
    "defaults": _no_effect("settings by feature type do not apply to a prompt and a completion"),
    "ludwig_version": Rule("used"),
}

_PROMPT = {
    "template task global_max_sequence_length": USED,
    "retrieval": SECTION,
    "retrieval.type": _refused("examples are not looked up at run time; put them into the template"),
    "retrieval.k": _refused("examples are not looked up at run time; put them into the template", 0),
    "retrieval.model_name retrieval.index_name": _no_effect("examples are not looked up at run time"),
}

_FEATURE = {
    "name column type": USED,
    "preprocessing": SECTION,
    "preprocessing.max_sequence_length": USED,
    "preprocessing.lowercase": _refused("text is used as it is", False),
    "preprocessing.prompt": _refused("write it as prompt at the top of the file"),
    "preprocessing.missing_value_strategy preprocessing.fill_value preprocessing.computed_fill_value": _no_effect("rows without a value are errors"),
    "preprocessing.tokenizer preprocessing.pretrained_model_name_or_path preprocessing.vocab_file preprocessing.most_common "
    "preprocessing.ngram_size preprocessing.compute_idf preprocessing.unknown_symbol preprocessing.cache_encoder_embeddings": _no_effect(
        "the base's own tokenizer is used"
    ),
    "preprocessing.padding preprocessing.padding_symbol preprocessing.sequence_length": _no_effect("rows are packed without padding"),
    "encoder tied": _no_effect("a prompt is text for the base"),
    "decoder": _no_effect("a completion is text from the base; data.metric says how it is scored"),
    "loss": _no_effect("the loss is cross-entropy over the completion's tokens"),
    "dependencies reduce_input reduce_dependencies default_validation_metric": _no_effect("there is one output"),
}

_PREPROCESSING = {
    "split": SECTION,
    "split.type split.column split.probabilities": USED,
    "global_max_sequence_length": USED,
    "sample_ratio": _refused("give a number of rows in Atoll's own form (data.max_train_rows)", 1, 1.0),
    "sample_size": _refused("give a number of rows in Atoll's own form (data.max_train_rows)"),
    "oversample_minority undersample_majority": _refused("rows are used as they are"),
    "cache_encoder_embeddings": _no_effect("there is no encoder", False),
    "text category binary number set sequence vector date": _no_effect("settings by feature type do not apply to a prompt and a completion"),
}

_ADAPTER = {
    "type r alpha dropout target_modules use_rslora use_dora rank_pattern alpha_pattern init_lora_weights loraplus_lr_ratio": USED,
    "bias_type": _refused("biases stay as they are", "none"),
    "pretrained_adapter_weights": _refused("training starts from a new adapter"),
    "postprocessor": SECTION,
    "postprocessor.merge_adapter_into_base_model": _no_effect("the adapter stays apart, so that one base serves many", False),
    "postprocessor.progressbar": _no_effect("progress is always shown", True, False),
}

_QUANTIZATION = {
    "bits bnb_4bit_quant_type bnb_4bit_use_double_quant": USED,
    "bnb_4bit_compute_dtype": _no_effect("trainer.dtype of Atoll's own form is the number format of the arithmetic"),
    "llm_int8_threshold llm_int8_has_fp16_weight": _no_effect("8-bit outliers are not treated apart", False),
    "backend mode qat": _no_effect("there is one form of each number of bits", "bitsandbytes", False),
}

_TRAINER = {
    "type learning_rate epochs train_steps batch_size gradient_accumulation_steps effective_batch_size early_stop": USED,
    "eval_batch_size eval_steps steps_per_checkpoint skip_all_evaluation": USED,
    "optimizer": SECTION,
    "optimizer.type optimizer.betas optimizer.eps optimizer.weight_decay optimizer.momentum": USED,
    "optimizer.nesterov": _refused("sgd has plain momentum", False),
    "optimizer.dampening": _refused("sgd has plain momentum", 0, 0.0),
    "optimizer.lr optimizer.learning_rate": _no_effect("trainer.learning_rate counts"),
    "optimizer.amsgrad": _refused("AdamW is the optimizer", False),
    "optimizer.is_paged optimizer.optim_bits optimizer.args optimizer.min_8bit_size optimizer.percentile_clipping optimizer.block_wise": _no_effect(
        "the optimizer's state is held in 32 bits", False
    ),
    "learning_rate_scheduler": SECTION,
    "learning_rate_scheduler.decay learning_rate_scheduler.warmup_fraction": USED,
    "learning_rate_scheduler.warmup_evaluations": _refused("give learning_rate_scheduler.warmup_fraction", 0, 0.0),
    "learning_rate_scheduler.reduce_on_plateau": _refused("the learning rate follows a fixed curve", 0),
    "learning_rate_scheduler.reduce_on_plateau_patience learning_rate_scheduler.reduce_on_plateau_rate learning_rate_scheduler.reduce_eval_metric "
    "learning_rate_scheduler.reduce_eval_split": _no_effect("the learning rate does not react to plateaus"),
    "learning_rate_scheduler.decay_steps learning_rate_scheduler.decay_rate learning_rate_scheduler.staircase": _no_effect(
        "the schedule ends with the training"
    ),
    "learning_rate_scheduler.eta_min": _refused("the learning rate ends at 0", 0, 0.0),
    "learning_rate_scheduler.t_0 learning_rate_scheduler.t_mult": _no_effect("the cosine has no restarts", 1),
    "gradient_clipping": SECTION,
    "gradient_clipping.clipglobalnorm": USED,
    "gradient_clipping.clipnorm gradient_clipping.clipvalue": _refused("gradients are clipped by their common norm (clipglobalnorm)"),
    "regularization_lambda": _refused("use trainer.optimizer.weight_decay", 0, 0.0),
    "regularization_type": _no_effect("regularization_lambda is 0", "l2", "none"),
    "increase_batch_size_on_plateau": _refused("the batch size is fixed", 0),
    "increase_batch_size_on_plateau_patience increase_batch_size_on_plateau_rate increase_batch_size_on_plateau_max increase_batch_size_eval_metric "
    "increase_batch_size_eval_split": _no_effect("the batch size is fixed"),
    "layers_to_freeze_regex": _refused("the whole base is frozen; adapter.target_modules says where the adapter acts"),
    "validation_metric": _no_effect("training stops by the validation loss", "loss"),
    "validation_field": _no_effect("there is one output", "combined"),
    "checkpoints_per_epoch": _no_effect("give steps_per_checkpoint; the validation loss is measured once an epoch", 0, 1),
    "enable_gradient_checkpointing": _no_effect(_MEMORY, False),
    "max_batch_size": _no_effect(_MEMORY),
    "bucketing_field": _no_effect("rows are always grouped by length"),
    "should_shuffle": _no_effect("rows are taken in a seeded order", True),
    "evaluate_training_set": _no_effect("the training loss is logged", False),
    "use_mixed_precision": _no_effect("trainer.dtype of Atoll's own form is the number format of the arithmetic"),
    "compile": _no_effect("the forward pass is not compiled", False),
    "enable_profiling profiler": _no_effect("there is no profile", False),
    "learning_rate_scaling": _no_effect("one process trains, so nothing is scaled"),
    "base_learning_rate": _no_effect("trainer.learning_rate counts", 0, 0.0),
}

_GENERATION = {
    "max_new_tokens": USED,
    "do_sample": _no_effect(_GREEDY, False),
    "temperature top_k top_p typical_p epsilon_cutoff eta_cutoff": _no_effect(_GREEDY),
    "num_beams num_beam_groups": _no_effect(_GREEDY, 1),
    "repetition_penalty encoder_repetition_penalty length_penalty": _no_effect(_GREEDY, 1, 1.0),
    "early_stopping renormalize_logits remove_invalid_values": _no_effect(_GREEDY, False),
    "diversity_penalty no_repeat_ngram_size": _no_effect(_GREEDY, 0, 0.0),
    "use_cache": _no_effect("the cache is always used", True),
    "max_length min_length min_new_tokens max_time": _no_effect("answers end at the end token, a stop text, or max_new_tokens", 0),
    "pad_token_id bos_token_id eos_token_id forced_bos_token_id forced_eos_token_id": _no_effect("the base's own special tokens are used"),
    "penalty_alpha guidance_scale prompt_lookup_num_tokens bad_words_ids force_words_ids suppress_tokens begin_suppress_tokens "
    "forced_decoder_ids sequence_bias exponential_decay_length_penalty": _no_effect(_GREEDY),
}

_MODEL_PARAMETERS = {
    "rope_scaling": _refused("a base is used with the positions it was trained with"),
    "neftune_noise_alpha": USED,
    "embedding_noise_alpha": _refused("noise on embeddings is neftune_noise_alpha's", 0, 0.0),
}

# Places in lists are written without their number: input_features[].name
RULES: Mapping[str, Rule] = {
    **_TOP,
    **_under("prompt", _PROMPT),
    **_under("input_features[]", _FEATURE),
    **_under("output_features[]", _FEATURE),
    **_under("preprocessing", _PREPROCESSING),
    **_under("adapter", _ADAPTER),
    **_under("quantization", _QUANTIZATION),
    **_under("trainer", _TRAINER),
    **_under("generation", _GENERATION),
    **_under("model_parameters", _MODEL_PARAMETERS),
}

# Ludwig's short names for bases, and ids whose usual spelling in such files is not the hub's
BASE_ALIASES: Mapping[str, str] = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "zephyr-7b-alpha": "HuggingFaceH4/zephyr-7b-alpha",
    "zephyr-7b-beta": "HuggingFaceH4/zephyr-7b-beta",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
    "codellama-7b": "codellama/CodeLlama-7b-hf",
    "codellama-13b": "codellama/CodeLlama-13b-hf",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "codellama-7b-instruct": "codellama/CodeLlama-7b-Instruct-hf",
    "codellama-13b-instruct": "codellama/CodeLlama-13b-Instruct-hf",
    "codellama-34b-instruct": "codellama/CodeLlama-34b-Instruct-hf",
    "vicuna-7b": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b": "lmsys/vicuna-13b-v1.3",
    "phi-2": "microsoft/phi-2",
    "gemma-2b": "google/gemma-2b",
    "gemma-7b": "google/gemma-7b",
    "gpt-neo-2.7b": "EleutherAI/gpt-neo-2.7B",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-12b": "EleutherAI/pythia-12b",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-6.7b": "facebook/opt-6.7b",
    "bloomz-3b": "bigscience/bloomz-3b",
    "bloomz-7b1": "bigscience/bloomz-7b1",
}


def base_name(written: str) -> str:
    """The base that a Ludwig file means: its short names, and known ids in any case; anything else as it is written."""
    known = {alias.casefold(): name for alias, name in BASE_ALIASES.items()} | {name.casefold(): name for name in BASE_ALIASES.values()}
    return known.get(written.casefold(), written)
