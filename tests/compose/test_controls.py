"""The contestants: each is what its name says, learns from its fold's examples only, and is measured like the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.adapters import random_adapter
from tests.compose.scenes import strong

from atoll.compose import controls as module
from atoll.compose.base_losses import base_losses
from atoll.compose.controls import BASE, BEST_SINGLE, COMPOSED, IN_CONTEXT, RANDOM, TRAINED, UNIFORM, Controls
from atoll.compose.cross_validation import Fold, cross_validated
from atoll.compose.few_shot_lora import few_shot_trainer
from atoll.compose.in_context import in_context_losses
from atoll.compose.losses import LabelLosses, losses
from atoll.compose.objective import FewShot, Objective
from atoll.compose.pool import Pool
from atoll.compose.retrieval import Candidate, rank
from atoll.compose.search import Found, search
from atoll.data.encode import EncodedRow, encode_examples
from atoll.data.task import Example, Task
from atoll.errors import Interrupted
from atoll.model.base import Base, load_base

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TASK = Task("sums", template="{question}", target="answer")
EXAMPLES = [Example(f"{index} + {index * 3 % 7} =", f" {index + index * 3 % 7}", {}, f"few.jsonl:{index + 1}") for index in range(6)]


class Asked:
    """A search that remembers what it was given."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.calls: list[tuple[tuple[str, ...], list[str], int]] = []

    def __call__(self, pool: Pool, rows: Sequence[EncodedRow], seed: int, stop_asked: Callable[[], bool]) -> Found:
        self.calls.append((pool.names, [row.where for row in rows], seed))
        objective = Objective(LabelLosses(self._base.decoder, pool, rows))
        return search(objective, pool.num, "gradient", budget=20, seed=seed, stop_asked=stop_asked)


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32")


@pytest.fixture(scope="module")
def rows(base: Base) -> list[EncodedRow]:
    return encode_examples(EXAMPLES, base.tokenizer, None).rows


@pytest.fixture(scope="module")
def candidates(base: Base) -> list[Candidate]:
    adapters = [strong(random_adapter(base.decoder, 4, seed=seed), 3.0) for seed in range(5)]
    return [Candidate(f"c{index}", f"d{index}", "", lambda adapter=adapter: adapter) for index, adapter in enumerate(adapters)]  # type: ignore[misc]


@pytest.fixture
def asked(base: Base) -> Asked:
    return Asked(base)


@pytest.fixture
def folds(rows: list[EncodedRow]) -> tuple[tuple[int, ...], ...]:
    return FewShot(rows).folds(3, seed=0)


@pytest.fixture
def controls(base: Base, rows: list[EncodedRow], candidates: list[Candidate], asked: Asked, folds: tuple[tuple[int, ...], ...]) -> Controls:
    subsets = [[example for example in range(6) if example not in fold] for fold in folds]
    ranking = rank(candidates, base.decoder, rows, by="loss", subsets=subsets)
    return Controls(base, TASK, EXAMPLES, rows, candidates, ranking, asked, top_k=3, seed=4)


def fold_of(held_out: tuple[int, ...]) -> Fold:
    return Fold(0, tuple(example for example in range(6) if example not in held_out), held_out, lambda: False)


def loss_of(base: Base, pool: Pool, weights: list[float], rows: list[EncodedRow]) -> torch.Tensor:
    return losses(base.decoder, pool, torch.tensor([weights]), rows)[0]


