"""ReftModel as a module beside other things: hooks of others, copies, modes, freezing, checkpointing, training, PEFT."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from atoll.errors import ConfigError, RequestRefused, UnsupportedAdapter
from atoll.reft import ConsreftIntervention, LoreftIntervention, NodireftIntervention, ReftConfig, get_reft_model
from reft_bases import BLOCKS, WIDTH, at, batch, block, logits, loreft, plain, reft_of, tokens, toy, with_lora

CLOSE = {"rtol": 0, "atol": 1e-5}


def _all_hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]


def test_hooks_of_others_stay_and_are_called() -> None:
    """pyvene clears the hooks of all modules before and after every call, PEFT's and the user's too."""
    model, called = toy("llama"), []
    block(model, 1).register_forward_hook(lambda *_: called.append("output"))
    model.register_forward_pre_hook(lambda *_: called.append("model"))
    model.enable_input_require_grads()
    reft_model = reft_of(model)
    foreign = _all_hooks(model)
    reft_model(batch(), unit_locations={"base": 1})
    reft_model.generate(batch(), unit_locations={"base": 1}, intervene_on_prompt=True, max_new_tokens=2, do_sample=False)
    assert _all_hooks(model) == foreign
    assert called == ["model", "output"] * 3


def test_hidden_states_are_recorded_and_show_the_edit() -> None:
    """In PyReFT output_hidden_states gives an empty tuple."""
    model, base = toy("llama"), batch()
    reft_model = reft_of(model, 1)
    with torch.no_grad():
        _, outputs = reft_model({**base, "output_hidden_states": True}, unit_locations={"base": 3})
        before = model(**base, output_hidden_states=True).hidden_states
    assert len(outputs.hidden_states) == BLOCKS + 1
    changed = [bool((now[:, 3] != then[:, 3]).any()) for now, then in zip(outputs.hidden_states, before, strict=True)]
    assert changed == [False, False, True, True]
    (intervention,) = reft_model.interventions.values()
    torch.testing.assert_close(outputs.hidden_states[2][:, 3], intervention(before[2][:, 3:4])[:, 0], **CLOSE)


def test_the_base_alone_and_another_reft_model_on_it_are_left_alone() -> None:
    """`reft_model.model` is the reference model of preference training; two adapters may share a base."""
    model, base = toy("llama"), batch()
    before = plain(model, base)
    first, second = reft_of(model, 0), reft_of(model, 1, cls=ConsreftIntervention)
    one, two = logits(first, base, {"base": 1}), logits(second, base, {"base": 1})
    assert torch.equal(plain(model, base), before)
    assert torch.equal(logits(first, base, {"base": 1}), one)
    assert not torch.allclose(one, two, atol=1e-3)
    with pytest.raises(RequestRefused):
        first(base, unit_locations={"base": 99})
    assert torch.equal(plain(model, base), before)


def test_a_call_that_fails_leaves_nothing_active() -> None:
    model, base = toy("llama"), batch()
    reft_model, before = reft_of(model), plain(model, base)
    handle = block(model, 2).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reft_model(base, unit_locations={"base": 1})
    handle.remove()
    assert torch.equal(plain(model, base), before)


def test_hooks_go_with_their_model() -> None:
    """A notebook that wraps one base again and again must not slow it down, or keep old interventions in memory."""
    model = toy("llama")
    for _ in range(3):
        reft_model = reft_of(model)
    assert len(_all_hooks(model)) <= 2 * 4
    del reft_model
    gc.collect()
    assert _all_hooks(model) == []


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    """Preference trainers copy the model."""
    reft_model, base = reft_of(toy("llama")), batch()
    twin = copy.deepcopy(reft_model)
    same = logits(reft_model, base, {"base": 1})
    assert torch.equal(logits(twin, base, {"base": 1}), same)
    with torch.no_grad():
        for tensor in twin.interventions.parameters():
            tensor.mul_(0.5)
    assert torch.equal(logits(reft_model, base, {"base": 1}), same)
    assert not torch.equal(logits(twin, base, {"base": 1}), same)


def test_modes_devices_dtypes_and_states_reach_the_interventions() -> None:
    """In PyReFT eval() leaves the interventions' dropout on, state_dict() has none of their tensors, and str() fails."""
    reft_model = reft_of(toy("llama"), dropout=0.5)
    interventions = list(reft_model.interventions.values())
    assert not any(module.training for module in reft_model.train().eval().modules())
    assert torch.equal(logits(reft_model, batch(), {"base": 1}), logits(reft_model, batch(), {"base": 1}))
    assert all(module.training for module in reft_model.train().modules())
    assert not torch.equal(logits(reft_model, batch(), {"base": 1}), logits(reft_model, batch(), {"base": 1}))
    own = {id(tensor) for intervention in interventions for tensor in intervention.parameters()}
    assert own <= {id(tensor) for tensor in reft_model.parameters()}
    key = "layer_0_comp_block_output_unit_pos_nunit_1#0"
    assert {f"interventions.{key}.rotate_layer.weight", "model.lm_head.weight"} <= set(reft_model.state_dict())
    assert "LoreftIntervention" in str(reft_model)
    assert key in repr(reft_model)
    reft_model.to(torch.bfloat16)
    assert reft_model.model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in reft_model.interventions.parameters()} == {torch.float32}
    reft_model.set_device("meta")
    assert {tensor.device.type for tensor in reft_model.parameters()} == {"meta"} == {reft_model.get_device().type}


