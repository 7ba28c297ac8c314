"""From a reply of any route to an Answer: what the model said, without ids, times and the shapes of three APIs.

Used by traffic.py. Raises Malformed for a reply that does not have its protocol's form: that is a finding too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from soaking.cases import Route


class Malformed(Exception):
    """A reply that is not what its route promises."""


@dataclass(frozen=True)
class Answer:
    """What was said; None for what the route does not tell. whole: False where the client hung up, so text is a beginning.

    values: an embedding, or the scores of LABELS by label.
    """

    text: str = ""
    finish: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    num_tokens: int | None = None
    values: tuple[Any, ...] | None = None
    whole: bool = True


def read_reply(route: Route, body: Any) -> Answer:
    """A whole reply, decoded from JSON."""
    try:
        if route == "embed":
            return Answer(values=tuple(body["embeddings"]))
        if route == "embeddings":
            return Answer(values=tuple(body["data"][0]["embedding"]))
        if route == "classify":
            return Answer(values=tuple(sorted((entity["entity_group"], entity["score"]) for entity in body)))
        if route in ("completions", "chat"):
            return _openai(body)
        return _native(body[0] if route == "root" else body)
    except (KeyError, IndexError, TypeError) as error:
        raise Malformed(f"{route}: {error!r} in {str(body)[:300]}") from error


def read_stream(route: Route, events: Iterable[Mapping[str, Any]], *, whole: bool) -> Answer:
    """A stream's events. whole: the stream came to its end."""
    try:
        return _native_stream(list(events), whole) if route in ("generate_stream", "root") else _openai_stream(list(events), whole)
    except (KeyError, IndexError, TypeError) as error:
        raise Malformed(f"a stream of {route}: {error!r}") from error


def data_lines(text: str) -> Iterator[str]:
    """The data of each complete event; comments are no events."""
    for block in text.split("\n\n")[:-1]:
        for line in block.split("\n"):
            if line.startswith("data:"):
                yield line[5:].strip()


def is_done(text: str) -> bool:
    """Whether OpenAI's last event has come."""
    return text.endswith("data: [DONE]\n\n")


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of what came of a stream. Raises Malformed for one that is not JSON."""
    try:
        return [json.loads(data) for data in data_lines(text) if data != "[DONE]"]
    except ValueError as error:
        raise Malformed(f"an event is not JSON: {error}") from error


def _native(body: Mapping[str, Any]) -> Answer:
    details = body["details"]
    tokens = details["tokens"]
    answer = Answer(
        body["generated_text"],
        _reason(details["finish_reason"]),
        tuple(token["id"] for token in tokens),
        tuple(token["logprob"] for token in tokens),
        details["generated_tokens"],
    )
    _check_texts([token for token in tokens if not token["special"]], answer.text)
    return answer


def _native_stream(events: list[Mapping[str, Any]], whole: bool) -> Answer:
    tokens = [event["token"] for event in events]
    ids, logprobs = tuple(token["id"] for token in tokens), tuple(token["logprob"] for token in tokens)
    plain = [token for token in tokens if not token["special"]]
    if not whole:
        return Answer("".join(token["text"] for token in plain), None, ids, logprobs, None, whole=False)
    last = events[-1]
    if last["generated_text"] is None or any(event["generated_text"] is not None for event in events[:-1]):
        raise Malformed("generated_text stands in another event than the last")
    _check_texts(plain, last["generated_text"], is_open=bool(tokens) and tokens[-1]["special"])
    return Answer(last["generated_text"], _reason(last["details"]["finish_reason"]), ids, logprobs, last["details"]["generated_tokens"])


def _check_texts(tokens: list[Mapping[str, Any]], text: str, *, is_open: bool = False) -> None:
    """is_open: the last token is not shown, so the half of a character before it, sent already as nothing, is in the text alone."""
    joined = "".join(token["text"] for token in tokens)
    if joined != text and not (is_open and text.startswith(joined)):
        raise Malformed(f"the tokens' texts joined are {joined!r:.120}, generated_text is {text!r:.120}")


def _openai(body: Mapping[str, Any]) -> Answer:
    choice = body["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    logprobs = choice["logprobs"]
    found = tuple(logprobs["token_logprobs"]) if logprobs is not None and "token_logprobs" in logprobs else None
    return Answer(text, choice["finish_reason"], None, found, body["usage"]["completion_tokens"])


def _openai_stream(events: list[Mapping[str, Any]], whole: bool) -> Answer:
    text, finish, logprobs, num_tokens = "", None, list[float](), None
    for event in events:
        if (usage := event.get("usage")) is not None:
            num_tokens = usage["completion_tokens"]
        for choice in event["choices"]:
            text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
            finish = choice["finish_reason"] or finish
            if (choice["logprobs"] or {}).get("token_logprobs"):
                logprobs += choice["logprobs"]["token_logprobs"]
    if whole and (finish is None or num_tokens is None):
        raise Malformed("a stream ended without finish_reason or usage")
    return Answer(text, finish if whole else None, None, tuple(logprobs) or None, num_tokens if whole else None, whole=whole)


def _reason(reason: str) -> str:
    """OpenAI's word for LoRAX's."""
    return "length" if reason == "length" else "stop"
