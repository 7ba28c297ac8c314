"""Which examples each seed of a composition gets, and by which rows the seeds are chosen between.

A seed means something only where something depends on it. Where `k` of more examples are drawn, it is the draw, and rows that no seed drew choose;
where the seeds together leave too few of those, the ones that each did not draw itself. Where all examples are used, seeds of a deterministic search
would be copies of one another: then there is one, or, where several were asked for, each leaves a part of the examples out and is chosen by that.

Used by compose_plan.py; compose_search.py chooses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from atoll.compose.objective import FewShot
from atoll.config_compose import USUAL_SEEDS, ComposeConfig
from atoll.data.encode import encode_examples
from atoll.data.task import Example, TaskData

if TYPE_CHECKING:
    from atoll.model.base import Base

PARTS = 5  # a seed that leaves a part out leaves out one of so many, or of as many as there are seeds
DEV_ROWS = 50  # rows that choose among seeds, at most
_FEWEST_DEV = 10  # rows that no seed drew, of which fewer are too few to choose by
ONLY_SEED = "the only seed"
ALL_ALIKE = "one seed: all examples have the same input, so none can be left out"
NOTHING_TO_DRAW = "one seed: all examples are used, so there is nothing to draw"


@dataclass(frozen=True)
class Draw:
    """The examples of one seed, and their tokens as for training: few.rows[i] is examples[i]. left_out: rows of its own that it is chosen by."""

    seed: int
    examples: tuple[Example, ...]
    few: FewShot
    left_out: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Draws:
    """All seeds' examples, how the seeds came about where that is to be said (note), and where prompts were cut.

    undrawn: at most DEV_ROWS rows that no seed drew; none where each seed is chosen by rows of its own.
    """

    draws: tuple[Draw, ...]
    undrawn: tuple[Example, ...]
    note: str
    cut: tuple[str, ...]


def draw_examples(config: ComposeConfig, data: TaskData, base: Base) -> Draws:
    """The examples of every seed that is worth a search of its own."""
    settings, examples = config.compose, data.train
    num = settings.seeds or (USUAL_SEEDS if data.test and config.controls else 1)
    is_drawn = settings.k is not None and settings.k < len(examples)
    parts: tuple[tuple[int, ...], ...] = ()
    note = ""
    if num > 1 and not is_drawn and not settings.holds_out:
        whole, _ = encoded(examples, data, base)
        if settings.deterministic and (settings.seeds is None or len(whole) == 1):
            num, note = 1, NOTHING_TO_DRAW
        elif len(whole) > 1:
            parts = whole.folds(min(len(whole), max(PARTS, num)), settings.seed)
            num = min(num, max(1, len(parts))) if settings.deterministic else num  # more would leave the same parts out again
            note = "" if parts else ALL_ALIKE
    draws, cut = [], dict[str, None]()
    for place, seed in enumerate(range(settings.seed, settings.seed + num)):
        left_out = parts[place % len(parts)] if parts else ()
        taken = [example for index, example in enumerate(examples) if index not in set(left_out)] if parts else examples
        drawn = drawn_examples(taken, settings.k if is_drawn else None, seed)
        few, shortened = encoded(drawn, data, base)
        cut |= dict.fromkeys(shortened)
        draws.append(Draw(seed, drawn, few, tuple(examples[index] for index in left_out)))
    rest = (*examples, *data.validation)
    undrawn = _not_among(rest, [example for draw in draws for example in (*draw.examples, *draw.left_out)])
    if is_drawn and num > 1 and len(undrawn) < _FEWEST_DEV:
        draws = [replace(draw, left_out=_some(_not_among(rest, draw.examples), settings.seed)) for draw in draws]
        undrawn = ()
    return Draws(tuple(draws), _some(undrawn, settings.seed), note, tuple(cut))


def _not_among(rows: Sequence[Example], taken: Sequence[Example]) -> tuple[Example, ...]:
    known = {id(example) for example in taken}
    return tuple(example for example in rows if id(example) not in known)


def _some(rows: Sequence[Example], seed: int) -> tuple[Example, ...]:
    return tuple(random.Random(f"atoll dev {seed}").sample(rows, min(DEV_ROWS, len(rows))))


def drawn_examples(examples: Sequence[Example], k: int | None, seed: int) -> tuple[Example, ...]:
    """k of the examples drawn by `seed`, in the order of the file; all of them where k is None."""
    if k is None or k >= len(examples):
        return tuple(examples)
    places = sorted(random.Random(f"atoll examples {seed}").sample(range(len(examples)), k))
    return tuple(examples[place] for place in places)


def encoded(examples: Sequence[Example], data: TaskData, base: Base) -> tuple[FewShot, tuple[str, ...]]:
    """Examples as training encodes them, and where those stood that lost the beginning of their prompt to fit the base's context."""
    rows = encode_examples(examples, base.tokenizer, None, chat=data.task.chat, context=base.context_length, eos_ids=base.eos_ids)
    return FewShot(rows.rows), rows.cut