def test_a_state_dict_of_the_whole_model_comes_back() -> None:
    first, second = reft_of(toy("llama")), reft_of(toy("llama", seed=3))
    for tensor in second.interventions.parameters():
        tensor.data.mul_(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second, batch(), {"base": 1}), logits(first, batch(), {"base": 1}))


def test_quantised_and_spread_bases_are_not_moved() -> None:
    """transformers refuses to move a base in 4 bits; PyReFT asks for set_device=False there."""
    model = toy("llama")
    model.is_quantized = True
    reft_model = reft_of(model)
    reft_model.set_device("meta")
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    assert {tensor.device.type for tensor in reft_model.interventions.parameters()} == {"meta"}


def test_freezing_is_what_it_says() -> None:
    model = toy("llama")
    entries = {"layer": 0, "intervention": loreft()}
    assert any(
        tensor.requires_grad for tensor in get_reft_model(model, ReftConfig(representations=entries), disable_model_grads=False).model.parameters()
    )
    reft_model = get_reft_model(model, ReftConfig(representations=entries))
    assert not any(tensor.requires_grad for tensor in model.parameters())
    reft_model.enable_model_gradients()
    assert all(tensor.requires_grad for tensor in model.parameters())
    assert model.training
    reft_model.disable_model_gradients()
    assert not model.training


def test_counts_are_printed_as_pyreft_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    reft_model = reft_of(toy("llama"))
    total = sum(tensor.numel() for tensor in reft_model.model.parameters())
    reft_model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable intervention params: 520 || trainable model params: 0\nmodel params: {total:,d} || trainable%: {100 * 520 / total}\n"
    )


def test_linked_interventions_are_one() -> None:
    """The same intervention_link_key: shared weights, counted once."""
    entries = [{"layer": layer, "intervention": loreft(layer), "intervention_link_key": 0} for layer in (0, 1)]
    reft_model = get_reft_model(toy("llama"), ReftConfig(representations=entries))
    first, second = reft_model.interventions.values()
    assert first is second
    assert reft_model.count_parameters() == 2 * WIDTH * 4 + 4


def test_classes_are_built_for_the_width_of_their_site() -> None:
    """intervention_type instead of an instance, also at a path; the configuration that was given stays without instances."""
    entries = [
        {"layer": 0, "component": "mlp_activation", "low_rank_dimension": 2, "intervention_type": NodireftIntervention},
        {"component": "model.layers[1].mlp.down_proj.input", "low_rank_dimension": 2, "intervention_type": LoreftIntervention},
        {"component": "model.layers[2].output", "low_rank_dimension": 2, "intervention_type": LoreftIntervention},
    ]
    config = ReftConfig(representations=entries)
    with pytest.raises(UnsupportedAdapter, match="embed_dim 32"):  # an activation does not say how wide it is
        logits(get_reft_model(toy("llama"), config), batch(), {"base": 1})
    reft_model = get_reft_model(toy("llama"), ReftConfig(representations=entries[1:]))
    assert [intervention.embed_dim for intervention in reft_model.interventions.values()] == [48, WIDTH]
    assert config.representations[0].intervention is None
    assert [entry.layer for entry in reft_model.representations] == [0, 0]
    with pytest.raises(ConfigError, match="low_rank_dimension"):
        get_reft_model(toy("llama"), ReftConfig(representations={"layer": 0, "intervention_type": LoreftIntervention}))


