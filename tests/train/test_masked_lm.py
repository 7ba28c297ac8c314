"""Masked-language training over BERT and RoBERTa: losses, gradients and files are PEFT's over transformers' own model."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.families import ALIKE, encoder_tokenizer
from tests.train.jobs import log_lines

from atoll.config import LandConfig, TrainConfig
from atoll.errors import BaseFormatError, ConfigError, DataError
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter
from atoll.model.base import Base, load_base
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.sites import peft_key
from atoll.train.loop import train
from atoll.train.plan import estimate_cost, training_job
from atoll.train.rows import RowGroup, adapter_batch, pack_groups
from atoll.train.weights import TrainableAdapter
from atoll.workflows import land, make_plan, train_and_publish, train_many

ROWS = {"max_train_rows": 24, "max_validation_rows": 6, "max_test_rows": 4}
TRAINER = {"max_steps": 4, "batch_size": 6, "dtype": "float32", "learning_rate": 0.01, "mlm_probability": 0.15, "eval_every": 2}


def masked_model(family: str, seed: int = 0) -> Any:
    """transformers' own masked-language model at toy size, float32, in eval mode."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **ALIKE), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(0.1 * torch.randn_like(tensor)) if "norm" in name.lower() else tensor.normal_(0.0, 0.15)
    return model


def write_masked_base(folder: Path, family: str, *, pooler: bool = False) -> Path:
    """What BertForMaskedLM saves has no pooler; what Google published has one."""
    model = masked_model(family)
    tensors = {**model.state_dict()}
    if pooler:
        tensors |= {"bert.pooler.dense.weight": torch.randn(64, 64) * 0.15, "bert.pooler.dense.bias": torch.zeros(64)}
    model.save_pretrained(folder, state_dict=tensors)
    tokenizer = encoder_tokenizer()
    tokenizer.mask_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    return folder


def config_of(base: Path, name: str = "texts", **adapter: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"base": str(base), "name": name, "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": TRAINER, "adapter": {"r": 4, **adapter}}
    )


