"""Logits to tokens: each setting does what its name says elsewhere, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from atoll.engine.request import Request, SamplingParams
from atoll.engine.sampler import _typical, choose
from atoll.engine.sequence import Sequence

V = 1000


def sequence(prompt: tuple[int, ...] = (7, 8), answer: tuple[int, ...] = (), **settings: Any) -> Sequence:
    found = Sequence("s", Request(prompt, None, SamplingParams(**settings)), 500, (2,), lambda ids: "")
    for token in answer:
        found.append(token, None)
    return found


def logits(rows: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(values: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [None if choice is None else choice.token for choice in choose(values.clone(), sequences)]


def kept(values: torch.Tensor, **settings: Any) -> set[int]:
    """Every token that some draw chooses: draws on a fine grid over [0, 1)."""

    class Fixed(Sequence):
        at = 0.0

        def draw(self) -> float:
            return self.at

    found: set[int] = set()
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1].tolist()
    for start in range(0, len(grid), 1000):
        rows = []
        for at in grid[start : start + 1000]:
            row = Fixed("s", Request((7,), None, SamplingParams(temperature=1.0, **settings)), 9, (2,), lambda ids: "")
            row.at = at
            rows.append(row)
        found.update(t for t in tokens(values.expand(len(rows), -1), rows) if t is not None)
    return found


def test_greedy_takes_the_largest_logit() -> None:
    """The plain case, and a temperature too small to divide by."""
    values = logits(4)
    best = values.argmax(-1).tolist()
    assert tokens(values, [sequence() for _ in range(4)]) == best
    assert tokens(values, [sequence(temperature=1e-30, seed=i) for i in range(4)]) == best


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.3},
        {"min_p": 0.3},
        {"top_k": 10, "top_p": 0.6},
        {"top_k": 10, "top_p": 0.6, "min_p": 0.2},
        {"top_k": 5000},
        {"typical_p": 0.3},
        {"typical_p": 0.9},
        {"top_k": 30, "typical_p": 0.5},
        {"top_p": 0.8, "typical_p": 0.5},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.4},
    ],
    ids=str,
)
def test_the_tokens_kept_are_those_that_transformers_keeps(settings: dict[str, Any]) -> None:
    """Same words, same meaning and order as the library that users come from."""
    values = logits(1, seed=3, spread=3.0)
    scores = values.clone()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(ids, scores)
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(ids, scores)
    if "min_p" in settings:
        scores = MinPLogitsWarper(settings["min_p"])(ids, scores)
    if "typical_p" in settings:
        scores = TypicalLogitsWarper(settings["typical_p"])(ids, scores)
    expected = {int(i) for i in torch.nonzero(torch.softmax(scores, -1)[0] > 1e-3).squeeze(1)}
    found = kept(values, **settings)
    allowed = {int(i) for i in torch.nonzero(torch.isfinite(scores[0])).squeeze(1)}
    assert expected <= found <= allowed


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.95, 0.999])
def test_typical_tokens_are_exactly_those_of_transformers(mass: float) -> None:
    """The set of arXiv 2202.00666: near the row's entropy, not the likeliest; on flat and on sharp rows, among a grammar's few tokens too."""
    values = torch.cat([logits(2, seed=5, spread=0.5), logits(2, seed=6, spread=4.0), torch.full((1, V), -torch.inf)])
    values[4, [3, 30, 300]] = torch.tensor([0.0, 1.0, 4.0])
    expected = torch.isfinite(TypicalLogitsWarper(mass)(None, values.clone()))
    probs = torch.softmax(values, -1)
    torch.testing.assert_close(_typical(3 * probs, [mass] * 5), torch.where(expected, 3 * probs, 0.0), rtol=0, atol=0)


def test_typical_sampling_may_leave_out_the_likeliest_token() -> None:
    """What tells it from top_p: a token that is much likelier than the entropy suggests is not typical."""
    values = torch.zeros(1, V)
    values[0, 5] = 4.0  # a twentieth of the mass; the other 999 share the rest
    assert 5 not in kept(values, typical_p=0.5)
    assert 5 in kept(values, top_p=0.5)


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    """top_p looks at the likeliest tokens first; a flat distribution needs nearly all, and cutting it short would change the distribution unseen."""
    flat = torch.zeros(1, V) + torch.arange(V) * -1e-5
    assert len(kept(flat, top_p=0.9)) == pytest.approx(900, abs=5)


def test_sampled_frequencies_follow_the_distribution() -> None:
    """Drawing through the cumulative sums must be drawing from softmax(logits / temperature)."""
    values = torch.full((1, V), -1e9)
    values[0, [10, 20, 30]] = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.softmax(TemperatureLogitsWarper(0.7)(None, values)[0, [10, 20, 30]], -1).tolist()
    drawn = tokens(values.expand(4000, -1), [sequence(temperature=0.7, seed=i) for i in range(4000)])
    for token, share in zip((10, 20, 30), expected, strict=True):
        assert drawn.count(token) / 4000 == pytest.approx(share, abs=0.03)


def test_a_seed_gives_its_own_numbers_place_by_place() -> None:
    """Equal seeds draw equally at equal places; other seeds and other places do not."""
    assert sequence(temperature=1, seed=5).draw() == sequence(temperature=1, seed=5).draw()
    draws = {sequence(answer=(9,) * place, temperature=1, seed=seed).draw() for seed in range(20) for place in range(20)}
    assert len(draws) == 400
    assert sequence(temperature=1).seed != sequence(temperature=1).seed


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    """On prompt and answer tokens, dividing above zero and multiplying below."""
    values = logits(1)
    ids = torch.tensor([[7, 8, 7, 100, 200, 100]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, values.clone())
    row = sequence((7, 8, 7), (100, 200, 100), repetition_penalty=1.7)
    assert tokens(values, [row]) == expected.argmax(-1).tolist()
    changed = values.clone()
    choose(changed, [row])
    torch.testing.assert_close(changed, expected)


def test_frequency_and_presence_penalties_count_answer_tokens_only() -> None:
    """OpenAI's formula: logit - count * frequency - [count > 0] * presence; the prompt is free."""
    values = logits(1)
    expected = values.clone()
    expected[0, 100] -= 2 * 0.5 + 1.5
    expected[0, 200] -= 0.5 + 1.5
    choose(values, [sequence((7, 300), (100, 200, 100), frequency_penalty=0.5, presence_penalty=1.5)])
    torch.testing.assert_close(values, expected)


