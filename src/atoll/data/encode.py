"""Tokenise examples into rows with labels, cut to a length, and say what was cut.

Prompt and completion are tokenised apart and joined, because generation also begins right after the prompt's last token. A completion ends with
EOS, or the model would never learn to stop. What is too long loses the beginning of its prompt, never its answer; a row that cannot keep its answer
is an error that names it, since training on it would teach nothing and say nothing.

Used by train (rows and report) and by the dry run (preview).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atoll.data.prompt import added_tokens, as_turns, encode_prompts, render_chat, tokenize
from atoll.data.task import Example
from atoll.errors import ConfigError, DataError

MaxLength = int | Literal["p95"] | None


@dataclass(frozen=True)
class EncodedRow:
    """The tokens of one example: token_ids[:num_prompt] is the prompt, the rest the completion with its EOS. where: "file:line"."""

    token_ids: list[int]
    num_prompt: int
    where: str
    train_on_prompt: bool = False

    @property
    def first_label(self) -> int:
        """Tokens from here on are labels: the completion's, or all but the first, which nothing precedes, when training on the prompt too."""
        return 1 if self.train_on_prompt else self.num_prompt

    @property
    def num_inputs(self) -> int:
        """How many tokens go into a forward: all but the last, which nothing follows."""
        return len(self.token_ids) - 1

    @property
    def num_labels(self) -> int:
        """How many tokens of the row count in the loss."""
        return len(self.token_ids) - self.first_label