def test_the_simple_ones_are_what_their_names_say(
    base: Base, rows: list[EncodedRow], candidates: list[Candidate], asked: Asked, controls: Controls
) -> None:
    """Against losses taken one by one: base, the single adapter that the learnt-from examples prefer, 1/N of the shortlist, shots before prompts."""
    fold = fold_of((1, 4))
    seen, unseen = [rows[example] for example in fold.learn], [rows[1], rows[4]]
    torch.testing.assert_close(controls.base(fold), base_losses(base.decoder, rows)[[1, 4]], **CLOSE)
    pool = controls.pool(fold.learn)
    assert pool.num == 3
    alone = [loss_of(base, pool, [float(place == index) for place in range(3)], seen).mean() for index in range(3)]
    best = int(torch.stack(alone).argmin())
    assert best == 0, "the shortlist is by loss, best first"
    by_slope = rank(candidates, base.decoder, rows, by="slope")
    other = Controls(base, TASK, EXAMPLES, rows, candidates, by_slope, asked, top_k=5)
    torch.testing.assert_close(other.best_single(fold), controls.best_single(fold), **CLOSE)
    torch.testing.assert_close(controls.best_single(fold), loss_of(base, pool, [1.0, 0.0, 0.0], unseen), **CLOSE)
    torch.testing.assert_close(controls.uniform(fold), loss_of(base, pool, [1 / 3] * 3, unseen), **CLOSE)
    shots = [EXAMPLES[example] for example in fold.learn]
    torch.testing.assert_close(controls.in_context(fold), in_context_losses(base, TASK, [EXAMPLES[1], EXAMPLES[4]], shots), **CLOSE)


def test_composed_and_random_are_the_same_search(rows: list[EncodedRow], controls: Controls, asked: Asked) -> None:
    """Same examples, same seed, same number of adapters; or the comparison would be of two procedures."""
    fold = fold_of((0, 5))
    composed, random = controls.composed(fold), controls.random(fold)
    real, drawn = asked.calls
    assert real[1] == drawn[1] == [f"few.jsonl:{example + 1}" for example in (1, 2, 3, 4)]
    assert real[2] == drawn[2] == 4
    assert drawn[0] == tuple(f"random: {name}" for name in real[0])
    assert not torch.allclose(composed, random)
    assert torch.equal(controls.composed(fold), composed), "the same fold again is the same answer"


def test_training_sees_the_learnt_from_examples_only(controls: Controls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control that would gain most from a leak."""
    seen: list[list[str]] = []
    train = module.train_on_examples
    short = few_shot_trainer(4).model_copy(update={"max_steps": 2})

    def spied(decoder: object, rows: Sequence[EncodedRow], **options: object) -> object:
        seen.append([row.where for row in rows])
        return train(decoder, rows, trainer=short, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train_on_examples", spied)
    assert controls.trained(fold_of((2, 3))).shape == (2,)
    assert seen == [[f"few.jsonl:{example + 1}" for example in (0, 1, 4, 5)]]


def test_retrieval_is_part_of_what_learns(base: Base, rows: list[EncodedRow], candidates: list[Candidate], controls: Controls) -> None:
    """A shortlist chosen with the held-out examples would have seen them."""
    fold = fold_of((1, 2))
    apart = rank(candidates, base.decoder, [rows[example] for example in fold.learn], by="loss")
    assert controls.pool(fold.learn).names == tuple(f"c{ranked.index}" for ranked in apart.best(3))
    whole = controls.pool()
    assert whole.num == 3
    assert whole.digests == tuple(name.replace("c", "d") for name in whole.names)
    assert controls.pool() is whole, "contestants of one fold share the pool"


def test_all_together_with_some_left_out(controls: Controls, folds: tuple[tuple[int, ...], ...]) -> None:
    """What the workflow does: the table's order, every example held out once, finite numbers for all."""
    assert list(controls.contestants()) == [BASE, BEST_SINGLE, UNIFORM, COMPOSED, RANDOM, TRAINED, IN_CONTEXT]
    found = cross_validated({name: contestant for name, contestant in controls.contestants().items() if name != TRAINED}, folds)
    assert list(found.results) == [BASE, BEST_SINGLE, UNIFORM, COMPOSED, RANDOM, IN_CONTEXT]
    assert found.failures == {}
    for held_out in found.results.values():
        assert bool(torch.isfinite(held_out.losses).all())
        assert len(held_out.folds) == 3


def test_a_search_that_was_stopped_is_no_contestant(controls: Controls, folds: tuple[tuple[int, ...], ...]) -> None:
    """Its best so far, taken after a second instead of a minute, would stand in the table as if that were all it can do."""
    fold = fold_of((0, 1))._replace(stop_asked=lambda: True)
    with pytest.raises(Interrupted):
        controls.composed(fold)
    with pytest.raises(Interrupted):
        controls.trained(fold)
    assert cross_validated({COMPOSED: lambda fold: controls.composed(fold._replace(stop_asked=lambda: True))}, folds).stopped
