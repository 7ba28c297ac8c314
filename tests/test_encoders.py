"""An encoder base end to end: trained from a file, published with its classifier, read by PEFT, measured, and served on /classify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import write_encoder_base
from tests.model.test_encoder import of_peft
from tests.server.live_server import serving

from atoll.config import LandConfig, TrainConfig
from atoll.errors import ConfigError
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter
from atoll.model.base import load_base
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
    plain = config.model_copy(update={"tasks": config.tasks})
    hub, base = Hub(), load_base(str(folder), dtype="float32")
    alone = TrainConfig.model_validate(
        {"base": str(folder), "name": "plain", "data": {"path": "builtin:support_intents", **ROWS}, "trainer": QUICK, "adapter": {"r": 4}}
    )
    outcome = train_and_publish(alone, out=tmp_path / "plain")
    assert plain and outcome.version is not None
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


def test_open_answers_are_refused_on_an_encoder(tmp_path: Path) -> None:
    """There is nothing that a classifier could learn from them."""
    folder = write_encoder_base(tmp_path / "base", "bert")
    given = {"base": str(folder), "name": "x", "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": QUICK}
    with pytest.raises(ConfigError, match="encoder"):
        train_and_publish(TrainConfig.model_validate(given), out=tmp_path / "out")
