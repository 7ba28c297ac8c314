"""Ranking a hub for a few examples: what each measure is, that chunks and strangers change nothing, and what a subset of the examples ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.adapters import decoder_of, random_adapter, random_reft
from tests.compose.scenes import examples, mixed_adapters, strong
from tests.conftest import tiny_model
from torch import Tensor

from atoll.compose import measuring, retrieval
from atoll.compose.losses import LabelLosses
from atoll.compose.measuring import alone, slopes
from atoll.compose.pool import Pool
from atoll.compose.retrieval import Candidate, Ranked, rank
from atoll.data.encode import EncodedRow
from atoll.errors import AdapterFormatError, ConfigError, DataError, Interrupted
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.decoder import Decoder

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 losses of about 6 nats, summed in other orders


def candidate(adapter: Adapter | Callable[[], Adapter], name: str = "one", text: str = "") -> Candidate:
    return Candidate(name, None, text, (lambda: adapter) if isinstance(adapter, Adapter) else adapter)


def candidates(adapters: list[Adapter]) -> list[Candidate]:
    return [candidate(adapter, f"adapter-{index}") for index, adapter in enumerate(adapters)]


def slope_of(losses: LabelLosses) -> Tensor:
    """[N]: what the first bit of each adapter takes from the mean loss of all examples."""
    return slopes(losses, [range(losses.num_examples)])[0][:, 0]


@pytest.fixture(scope="module")
def rows() -> list[EncodedRow]:
    return examples(4)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter]:
    """Seven that differ in shape and strength, so that losses lie well apart."""
    mixed = [strong(adapter, 3.0) for adapter in mixed_adapters(decoder)]
    return [*mixed, *(strong(random_adapter(decoder, 4, seed=seed), 2.0) for seed in (20, 21, 22))]


def test_loss_is_each_adapter_alone(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """At weight 1 and nothing beside it: what serving this adapter would score."""
    found = alone(LabelLosses(decoder, Pool.of(adapters, decoder), rows)).mean(1)
    for adapter, loss in zip(adapters, found, strict=True):
        single = LabelLosses(decoder, Pool.of([adapter], decoder), rows).scores(torch.ones(1, 1), range(len(rows)))
        torch.testing.assert_close(loss, single.mean(), **CLOSE)


def test_slope_is_the_loss_that_the_first_bit_of_an_adapter_takes_away(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """Against finite differences around w = 0; greater is better, so the sign matters."""
    losses = LabelLosses(decoder, Pool.of(adapters, decoder), rows, backward_tokens=20)  # several portions
    step = 1e-2
    difference = losses.scores(torch.cat([-step * torch.eye(7), step * torch.eye(7)]), range(len(rows))).mean(1)
    torch.testing.assert_close(slope_of(losses), (difference[:7] - difference[7:]) / (2 * step), rtol=0.05, atol=2e-3)


def test_chunks_change_nothing(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub is never in memory at once: in chunks of two the numbers are those of one pool, and no more than two adapters are held at a time."""
    whole = rank(candidates(adapters), decoder, rows, by="loss"), rank(candidates(adapters), decoder, rows, by="slope")
    alive: list[int] = []
    pool_of = Pool.of
    monkeypatch.setattr(Pool, "of", lambda given, *rest: (alive.append(len(given)), pool_of(given, *rest))[1])
    monkeypatch.setattr(measuring, "CHUNK", 2)
    pieces = rank(candidates(adapters), decoder, rows, by="loss"), rank(candidates(adapters), decoder, rows, by="slope")
    assert alive == [2, 2, 2, 1] * 2
    torch.testing.assert_close(pieces[0].losses, whole[0].losses, **CLOSE)
    torch.testing.assert_close(pieces[1].slopes, whole[1].slopes, **CLOSE)
    for ranking in (*whole, *pieces):
        torch.testing.assert_close(ranking.base, pieces[0].base, **CLOSE)
    monkeypatch.setattr(measuring, "CHUNK_PARAMETERS", 1)
    alive.clear()
    rank(candidates(adapters), decoder, rows, by="loss")
    assert alive == [1] * 7, "large adapters come one at a time"


