"""T5 by the contract of the decoders: losses, gradients, files and answers are PEFT's and transformers'."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.server.live_server import serving
from tests.tiny_t5 import tiny_t5, write_tiny_t5

from atoll.config import LandConfig
from atoll.data.encode import EncodedRow
from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams, ScoreRequest
from atoll.hub.store import Hub
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.base import load_base
from atoll.model.seq2seq import Seq2SeqDecoder
from atoll.model.sites import peft_key
from atoll.train.rows import RowGroup, adapter_batch, pack_groups
from atoll.train.weights import TrainableAdapter
from atoll.workflows import land

PAIRS = [([10, 11, 12, 13, 1], [20, 21, 1]), ([30, 1], [40, 41, 42, 43, 1]), ([50, 51, 52, 1], [1])]
KINDS = [{}, {"feed_forward_proj": "relu", "tie_word_embeddings": True}]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32 on a CPU; weights are large, so that losses differ


def peft_t5(changes: dict[str, Any], targets: list[str], seed: int = 5) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny_t5(**changes), LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return theirs.eval()


@pytest.mark.parametrize("changes", KINDS)
def test_losses_and_gradients_are_pefts(changes: dict[str, Any], tmp_path: Path) -> None:
    """A training batch of rows of other lengths, LoRA in both stacks and across them."""
    theirs = peft_t5(changes, ["q", "v", "o", "wo"])
    theirs.save_pretrained(tmp_path / "theirs")
    adapter, decoder = read_adapter(tmp_path / "theirs"), Seq2SeqDecoder(tiny_t5(**changes))
    adapter.check_fits(decoder.shape.linears, decoder.shape.num_layers)
    assert adapter.spec.task_type == "SEQ_2_SEQ_LM"
    weights = TrainableAdapter(adapter, decoder.shape.linears, groups=decoder.shape.groups)
    packed = pack_groups([RowGroup([EncodedRow(prompt + answer, len(prompt), "") for prompt, answer in PAIRS])], "cpu")
    loss = decoder.label_losses(decoder.forward(packed.batch, adapter_batch(packed, [weights])), packed.labels).sum()
    loss.backward()
    expected = torch.tensor(0.0)
    for prompt, answer in PAIRS:
        logits = theirs(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
        expected = expected + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    ours = weights.adapter(weights.grads)
    assert len(grads) == 2 * len(ours.modules)
    for site, module in ours.modules.items():
        for factor, found in (("A", module.a), ("B", module.b)):
            torch.testing.assert_close(found, grads[peft_key(site, factor).replace(".weight", ".default.weight")], rtol=1e-3, atol=1e-4)
    write_adapter(tmp_path / "ours", adapter)
    assert read_adapter(tmp_path / "ours").spec == adapter.spec


def test_a_land_over_t5_is_trained_measured_and_served_as_peft_says(tmp_path: Path) -> None:
    """Answers of the engine, many rows at once with few tokens a step and pages to spare for few, are transformers' greedy ones; so is /generate."""
    folder = write_tiny_t5(tmp_path / "base")
    config = LandConfig.model_validate(
        {
            "base": str(folder),
            "defaults": {
                "data": {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 4},
                "trainer": {"epochs": 1, "batch_size": 4, "dtype": "float32", "learning_rate": 0.01},
                "adapter": {"r": 4, "reft": {"type": "loreft", "rank": 2, "positions": "f1+l1"}},
                "generation": {"max_new_tokens": 5},
            },
            "tasks": ["builtin:support_intents"],
        }
    )
    outcome = land(config, tmp_path / "out")
    assert not outcome.failures
    assert all(bool(module.b.any()) for module in read_adapter(Hub().path(Hub().resolve("support_intents"))).modules.values())
    theirs = peft_t5({}, ["q", "v", "wi_0"])
    theirs.save_pretrained(tmp_path / "adapter")
    version = Hub().publish(tmp_path / "adapter", "plain")
    base = load_base(str(folder), dtype="float32")
    engine = Engine(base, EngineConfig(max_rows=3, max_step_tokens=4, max_row_tokens=64))
    engine.register("ours", read_adapter(tmp_path / "adapter"))
    prompts = [prompt for prompt, _ in PAIRS] * 2
    found = engine.generate([Request(prompt, adapter="ours", sampling=SamplingParams(max_new_tokens=40, temperature=0.0)) for prompt in prompts])
    for prompt, completion in zip(prompts, found, strict=True):
        wanted = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, 1:].tolist()
        assert list(completion.token_ids) == wanted[: len(completion.token_ids)]
    options = [[20, 21], [40], [60, 61, 62]]
    (scores,) = engine.score([ScoreRequest(PAIRS[0][0], options, adapter="ours")])
    for option, score in zip(options, scores, strict=True):
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([PAIRS[0][0]]), labels=torch.tensor([option])).logits[0].log_softmax(-1)
        assert score == pytest.approx(sum(float(logits[i, token]) for i, token in enumerate(option)), abs=1e-3)
    with serving(base, Hub()) as live:
        asked = {"adapter_id": version.name, "adapter_source": "hub", "max_new_tokens": 6, "details": True}
        reply = live.post("/generate", {"inputs": "add 2 and 3", "parameters": asked})
        assert reply.status_code == 200, reply.text
        ids = [token["id"] for token in reply.json()["details"]["tokens"]]
    wanted = theirs.generate(**base.tokenizer("add 2 and 3", return_tensors="pt"), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
    assert ids == wanted[: len(ids)]