def test_a_wrong_width_is_named_when_the_model_is_made() -> None:
    with pytest.raises(ConfigError, match="embed_dim 16, but the base is 32 wide"):
        reft_of(toy("llama"), embed_dim=16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family: str, component: str, reentrant: bool) -> None:
    """Identity 14; an edit inside a block is part of what the backward computes again, after the call has ended."""
    base = batch()
    labels = torch.tensor([0, 2]) if family == "bert" else base["input_ids"]
    found = []
    for checkpointing in (False, True):
        reft_model = reft_of(toy(family, **({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {})), 0, 2)
        reft_model.train()
        for module in reft_model.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            reft_model.activation_checkpointing_enable({"use_reentrant": reentrant})
            reft_model.model.enable_input_require_grads()
        _, outputs = reft_model(base, unit_locations=at([[0, 3]] * 2, [[2]] * 2), labels=labels)
        _, other = reft_model(batch(seed=4), unit_locations=at([[5]] * 2, [[6]] * 2), labels=labels)  # two graphs before one backward
        (outputs.loss + other.loss).backward()
        found.append((outputs.loss.detach(), [tensor.grad for tensor in reft_model.get_trainable_parameters()]))
        functions = [getattr(module, "_gradient_checkpointing_func", None) for module in reft_model.model.modules()]
        assert not any("checkpointed" in getattr(function, "__name__", "") for function in functions)
    for plain_grad, again in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain_grad, again, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)


def test_training_by_hand_learns_and_stays_on_the_manifold() -> None:
    """A loop without our trainers, with weight decay; `retract` after a step, or a followed optimizer, does the same."""
    base, labels = batch(rows=4, length=6), tokens(4, 6, seed=8)
    finals = []
    for way in ("forgotten", "called", "followed"):
        reft_model = reft_of(toy("llama")).train()
        optimizer = torch.optim.AdamW(reft_model.get_trainable_parameters(), lr=0.05, weight_decay=0.1)
        handle = reft_model.follow(optimizer) if way == "followed" else None
        losses = []
        for _ in range(15):
            _, outputs = reft_model(base, unit_locations={"base": [1, 4]}, labels=labels)
            losses.append(float(outputs.loss.detach()))
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if way == "called":
                reft_model.retract()
        assert losses[-1] < 0.8 * losses[0]
        if handle is not None:
            handle.remove()
        if way != "forgotten":
            assert all(intervention.rotate_layer.deviation() < 1e-6 for intervention in reft_model.interventions.values())
        finals.append(logits(reft_model.eval(), base, {"base": [1, 4]}))
        assert all(intervention.rotate_layer.deviation() < 1e-6 for intervention in reft_model.interventions.values())
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(finals[0], finals[2], rtol=0, atol=1e-4)


def test_lora_of_peft_and_reft_train_together() -> None:
    """PyReFT's notebook: wrap with PEFT, then with ReFT by a path, then make the LoRA factors trainable again."""
    wrapped = with_lora(toy("llama"))
    alone = plain(wrapped, batch())
    entries = {"layer": 1, "component": "base_model.model.model.layers[1].output", "intervention": loreft()}
    reft_model = get_reft_model(wrapped, ReftConfig(representations=entries))
    assert reft_model.count_parameters(include_model=True) == reft_model.count_parameters()
    reft_model.model.enable_adapter_layers()
    lora = reft_model.count_parameters(include_model=True) - reft_model.count_parameters()
    assert lora == sum(tensor.numel() for name, tensor in wrapped.named_parameters() if "lora_" in name) > 0
    optimizer = torch.optim.AdamW(reft_model.get_trainable_parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        _, outputs = reft_model.train()(batch(), unit_locations={"base": 6}, labels=tokens(seed=5))
        losses.append(float(outputs.loss.detach()))
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert torch.equal(logits(reft_model.eval(), batch(), {"base": -1}), plain(wrapped, batch()))
    assert not torch.equal(plain(wrapped, batch()), alone)
    _, generated = reft_model.generate(batch(), unit_locations={"base": 6}, intervene_on_prompt=True, max_new_tokens=3, do_sample=False)
    again = batch()["input_ids"]
    for _ in range(3):
        step = logits(reft_model, {"input_ids": again}, {"base": 6})[:, -1].argmax(-1, keepdim=True)
        again = torch.cat([again, step], 1)
    assert torch.equal(generated, again)


def test_a_model_without_interventions_is_the_base() -> None:
    """PyReFT's LoRA-only baseline goes through its trainer with an empty configuration."""
    model = toy("llama")
    _, outputs = get_reft_model(model, ReftConfig(representations=[]))(batch(), unit_locations={"sources->base": (None, 0)}, labels=tokens())
    assert torch.equal(outputs.logits, plain(model, batch()))
    assert outputs.loss is not None
