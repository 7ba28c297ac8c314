"""LoraHub's two functions on a decoder base, which runs in Atoll's own forward and engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.adapters import publish
from tests.tiny_t5 import INPUTS, OUTPUTS

from atoll.errors import BaseMismatch
from atoll.hub.store import Hub
from atoll.lorahub import lorahub_inference, lorahub_learning
from atoll.lorahub.decoders import DecoderModel
from atoll.model.adapter_files import read_adapter
from atoll.model.base import load_base


@pytest.mark.parametrize("form", ["cat", "product"])
def test_learning_gives_a_model_that_answers_and_saves_itself(llama_modules: list[str], tmp_path: Path, form: str) -> None:
    weights, model, tokenizer = lorahub_learning(llama_modules, INPUTS, OUTPUTS, 12, form=form, save_to=tmp_path / "made")
    assert weights.shape == (3,)
    predictions, accuracy = lorahub_inference(INPUTS[:2], model, tokenizer, 2, OUTPUTS[:2])
    assert len(predictions) == 2
    assert accuracy is not None
    model.save_pretrained(tmp_path / "again")
    made, again = read_adapter(tmp_path / "made"), read_adapter(tmp_path / "again")
    assert made.manifest == again.manifest
    assert [parent["weight"] for parent in made.manifest["parents"]] == pytest.approx(list(weights))
    assert made.manifest["base"]["weights_fingerprint"] == model.base.fingerprint.weights
    assert Hub().publish(tmp_path / "made", "made").kind == "composed"


def test_the_model_is_the_candidate_that_won(llama_modules: list[str]) -> None:
    """The recorded value must be that of the model that is returned, asked as get_loss would ask it."""
    weights, model, tokenizer = lorahub_learning(llama_modules, INPUTS, OUTPUTS, 12)
    losses = []
    for given, wanted in zip(INPUTS, OUTPUTS, strict=True):
        prompt, answer = tokenizer(given).input_ids, [*tokenizer(f" {wanted}").input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        losses.append(float(model(input_ids=ids, labels=torch.tensor([[*[-100] * len(prompt), *answer]])).loss))
    value = sum(losses) / len(losses) + 0.05 * float(np.abs(weights).mean())
    assert value == pytest.approx(model.adapter.manifest["composition"]["value"], abs=1e-4)


def test_a_get_loss_for_causal_models_runs_as_it_is(llama_modules: list[str]) -> None:
    """Code that was written for transformers: padded rows, labels in place, loss, logits and generate."""

    def get_loss(example_dataset: Any, model: Any, batch_size: int | None) -> float:
        rows = example_dataset[:]
        batch = {name: torch.tensor(rows[name]).to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        output = model(**batch)
        shifted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(output.loss, shifted)
        return float(output.loss)

    weights, model, _ = lorahub_learning(llama_modules, INPUTS, OUTPUTS, 6, get_loss=get_loss)
    assert weights.shape == (3,)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
    assert written.shape[0] == 2
    first = int(model(ids[1:, :2]).logits[0, -1].argmax())
    assert int(written[1, 4]) == first
    assert model.to("cpu").eval() is model


def test_names_of_the_local_hub_are_modules(llama_modules: list[str], tiny_base_dir: Path, tmp_path: Path) -> None:
    """A name means its newest version, and the composed adapter remembers which that was."""
    hub = Hub()
    versions = [publish(hub, read_adapter(Path(folder)), f"skill{number}", tmp_path) for number, folder in enumerate(llama_modules)]
    named = lorahub_learning(["skill0", "skill1@1", "skill2"], INPUTS, OUTPUTS, 6, str(tiny_base_dir), save_to=tmp_path / "made")[0]
    assert np.array_equal(named, lorahub_learning(llama_modules, INPUTS, OUTPUTS, 6, hub=hub)[0])
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert [parent["digest"] for parent in manifest["parents"]] == [version.digest for version in versions]


def test_a_base_by_its_name_answers_without_modules(tiny_base_dir: Path) -> None:
    by_name, _ = lorahub_inference(INPUTS[:2], str(tiny_base_dir), str(tiny_base_dir), 1)
    model = DecoderModel(load_base(str(tiny_base_dir), dtype="float32"))
    assert lorahub_inference(INPUTS[:2], model, model.base.tokenizer, 2)[0] == by_name


def test_prompts_longer_than_the_context_lose_their_beginning(tiny_base_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """256 new tokens must fit behind the prompt; what is cut is said."""
    model = DecoderModel(load_base(str(tiny_base_dir), dtype="float32"))
    long = "x" * 300 + INPUTS[0]
    [answer] = model.answers([long], model.base.tokenizer, 256)
    assert "1 of 1 prompts lost their beginning" in caplog.text
    assert model.answers([long[-256:]], model.base.tokenizer, 256) == [answer]


def test_a_module_of_another_shape_is_refused(llama_modules: list[str], tmp_path: Path) -> None:
    from tests.conftest import write_tiny_base

    other = write_tiny_base(tmp_path / "deeper", num_hidden_layers=2)
    with pytest.raises(BaseMismatch, match="llama-module0"):
        lorahub_learning(llama_modules, INPUTS, OUTPUTS, 4, str(other))