def test_the_best_come_first_with_what_is_known_of_them(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """A smaller loss is better, a greater slope and likeness are."""
    described = [replace(one, text="about cats" if index == 5 else "about dogs") for index, one in enumerate(candidates(adapters))]
    by_loss = rank(described, decoder, rows, by="loss").best(3)
    losses = alone(LabelLosses(decoder, Pool.of(adapters, decoder), rows)).mean(1)
    assert [ranked.index for ranked in by_loss] == losses.argsort()[:3].tolist()
    first = by_loss[0]
    assert first.loss == pytest.approx(float(losses.min()), abs=1e-4)
    assert first.slope is None
    assert first.similarity is None
    slopes = slope_of(LabelLosses(decoder, Pool.of(adapters, decoder), rows))
    assert [ranked.index for ranked in rank(described, decoder, rows, by="slope").best(7)] == slopes.argsort(descending=True).tolist()
    by_text = rank(described, decoder, rows, by="text", description="cats").best(2)
    assert by_text[0].index == 5
    assert by_text[1] == Ranked(0, None, None, 0.0)
    assert len(rank(described, decoder, rows, by="loss").best(50)) == 7


def test_some_of_the_examples_rank_as_if_there_were_no_others(decoder: Decoder, adapters: list[Adapter]) -> None:
    """Cross-validation rests on it: a fold's shortlist must not know the examples that the fold holds out."""
    rows = examples(6, seed=3)
    subset = [0, 2, 5]
    for by in ("loss", "slope"):
        ranking = rank(candidates(adapters), decoder, rows, by=by, subsets=[subset])
        apart = rank(candidates(adapters), decoder, [rows[example] for example in subset], by=by)
        best, alone = ranking.best(4, subset), apart.best(4)
        assert [ranked.index for ranked in best] == [ranked.index for ranked in alone]
        for mine, other in zip(best, alone, strict=True):
            measures = [ranked.loss if by == "loss" else ranked.slope for ranked in (mine, other)]
            assert measures[0] == pytest.approx(measures[1], rel=1e-3)


def test_of_many_examples_some_are_drawn_to_rank_on(decoder: Decoder, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred examples would make ranking dearer than the search. Whatever is asked of the rest, the numbers are those of the drawn ones."""
    rows = examples(8, seed=5)
    whole = rank(candidates(adapters), decoder, rows, by="loss")
    monkeypatch.setattr(retrieval, "SAMPLED", 5)
    ranking, again = (rank(candidates(adapters), decoder, rows, by="loss") for _ in range(2))
    drawn = [example for example in range(8) if not bool(ranking.base[example].isnan())]
    assert len(drawn) == 5
    torch.testing.assert_close(ranking.losses[:, drawn], whole.losses[:, drawn], **CLOSE)
    assert torch.equal(ranking.losses.nan_to_num(), again.losses.nan_to_num())
    assert ranking.best(7)[0].loss == pytest.approx(float(whole.losses[:, drawn].mean(1).min()), abs=1e-4)
    fold = [example for example in range(8) if example != drawn[0]]
    assert [ranked.index for ranked in ranking.best(7, fold)] == whole.losses[:, drawn[1:]].mean(1).argsort().tolist()


def test_of_many_slope_and_text_choose_whose_losses_are_measured(
    decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss costs a forward of each adapter; with hundreds in a hub, only those that slope or text speak for get one, for any subset asked for."""
    monkeypatch.setattr(retrieval, "MEASURED", 4)
    likely = candidates(adapters)
    slopes = rank(likely, decoder, rows, by="slope")
    worst = slopes.best(7)[-1].index
    likely[worst] = replace(likely[worst], text="sorting words")
    auto = rank(likely, decoder, rows, description="sorting words", subsets=[[0], [1, 2]])
    by_slope = [ranked.index for ranked in slopes.best(7)]
    assert set(auto.finalists(range(4))) >= {by_slope[0], by_slope[1], worst}
    assert len(auto.finalists(range(4))) == 4
    measured = {index for index in range(7) if not auto.losses[index].isnan().any()}
    assert measured == {index for subset in (range(4), [0], [1, 2]) for index in auto.finalists(subset)}
    assert {ranked.index for ranked in auto.best(7)} == set(auto.finalists(range(4)))
    assert set(rank(likely, decoder, rows).finalists(range(4))) == set(by_slope[:4]), "without a description slope alone chooses"
    few = rank(likely[:4], decoder, rows, description="sorting words")
    assert few.slopes.isnan().all(), "as many as are measured anyway need no choosing"


def broken() -> Adapter:
    raise AdapterFormatError("adapter.safetensors ends in the middle of a tensor")


def gone() -> Adapter:
    raise FileNotFoundError(2, "No such file or directory")


def test_broken_and_misfitting_adapters_are_left_out_with_a_sentence(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """One bad file of a stranger must not end a composition, nor be passed over in silence."""
    other = random_adapter(decoder_of(tiny_model("llama", intermediate_size=128)), 4)
    nan = strong(adapters[0], math.nan)
    strangers = [
        candidate(broken, "torn"),
        candidate(gone, "gone"),
        candidate(other, "other-base"),
        candidate(random_reft(decoder, rank=2), "edits"),
        candidate(nan, "nan"),
        candidate(random_adapter(decoder, 4, use_dora=True), "dora"),
    ]
    mixed = [strangers[0], candidate(adapters[0], "a"), *strangers[1:4], candidate(adapters[1], "b"), *strangers[4:]]
    for by in ("loss", "slope", "text"):
        ranking = rank(mixed, decoder, rows, by=by, description="anything")
        assert sorted(ranked.index for ranked in ranking.best(10)) == [1, 5]
        assert [sentence.split(" is left out: ")[0] for sentence in ranking.left_out] == ["torn", "gone", "other-base", "edits", "nan", "dora"]
    torn, lost, misfit, edits, infinite, dora = ranking.left_out
    assert "ends in the middle" in torn
    assert "No such file" in lost
    assert "128 x 64" in misfit
    assert "edits hidden states" in edits
    assert "not finite" in infinite
    assert "no weighted sum" in dora
    with pytest.raises(ConfigError, match="no adapter is left to compose") as refused:
        rank(strangers, decoder, rows, by="loss").best(3)
    assert "torn" in refused.value.hint


def test_an_adapter_that_overflows_spoils_no_other(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """Its values are finite, what it computes is not; run stacked with others, its infinities times zero would be their NaN."""
    huge = Adapter(adapters[0].spec, {site: LoraModule(m.a * 1e30, m.b * 1e30, m.scaling) for site, m in adapters[0].modules.items()})
    alone = [rank(candidates(adapters[:3]), decoder, rows, by=by) for by in ("loss", "slope")]
    beside = [rank([*candidates(adapters[:3]), candidate(huge, "huge")], decoder, rows, by=by) for by in ("loss", "slope")]
    torch.testing.assert_close(beside[0].losses[:3], alone[0].losses, **CLOSE)
    torch.testing.assert_close(beside[1].slopes[:3], alone[1].slopes, **CLOSE)
    torch.testing.assert_close(beside[0].base, alone[0].base, **CLOSE)
    for ranking in beside:
        assert ranking.left_out == ("huge is left out: under it the examples have no finite loss",)
        assert ranking.usable.tolist() == [True, True, True, False]


def test_a_ranking_that_is_stopped_says_how_far_it_came(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """Half a ranking is none: it ends as an interruption between two adapters, after having told its progress."""
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(Interrupted, match="3 of 7 adapters"):
        rank(candidates(adapters), decoder, rows, by="loss", report=lambda *told: seen.append(told), stop_asked=lambda: len(seen) > 3)
    assert seen == [("rank by loss", done, 7) for done in range(4)]
    seen.clear()
    rank(candidates(adapters), decoder, rows, by="loss", report=lambda *told: seen.append(told))
    assert seen[-1] == ("rank by loss", 7, 7)


def test_what_cannot_be_ranked_is_refused(decoder: Decoder, adapters: list[Adapter], rows: list[EncodedRow]) -> None:
    """Before any adapter is read, in one sentence."""
    with pytest.raises(ConfigError, match="no adapters"):
        rank([], decoder, rows)
    with pytest.raises(ConfigError, match="ranked by 'likes'"):
        rank(candidates(adapters), decoder, rows, by="likes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only with a description"):
        rank(candidates(adapters), decoder, rows, by="text", description=" ")
    with pytest.raises(ConfigError, match="top_k is 0"):
        rank(candidates(adapters), decoder, rows).best(0)
    with pytest.raises(DataError, match="no examples"):
        rank(candidates(adapters), decoder, [])