def of_peft(family: str, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(masked_model(family), folder, is_trainable=True).eval()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_published_adapter_is_pefts_in_losses_and_gradients(family: str, tmp_path: Path) -> None:
    """The loss of hidden tokens under the trained adapter, and every gradient of it."""
    folder = write_masked_base(tmp_path / "base", family)
    outcome = train_and_publish(config_of(folder), out=tmp_path / "out")
    assert outcome.version is not None
    saved = Hub().path(outcome.version)
    adapter, theirs, base = read_adapter(saved), of_peft(family, saved), load_base(str(folder), dtype="float32")
    assert adapter.spec.task_type == "FEATURE_EXTRACTION" and not adapter.head
    plan = make_plan(config_of(folder), base=base)
    assert plan.masking is not None and estimate_cost(plan).tokens_per_s > 0
    rows = [plan.masking.hide(row, str(place)) for place, row in enumerate(plan.train.rows[:4])]
    decoder = plan.decoder
    weights = TrainableAdapter(adapter, decoder.shape.linears, groups=decoder.shape.groups)
    packed = pack_groups([RowGroup(rows)], "cpu")
    each = decoder.label_losses(decoder.forward(packed.batch, adapter_batch(packed, [weights])), packed.labels)
    each.sum().backward()
    expected = torch.tensor(0.0)
    for row in rows:
        logits = theirs(input_ids=torch.tensor([row.token_ids])).logits[0, list(row.places)]
        expected = expected + F.cross_entropy(logits, torch.tensor(row.hidden), reduction="sum")
    expected.backward()
    torch.testing.assert_close(each.sum(), expected, rtol=1e-5, atol=1e-4)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    ours = weights.adapter(weights.grads)
    assert len(grads) == 2 * len(ours.modules)
    for site, module in ours.modules.items():
        for factor, found in (("A", module.a), ("B", module.b)):
            torch.testing.assert_close(found, grads[peft_key(site, factor).replace(".weight", ".default.weight")], rtol=1e-3, atol=1e-4)


def mean_loss(base: Base, config: TrainConfig, adapter: Any) -> float:
    plan = make_plan(config, base=base)
    assert plan.masking is not None
    rows = [plan.masking.hide(row, f"test {place}") for place, row in enumerate(plan.train.rows)]
    packed = pack_groups([RowGroup(rows)], "cpu")
    weights = TrainableAdapter(adapter, plan.decoder.shape.linears, groups=plan.decoder.shape.groups)
    with torch.no_grad():
        return float(plan.decoder.label_losses(plan.decoder.forward(packed.batch, adapter_batch(packed, [weights])), packed.labels).mean())


def test_texts_are_learned_beside_other_jobs_and_classes(tmp_path: Path) -> None:
    """Jobs over hidden tokens and over classes share the base, never a forward; each ends as alone, and what was hidden is told better."""
    folder = write_masked_base(tmp_path / "base", "bert", pooler=True)
    classes = config_of(folder, "classes").model_copy(
        update={
            "data": config_of(folder).data.model_copy(update={"path": "builtin:support_intents"}),
            "trainer": config_of(folder).trainer.model_copy(update={"mlm_probability": None}),
        }
    )
    reft = config_of(folder, "edited", reft={"type": "loreft", "rank": 2, "positions": "f2"})
    configs = [config_of(folder), classes, reft]
    together = train_many([(config, None) for config in configs], out=tmp_path / "together", publish=False)
    assert not any(isinstance(outcome, Exception) for outcome in together), together
    for config, outcome in zip(configs, together, strict=True):
        train_and_publish(config, out=tmp_path / "alone" / str(config.name), publish=False)
        ours = log_lines(tmp_path / "together" / str(config.name))
        for line, expected in zip(ours, log_lines(tmp_path / "alone" / str(config.name)), strict=True):
            assert line == pytest.approx(expected, rel=1e-3)
        assert not isinstance(outcome, Exception)
    base = load_base(str(folder), dtype="float32")
    trained = read_adapter(tmp_path / "together" / "texts" / "adapter")
    from atoll.train.start import start_adapter

    fresh = start_adapter(trained.spec, base.decoder, 0).adapter
    assert mean_loss(base, configs[0], trained) < mean_loss(base, configs[0], fresh)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """A base that writes, one whose files have no such head, a land, ReFT alone: each in one sentence before any step."""
    from tests.conftest import write_tiny_base
    from tests.families import write_encoder_base

    with pytest.raises(BaseFormatError, match="writes text"):
        make_plan(config_of(write_tiny_base(tmp_path / "llama")))
    with pytest.raises(BaseFormatError, match="cannot tell hidden tokens"):
        make_plan(config_of(write_encoder_base(tmp_path / "headless", "bert")))
    folder = write_masked_base(tmp_path / "base", "bert")
    given = {"base": str(folder), "name": "classes", "data": {"path": "builtin:support_intents", **ROWS}, "trainer": {"max_steps": 1}}
    with pytest.raises(BaseFormatError, match="pooler"):
        train_and_publish(TrainConfig.model_validate(given), out=tmp_path / "out")
    config = LandConfig.model_validate({"base": str(folder), "defaults": {"trainer": TRAINER, "data": ROWS}, "tasks": ["builtin:support_intents"]})
    with pytest.raises(ConfigError, match="mlm_probability"):
        land(config, tmp_path / "land")
    alone = {"type": "loreft", "rank": 2}
    given = {"base": str(folder), "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": TRAINER, "adapter": alone}
    with pytest.raises(ConfigError, match="ReFT alone"):
        make_plan(TrainConfig.model_validate(given))


def test_a_text_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    """Before any step: it has no label."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in [*(f"number {n}" for n in range(20)), "</s>"]))
    trainer = {**TRAINER, "batch_size": 2}
    given = {"base": str(write_masked_base(tmp_path / "base", "bert")), "data": {"path": str(rows), "ratios": [1.0, 0.0, 0.0]}, "trainer": trainer}
    with pytest.raises(DataError, match=r"texts\.jsonl:21: the text has no token that could be hidden"):
        make_plan(TrainConfig.model_validate(given))


def test_all_tokens_of_a_text_are_counted_and_bound_its_noise(tmp_path: Path) -> None:
    """All of them go into the forward: into the speed, the cost, and the L of NEFTune's ± alpha / √(L D)."""
    config = config_of(write_masked_base(tmp_path / "base", "bert"))
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"neftune_noise_alpha": 5.0, "max_steps": 1})})
    job = training_job(make_plan(config), tmp_path / "run")
    groups = job.begin_step()
    job.enter(groups[0], 0)
    drawn, bound = job.noise(64, 0), 5.0 / math.sqrt(64 * 64)
    assert drawn is not None and 0.98 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.abs().max()) > 5.0 / math.sqrt(65 * 64)
    result = train(training_job(make_plan(config), tmp_path / "run"))
    assert result.progress.tokens == sum(len(row.token_ids) for group in groups for row in group.rows)


def test_states_are_those_of_the_text_as_it_is(tmp_path: Path) -> None:
    """Without an adapter, logits of every token are transformers'."""
    base = load_base(str(write_masked_base(tmp_path / "base", "roberta")), dtype="float32")
    decoder, theirs = base.decoder.masked_lm(), masked_model("roberta")
    rows = [[1, 50, 51, 52, 2], [1, 60, 2]]
    batch = PackedBatch.of(rows)
    with torch.no_grad():
        found = decoder.logits(decoder.forward(batch, AdapterBatch()))
        wanted = torch.cat([theirs(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_dry_run_shows_what_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who reads it must not think that the whole text is learned, or none of it."""
    from atoll.cli.dry_run import _show_prompts

    plan = make_plan(config_of(write_masked_base(tmp_path / "base", "roberta")))
    _show_prompts(plan)
    printed = capsys.readouterr().out
    assert "tokens hidden and learned" in printed
    assert "<|im_start|>" in printed
