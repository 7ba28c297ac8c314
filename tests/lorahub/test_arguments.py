"""What LoraHub's two functions take and refuse, without a base where none is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_t5 import INPUTS, OUTPUTS

from atoll.errors import AtollError, ConfigError, DataError, StorageError
from atoll.lorahub import arguments
from atoll.lorahub.algorithm import lorahub_inference, lorahub_learning
from atoll.lorahub.decoders import DecoderModel
from atoll.model.base import load_base


@pytest.mark.parametrize("kind", [tuple, iter, np.array, lambda texts: np.array(texts, dtype=object), lambda texts: dict(enumerate(texts)).values()])
def test_texts_may_stand_in_any_kind_of_list(kind: Any) -> None:
    """Programs hold their examples in arrays and columns; the truth of an array is an error, and its texts are not quite str."""
    found = arguments.examples(kind(INPUTS), kind(OUTPUTS))
    assert found == (INPUTS, OUTPUTS)
    assert {type(text) for text in found[0]} == {str}


def test_arrays_learn_what_lists_do(t5_modules: list[str]) -> None:
    plain = lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, batch_size=2)[0]
    found = lorahub_learning(np.array(t5_modules), np.array(INPUTS), np.array(OUTPUTS), np.int64(4), batch_size=np.int32(2))[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", "example_inputs is one text, expected a list of texts"),
        (None, "example_inputs is None, expected a list of texts"),
        (7, "example_inputs is of type int, expected a list of texts"),
        ({"a": "b"}, "example_inputs is of type dict, expected a list of texts"),
        (np.array([["a"], ["b"]]), "example_inputs is of type ndarray, expected a list of texts"),
        (["a", 2], "example_inputs, entry 2 is 2, expected a text"),
        ([None], "example_inputs, entry 1 is None, expected a text"),
        ([float("nan")], "example_inputs, entry 1 is nan, expected a text"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_by_both_functions(given: Any, message: str) -> None:
    """A text is a list of letters to Python: one prompt of three letters got three answers."""
    for call in (lambda: lorahub_learning(["module"], given, OUTPUTS, 4), lambda: lorahub_inference(given, "base", "base", 1)):
        with pytest.raises(DataError) as caught:
            call()
        assert caught.value.message == message
        assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "2"}, "batch_size is '2', expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True, expected a whole number of at least 1"),
        ({"max_inference_step": 2.5}, "max_inference_step is 2.5, expected a whole number of at least 1"),
        ({"seed": None}, "seed is None, expected a whole number from 0 to 4294967295"),
        ({"seed": -1, "compatible": True}, "seed is -1, expected a whole number from 0 to 4294967295"),
        ({"get_loss": 3}, "get_loss is 3, expected a function"),
        ({"get_regular": None}, "get_regular is None, expected a function"),
        ({"save_to": ""}, "save_to is '', expected the path of a folder"),
        ({"model_name_or_path": 3}, "model_name_or_path is int, expected a name"),
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any], message: str, t5_modules: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        lorahub_learning(**{"lora_module_list": t5_modules, "example_inputs": INPUTS, "example_outputs": OUTPUTS, "max_inference_step": 4, **options})
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["get_loss", "get_regular"])
@pytest.mark.parametrize("found", [None, torch.zeros(2)])
@pytest.mark.parametrize("compatible", [False, True])
def test_a_callable_that_returns_no_number_is_named(t5_modules: list[str], name: str, found: Any, compatible: bool) -> None:
    """Forgetting the return is the usual mistake, and happens inside a search."""
    with pytest.raises(ConfigError, match=f"{name} returned .*, expected a number"):
        lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, compatible=compatible, **{name: lambda *_: found})  # type: ignore[arg-type]


def test_a_file_in_the_way_of_the_result_is_said_before_the_search(t5_modules: list[str], tiny_base_dir: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for place in (taken, taken / "below"):
        with pytest.raises(ConfigError, match=r"save_to is '.*', but .*taken is a file, expected a folder"):
            lorahub_learning(t5_modules, INPUTS, OUTPUTS, 4, save_to=place)
    assert taken.read_text() == "mine"
    base = DecoderModel(load_base(str(tiny_base_dir), dtype="float32"))
    with pytest.raises(ConfigError, match="no adapter to save"):
        base.save_pretrained(tmp_path / "base")


def test_saving_where_a_file_is_says_so(llama_modules: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    _, model, _ = lorahub_learning(llama_modules, INPUTS, OUTPUTS, 4)
    with pytest.raises(StorageError, match=r"taken.* could not be written"):
        model.save_pretrained(tmp_path / "taken")


def test_lorahubs_own_search_is_for_encoder_decoders_and_says_so_first(llama_modules: list[str]) -> None:
    with pytest.raises(ConfigError, match="compatible=True is for encoder-decoder bases"):
        lorahub_learning(llama_modules, INPUTS, OUTPUTS, 4, compatible=True)


def test_inference_refuses_what_it_cannot_ask(t5_dir: Path) -> None:
    for given, message in (
        ((["hi"], str(t5_dir), None, 1), "None is no tokenizer"),
        ((["hi"], str(t5_dir), str(t5_dir), "2"), "batch_size is '2', expected a whole number"),
        ((["hi"], str(t5_dir), str(t5_dir), 1, "a"), "example_outputs is one text"),
        ((["hi"], str(t5_dir), str(t5_dir), 1, [3]), "example_outputs, entry 1 is 3"),
    ):
        with pytest.raises(AtollError, match=message):
            lorahub_inference(*given)  # type: ignore[arg-type]


def test_a_column_of_a_table_is_a_list_of_texts() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": INPUTS, "answer": OUTPUTS}, index=range(7, 7 + len(INPUTS)))
    assert arguments.examples(table["text"], table["answer"]) == (INPUTS, OUTPUTS)
    with pytest.raises(DataError, match="example_inputs is of type DataFrame"):
        arguments.examples(table, table["answer"])
