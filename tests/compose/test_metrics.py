"""Options and written texts as scores: the same answers as the composed adapter gives alone."""

from __future__ import annotations

import pytest
import torch
from tests.compose.scenes import examples
from torch import Tensor

from atoll.compose.metrics import GeneratedScores, OptionScores
from atoll.compose.objective import Objective, l1
from atoll.compose.pool import Pool
from atoll.compose.search import search
from atoll.data.encode import EncodedRow
from atoll.errors import DataError
from atoll.model.bank import LoraBank
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.composed import cat
from atoll.model.decoder import Decoder

WEIGHTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
PROMPTS = [row.token_ids[: row.num_prompt] for row in examples(3)]
OPTIONS = [[EncodedRow([*prompt, *option], len(prompt), "x:1") for option in ([7, 8, 2], [9, 2], [11, 12, 13, 2])] for prompt in PROMPTS]


def as_text(ids: list[int]) -> str:
    return "".join(chr(0x100 + token) for token in ids)


def alone(decoder: Decoder, pool: Pool, weights: Tensor) -> LoraBank:
    slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(cat(pool.adapters, weights.tolist()))
    return slot  # type: ignore[return-value]


def greedy_alone(decoder: Decoder, slot: LoraBank, prompt: list[int], num: int, eos: set[int]) -> list[int]:
    """One token at a time, without a cache."""
    ids = list(prompt)
    for _ in range(num):
        batch = PackedBatch.of([ids], outputs="last")
        ids.append(int(decoder.logits(decoder.forward(batch, AdapterBatch.single(slot, len(ids))))[0].argmax()))  # type: ignore[arg-type]
        if ids[-1] in eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_texts_are_those_of_each_composed_adapter_alone(decoder: Decoder, pool: Pool, tokens: int) -> None:
    """All candidates write to all prompts in one batch, rows end at different steps, and none may notice the others."""
    truth = [[greedy_alone(decoder, alone(decoder, pool, row), prompt, 40, set()) for prompt in PROMPTS] for row in WEIGHTS]
    # end marks that some rows write early, some late and some never
    eos = {truth[0][0][3], truth[1][2][30]}
    expected = [[as_text(_until(ids, eos)) for ids in row] for row in truth]
    scores = GeneratedScores(decoder, pool, PROMPTS, lambda text, example: 0.0, as_text, max_new_tokens=40, eos_ids=eos, forward_tokens=tokens)
    assert scores.texts(WEIGHTS, range(3)) == expected
    assert len({len(text) for row in expected for text in row}) > 2
    assert scores.texts(WEIGHTS[:1], [2, 0]) == [[expected[0][2], expected[0][0]]]


def _until(ids: list[int], eos: set[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in eos]
    return ids[: ends[0]] if ends else ids


@torch.no_grad()
def test_any_callable_scores_the_texts(decoder: Decoder, pool: Pool) -> None:
    """It gets the text, cut at a stop string, and the example's number, wherever the example stands in the batch."""
    seen: list[tuple[str, int]] = []

    def metric(text: str, example: int) -> float:
        seen.append((text, example))
        return example / 10

    plain = GeneratedScores(decoder, pool, PROMPTS, metric, as_text, max_new_tokens=6, eos_ids={})
    found = plain.scores(WEIGHTS, [2, 0])
    torch.testing.assert_close(found, torch.tensor([[0.8, 1.0]] * 4))
    assert [example for _, example in seen] == [2, 0] * 4
    mark = seen[0][0][2]
    stopped = GeneratedScores(decoder, pool, PROMPTS, metric, as_text, max_new_tokens=6, eos_ids={}, stop=[mark])
    assert stopped.texts(WEIGHTS[:1], [2]) == [[seen[0][0][: seen[0][0].index(mark)]]]


@torch.no_grad()
def test_a_search_by_exact_match_finds_who_matches(decoder: Decoder, pool: Pool) -> None:
    """The way through: an objective without gradients, and the search by one adapter."""
    wanted = GeneratedScores(decoder, pool, PROMPTS, lambda text, example: 0.0, as_text, max_new_tokens=6, eos_ids={}).texts(
        torch.eye(4)[2:3], range(3)
    )
    scores = GeneratedScores(
        decoder, pool, PROMPTS, lambda text, example: float(text == wanted[0][example]), as_text, max_new_tokens=6, eos_ids={}, forward_tokens=50
    )
    found = search(Objective(scores, l1(0.0)), 4, "best_single")
    assert (found.weights.tolist(), found.value) == ([0.0, 0.0, 1.0, 0.0], 0.0)


def log_probs(decoder: Decoder, pool: Pool, weights: Tensor) -> Tensor:
    """[example, option]: the sum of an option's log-probabilities, one forward each."""
    slot = alone(decoder, pool, weights)
    found = []
    for rows in OPTIONS:
        for row in rows:
            batch = PackedBatch.of([row.token_ids[:-1]])
            logits = decoder.logits(decoder.forward(batch, AdapterBatch.single(slot, batch.num_tokens))).log_softmax(-1)  # type: ignore[arg-type]
            labels = torch.tensor(row.token_ids[row.num_prompt :])
            found.append(logits[row.num_prompt - 1 :].gather(1, labels[:, None]).sum())
    return torch.stack(found).view(len(OPTIONS), -1)


def test_options_are_ranked_by_their_whole_likelihood(decoder: Decoder, pool: Pool) -> None:
    """Hard: right or wrong. Soft: the right one's share, with a gradient that lowers it."""
    right = [0, 1, 2]
    hard, soft = OptionScores(decoder, pool, OPTIONS, right), OptionScores(decoder, pool, OPTIONS, right, soft=True)
    with torch.no_grad():
        truth = torch.stack([log_probs(decoder, pool, row) for row in WEIGHTS])
        assert torch.equal(hard.scores(WEIGHTS, range(3)), (truth.argmax(2) != torch.tensor(right)).float())
        expected = -truth.log_softmax(2).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(soft.scores(WEIGHTS, range(3)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(soft.scores(WEIGHTS, [2, 0]), expected[:, [2, 0]], rtol=1e-4, atol=1e-4)
    assert (hard.differentiable, soft.differentiable, hard.num_examples) == (False, True, 3)
    found = search(Objective(soft, l1(0.0)), 4, budget=40)
    assert found.value < float(expected.mean(1).min())


def test_examples_that_cannot_be_asked_are_refused(decoder: Decoder, pool: Pool) -> None:
    with pytest.raises(DataError, match="example 2 has 1 options"):
        OptionScores(decoder, pool, [OPTIONS[0], OPTIONS[1][:1]], [0, 0])
    with pytest.raises(DataError, match="example 1 has 3 options, of which number 4 is right"):
        OptionScores(decoder, pool, OPTIONS, [3, 0, 0])
    for prompts, message in (([], "no examples"), ([[5], []], "example 2 has 0 prompt tokens"), ([[5] * 510], "room for 506")):
        with pytest.raises(DataError, match=message):
            GeneratedScores(decoder, pool, prompts, lambda text, example: 0.0, as_text, max_new_tokens=6, eos_ids={})
