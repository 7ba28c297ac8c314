"""`atoll classify`: an encoder's classes from the command line, and advice that works after training and when serving."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.families import write_encoder_base
from tests.train.test_masked_lm import write_masked_base

from atoll.cli.serve import _greet


@pytest.fixture
def encoder_job(job: Path, tmp_path: Path) -> Path:
    """The training file of conftest, over an encoder."""
    write_encoder_base(tmp_path / "encoder", "bert")
    job.write_text(json.dumps({**json.loads(job.read_text()), "base": "encoder"}))
    return job


def test_the_advice_after_training_an_encoder_is_carried_out(atoll: Any, encoder_job: Path) -> None:
    """`atoll generate` fails over it; the command that is printed answers with the classes of the data."""
    trained = atoll("train", encoder_job)
    assert 'try it: atoll classify --adapter colours "..."' in trained.err and "generate" not in trained.err
    found = atoll("classify", "--adapter", "colours", "--dtype", "float32", "--json", "a red thing 0").json()
    assert set(found["classes"]) == {"red", "blue", "green"} and found["label"] == max(found["classes"], key=found["classes"].__getitem__)
    assert sum(found["classes"].values()) == pytest.approx(1, abs=1e-5) and found["prompt"] == "a red thing 0 is"
    shown = atoll("classify", "--adapter", "colours", "--dtype", "float32", "-f", "text=a red thing 0").out
    assert shown.index(found["label"]) == min(map(shown.index, found["classes"]))
    assert atoll("classify", "--adapter", "colours").code == 2
    encoder_job.write_text(json.dumps({**json.loads(encoder_job.read_text()), "name": "swept", "sweep": {"adapter.r": [2, 4]}}))
    assert "try it: atoll classify --adapter swept" in atoll("train", encoder_job).err


def test_an_adapter_that_learned_hidden_tokens_has_no_classes(atoll: Any, encoder_job: Path, tmp_path: Path) -> None:
    """Nothing is advised that it cannot do."""
    write_masked_base(tmp_path / "encoder", "bert", pooler=True)
    trained = atoll("train", encoder_job, "--set", "trainer.mlm_probability=0.3", "--name", "texts")
    assert trained.code == 0 and "try it" not in trained.err
    refused = atoll("classify", "--adapter", "texts", "--dtype", "float32", "a red thing")
    assert refused.code == 1 and "no classifier" in refused.err


def test_a_base_that_writes_has_no_classes(atoll: Any, trained: Path) -> None:
    """Its labels are words, which `atoll generate` writes."""
    refused = atoll("classify", "--adapter", "colours", "--dtype", "float32", "a red thing")
    assert refused.code == 1 and "atoll generate --adapter colours" in refused.err


@pytest.mark.parametrize(("classifies", "route"), [(True, "/classify"), (False, "/generate")])
def test_the_server_says_what_its_base_can_be_asked(classifies: bool, route: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing to try must not be refused."""
    decoder = SimpleNamespace(classifies=classifies, holds_blocks=False)
    config = SimpleNamespace(preload=("colours",), keys_file=None, engine=SimpleNamespace(max_rows=4))
    base = SimpleNamespace(title="tiny", decoder=decoder)
    _greet(SimpleNamespace(config=config, base=base, kernel="plain", stats=lambda: {"engine": {}}), "http://here")  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert f"try: curl http://here{route} " in said and '"adapter_id": "colours"' in said
