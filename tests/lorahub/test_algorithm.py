"""LoraHub's two functions on an encoder-decoder base: the article's program, the fixes, the errors."""

from __future__ import annotations

import ast
import inspect
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_t5 import INPUTS, OUTPUTS, linear_shapes, random_t5_adapter, tiny_t5, write_tiny_t5

import atoll.lorahub
from atoll.errors import AdapterFormatError, AdapterNotFound, BaseMismatch, ConfigError, DataError
from atoll.lorahub.algorithm import default_get_loss, default_l1_regularization, lorahub_inference, lorahub_learning
from atoll.lorahub.constant import LORA_MODULE_NAMES
from atoll.model.generic import GenericModel, Pairs, load_encoder_decoder
from atoll.model.generic_adapter import read_generic_adapter, write_generic_adapter
from atoll.model.generic_pool import GenericPool


def mean_loss(model: Any, tokenizer: Any) -> float:
    """The true mean over the examples of transformers' own loss of each."""
    found = []
    for given, wanted in zip(INPUTS, OUTPUTS, strict=True):
        pair = Pairs.of([(tokenizer(given).input_ids, tokenizer(wanted).input_ids)], 0)
        with torch.no_grad():
            found.append(float(model(input_ids=pair.input_ids, labels=pair.labels).loss))
    return sum(found) / len(found)


def test_the_articles_program_runs(t5_modules: list[str]) -> None:
    """Only the imports and the names of modules are ours; everything else stands as people have it."""

    def get_lora_module_list() -> list[str]:
        random.seed(42)
        return random.sample(t5_modules, 3)

    modules = get_lora_module_list()
    module_weights, model, tokenizer = lorahub_learning(
        lora_module_list=modules, example_inputs=INPUTS, example_outputs=OUTPUTS, max_inference_step=10, batch_size=1
    )
    assert len(module_weights) == len(modules)
    predictions, accuracy = lorahub_inference(
        example_inputs=INPUTS, model_or_name_path=model, tokenizer_or_tokenizer_path=tokenizer, batch_size=2, example_outputs=OUTPUTS
    )
    assert len(predictions) == len(INPUTS)
    assert accuracy == 0
    assert type(model).__name__ == "T5ForConditionalGeneration"


def test_signatures_are_the_articles() -> None:
    """Positional calls, and calls by name with LoraHub's defaults, must mean what they meant."""
    learning = [p for p in inspect.signature(lorahub_learning).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in learning[4:]] == [
        ("model_name_or_path", None),
        ("batch_size", None),
        ("get_loss", default_get_loss),
        ("get_regular", default_l1_regularization),
        ("seed", 42),
    ]
    assert [p.name for p in learning[:4]] == ["lora_module_list", "example_inputs", "example_outputs", "max_inference_step"]
    inference = inspect.signature(lorahub_inference).parameters
    assert list(inference) == ["example_inputs", "model_or_name_path", "tokenizer_or_tokenizer_path", "batch_size", "example_outputs"]
    assert inference["example_outputs"].default is None


def test_the_module_names_are_lorahubs() -> None:
    """random.sample by a seed must draw the modules that it draws there."""
    assert len(LORA_MODULE_NAMES) == len(set(LORA_MODULE_NAMES)) == 196
    assert LORA_MODULE_NAMES[0] == "lorahub/flan_t5_large-qasc_qa_with_separated_facts_3"
    assert all(name.startswith("lorahub/flan_t5_large-") for name in LORA_MODULE_NAMES)


