"""The computing half of a step: planned work in, one outcome a piece of work out. It changes no sequence, so it may be repeated.

A forward that raises is run again adapter by adapter, so that one adapter's failure is not its neighbours'. What the first try stored in the cache is
stored again at the same places, and random numbers depend on seed and place only, so the second try gives what the first would have given.

Used by engine.py, once a step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from atoll.engine.request import TokenLogprob
from atoll.engine.runner import LOGIT_ROWS, Outputs, Row, Runner
from atoll.engine.sampler import Choice, choose, token_logprobs
from atoll.engine.scheduler import Work
from atoll.errors import EngineError

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What a step found for one piece of work. choice is None where no token was wanted."""

    choice: Choice | None
    prompt_logprobs: list[TokenLogprob]


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
    chosen = [i for i, item in enumerate(work) if item.wants_token]
    choices = choose(runner.logits(out.last(chosen)), [work[i].sequence for i in chosen]) if chosen else []
    outcomes: list[Outcome | Exception] = [Outcome(None, prompt_logprobs.get(i, [])) for i in range(len(work))]
    for i, choice in zip(chosen, choices, strict=True):
        outcomes[i] = not_finite(work[i].sequence.adapter) if choice is None else Outcome(choice, prompt_logprobs.get(i, []))
    return outcomes


def not_finite(adapter: str | None) -> EngineError:
    """The error of a row whose logits are NaN or infinite."""
    owner = "the base" if adapter is None else f"adapter {adapter!r}"
    return EngineError(f"{owner} gave logits that are not finite", hint="its weights are damaged, or too large for the base's dtype")


def _prompt_logprobs(runner: Runner, item: Work, hidden: Tensor) -> list[TokenLogprob]:
    """Of the prompt's tokens start + 1 to stop: each hidden state predicts the token after it."""
    sequence = item.sequence
    targets = sequence.tokens[item.start + 1 : min(item.stop + 1, sequence.num_prompt)]
    found: list[TokenLogprob] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        part = targets[start : start + LOGIT_ROWS]
        logits = runner.logits(hidden[start : start + len(part)])
        found += token_logprobs(logits, part, sequence.sampling.prompt_logprobs or 0)
    return found


def _row(item: Work) -> Row:
    """The runner's row for a piece of work. Hidden states of all its tokens are wanted where the prompt's log-probabilities are."""
    sequence = item.sequence
    assert sequence.kv_row is not None
    outputs: Outputs = "last" if item.wants_token else "none"
    if sequence.sampling.prompt_logprobs is not None and item.start < sequence.num_prompt:
        outputs = "all"
    return Row(sequence.tokens[item.start : item.stop], item.start, sequence.kv_row, sequence.adapter, outputs, sequence.num_prompt)


def _adapter_of(item: Work) -> str:
    return item.sequence.adapter or ""
