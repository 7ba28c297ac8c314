"""Composing over bases of other families than Llama's: the losses of a search are those of the adapter that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.adapters import random_adapter
from tests.compose.scenes import examples
from tests.families import encoder_model, family_model
from tests.tiny_t5 import tiny_t5

from atoll.compose.base_losses import base_losses
from atoll.compose.few_shot_lora import few_shot_trainer, train_on_examples
from atoll.compose.losses import LabelLosses, losses
from atoll.compose.metrics import GeneratedScores
from atoll.compose.objective import Objective
from atoll.compose.pool import Pool
from atoll.compose.result import compose
from atoll.compose.search import search
from atoll.data.encode import EncodedRow
from atoll.errors import UnsupportedAdapter
from atoll.model.adapter import Adapter
from atoll.model.batch import BASE_ONLY, AdapterBatch
from atoll.model.decoder import Decoder
from atoll.model.encoder import EncoderClassifier
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.seq2seq import Seq2SeqDecoder
from atoll.model.sites import module_name
from atoll.train.rows import label_batch

FAMILIES = ("gpt2", "gemma2", "phi3", "t5")
ROWS = examples(4)


def base_of(family: str) -> Decoder:
    return Seq2SeqDecoder(tiny_t5()) if family == "t5" else GenericDecoder(family_model(family))


def adapters(decoder: Decoder, num: int = 3) -> list[Adapter]:
    """Of other ranks; the last at one linear of the upper blocks only."""
    names = tuple(dict.fromkeys(map(module_name, decoder.shape.linears)))
    own: dict[str, Any] = {"fan_in_fan_out": decoder.shape.fan_in_fan_out, "task_type": decoder.task_type}
    found = [random_adapter(decoder, 3 + seed, seed=seed, target_modules=names, **own) for seed in range(1, num)]
    return [*found, random_adapter(decoder, 4, seed=9, target_modules=names[:1], layers_to_transform=(1,), **own)]


@torch.no_grad()
def their_losses(decoder: Decoder, adapter: Adapter | None, rows: Sequence[EncodedRow]) -> torch.Tensor:
    found = []
    for row in rows:
        packed = label_batch([row], "cpu")
        tokens = packed.batch.num_tokens
        used = BASE_ONLY if adapter is None else AdapterBatch.single(decoder.new_bank().load(adapter), tokens)
        found.append(decoder.label_losses(decoder.forward(packed.batch, used), packed.labels).mean())
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["mixed", "merged"])
def test_losses_are_those_of_the_composed_adapter(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weightings in one forward of transformers' blocks, by either way of computing them."""
    monkeypatch.setattr("atoll.compose.candidates.cheaper_way", lambda *counted: way)
    decoder = base_of(family)
    pool = Pool.of(adapters(decoder), decoder)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = losses(decoder, pool, weights, ROWS)
    for values, row in zip(found, weights, strict=True):
        made = compose(pool, row).adapter
        assert (made.spec.fan_in_fan_out, made.spec.task_type) == (decoder.shape.fan_in_fan_out, decoder.task_type)
        torch.testing.assert_close(values, their_losses(decoder, made, ROWS), rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(base_losses(decoder, ROWS), their_losses(decoder, None, ROWS), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_a_search_by_gradient_lowers_the_loss(family: str) -> None:
    """The whole search over another family, weights for each layer; what it says of the result is what the result has."""
    decoder = base_of(family)
    pool = Pool.of(adapters(decoder), decoder)
    found = search(Objective(LabelLosses(decoder, pool, ROWS)), pool.num)
    made = compose(pool, found.weights).adapter
    assert float(their_losses(decoder, made, ROWS).mean()) < float(base_losses(decoder, ROWS).mean())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_written_texts_are_the_composed_adapters(family: str) -> None:
    """Greedy answers of candidates, token by token over a cache."""
    decoder = base_of(family)
    pool = Pool.of(adapters(decoder), decoder)
    weights, prompts = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.3, 0.0]]), [row.token_ids[: row.num_prompt] for row in ROWS[:2]]
    metric = GeneratedScores(decoder, pool, prompts, lambda text, example: 0.0, lambda ids: " ".join(map(str, ids)), max_new_tokens=4, eos_ids=())
    found = metric.texts(weights, range(2))
    for texts, row in zip(found, weights, strict=True):
        slot = decoder.new_bank().load(compose(pool, row).adapter)
        for text, prompt in zip(texts, prompts, strict=True):
            written = list(prompt)
            for _ in range(4):
                packed = label_batch([EncodedRow([*written, 0], len(prompt), "")], "cpu").batch
                with torch.no_grad():
                    states = decoder.forward(packed, AdapterBatch.single(slot, packed.num_tokens))
                written.append(int(decoder.logits(states[-1:]).argmax()))
            assert text == " ".join(map(str, written[len(prompt) :]))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_few_shot_control_trains_all_linears_of_the_family(family: str) -> None:
    """A control at no site would be none."""
    decoder = base_of(family)
    settings = few_shot_trainer(len(ROWS)).model_copy(update={"learning_rate": 1e-2})
    made = train_on_examples(decoder, ROWS, trainer=settings)
    assert {site.target for site in made.modules} == set(decoder.shape.linears)
    assert float(their_losses(decoder, made, ROWS).mean()) < float(base_losses(decoder, ROWS).mean())


def test_an_encoders_adapters_are_refused_by_name() -> None:
    """Their classifiers tell different classes apart; a sum of them would mean nothing."""
    decoder = EncoderClassifier(encoder_model("bert"))
    with pytest.raises(UnsupportedAdapter, match="encoder"):
        Pool.of([random_adapter(decoder, 4, target_modules=("query",))], decoder)
