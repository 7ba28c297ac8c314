"""Composing end to end over bases of other families: with every control and test rows, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.adapters import publish, random_adapter
from tests.families import write_encoder_base, write_family_base
from tests.tiny_t5 import write_tiny_t5
from tests.workflows.scenes import config_of
from tests.workflows.test_compose import CONTESTANTS

from atoll.errors import ConfigError
from atoll.hub.store import Hub
from atoll.model import composed
from atoll.model.adapter_files import read_adapter
from atoll.model.base import load_base
from atoll.model.sites import module_name
from atoll.workflows import compose_and_publish


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_composition_is_compared_published_and_asked(family: str, examples: Path, tests_file: Path, tmp_path: Path) -> None:
    """Retrieval, search, every control and the test rows; the published adapter is the weighted sum of its parents."""
    folder = write_tiny_t5(tmp_path / "base") if family == "t5" else write_family_base(tmp_path / "base", family)
    base, hub = load_base(str(folder), dtype="float32"), Hub()
    names = tuple(dict.fromkeys(map(module_name, base.decoder.shape.linears)))
    own = {"fan_in_fan_out": base.decoder.shape.fan_in_fan_out, "task_type": base.decoder.task_type}
    for number, name in enumerate(("colours", "shapes", "sizes")):
        adapter = random_adapter(base.decoder, 2 + number, seed=number, target_modules=names, **own)
        publish(hub, adapter, name, tmp_path / "made", base=base.describe(), description=f"names of {name}", task=name)
    config = config_of(base, {"train": str(examples), "test": str(tests_file)}, compose={"method": "gradient", "seeds": 1})
    outcome = compose_and_publish(config, out=tmp_path / "out", hub=hub)
    assert outcome.version is not None
    assert [line.name for line in outcome.report.lines if line.name != "majority"] == CONTESTANTS
    made, parents = read_adapter(hub.path(outcome.version)), [read_adapter(hub.path(hub.resolve(part.name))) for part in outcome.weights]
    wanted = composed.cat(parents, [part.weight for part in outcome.weights])
    assert made.spec.task_type == base.decoder.task_type and set(made.modules) == set(wanted.modules)
    for site, module in wanted.modules.items():
        torch.testing.assert_close(made.modules[site].b @ made.modules[site].a, module.b @ module.a)


def test_an_encoder_is_refused_before_anything_is_ranked(examples: Path, tmp_path: Path) -> None:
    """Its adapters' classifiers have classes of their own."""
    base = load_base(str(write_encoder_base(tmp_path / "base", "bert")), dtype="float32")
    hub = Hub()
    publish(hub, random_adapter(base.decoder, 2, target_modules=("query",)), "colours", tmp_path / "made", base=base.describe())
    with pytest.raises(ConfigError, match="is an encoder"):
        compose_and_publish(config_of(base, examples), out=tmp_path / "out", hub=hub)
