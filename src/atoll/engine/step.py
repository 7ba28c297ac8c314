"""The computing half of a step: planned work in, one outcome a piece of work out. It changes no sequence, so it may be repeated.

A forward that raises is run again adapter by adapter, so that one adapter's failure is not its neighbours'. What the first try stored in the cache is
stored again at the same places of the same pages, and random numbers depend on seed and place only, so the second try gives what the first would have
given.

Used by engine.py, once a step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from atoll.engine.request import TokenLogprob
from atoll.engine.runner import LOGIT_ROWS, Outputs, Row, Runner, StepOutput
from atoll.engine.sampler import Choice, choices_of, choose, plain_greedy, token_logprobs
from atoll.engine.scheduler import Work
from atoll.errors import EngineError

_log = logging.getLogger(__name__)
_NONE: Sequence[TokenLogprob] = ()


class Outcome(NamedTuple):
    """What a step found for one piece of work. choice is None where no token was wanted."""

    choice: Choice | None
    prompt_logprobs: Sequence[TokenLogprob]


def compute(runner: Runner, work: Sequence[Work]) -> list[Outcome | Exception]:
    """One outcome, or the error that ends its request, for each piece of work in order."""
    try:
        return _compute(runner, work)
    except Exception as error:
        places = sorted(range(len(work)), key=lambda i: _adapter_of(work[i]))
        parts = [list(part) for _, part in groupby(places, key=lambda i: _adapter_of(work[i]))]
        if len(parts) == 1:
            return [error] * len(work)
        _log.warning("a step over %d adapters failed and is tried again one by one: %s", len(parts), error)
    found: dict[int, Outcome | Exception] = {}
    for part in parts:
        outcomes = compute(runner, [work[i] for i in part])
        found.update(zip(part, outcomes, strict=True))
    return [found[i] for i in range(len(work))]


def _compute(runner: Runner, work: Sequence[Work]) -> list[Outcome | Exception]:
    rows = [_row(item) for item in work]
    out = runner.forward(rows)
    prompt_logprobs = {i: _prompt_logprobs(runner, item, out.of(i)) for i, item in enumerate(work) if rows[i].outputs == "all"}
    outcomes: list[Outcome | Exception] = [Outcome(None, prompt_logprobs.get(i, _NONE)) for i in range(len(work))]
    for i, choice in _choices(runner, work, out):
        outcomes[i] = not_finite(work[i].sequence.adapter) if choice is None else Outcome(choice, prompt_logprobs.get(i, _NONE))
    for i in out.broken:
        outcomes[i] = not_finite(work[i].sequence.adapter)
    return outcomes


def _choices(runner: Runner, work: Sequence[Work], out: StepOutput) -> Iterator[tuple[int, Choice | None]]:
    """(place in work, the next token or None where logits are not finite). Rows that only want the likeliest token need no logits."""
    wanting = [i for i, item in enumerate(work) if item.wants_token]
    plain = [i for i in wanting if plain_greedy(work[i].sequence)]
    if plain:
        yield from zip(plain, choices_of(*runner.best(out.last(plain))), strict=True)
    others = [i for i in wanting if not plain_greedy(work[i].sequence)] if len(plain) < len(wanting) else []
    for start in range(0, len(others), LOGIT_ROWS):
        part = others[start : start + LOGIT_ROWS]
        yield from zip(part, choose(runner.logits(out.last(part)), [work[i].sequence for i in part], runner.draw), strict=True)


def not_finite(adapter: str | None) -> EngineError:
    """The error of a row whose logits are NaN or infinite."""
    owner = "the base" if adapter is None else f"adapter {adapter!r}"
    return EngineError(f"{owner} gave logits that are not finite", hint="its weights are damaged, or too large for the base's dtype")


def _prompt_logprobs(runner: Runner, item: Work, hidden: Tensor) -> list[TokenLogprob]:
    """Of the prompt's tokens start + 1 to stop that have none yet: each hidden state predicts the token after it."""
    sequence = item.sequence
    first = max(item.start + 1, len(sequence.prompt_logprobs))  # a preempted sequence has some already
    targets = sequence.tokens[first : min(item.stop + 1, sequence.num_prompt)]
    hidden = hidden[first - 1 - item.start :]
    found: list[TokenLogprob] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        part = targets[start : start + LOGIT_ROWS]
        logits = runner.logits(hidden[start : start + len(part)])
        found += token_logprobs(logits, part, sequence.sampling.prompt_logprobs or 0)
    return found


def _row(item: Work) -> Row:
    """The runner's row for a piece of work. Hidden states of all its tokens are wanted where the prompt's log-probabilities are."""
    sequence = item.sequence
    outputs: Outputs = "all" if sequence.wants_prompt_logprobs else "last" if item.wants_token else "none"
    return Row(sequence.tokens[item.start : item.stop], item.start, sequence.pages, sequence.adapter, sequence.num_prompt, outputs)


def _adapter_of(item: Work) -> str:
    return item.sequence.adapter or ""
