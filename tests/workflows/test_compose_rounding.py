"""Composing on a rounded base: adapters that were trained on it are composed on it, and others are told how."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.adapters import publish, random_adapter
from tests.workflows.scenes import config_of

from atoll.config_quantization import QuantizationConfig
from atoll.errors import BaseMismatch, ConfigError
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter
from atoll.model.base import Base, load_base
from atoll.workflows import compose_and_publish
from atoll.workflows.compose_plan import plan_composition

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")


@pytest.fixture(params=["bf16", "nf4"])
def rounded(tiny_base_dir: Path, request: pytest.FixtureRequest) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32", quantization=QuantizationConfig(resident=request.param))


def test_a_composition_on_a_rounded_base_belongs_to_it(rounded: Base, atoll_home: Path, examples: Path, tests_file: Path, tmp_path: Path) -> None:
    """Base's score included, which is measured under the rounded base's own title."""
    hub = Hub()
    for number in range(2):
        publish(hub, random_adapter(rounded.decoder, 2, seed=number), f"rounded-{number}", tmp_path / "made", base=rounded.describe())
    config = config_of(rounded, {"train": str(examples), "test": str(tests_file)}, controls=False, compose={"seeds": 1})
    outcome = compose_and_publish(config, out=tmp_path / "out", hub=hub, base=rounded)
    assert {line.name for line in outcome.report.lines if line.scores} >= {"base", "composed"} and outcome.report.base.endswith("(nf4)")
    manifest = read_adapter(outcome.adapter_folder).manifest
    assert manifest["quantization"] == {"bits": 4, "quant_type": "nf4", "double_quant": True} and manifest["base"]["quantization"] == "nf4"


def test_the_key_of_a_compose_file_rounds_the_base_and_without_it_the_way_out_is_said(
    base: Base, atoll_home: Path, tiny_base_dir: Path, examples: Path, tmp_path: Path
) -> None:
    hub, nf4 = Hub(), load_base(str(tiny_base_dir), dtype="float32", quantization=QuantizationConfig())
    publish(hub, random_adapter(nf4.decoder, 2, seed=1), "rounded", tmp_path / "made", base=nf4.describe())
    assert plan_composition(config_of(base, examples, quantization={"bits": 4}), hub).base.fingerprint.quantization == "nf4"
    with pytest.raises(ConfigError, match="rounded@1: the adapter was trained on the base rounded to nf4") as none:
        plan_composition(config_of(base, examples), hub, base=base)
    with pytest.raises(BaseMismatch, match="rounded to nf4") as named:
        plan_composition(config_of(base, examples, compose={"adapters": ["rounded"]}), hub, base=base)
    for caught in (none, named):
        assert caught.value.hint == "round the base alike with --quantization nf4"
    publish(hub, random_adapter(base.decoder, 2, seed=2), "plain", tmp_path / "made2", base=base.describe())
    warnings = plan_composition(config_of(base, examples), hub, base=base).warnings
    assert any("rounded@1 left out: trained on the base rounded to nf4" in warning for warning in warnings)