def test_a_bias_is_added_and_early_stops_are_forbidden() -> None:
    """logit_bias forces a token; before min_new_tokens no stopping token is chosen, even a forced one."""
    values = logits(3)
    rows = [sequence(logit_bias={77: 100.0}), sequence(logit_bias={2: 100.0}), sequence(logit_bias={2: 100.0}, min_new_tokens=1)]
    found = tokens(values, rows)
    assert found[:2] == [77, 2]
    assert found[2] != 2


def test_rows_that_are_not_finite_are_reported_and_the_others_untouched() -> None:
    """One adapter with NaN weights sits in a batch with good ones, sampled and with log-probabilities."""
    values = logits(4)
    good = tokens(values, [sequence(), sequence(temperature=1, seed=1), sequence(logprobs=2), sequence()])
    broken = torch.cat((values, torch.full((1, V), torch.nan), torch.full((1, V), torch.inf)))
    broken[4, 5:] = 1.0
    rows = [sequence(), sequence(temperature=1, seed=1), sequence(logprobs=2), sequence(), sequence(temperature=1, seed=2), sequence(logprobs=1)]
    assert tokens(broken, rows) == [*good, None, None]


def test_a_row_chooses_the_same_alone_and_in_any_batch() -> None:
    """Every setting is the row's own: widths and index tensors are shared between rows, results must not be."""
    values = logits(10, seed=9)
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 2},
        {"temperature": 1.5, "top_k": 700, "seed": 3},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 4},
        {"repetition_penalty": 1.3, "temperature": 1.0, "seed": 5},
        {"frequency_penalty": 1.0, "logprobs": 3},
        {"temperature": 2.0, "min_p": 0.05, "seed": 6, "logit_bias": {5: 3.0}},
        {"temperature": 1.0, "typical_p": 0.2, "seed": 7},
        {"temperature": 0.3, "typical_p": 0.95, "top_k": 20, "seed": 8},
    ]

    def rows() -> list[Sequence]:
        return [sequence((7, 8, 9), (11, 12, 11), **s) for s in settings]

    together = choose(values.clone(), rows())
    alone = [choose(values[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows())]
    assert together == alone


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    """Before temperature and penalties, so that they compare across settings; alternatives in order."""
    values = logits(2)
    expected = torch.log_softmax(values, -1)
    rows = [sequence(logprobs=3, temperature=3.0, seed=1, logit_bias={50: 30.0}), sequence(logprobs=0)]
    first, second = choose(values.clone(), rows)
    assert first is not None and first.logprob is not None and second is not None and second.logprob is not None
    assert first.token == first.logprob.token_id == 50
    assert first.logprob.logprob == pytest.approx(float(expected[0, 50]))
    top = expected[0].topk(3)
    assert [token for token, _ in first.logprob.top] == top.indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(top.values.tolist())
    assert second.logprob.top == ()
