"""Replies of LoRAX's generate routes: tokens, details, headers, and the events of a stream.

A token's text is what became final with it, so the texts of an answer joined are its generated_text: a token that ends inside a character has the
text "", and the one that completes it has the whole. Special tokens are written out, marked special, and are not in generated_text. The end-of-text
token is among the tokens; a stop sequence's tokens are too, but not its text.

What a stream sends for every token is put together from text, since this runs for each token of each stream.

Used by generate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from atoll.engine.request import Completion, TokenEvent, TokenLogprob
from atoll.engine.stops import Detokenizer, TextStream
from atoll.http.asking import check_finished

if TYPE_CHECKING:
    from atoll.engine.request import Request
    from atoll.http.token_text import TokenTexts
    from atoll.serving.entries import Served

_CONTEXT_TOKENS = 5  # of the prompt, as the engine decodes an answer
_HEADER_SAFE = "/:@+=~._-"


def finish_reason(completion: Completion) -> str:
    """LoRAX's word. It has none for an answer cut by the server's time limit: that one has been cut short too."""
    if completion.finish_reason != "stop":
        return "length"
    return "stop_sequence" if isinstance(completion.stopped_by, str) else "eos_token"


class ReplyWriter:
    """Writes what one server's answers look like; `texts` knows its tokens."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    # Whole answers

    def body(self, request: Request, completions: Sequence[Completion], *, details: bool, full_text: str) -> dict[str, Any]:
        """GenerateResponse. The first completion is the answer, the others are best_of_sequences; full_text stands before each text."""
        best, *others = completions
        if not details:
            return {"generated_text": full_text + best.text}
        shown = self._sequence(request, best)
        shown = {
            "finish_reason": shown["finish_reason"],
            "prompt_tokens": best.num_prompt_tokens,
            "generated_tokens": shown["generated_tokens"],
            "skipped_tokens": 0,
            **{name: shown[name] for name in ("seed", "prefill", "tokens")},
        }
        if others:
            shown["best_of_sequences"] = [{"generated_text": full_text + other.text, **self._sequence(request, other)} for other in others]
        return {"generated_text": full_text + best.text, "details": shown}

    def _sequence(self, request: Request, completion: Completion) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "seed": completion.seed,
            "prefill": self._prefill(request, completion),
            "tokens": self._tokens(request, completion),
        }

    def _tokens(self, request: Request, completion: Completion) -> list[dict[str, Any]]:
        """A Token for each. What an end-of-text token lets go (the beginning of a stop sequence that never came) is its predecessor's."""
        sampling = request.sampling
        reader = TextStream(self._decode, sampling.stop, request.prompt_ids[-_CONTEXT_TOKENS:], after_text=sampling.stop_after_text)
        left = len(completion.text)
        tokens: list[dict[str, Any]] = []
        last = len(completion.token_ids) - 1
        for place, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs or (), strict=True)):
            ends = place == last and completion.stopped_by == token and isinstance(completion.stopped_by, int)
            text = "" if ends else reader.push(token, may_stop=place >= sampling.min_new_tokens)[:left]
            if place == last:
                rest = reader.finish()[: left - len(text)]
                hidden = ends or self._texts.is_special(token)  # what it lets go would not be shown with it
                if hidden and tokens and not tokens[-1]["special"]:
                    tokens[-1]["text"] += rest
                elif not hidden:
                    text += rest
            left -= len(text)
            tokens.append(self._token(token, text, entry))
        return tokens

    def _token(self, token: int, text: str, entry: TokenLogprob) -> dict[str, Any]:
        special = self._texts.is_special(token)
        body = {"id": token, "text": self._texts.text_of(token) if special else text, "logprob": entry.logprob, "special": special}
        if entry.top:
            body["alternative_tokens"] = self._alternatives(entry)
        return body | {"skipped": False}

    def _alternatives(self, entry: TokenLogprob) -> list[dict[str, Any]]:
        return [{"id": token, "text": self._texts.text_of(token), "logprob": logprob} for token, logprob in entry.top]

    def _prefill(self, request: Request, completion: Completion) -> list[dict[str, Any]]:
        """The prompt's tokens, if asked for; their texts joined are the prompt."""
        if completion.prompt_logprobs is None:
            return []
        reader = Detokenizer(self._texts.decode)
        rows = [
            {"id": token, "text": reader.push(token), "logprob": None if entry is None else entry.logprob}
            for token, entry in zip(request.prompt_ids, completion.prompt_logprobs, strict=True)
        ]
        rows[-1]["text"] = str(rows[-1]["text"]) + reader.flush()
        return rows

    def _decode(self, ids: list[int]) -> str:
        return self._texts.decode([token for token in ids if not self._texts.is_special(token)])

    # Streams

    def event(self, event: TokenEvent) -> str:
        """The event of one token that is not the last."""
        return f'data:{{"token":{self._event_token(event)},"generated_text":null,"details":null}}\n\n'

    def last_event(self, event: TokenEvent, *, details: bool, full_text: str) -> str:
        """The event of a stream's last token. Raises what check_finished raises."""
        completion = event.completion
        assert completion is not None, "the last event carries the completion"
        check_finished(completion)
        told = {
            "finish_reason": finish_reason(completion),
            "prompt_tokens": completion.num_prompt_tokens,
            "generated_tokens": len(completion.token_ids),
            "skipped_tokens": 0,
            "seed": completion.seed,
        }
        text, shown = json.dumps(full_text + completion.text), json.dumps(told if details else None, separators=(",", ":"))
        return f'data:{{"token":{self._event_token(event)},"generated_text":{text},"details":{shown}}}\n\n'

    def _event_token(self, event: TokenEvent) -> str:
        entry = event.logprob
        assert entry is not None and event.token_id is not None, "streams ask for log-probabilities"
        if entry.top or self._texts.is_special(event.token_id):
            return json.dumps(self._token(event.token_id, event.text, entry), separators=(",", ":"))
        return f'{{"id":{event.token_id},"text":{json.dumps(event.text)},"logprob":{entry.logprob!r},"special":false,"skipped":false}}'