@dataclass(frozen=True)
class Encoded:
    """Encoded rows in the order of their examples, and the report on them.

    max_length: the length that was applied. cut: where each row stood that lost the beginning of its prompt. lengths: tokens of each row before
    cutting. longest_completion counts the EOS.
    """

    rows: list[EncodedRow]
    max_length: int
    cut: tuple[str, ...]
    lengths: tuple[int, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    longest_completion: int

    @property
    def num_cut(self) -> int:
        """How many rows lost the beginning of their prompt."""
        return len(self.cut)

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, after cutting."""
        return self.num_prompt_tokens + self.num_completion_tokens

    def percentile(self, percent: float) -> int:
        """The length before cutting that `percent` of the rows do not exceed (0 without rows)."""
        return percentile(self.lengths, percent)

    def report(self) -> dict[str, int]:
        """The counts as JSON, for the dry run and the training record."""
        return {
            "rows": len(self.rows),
            "rows_cut": self.num_cut,
            "max_length": self.max_length,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "label_tokens": sum(row.num_labels for row in self.rows),
            "longest_completion": self.longest_completion,
            **{f"p{percent}": self.percentile(percent) for percent in (50, 95, 99)},
            "longest": max(self.lengths, default=0),
        }


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: MaxLength,
    *,
    train_on_prompt: bool = False,
    chat: bool = False,
    context: int | None = None,
    eos_ids: Collection[int] = (),
    classes: Sequence[str] = (),
    whole: bool = False,
) -> Encoded:
    """Token rows of the examples, each at most `max_length` tokens (see resolve_max_length; `context` is the base's length).

    Examples with messages are always chats; with `chat`, text prompts become a user turn. A chat's completion is what its template writes after
    the generation prompt. Every completion ends in EOS: one is added unless a chat template already ends the turn with one of `eos_ids` (all tokens
    that end generation on this base) or the tokenizer's own. classes: the completion is instead one number, that of its class among these.
    whole: prompt and completion are one text, and nothing of it is a label yet (see masking).

    Raises DataError, naming file and line, for an empty completion, and for a row whose completion leaves no room for a token of its prompt.
    """
    asked = [example.turns if not whole else f"{example.turns}{example.completion}" for example in examples]
    prompts = encode_prompts(asked, tokenizer, chat, [example.where for example in examples])
    if whole:
        completions: list[list[int]] = [[] for _ in examples]
    else:
        completions = _class_numbers(examples, classes) if classes else _encode_completions(examples, tokenizer, chat, eos_ids)
    lengths = tuple(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    longest_completion = max(map(len, completions), default=0)
    limit = resolve_max_length(max_length, lengths, context, longest_completion=longest_completion)
    before, _ = added_tokens(tokenizer)
    rows: list[EncodedRow] = []
    cut: list[str] = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        shortened = _cut_prompt(prompt, limit - len(completion), before, tokenizer.bos_token_id)
        if shortened is None:
            raise DataError(
                f"{example.where}: the completion has {len(completion)} tokens with its end mark, which leaves no room for its prompt of "
                f"{len(prompt)} in a length of {limit}",
                hint="raise max_length, drop the row, or shorten its completion; completions are never cut",
            )
        if len(shortened) < len(prompt):
            cut.append(example.where)
        rows.append(EncodedRow(shortened + completion, len(shortened), example.where, train_on_prompt))
    num_prompt_tokens = sum(row.num_prompt for row in rows)
    return Encoded(rows, limit, tuple(cut), lengths, num_prompt_tokens, sum(map(len, completions)), longest_completion)


def resolve_max_length(spec: MaxLength, lengths: Sequence[int], context: int | None, *, longest_completion: int = 0) -> int:
    """The length in tokens that `spec` means.

    A number is itself and must fit the context; None is the context (without one, the longest row); "p95" is what 95 % of the rows do not exceed,
    but enough for the longest completion and a token before it, since completions are never cut. Raises ConfigError for anything else or a number
    past the context.
    """
    longest = max(lengths, default=1)
    if spec is None:
        return longest if context is None else context
    if spec == "p95":
        wanted = max(percentile(lengths, 95), longest_completion + 1)
        return wanted if context is None else min(wanted, context)
    if isinstance(spec, bool) or not isinstance(spec, int) or spec < 2:
        raise ConfigError(
            f"max_length is {spec!r}, expected a number of tokens from 2, 'p95' or nothing", hint="leave it out to use the base's context"
        )
    if context is not None and spec > context:
        raise ConfigError(f"max_length is {spec}, but the base's context is {context} tokens", hint=f"set max_length to {context} or less")
    return spec


def percentile(lengths: Sequence[int], percent: float) -> int:
    """The smallest of `lengths` that at least `percent` % of them do not exceed (nearest rank); 0 if there are none."""
    ordered = sorted(lengths)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def preview(row: EncodedRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row as the model sees it: (text, is label) segments, special tokens written out, the masked part first. For the dry run."""
    segments = [(row.token_ids[: row.first_label], False), (row.token_ids[row.first_label :], True)]
    return [(tokenizer.decode(token_ids, skip_special_tokens=False), is_label) for token_ids, is_label in segments if token_ids]


def _encode_completions(examples: Sequence[Example], tokenizer: Any, chat: bool, eos_ids: Collection[int]) -> list[list[int]]:
    """Tokens of each completion, EOS included. Raises DataError naming the row whose completion is empty, ConfigError if there is no EOS to teach."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the base's tokenizer has no end-of-sequence token, so a model could not learn to stop", hint="set eos_token in its config")
    ends = {eos, *eos_ids}
    texts, is_chat = [], []
    for example in examples:
        if not example.completion.strip():
            raise DataError(f"{example.where}: the completion is empty, so the row has nothing to learn", hint="fill it in, or drop the row")
        is_chat.append(chat or example.messages is not None)
        if is_chat[-1]:  # white space after the end of turn belongs to the next turn
            texts.append(render_chat(as_turns(example.turns), tokenizer, example.where, answer=example.completion).rstrip())
        else:
            texts.append(example.completion)
    completions = []
    for token_ids, in_chat, example in zip(tokenize(texts, tokenizer), is_chat, examples, strict=True):
        if not token_ids:
            raise DataError(f"{example.where}: the completion {example.completion!r:.60} has no token", hint="fill it in, or drop the row")
        completions.append(token_ids if in_chat and token_ids[-1] in ends else [*token_ids, eos])
    return completions


def _class_numbers(examples: Sequence[Example], classes: Sequence[str]) -> list[list[int]]:
    """The number of each completion's class. Raises DataError for one that is none."""
    numbers = {label.strip(): number for number, label in enumerate(classes)}
    for example in examples:
        if example.completion.strip() not in numbers:
            raise DataError(
                f"{example.where}: the answer {example.completion.strip()!r:.60} is none of the {len(classes)} classes {', '.join(classes)[:80]}",
                hint="correct the row, or name the class in data.label_set",
            )
    return [[numbers[example.completion.strip()]] for example in examples]


def _cut_prompt(prompt: list[int], room: int, before: list[int], bos: int | None) -> list[int] | None:
    """The prompt's end in `room` tokens, what stands before every text (`before`, or a template's BOS) kept; None if no token of text is left."""
    if len(prompt) <= room:
        return prompt
    front = before if prompt[: len(before)] == before else []
    front = front or [token_id for token_id in prompt[:1] if token_id == bos]
    if room <= len(front):
        return None
    return front + prompt[len(prompt) - (room - len(front)) :]
