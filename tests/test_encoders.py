"""An encoder base end to end: trained from a file, published with its classifier, read by PEFT, measured, and served on /classify."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.adapters import random_adapter
from tests.families import encoder_model, write_encoder_base
from tests.model.test_encoder import of_peft, peft_classifier
from tests.server.live_server import serving

from atoll.config import LandConfig, TrainConfig
from atoll.errors import BaseMismatch, ConfigError
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.base import load_base
from atoll.model.encoder import EncoderClassifier
from atoll.workflows import land, prompt_ids, train_and_publish

ROWS = {"max_train_rows": 40, "max_validation_rows": 8, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 8, "dtype": "float32", "learning_rate": 0.01}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_land_over_an_encoder_trains_measures_and_serves_classes(family: str, tmp_path: Path) -> None:
    """Scores and /classify are what PEFT's model says of the published folder."""
    folder = write_encoder_base(tmp_path / "base", family)
    config = LandConfig.model_validate(
        {
            "base": str(folder),
            "defaults": {"data": ROWS, "trainer": QUICK, "adapter": {"r": 4, "reft": {"type": "loreft", "rank": 2, "positions": "f1"}}},
            "tasks": ["builtin:support_intents"],
        }
    )
    assert not land(config, tmp_path / "out").failures
    hub, base = Hub(), load_base(str(folder), dtype="float32")
    alone = TrainConfig.model_validate(
        {"base": str(folder), "name": "plain", "data": {"path": "builtin:support_intents", **ROWS}, "trainer": QUICK, "adapter": {"r": 4}}
    )
    outcome = train_and_publish(alone, out=tmp_path / "plain")
    assert outcome.version is not None
    adapter = read_adapter(hub.path(outcome.version))
    labels = adapter.manifest["labels"]
    theirs = of_peft(family, hub.path(outcome.version), len(labels))
    with serving(base, hub) as live:
        reply = live.post("/classify", {"inputs": "where is my parcel", "parameters": {"adapter_id": "plain", "adapter_source": "hub"}})
        assert reply.status_code == 200, reply.text
        refused = live.post("/generate", {"inputs": "hello"})
        assert 400 <= refused.status_code < 500 and "encoder" in refused.text
    with torch.no_grad():
        form = next(iter(adapter.manifest["prompt"]["template"].split("{")[1:])).split("}")[0]
        wanted = theirs(torch.tensor([prompt_ids(base, adapter, **{form: "where is my parcel"})])).logits[0].softmax(-1)
    found = {entity["entity_group"]: entity["score"] for entity in reply.json()}
    for label, score in zip(labels, wanted.tolist(), strict=True):
        assert found[label] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_that_peft_saved_is_served_as_it_is(family: str, tmp_path: Path) -> None:
    """No manifest, so no names and no template: the classes are numbered as transformers does, the text is read as the tokenizer writes it."""
    theirs, hub = peft_classifier(family), Hub()
    theirs.save_pretrained(tmp_path / "theirs")
    hub.publish(tmp_path / "theirs", "found")
    misnamed = read_adapter(tmp_path / "theirs")
    write_adapter(tmp_path / "misnamed", replace(misnamed, manifest={"format": 1, "kind": "lora", "base": {}, "labels": ["yes", "no"]}))
    hub.publish(tmp_path / "misnamed", "misnamed")
    write_adapter(
        tmp_path / "headless",
        replace(
            misnamed,
            spec=replace(misnamed.spec, task_type="CAUSAL_LM"),
            head={},
            manifest={"format": 1, "kind": "lora", "base": {}, "labels": ["yes", "no"]},
        ),
    )
    hub.publish(tmp_path / "headless", "headless")
    base = load_base(str(write_encoder_base(tmp_path / "base", family)), dtype="float32")
    with serving(base, hub) as live:
        asked = {"inputs": ["a text", "another text"], "parameters": {"adapter_id": "found", "adapter_source": "hub"}}
        reply = live.post("/classify_batch", asked)
        assert reply.status_code == 200, reply.text
        assert live.get("/info").json()["model_pipeline_tag"] == "text-classification"
        asked["parameters"] = {"adapter_id": "misnamed", "adapter_source": "hub"}
        refused = live.post("/classify_batch", asked)
        assert 400 <= refused.status_code < 500 and "3 classes" in refused.text
        for name in ("headless", None):
            asked["parameters"] = {"adapter_id": name, "adapter_source": "hub"} if name else {}
            refused = live.post("/classify_batch", asked)
            assert refused.status_code == 501, refused.text
    for text, entities in zip(asked["inputs"], reply.json(), strict=True):
        with torch.no_grad():
            wanted = theirs(**base.tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
        found = {entity["entity_group"]: entity["score"] for entity in entities}
        assert found == pytest.approx({f"LABEL_{number}": score for number, score in enumerate(wanted)}, abs=1e-4)


def test_a_classifier_of_another_family_does_not_fit() -> None:
    """RoBERTa's has two layers; the names of what is missing are said."""
    decoder = EncoderClassifier(encoder_model("bert"))
    adapter = random_adapter(decoder, 4, target_modules=("query",))
    head = EncoderClassifier(encoder_model("roberta")).new_head(3, torch.Generator())
    with pytest.raises(BaseMismatch, match=r"classifier\.dense\.bias"):
        replace(adapter, head=head).check_fits(decoder.shape.linears, decoder.shape.num_layers)
    with pytest.raises(BaseMismatch, match=r"classifier\.bias has shape \[2\]"):
        own = decoder.new_head(3, torch.Generator())
        replace(adapter, head={**own, "classifier.bias": torch.zeros(2)}).check_fits(decoder.shape.linears, decoder.shape.num_layers)


def test_open_answers_are_refused_on_an_encoder(tmp_path: Path) -> None:
    """There is nothing that a classifier could learn from them."""
    folder = write_encoder_base(tmp_path / "base", "bert")
    given = {"base": str(folder), "name": "x", "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": QUICK}
    with pytest.raises(ConfigError, match="encoder"):
        train_and_publish(TrainConfig.model_validate(given), out=tmp_path / "out")