# Headers


@dataclass(frozen=True)
class Clock:
    """When a request came and when the engine got it (time.perf_counter), for the headers."""

    came: float
    asked: float


def stream_headers(served: Served, model_id: str, num_chars: int) -> dict[str, str]:
    """The headers of a stream; of a whole answer they are a part."""
    found = {"x-compute-type": "cpu", "x-compute-characters": str(num_chars), "x-model-id": header_text(model_id)}
    if served.key is not None:
        found["x-adapter-id"] = ",".join(header_text(name) for name in served.ids or (served.name,))
        found["x-adapter-source"] = header_text(served.source or "hub")
    return found


def answer_headers(served: Served, model_id: str, num_chars: int, completions: Sequence[Completion], clock: Clock, now: float) -> Mapping[str, str]:
    """The headers of a whole answer; times are whole milliseconds. Of several sequences the best one's times count, and the tokens of all."""
    best = completions[0]
    timing = best.timing
    generated = sum(len(completion.token_ids) for completion in completions)
    first = timing.first_token_s if timing.first_token_s is not None else timing.total_s
    inference = max(0.0, timing.total_s - timing.queue_s)
    times = {
        "compute-time": now - clock.came,
        "total-time": now - clock.came,
        "validation-time": clock.asked - clock.came,
        "queue-time": timing.queue_s,
        "inference-time": inference,
        "time-per-token": inference / max(1, len(best.token_ids)),
        "time-to-first-token": first,
        "time-per-output-token": max(0.0, timing.total_s - first) / max(1, len(best.token_ids) - 1),
    }
    counts = {
        "prompt-tokens": best.num_prompt_tokens,
        "generated-tokens": generated,
        "skipped-tokens": 0,
        "total-tokens": best.num_prompt_tokens + generated,
    }
    found = stream_headers(served, model_id, num_chars)
    found |= {f"x-{name}": str(round(1000 * seconds)) for name, seconds in times.items()}
    return found | {f"x-{name}": str(count) for name, count in counts.items()}


def header_text(text: str) -> str:
    """A text as a header may hold it: anything but plain ASCII is percent-encoded, and so is the comma that separates ids."""
    return quote(text, safe=_HEADER_SAFE)
