"""Bases of other families than Llama's, end to end: trained from a file, published, read by PEFT, answered, ranked and measured."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_base
from tests.families import family_model, write_encoder_base, write_family_base
from tests.tiny_t5 import write_tiny_t5

from atoll.config import LandConfig, TrainConfig
from atoll.config_file import load_config
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams, ScoreRequest
from atoll.errors import BaseMismatch, ConfigError
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter
from atoll.model.base import load_base
from atoll.model.fingerprint import config_hash
from atoll.workflows import land, train_and_publish

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # PEFT says so of every Conv1D

ROWS = {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 4, "dtype": "float32", "learning_rate": 0.01}
PROMPTS = [[5, 6, 7, 8, 9, 10], [30, 31, 32], [99, 98, 97, 96] * 3]


def asked(base: Path, **adapter: Any) -> LandConfig:
    return LandConfig.model_validate(
        {
            "base": str(base),
            "defaults": {"data": ROWS, "trainer": QUICK, "adapter": adapter, "generation": {"max_new_tokens": 6}},
            "tasks": ["builtin:support_intents"],
            "eval": {"batch_size": 8},
        }
    )


def of_peft(family: str, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(family_model(family), folder).eval()


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn"]), ("gemma2", "all-linear"), ("phi3", ["qkv_proj", "down_proj"])])
def test_a_land_over_another_family_trains_and_measures_what_peft_reads(family: str, targets: Any, tmp_path: Path) -> None:
    """The whole job over a base that transformers runs; its adapter answers greedily as PEFT's model does, and options rank as by PEFT's logits."""
    folder = write_family_base(tmp_path / "base", family)
    outcome = land(asked(folder, r=4, target_modules=targets), tmp_path / "out")
    assert not outcome.failures
    (row,) = outcome.leaderboard.rows
    assert {entry.kind for entry in row.entries} >= {"base", "lora"}
    hub = Hub()
    saved = hub.path(hub.resolve("support_intents"))
    theirs, adapter = of_peft(family, saved), read_adapter(saved)
    assert any(bool(module.b.any()) for module in adapter.modules.values())
    engine = Engine(load_base(str(folder), dtype="float32"))
    engine.register("ours", adapter)
    found = engine.generate([Request(prompt, adapter="ours", sampling=SamplingParams(max_new_tokens=8, temperature=0.0)) for prompt in PROMPTS])
    for prompt, completion in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            wanted = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert list(completion.token_ids) == wanted[: len(completion.token_ids)]
    options = [[40, 41], [50], [60, 61, 62]]
    (scores,) = engine.score([ScoreRequest(PROMPTS[0], options, adapter="ours")])
    for option, score in zip(options, scores, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([PROMPTS[0] + option])).logits[0].log_softmax(-1)
        place = len(PROMPTS[0]) - 1
        assert score == pytest.approx(sum(float(logits[place + i, token]) for i, token in enumerate(option)), abs=1e-4)


def test_lora_and_reft_train_together_over_another_family(tmp_path: Path) -> None:
    """Edits and factors of one job move, on a base whose blocks are transformers' own."""
    folder = write_family_base(tmp_path / "base", "gpt_neox")
    config = asked(folder, r=2, target_modules=["query_key_value"], reft={"type": "loreft", "rank": 2, "layers": "last", "positions": "f1+l1"})
    assert not land(config, tmp_path / "out").failures
    adapter = read_adapter(Hub().path(Hub().resolve("support_intents")))
    assert adapter.spec.kind == "lora+reft"
    assert all(bool(module.b.any()) for module in adapter.modules.values())


def test_targets_that_a_family_lacks_are_refused_by_name(tmp_path: Path) -> None:
    """c_attn is GPT-2's: a Llama has no such linear, and saying nothing would train nothing."""
    folder = write_tiny_base(tmp_path / "base")
    given = {"base": str(folder), "name": "x", "data": {"path": "builtin:support_intents", **ROWS}, "adapter": {"target_modules": ["c_attn"]}}
    with pytest.raises(ConfigError, match="c_attn"):
        train_and_publish(TrainConfig.model_validate(given), out=tmp_path / "out")


def test_an_adapter_of_one_family_does_not_fit_another(tmp_path: Path) -> None:
    """Shapes could agree by chance; names of linears do not."""
    gpt2 = load_base(str(write_family_base(tmp_path / "a", "gpt2")), dtype="float32")
    llama = load_base(str(write_tiny_base(tmp_path / "b")), dtype="float32")
    land(asked(tmp_path / "a", r=2, target_modules=["c_attn"]), tmp_path / "out")
    adapter = read_adapter(Hub().path(Hub().resolve("support_intents")))
    adapter.check_fits(gpt2.decoder.shape.linears, 3)
    with pytest.raises(BaseMismatch, match="c_attn"):
        adapter.check_fits(llama.decoder.shape.linears, 3)


@pytest.mark.parametrize(("example", "task_type"), [("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_example_of_each_kind_of_family_trains(example: str, task_type: str, tmp_path: Path) -> None:
    """The files of the README, over a toy base of the family that they name."""
    write = {"gpt2": lambda path: write_family_base(path, "gpt2"), "bert": lambda path: write_encoder_base(path, "bert"), "t5": write_tiny_t5}
    loaded = load_config(Path(__file__).parents[1] / "examples" / f"train_{example}.yaml", "train")
    assert isinstance(loaded.config, TrainConfig)
    trainer = loaded.config.trainer.model_copy(update={"max_steps": 2, "dtype": "float32"})
    config = loaded.config.model_copy(update={"base": str(write[example](tmp_path / "base")), "trainer": trainer})
    outcome = train_and_publish(config, root=loaded.root, out=tmp_path / "out")
    assert outcome.version is not None and read_adapter(outcome.adapter_folder).spec.task_type == task_type


def test_ids_that_a_forward_reads_are_part_of_a_base(tmp_path: Path) -> None:
    """Two T5s that start their answers from different tokens are two bases; what every config of transformers has is not part of one."""
    from transformers import AutoConfig

    def t5(**changes: Any) -> str:
        return config_hash(AutoConfig.for_model("t5", decoder_start_token_id=changes.pop("start", 0), **changes))

    assert t5() != t5(start=5)
    assert t5() == t5(problem_type="regression", output_hidden_states=True, eos_token_id=7)
    assert t5() != t5(d_ff=64)
    roberta = [config_hash(AutoConfig.for_model("roberta", pad_token_id=pad)) for pad in (1, 2)]
    assert roberta[0] != roberta[1]


def test_an_encoder_does_not_learn_its_own_prompt(tmp_path: Path) -> None:
    """Its states have seen the tokens that they would be asked for."""
    folder = write_tiny_t5(tmp_path / "base")
    trainer = {"train_on_prompt": True, "max_steps": 1}
    given = {"base": str(folder), "name": "x", "data": {"path": "builtin:support_intents", **ROWS}, "trainer": trainer}
    with pytest.raises(ConfigError, match="train_on_prompt"):
        train_and_publish(TrainConfig.model_validate(given), out=tmp_path / "out")
