"""compatible=True is lorahub 0.1.0. Its formulas are written out here; bench/compare_lorahub.py runs the real one."""

from __future__ import annotations

import random
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.tiny_t5 import INPUTS, OUTPUTS, tiny_t5

from atoll.errors import ConfigError
from atoll.lorahub import default_get_loss, default_l1_regularization, lorahub_learning
from atoll.lorahub.examples import encode_pairs
from atoll.model.generic import load_encoder_decoder


def as_written(base: Path, modules: list[str], steps: int, batch_size: int) -> tuple[Any, Any]:
    """lorahub 0.1.0 as a plain program: (weights, merged model). The list's last module is where the model's own tensors are kept."""
    import nevergrad as ng

    model = load_encoder_decoder(str(base))
    dataset = encode_pairs(model.tokenizer, INPUTS, OUTPUTS)
    tensors = [load_file(Path(module) / "adapter_model.safetensors") for module in modules]
    scaling = (6.0 + 2 * (len(modules) - 1)) / 4  # of the last module
    live: dict[str, torch.Tensor] = {}

    def load(weights: Any) -> None:
        summed = {key: weights[0] * tensors[0][key] for key in tensors[0]}
        for weight, module in zip(weights[1:], tensors[1:], strict=True):
            summed = {key: summed[key] + weight * module[key] for key in summed}
        live.update(summed)
        tensors[-1] = dict(summed)

    def hook(path: str) -> Any:
        key = f"base_model.model.{path}.lora_"
        return lambda _, x, y: y + F.linear(F.linear(x[0], live[f"{key}A.weight"]), live[f"{key}B.weight"]) * scaling

    places = [place for place in model.linears if f"base_model.model.{place}.lora_A.weight" in tensors[0]]
    for place in places:
        model.model.get_submodule(place).register_forward_hook(hook(place))

    def score(weights: Any) -> float:
        load(weights)
        return default_get_loss(dataset, model.model, batch_size) + default_l1_regularization(weights)

    random.seed(42)
    np.random.seed(42)
    num = len(modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = ng.p.Array(init=[0] * num, upper=[1.5] * num, lower=[-1.5] * num)
        weights = ng.optimizers.NGOpt(parametrization=space, budget=steps).minimize(score).value
    load(weights)
    merged = tiny_t5()
    with torch.no_grad():
        for place in places:
            key = f"base_model.model.{place}.lora_"
            merged.get_submodule(place).weight.add_((live[f"{key}B.weight"] @ live[f"{key}A.weight"]) * scaling)
    return weights, merged


@pytest.mark.parametrize("batch_size", [2, 5])
def test_weights_are_lorahubs_to_the_bit(t5_dir: Path, t5_modules: list[str], batch_size: int) -> None:
    """Steps of COBYLA amplify any difference, so nothing in the objective may differ."""
    weights, model, _ = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 25, batch_size=batch_size, compatible=True)
    expected, merged = as_written(t5_dir, t5_modules, 25, batch_size)
    assert np.array_equal(weights, expected)
    theirs = dict(merged.named_parameters())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.named_parameters())


def test_other_peoples_random_numbers_go_on(t5_modules: list[str]) -> None:
    """lorahub seeds the generators of the whole process; a program's own draws must not start again because of that."""
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    lorahub_learning(t5_modules[:2], INPUTS, OUTPUTS, 4, compatible=True)
    assert (random.random(), np.random.rand()) == expected


def test_a_module_named_twice_counts_once_and_has_two_weights(t5_modules: list[str]) -> None:
    """The last weight is in no sum: nothing but the regulariser moves it."""
    weights, _, _ = lorahub_learning([*t5_modules[:2], t5_modules[0]], INPUTS, OUTPUTS, 12, compatible=True)
    assert len(weights) == 3


def test_callables_are_called_once_for_each_step(t5_modules: list[str]) -> None:
    calls: list[Any] = []

    def get_loss(dataset: Any, model: Any, batch_size: int | None) -> float:
        calls.append(batch_size)
        return default_get_loss(dataset, model, batch_size)

    weights, _, _ = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 7, None, 3, get_loss, compatible=True)
    assert calls == [3] * 7
    assert np.array_equal(weights, lorahub_learning(t5_modules, INPUTS, OUTPUTS, 7, None, 3, compatible=True)[0])


def test_an_error_in_a_callable_leaves_no_thread_behind(t5_modules: list[str]) -> None:
    """nevergrad's COBYLA waits for a value in a thread of its own, which would keep the process from ever exiting."""

    def get_loss(dataset: Any, model: Any, batch_size: int | None) -> float:
        raise ZeroDivisionError("mine")

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError, match="mine"):
        lorahub_learning(t5_modules[:2], INPUTS, OUTPUTS, 4, get_loss=get_loss, compatible=True)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_what_lorahub_cannot_do_is_refused(t5_modules: list[str], llama_modules: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no form but the product"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, compatible=True, form="cat")
    with pytest.raises(ConfigError, match="no method"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, compatible=True, method="cma")
    with pytest.raises(ConfigError, match="encoder-decoder bases"):
        lorahub_learning(llama_modules, INPUTS, OUTPUTS, 4, compatible=True)
