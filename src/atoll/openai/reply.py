"""Replies in OpenAI's shape: ids, usage, log-probabilities, and the chunks of a stream.

A stream's chunks differ in a few characters, so what they share is written once as text and each token costs one json.dumps of its own text. Nothing
here knows HTTP.

Used by chat and completions, and for ids and usage by embeddings.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.engine.request import Completion, FinishReason, TokenLogprob
from atoll.engine.stops import Detokenizer
from atoll.http.token_text import TokenTexts

if TYPE_CHECKING:
    from atoll.model.base import Base

DONE = b"data: [DONE]\n\n"
_CONTEXT = 8  # tokens of the prompt behind which an answer's first one is decoded


@dataclass(frozen=True)
class Head:
    """What every piece of one reply repeats. `model` as the client asked for it."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Head:
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, fingerprint)

    def reply(self, kind: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole reply as an object; `usage` is left out of chunks where it is None."""
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}
        return {**body, "choices": list(choices)} | ({} if usage is None else {"usage": usage})


class Chunks:
    """The chunks of one stream as bytes. With usage asked for, every chunk says `"usage":null` but the last."""

    def __init__(self, head: Head, kind: str, *, with_usage: bool) -> None:
        self._head, self._kind = head, kind
        begin = head.reply(kind, (), None)
        self._begin = "data: " + json.dumps(begin, separators=(",", ":")).removesuffix("]}")
        self._end = '],"usage":null}\n\n' if with_usage else "]}\n\n"

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """Any chunk of one choice."""
        return (self._begin + json.dumps(choice, separators=(",", ":")) + self._end).encode()

    def text_writer(self, index: int, before: str, after: str) -> TextWriter:
        """The fast way for chunks of one choice that differ in one text."""
        return TextWriter(f'{self._begin}{{"index":{index},{before}', f"{after}}}{self._end}")

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The last chunk, when the client asked for the usage."""
        body = self._head.reply(self._kind, (), usage)
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class TextWriter:
    """A text between two fixed halves, as bytes."""

    def __init__(self, before: str, after: str) -> None:
        self._before, self._after = before, after

    def __call__(self, text: str) -> bytes:
        return (self._before + json.dumps(text) + self._after).encode()


def fingerprint_of(base: Base, kernel: str) -> str:
    """OpenAI's system_fingerprint: the same as long as base and arithmetic are, so that equal seeds may be expected to give equal answers.

    kernel: which forward computes; how it computes is a matter of Atoll's version.
    """
    from atoll import __version__

    what = json.dumps([base.fingerprint.to_json(), str(base.dtype), kernel, __version__], sort_keys=True)
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:12]


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word. An answer cut by its deadline is one cut short: "length", the only word OpenAI has for that."""
    return "stop" if reason == "stop" else "length"


def usage_of(groups: Sequence[Sequence[Completion]], *, dropped_tokens: int = 0) -> dict[str, Any]:
    """The usage of a reply; a group holds all answers to one prompt, which counts once. dropped_tokens: generated only because the engine must."""
    prompt = sum(group[0].num_prompt_tokens for group in groups)
    answers = sum(len(completion.token_ids) for group in groups for completion in group) - dropped_tokens
    cached = sum(group[0].num_reused_tokens for group in groups)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# Log-probabilities of chat


def chat_entry(entry: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    """One token of `logprobs.content`."""
    return {
        **_chat_token(entry.token_id, entry.logprob, texts),
        "top_logprobs": [_chat_token(token, logprob, texts) for token, logprob in entry.top],
    }


def _chat_token(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text_of(token), "logprob": logprob, "bytes": list(texts.bytes_of(token))}


class ContentLogprobs:
    """Which tokens belong to the text that was given out: a stop string's and the end-of-text token do not.

    push takes a token and the text that became final with it, and gives the entries of the tokens that this text completes.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._waiting: list[TokenLogprob] = []
        self._start = 0  # in the answer's bytes, of the first that waits
        self._given = 0  # bytes of text

    def push(self, entry: TokenLogprob | None, text: str) -> list[dict[str, Any]]:
        if entry is not None:
            self._waiting.append(entry)
        self._given += len(text.encode())
        ready = []
        while self._waiting and self._start < self._given:
            first = self._waiting.pop(0)
            self._start += 0 if self._texts.is_special(first.token_id) else len(self._texts.bytes_of(first.token_id))
            ready.append(chat_entry(first, self._texts))
        return ready

    def finish(self, completion: Completion) -> list[dict[str, Any]]:
        """The tokens still waiting, but for those that stopped the answer."""
        if isinstance(completion.stopped_by, str):
            return []
        rest = self._waiting[:-1] if completion.stopped_by is not None else self._waiting
        self._waiting = []
        return [chat_entry(entry, self._texts) for entry in rest]