def test_every_public_name_is_there() -> None:
    for name in atoll.lorahub.__all__:
        assert getattr(atoll.lorahub, name) is not None
    assert set(atoll.lorahub.__all__) <= set(dir(atoll.lorahub))
    with pytest.raises(AttributeError, match="no_such_name"):
        atoll.lorahub.no_such_name  # noqa: B018 (the access is the test)
    tree = ast.parse(Path(atoll.lorahub.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen.keys() == atoll.lorahub._HOMES.keys()  # what type checkers see is written by hand beside the table


@pytest.mark.parametrize("form", ["cat", "product"])
@pytest.mark.parametrize("method", [None, "cma", "nevergrad:NGOpt", "gradient_per_layer"])
def test_learning_lowers_the_loss_and_returns_the_model_that_has_it(
    t5_dir: Path, t5_modules: list[str], tmp_path: Path, form: str, method: str | None
) -> None:
    """The merged model must be the candidate whose value won, whatever the method."""
    weights, model, tokenizer = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 24, form=form, method=method, save_to=tmp_path)
    assert weights.shape == ((4, 4) if method == "gradient_per_layer" else (4,))
    assert abs(weights).max() <= 1.5
    value = mean_loss(model, tokenizer) + 0.05 * float(np.abs(weights).mean())
    assert value == pytest.approx(json.loads((tmp_path / "manifest.json").read_text())["composition"]["value"], abs=1e-4)
    base = load_encoder_decoder(str(t5_dir))
    assert mean_loss(model, tokenizer) < mean_loss(base.model, tokenizer) + 0.05


def test_a_seed_gives_the_same_weights(t5_modules: list[str]) -> None:
    first, again, other = (lorahub_learning(t5_modules, INPUTS, OUTPUTS, 16, method="cma", seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_batch_size_bounds_the_forward_and_changes_no_loss(t5_modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In LoraHub the same arguments with another batch_size have another optimum."""
    rows: list[int] = []
    plain = GenericModel.label_losses

    def counted(self: GenericModel, pairs: Pairs, *rest: Any) -> torch.Tensor:
        rows.append(len(pairs.labels))
        return plain(self, pairs, *rest)

    monkeypatch.setattr(GenericModel, "label_losses", counted)
    alone = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 8, batch_size=1)[0]
    assert max(rows) == 1
    np.testing.assert_allclose(lorahub_learning(t5_modules, INPUTS, OUTPUTS, 8)[0], alone, atol=1e-4)
    assert max(rows) == 5


def test_every_module_counts_with_its_own_scaling(t5_dir: Path, t5_modules: list[str], tmp_path: Path) -> None:
    """LoraHub gives all modules the scaling of one, so an adapter's strength would depend on its company."""
    loud = read_generic_adapter(Path(t5_modules[0]))
    folder = tmp_path / "quiet"
    quiet = random_t5_adapter(linear_shapes(tiny_t5()), 0, base=str(t5_dir), alpha=0.06)
    write_generic_adapter(folder, quiet)
    assert quiet.spec.alpha * 100 == pytest.approx(loud.spec.alpha)

    def losses(modules: Sequence[str], weights: Sequence[float]) -> float:
        model = load_encoder_decoder(str(t5_dir))
        pool = GenericPool.of([read_generic_adapter(Path(module)) for module in modules], model, modules)
        model.merge(pool.compose(torch.tensor(weights), "product"))
        return mean_loss(model.model, model.tokenizer)

    assert losses([str(folder), t5_modules[1]], [10.0, 0.0]) == pytest.approx(losses([t5_modules[1], t5_modules[0]], [0.0, 1.0]), abs=1e-4)


def test_callables_of_ones_own_get_what_lorahub_gives_them(t5_modules: list[str]) -> None:
    """The documented way to optimise for something else: (example_dataset, model, batch_size), and the weights."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    asked: list[float] = []

    def get_loss(example_dataset: Any, model: Any, batch_size: int) -> float:
        assert len(example_dataset) == len(example_dataset["input"]) == 5
        total = 0.0
        with torch.no_grad():
            for batch in DataLoader(example_dataset, collate_fn=default_data_collator, batch_size=batch_size):
                total += float(model(**batch).loss)
            assert model.generate(input_ids=torch.tensor([example_dataset[0]["input_ids"]]), max_new_tokens=2).shape[0] == 1
        asked.append(total)
        return total

    def get_regular(weights: Any) -> float:
        assert isinstance(weights, np.ndarray)
        return 0.3 * sum(abs(weight) for weight in weights)

    weights, _, _ = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 9, None, 2, get_loss, get_regular)
    assert len(asked) == 9
    assert len(weights) == 4
    assert lorahub_learning(t5_modules, INPUTS, OUTPUTS, 9, get_regular=lambda weights: 1e3 * abs(weights[0]))[0][0] == pytest.approx(0, abs=0.05)
    with pytest.raises(ConfigError, match="gradient needs"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 9, get_regular=get_regular, method="gradient")
    with pytest.raises(ConfigError, match="needs scores with gradients"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 9, get_loss=get_loss, method="gradient")


def test_the_adapter_is_saved_with_its_story(t5_dir: Path, t5_modules: list[str], tmp_path: Path) -> None:
    """What is found must outlive the program: an ordinary folder, with parents, weights, method and examples."""
    weights, model, tokenizer = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 8, save_to=tmp_path / "made")
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["kind"] == "composed"
    assert [parent["weight"] for parent in manifest["parents"]] == pytest.approx(list(weights))
    assert [parent["name"] for parent in manifest["parents"]] == t5_modules
    assert manifest["composition"]["method"] == "gradient"
    assert len(manifest["composition"]["examples"]) == 64
    again = load_encoder_decoder(str(t5_dir))
    again.merge(read_generic_adapter(tmp_path / "made"))
    assert mean_loss(again.model, tokenizer) == pytest.approx(mean_loss(model, tokenizer), abs=1e-5)
    assert set(tmp_path.iterdir()) == {tmp_path / "made"}


def test_modules_of_different_bases_are_refused(t5_dir: Path, t5_modules: list[str], tmp_path: Path) -> None:
    """LoraHub checks shapes of the first module's tensors, which say nothing of the base."""
    write_generic_adapter(tmp_path / "strange", random_t5_adapter(linear_shapes(tiny_t5()), 9, base="google/other-t5"))
    with pytest.raises(BaseMismatch, match=r"strange' was made for base 'google/other-t5', but .*module0' for"):
        lorahub_learning([*t5_modules, str(tmp_path / "strange")], INPUTS, OUTPUTS, 4)
    write_generic_adapter(tmp_path / "wide", random_t5_adapter(linear_shapes(tiny_t5(d_model=40)), 9, base=str(t5_dir)))
    with pytest.raises(BaseMismatch, match=r"wide'.* x 40 linear"):
        lorahub_learning([*t5_modules, str(tmp_path / "wide")], INPUTS, OUTPUTS, 4)
    moved = write_tiny_t5(tmp_path / "elsewhere")
    assert len(lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, str(moved))[0]) == 4  # a base that is named is used: folders have many names


def test_unequal_ranks_are_refused_by_the_product_form_alone(t5_dir: Path, t5_modules: list[str], tmp_path: Path) -> None:
    write_generic_adapter(tmp_path / "thin", random_t5_adapter(linear_shapes(tiny_t5()), 9, rank=2, base=str(t5_dir)))
    modules = [*t5_modules, str(tmp_path / "thin")]
    with pytest.raises(ConfigError, match="equal rank"):
        lorahub_learning(modules, INPUTS, OUTPUTS, 4, form="product")
    with pytest.raises(ConfigError, match="equal rank"):
        lorahub_learning(modules, INPUTS, OUTPUTS, 4, compatible=True)
    assert len(lorahub_learning(modules, INPUTS, OUTPUTS, 4)[0]) == 5


def test_bfloat16_finds_nearly_the_same(t5_modules: list[str]) -> None:
    """Half the memory and, where the processor has it, a third of the time; the losses agree to its precision."""
    weights, model, _ = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 3, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    np.testing.assert_allclose(weights, lorahub_learning(t5_modules, INPUTS, OUTPUTS, 3)[0], atol=0.2)


def test_what_cannot_be_learnt_from_is_refused(t5_modules: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA modules"):
        lorahub_learning([], INPUTS, OUTPUTS, 4)
    with pytest.raises(DataError, match="no examples"):
        lorahub_learning(t5_modules, [], [], 4)
    with pytest.raises(DataError, match="5 example inputs, but 4 outputs"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS[:4], 4)
    with pytest.raises(DataError, match="example_inputs is one text"):
        lorahub_learning(t5_modules, "input", "output", 4)
    with pytest.raises(ConfigError, match="max_inference_step is 0"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 0)
    with pytest.raises(ConfigError, match="no form 'sum'"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, form="sum")
    with pytest.raises(ConfigError, match="no method 'gradients'"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, method="gradients")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, batch_size=0)
    with pytest.raises(ConfigError, match="dtype 'float8'"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, dtype="float8")
    with pytest.raises(ConfigError, match="device 'nowhere'"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, device="nowhere")
    with pytest.raises(AdapterNotFound, match="no module 'nothing here'"):
        lorahub_learning(["nothing here"], INPUTS, OUTPUTS, 4)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        lorahub_learning([str(tmp_path)], INPUTS, OUTPUTS, 4)


def test_inference_counts_answers_as_lorahub_does(t5_dir: Path, t5_modules: list[str]) -> None:
    """Case, full stops and blanks at the ends do not count; a model by its name and one at hand answer alike, in any batch size."""
    answers, none = lorahub_inference(INPUTS, str(t5_dir), str(t5_dir), 5)
    assert none is None
    wanted = [f"  {answers[0].upper()}. ", *answers[1:4], "something else"]
    model = load_encoder_decoder(str(t5_dir))
    again, accuracy = lorahub_inference(INPUTS, model.model, model.tokenizer, 2, wanted)
    assert again == answers
    assert accuracy == pytest.approx(80)
    assert lorahub_inference([], model.model, model.tokenizer, 2) == ([], None)
    with pytest.raises(DataError, match="5 example inputs, but 1 outputs"):
        lorahub_inference(INPUTS, model.model, model.tokenizer, 2, ["one"])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        lorahub_inference(INPUTS, model.model, model.tokenizer, 0)
    with pytest.raises(ConfigError, match="object is neither"):
        lorahub_inference(INPUTS, object(), model.tokenizer, 1)
