"""What each question's answer is, alone: one request at a time on an engine of our own, and the comparison of all answers with it.

Where the server's forward is compiled, a row's arithmetic does not depend on what runs beside it, so tokens, texts and log-probabilities must be
equal to the last bit; embeddings to MEAN_ROUNDING, since a mean is taken chunk by chunk. Plain torch (float32) rounds by the shape of the batch:
log-probabilities may differ by ROUNDING, and an answer may part from its reference where two tokens stand that close, or a draw falls on the border
between two. Such answers are counted apart, as ties, and few.

Used by soak.py, after the traffic has ended: nothing here takes the processor from the server.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from soaking.cases import SCHEMA, Case
from soaking.reading import Answer
from soaking.world import LABEL_TEMPLATE, LABELS, World

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.engine.request import Completion

ROUNDING = 1e-4  # nats; float32 and sums in another order
MEAN_ROUNDING, VECTOR_ROUNDING = 1e-5, 1e-3  # of embeddings and scores: with equal hidden states, and with rounded ones
Verdict = Literal["right", "wrong", "tie"]


@dataclass(frozen=True)
class Seen:
    """An answer as it came: to which question, with what content of `moving` it may have been made (None: another adapter), and a drawn seed."""

    case: int
    answer: Answer
    contents: tuple[int, ...] | None = None
    seed: int | None = None


class Reference:
    """Answers of the engine alone, each computed once."""

    def __init__(self, world: World, cases: list[Case]) -> None:
        from atoll.engine.config import EngineConfig
        from atoll.engine.engine import Engine

        self._world, self._cases = world, cases
        self._engine: Engine = Engine(world.base, EngineConfig(max_rows=2, max_step_tokens=512, reuse_prefixes=False))
        self.exact = self._engine.kernel != "plain"
        self._answers: dict[tuple[int, int | None, int | None], tuple[Answer, float]] = {}

    def verdict(self, seen: Seen) -> Verdict:
        """Whether what came is what any of the possible contents would have said."""
        found = [self._compare(seen.answer, *self.answer(seen.case, content, seen.seed)) for content in seen.contents or (None,)]
        return "right" if "right" in found else "tie" if "tie" in found else "wrong"

    def answer(self, number: int, content: int | None, seed: int | None = None) -> tuple[Answer, float]:
        """The reference, and how far in nats its closest decision was from going the other way (0: unknown, a draw).

        content: which of `moving`'s; seed: instead of the question's own.
        """
        key = number, content, seed
        if key not in self._answers:
            self._answers[key] = self._ask(self._cases[number], content, seed)
        return self._answers[key]

    # ---- asking ----

    def _ask(self, case: Case, content: int | None, seed: int | None) -> tuple[Answer, float]:
        from atoll.engine.request import EmbedRequest, Request, SamplingParams, ScoreRequest

        adapter = self._register(case, content)
        if case.kind == "embed":
            return Answer(values=tuple(self._engine.embed([EmbedRequest(self._ids(case.prompt), adapter)])[0])), 0.0
        if case.kind == "classify":
            prompt = LABEL_TEMPLATE.format(text=case.prompt)
            options = [self._ids(" " + label, special=False) for label in LABELS]
            if any(one != other and other[: len(one)] == one for one in options for other in options):
                options = [[*option, self._world.base.eos_ids[0]] for option in options]
            return Answer(values=_shares(self._engine.score([ScoreRequest(self._ids(prompt), options, adapter)])[0])), 0.0
        values = {**case.sampling, **({} if seed is None else {"seed": seed})}
        sampling = SamplingParams(**{**values, "stop": tuple(values.get("stop", ()))}, logprobs=2, grammar=self._grammar(case))
        [completion] = self._engine.generate([Request(self._prompt(case), adapter, sampling)])
        return _answer(completion, sampling.is_greedy)

    def _prompt(self, case: Case) -> list[int]:
        if not case.chat:
            return self._ids(case.prompt)
        turns, tokenizer = [{"role": "user", "content": case.prompt}], self._world.base.tokenizer
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._world.base.tokenizer(text, add_special_tokens=special)["input_ids"])

    @staticmethod
    def _grammar(case: Case) -> Any:
        from atoll.engine.request import Grammar

        return Grammar("json_schema", json.dumps(SCHEMA)) if case.schema else None

    def _register(self, case: Case, content: int | None) -> str | None:
        """The key of the case's adapter, known to the engine."""
        from atoll.model.adapter_files import read_adapter

        if case.merge is not None:
            return self._merged(case)
        if case.adapter is None:
            return None
        key = case.adapter if content is None else f"{case.adapter}-{content}"
        if not self._engine.is_registered(key):
            folder = self._world.contents[content] if content is not None else self._world.hub.path(case.adapter)
            self._engine.register(key, read_adapter(folder))
        return key

    def _merged(self, case: Case) -> str:
        from atoll.model.adapter_files import read_adapter
        from atoll.serving.merging import MergeSpec, merge

        key = json.dumps(case.merge, sort_keys=True)
        if case.merge is not None and not self._engine.is_registered(key):
            given = dict(case.merge)
            spec = MergeSpec.of(given.pop("ids"), given.pop("weights"), **given, max_merged=16)
            self._engine.register(key, merge(spec, [read_adapter(self._world.hub.path(name)) for name in spec.ids]))
        return key

    # ---- comparing ----

    def _compare(self, came: Answer, right: Answer, margin: float) -> Verdict:
        if came.values is not None:
            return "right" if self._same_values(came.values, right.values) else "wrong"
        if self._same(came, right):
            return "right"
        return "tie" if not self.exact and margin <= 2 * ROUNDING else "wrong"

    def _same_values(self, came: tuple[Any, ...], right: tuple[Any, ...] | None) -> bool:
        if right is None or len(came) != len(right):
            return False
        rounding = MEAN_ROUNDING if self.exact else VECTOR_ROUNDING
        if isinstance(came[0], tuple):
            return all(a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=rounding) for a, b in zip(came, right, strict=True))
        return all(math.isclose(a, b, rel_tol=rounding, abs_tol=rounding) for a, b in zip(came, right, strict=True))

    def _same(self, came: Answer, right: Answer) -> bool:
        assert right.token_ids is not None and right.logprobs is not None
        if not came.whole:
            parts = [right.text.startswith(came.text), came.token_ids in (None, right.token_ids[: len(came.token_ids or ())])]
            return all(parts) and self._near(came.logprobs, right.logprobs[: len(came.logprobs or ())])
        return (
            came.text == right.text
            and came.finish == right.finish
            and came.token_ids in (None, right.token_ids)
            and came.num_tokens in (None, len(right.token_ids))
            and self._near(came.logprobs, right.logprobs)
        )

    def _near(self, came: tuple[float, ...] | None, right: tuple[float, ...]) -> bool:
        if came is None or came == right:
            return True
        return not self.exact and len(came) == len(right) and all(abs(a - b) <= ROUNDING for a, b in zip(came, right, strict=True))


def _answer(completion: Completion, is_greedy: bool) -> tuple[Answer, float]:
    assert completion.logprobs is not None and completion.finish_reason in ("stop", "length"), completion
    margin = min(entry.top[0][1] - entry.top[1][1] for entry in completion.logprobs) if is_greedy else 0.0
    logprobs = tuple(entry.logprob for entry in completion.logprobs)
    return Answer(completion.text, completion.finish_reason, completion.token_ids, logprobs, len(completion.token_ids)), margin


def _shares(sums: list[float]) -> tuple[tuple[str, float], ...]:
    weights = [math.exp(value - max(sums)) for value in sums]
    return tuple(sorted((label, weight / sum(weights)) for label, weight in zip(LABELS, weights, strict=True)))
