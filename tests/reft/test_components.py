"""Finding the module that an entry of a configuration means, on architectures of every shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from atoll.errors import ConfigError, UnsupportedAdapter
from atoll.reft.components import ABSTRACT, find_site
from reft_bases import BLOCKS, WIDTH, batch, toy, with_lora

# Where PyReFT's table has Llama's and GPT-2's components, and where BERT's and others' are by their own names.
PATHS = {
    "llama": {
        "block_input": "model.layers.1<",
        "block_output": "model.layers.1",
        "mlp_input": "model.layers.1.mlp<",
        "mlp_activation": "model.layers.1.mlp.act_fn",
        "mlp_output": "model.layers.1.mlp",
        "attention_input": "model.layers.1.self_attn<",
        "attention_value_output": "model.layers.1.self_attn.o_proj<",
        "attention_output": "model.layers.1.self_attn",
        "query_output": "model.layers.1.self_attn.q_proj",
        "key_output": "model.layers.1.self_attn.k_proj",
        "value_output": "model.layers.1.self_attn.v_proj",
    },
    "gpt2": {
        "block_output": "transformer.h.1",
        "mlp_input": "transformer.h.1.mlp<",
        "mlp_activation": "transformer.h.1.mlp.act",
        "attention_output": "transformer.h.1.attn",
        "attention_value_output": "transformer.h.1.attn.c_proj<",
    },
    "roberta": {
        "block_output": "roberta.encoder.layer.1",
        "mlp_input": "roberta.encoder.layer.1.intermediate<",
        "mlp_activation": "roberta.encoder.layer.1.intermediate.intermediate_act_fn",
        "mlp_output": "roberta.encoder.layer.1.output.dense",
        "attention_input": "roberta.encoder.layer.1.attention<",
        "attention_output": "roberta.encoder.layer.1.attention.output.dense",
        "attention_value_output": "roberta.encoder.layer.1.attention.output.dense<",
        "query_output": "roberta.encoder.layer.1.attention.self.query",
    },
    "bloom": {"attention_output": "transformer.h.1.self_attention.dense", "mlp_output": "transformer.h.1.mlp.dense_4h_to_h"},
    "opt": {"mlp_input": "model.decoder.layers.1.fc1<", "mlp_output": "model.decoder.layers.1.fc2", "block_output": "model.decoder.layers.1"},
    "gpt_neox": {"block_output": "gpt_neox.layers.1", "attention_output": "gpt_neox.layers.1.attention"},
    "falcon": {"block_output": "transformer.h.1", "attention_output": "transformer.h.1.self_attention", "mlp_output": "transformer.h.1.mlp"},
    "mixtral": {"block_output": "model.layers.1", "mlp_output": "model.layers.1.mlp"},
    "distilbert": {
        "block_output": "distilbert.transformer.layer.1",
        "mlp_output": "distilbert.transformer.layer.1.ffn",
        "query_output": "distilbert.transformer.layer.1.attention.q_lin",
    },
}


@pytest.mark.parametrize("family", PATHS)
def test_names_mean_the_same_place_in_every_architecture(family: str) -> None:
    """No class is listed anywhere: blocks are found by their number, parts by their names."""
    model = toy(family)
    for component, path in PATHS[family].items():
        site = find_site(model, component, 1)
        assert site.module is model.get_submodule(path.rstrip("<")), component
        assert site.is_input is path.endswith("<"), component
        assert site.path == path.rstrip("<")


def _seen(model: Any, site: Any) -> torch.Tensor:
    """What stands at a site in a forward."""
    found: list[torch.Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = site.module.register_forward_pre_hook(before, with_kwargs=True) if site.is_input else site.module.register_forward_hook(after)
    with torch.no_grad():
        model(**batch())
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("component", ABSTRACT)
def test_a_sites_width_is_what_stands_there(family: str, component: str) -> None:
    """An intervention_type gets its embed_dim from it."""
    model = toy(family)
    if family == "gpt2" and component in ("query_output", "key_output", "value_output"):
        with pytest.raises(UnsupportedAdapter, match="in one product"):
            find_site(model, component, 1)
        return
    site = find_site(model, component, 1)
    assert site.width in (None, _seen(model, site).shape[-1])
    assert (site.width is None) <= (component in ("mlp_activation", "attention_value_output"))


@pytest.mark.parametrize(
    ("family", "path", "module"),
    [
        ("llama", "model.layers[2].output", "model.layers.2"),
        ("llama", "model.layers.2.mlp.down_proj.input", "model.layers.2.mlp.down_proj"),
        ("llama", "base_model.model.model.layers[2].output", "model.layers.2"),
        ("roberta", "roberta.encoder.layer[2].output", "roberta.encoder.layer.2"),
        ("roberta", "roberta.encoder.layer[2].output.output", "roberta.encoder.layer.2.output"),
        ("gpt2", "transformer.wte.output", "transformer.wte"),
    ],
)
def test_paths_name_any_module(family: str, path: str, module: str) -> None:
    """PyReFT's string access, also with the prefix that PEFT's wrapper puts before it."""
    model = toy(family)
    site = find_site(model, path, 0)
    assert site.module is model.get_submodule(module)
    assert site.is_input is path.endswith("input")


def test_wrappers_are_looked_through() -> None:
    """The same file is valid for a plain base and for one that PEFT has wrapped."""
    model = toy("llama")
    plain = find_site(model, "model.layers[1].output", 0).module
    query = find_site(model, "query_output", 1)
    wrapped = with_lora(model)
    for component, layer in (("block_output", 1), ("model.layers[1].output", 0), ("base_model.model.model.layers[1].output", 0)):
        assert find_site(wrapped, component, layer).module is plain
    assert find_site(wrapped, "query_output", 1).width == query.width == WIDTH


@pytest.mark.parametrize(
    ("component", "layer", "error", "named"),
    [
        ("block_outputs", 0, ConfigError, "block_outputs"),
        ("block_output", BLOCKS, ConfigError, f"0 to {BLOCKS - 1}"),
        ("block_output", -1, ConfigError, "-1"),
        ("model.layers[9].output", 0, ConfigError, "no module"),
        ("model.layers[1].mpl.output", 0, ConfigError, "no module"),
        ("model.layers[1]", 0, ConfigError, "must end in"),
        ("model.layers[1].mlp", 0, ConfigError, "must end in"),
        ("__class__.__init__.output", 0, ConfigError, "no module"),
        ("head_query_output", 0, UnsupportedAdapter, "attention head"),
    ],
)
def test_what_is_not_there_is_named(component: str, layer: int, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        find_site(toy("llama"), component, layer)


def test_a_near_path_is_offered() -> None:
    with pytest.raises(ConfigError) as caught:
        find_site(toy("llama"), "model.layer[1].mlp.output", 0)
    assert "model.layers[1].mlp" in caught.value.hint


def test_two_lists_of_blocks_need_a_path() -> None:
    """An encoder and a decoder of as many blocks: a number alone would be a guess."""
    model = toy("t5")
    with pytest.raises(UnsupportedAdapter, match=r"encoder\.block and decoder\.block"):
        find_site(model, "block_output", 1)
    assert find_site(model, "encoder.block[1].output", 0).module is model.encoder.block[1]


def test_a_part_that_a_block_lacks_is_named() -> None:
    """State-space blocks have no attention."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=WIDTH, num_hidden_layers=2, state_size=4))
    assert find_site(model, "block_output", 1).module is model.backbone.layers[1]
    with pytest.raises(UnsupportedAdapter, match=r"MambaBlock.*attention"):
        find_site(model, "attention_output", 1)
