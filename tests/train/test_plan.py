"""train/plan.py: what a config asks for is what is trained, and a job's identity covers all that decides its weights."""

from __future__ import annotations

from atoll.config import AdapterConfig
from atoll.model.adapter import AdapterSpec
from atoll.model.sites import TARGETS
from atoll.train.plan import adapter_spec


def test_the_spec_is_what_the_config_asks_for() -> None:
    """From the YAML's adapter section to the file's config, with its defaults: all linears, alpha twice the rank."""
    assert adapter_spec("tiny", AdapterConfig()) == AdapterSpec("tiny", 16, 32.0, TARGETS)
    asked = AdapterConfig(
        r=8,
        alpha=12,
        dropout=0.1,
        target_modules=["v_proj", "q_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3.0},
        layers_to_transform=[2, 0],
    )
    assert adapter_spec("tiny", asked) == AdapterSpec(
        base="tiny",
        rank=8,
        alpha=12.0,
        target_modules=("q_proj", "v_proj"),
        dropout=0.1,
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3.0},
        layers_to_transform=(2, 0),
    )