def chat_logprobs_of(completion: Completion, texts: TokenTexts) -> dict[str, Any] | None:
    """`logprobs` of a whole chat answer."""
    if completion.logprobs is None:
        return None
    reader = ContentLogprobs(texts)
    content = [item for entry in completion.logprobs for item in reader.push(entry, "")]
    content += reader.push(None, completion.text)
    return {"content": content + reader.finish(completion), "refusal": None}


# Log-probabilities of completions


class CompletionLogprobs:
    """`logprobs` of completions: four lists with an entry a token, whole or in pieces.

    Every token has an entry, the one that ended the answer too, so that the lists are as long as what was computed: tools that score by `echo` count
    on it. text_offset is where a token's text begins in the reply's text.
    """

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        """offset: characters of the reply's text that come before."""
        self._texts, self._offset = texts, offset

    def prompt(self, prompt_ids: Sequence[int], found: Sequence[TokenLogprob | None], num_added: int) -> dict[str, Any]:
        """The prompt's tokens, the first without a log-probability. num_added: tokens in front that the tokenizer put there, outside the text."""
        reader = Detokenizer(self._texts.decode)
        rows = []
        for place, (token, entry) in enumerate(zip(prompt_ids, found, strict=True)):
            rows.append((token, entry, self._offset))
            if place >= num_added:
                self._offset += len(reader.push(token))
        self._offset += len(reader.flush())
        return self._lists(rows)

    def answer(self, steps: Sequence[tuple[TokenLogprob, str]]) -> dict[str, Any]:
        """Some of the answer's tokens, each with the text that became final with it."""
        rows = []
        for entry, text in steps:
            rows.append((entry.token_id, entry, self._offset))
            self._offset += len(text)
        return self._lists(rows)

    def _lists(self, rows: Sequence[tuple[int, TokenLogprob | None, int]]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token) for token, _, _ in rows],
            "token_logprobs": [None if entry is None else entry.logprob for _, entry, _ in rows],
            "top_logprobs": [None if entry is None else self._top_of(entry) for _, entry, _ in rows],
            "text_offset": [offset for _, _, offset in rows],
        }

    def _top_of(self, entry: TokenLogprob) -> dict[str, float]:
        """Likeliest first; where two tokens look alike the likelier one counts. The token itself is always there."""
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._name(token), logprob)
        return found

    def _name(self, token: int) -> str:
        text = self._texts.text_of(token)
        return f"bytes:{text}" if _is_partial(self._texts.bytes_of(token)) else text


def completion_logprobs_of(
    completion: Completion, texts: TokenTexts, prompt_ids: Sequence[int], *, echo: bool, num_added: int, keep_answer: bool
) -> dict[str, Any] | None:
    """`logprobs` of a whole completion, with the prompt's tokens where it is echoed. num_added: see CompletionLogprobs.prompt."""
    if completion.logprobs is None:
        return None
    writer = CompletionLogprobs(texts)
    pieces = []
    if echo and completion.prompt_logprobs is not None:
        pieces.append(writer.prompt(prompt_ids, completion.prompt_logprobs, num_added))
    pieces.append(writer.answer(list(_with_texts(completion, texts, prompt_ids[-_CONTEXT:])) if keep_answer else ()))
    return {key: [entry for piece in pieces for entry in piece[key]] for key in pieces[0]}


def _with_texts(completion: Completion, texts: TokenTexts, before: Sequence[int]) -> Iterator[tuple[TokenLogprob, str]]:
    """Each token of an answer with the text that became final with it, cut where the answer was."""
    reader, left = Detokenizer(texts.decode, before), len(completion.text)
    for entry in completion.logprobs or ():
        text = "" if texts.is_special(entry.token_id) else reader.push(entry.token_id)[:left]
        left -= len(text)
        yield entry, text


def _is_partial(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return False
