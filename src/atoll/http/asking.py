"""What every protocol asks of a request and reads from its answer in the same way; each says it in its own words.

Used by lorax/ and openai/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.engine.request import Completion, Grammar
from atoll.errors import EngineError, RequestRefused
from atoll.http.errors import Incomplete

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat


@dataclass(frozen=True)
class StopCaps:
    """How many stop texts a request may have, and of how many characters."""

    count: int
    chars: int

    def misfit(self, stops: Sequence[str]) -> str | None:
        """The first text that is empty or too long."""
        return next((text for text in stops if not 1 <= len(text) <= self.chars), None)


def trims(form: PromptFormat | None) -> bool:
    """Whether an adapter's answers begin with the white space of its template, which is no part of what it says."""
    return form is not None and form.completion_prefix != "" and not form.chat


def stops_after_text(trimmed: bool, stops: Sequence[str]) -> bool:
    """Whether stop texts count only once the answer has text: where its first white space is the template's, unless white space was asked for."""
    return trimmed and all(text.strip() for text in stops)


def row_of(form: PromptFormat, text: str, fields: Mapping[str, Any] | None, filled_by: str) -> dict[str, Any]:
    """The columns of an adapter's template: the request's fields, and the text (filled_by: what carries it) in the one that they leave open.

    Raises RequestRefused unless that is exactly one.
    """
    given = fields or {}
    unknown = [name for name in given if name not in form.columns]
    left = [name for name in form.columns if name not in given]
    columns = ", ".join(map(repr, form.columns)) or "none"
    if unknown:
        raise RequestRefused(f"`fields` has {unknown[0][:80]!r}, but the columns of the adapter's prompt are {columns}")
    if len(left) != 1:
        raise RequestRefused(
            f"the columns of the adapter's prompt are {columns}, and `fields` must give all of them but the one that {filled_by} fills",
            hint='"fields": {"column": "value"}',
        )
    return {**given, left[0]: text}


def grammar_for(schema: Mapping[str, Any] | bool | None) -> Grammar:
    """The grammar of a JSON Schema; without one, any JSON object."""
    if schema is None or schema == {"type": "object"}:
        return Grammar("json_object")
    return Grammar("json_schema", json.dumps(schema))


def check_finished(completion: Completion) -> None:
    """Raise for a request that has no answer: the engine failed it (EngineError), or the server cut it off (Incomplete)."""
    if completion.finish_reason == "error":
        raise EngineError(completion.error or "the request failed in the engine")
    if completion.finish_reason == "cancelled":
        raise Incomplete("the request was cancelled before its answer was complete", hint="the server is shutting down: try again soon")


def mean_logprob(completion: Completion) -> float:
    """What best_of ranks by."""
    found = completion.logprobs or ()
    return sum(entry.logprob for entry in found) / len(found) if found else -math.inf
