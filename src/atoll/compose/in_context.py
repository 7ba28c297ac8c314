"""The base with the examples in its prompt: the control that costs nothing to make, and its price at every question.

The shots stand before the prompt in the words of the task: prompt, completion, an empty line; in a chat they are earlier turns. As many as fit into
the context; where they do not all fit, the first ones go.

Used by controls.py, and by workflows for the test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch import Tensor

from atoll.compose.base_losses import base_losses
from atoll.data.encode import encode_examples
from atoll.data.prompt import Turn, as_turns, encode_prompts, tokenize
from atoll.data.task import Example, Task
from atoll.errors import DataError

if TYPE_CHECKING:
    from atoll.model.base import Base

BETWEEN = "\n\n"  # between a shot and what follows it


@dataclass(frozen=True)
class InContext:
    """Examples that begin with shots, and how many stand before each."""

    examples: tuple[Example, ...]
    num_shots: tuple[int, ...]


def in_context(examples: Sequence[Example], shots: Sequence[Example], task: Task, base: Base, *, room: int | None = None) -> InContext:
    """Each example with the last of the shots before its prompt, as many as leave `room` tokens of the base's context for an answer.

    room: None for the example's own completion with its end mark. An instruction of the task stands once, at the beginning. Raises DataError for an
    example that does not fit even without shots; ConfigError as encode_prompts does.
    """
    tokenizer = base.tokenizer
    free = [base.context_length - need for need in _needed(examples, task, base, room)]
    # Counted apart, pieces have about the tokens that they have together; the prompts themselves decide below.
    sizes = [len(ids) for ids in tokenize([_shot_text(shot) for shot in shots], tokenizer)]
    together = list(accumulate(reversed(sizes), initial=0))
    alone = [len(ids) for ids in _prompt_ids(examples, task, tokenizer)]
    counts = [sum(length + size <= room_left for size in together[1:]) for length, room_left in zip(alone, free, strict=True)]
    found = [_with_shots(example, shots[len(shots) - count :], task) for example, count in zip(examples, counts, strict=True)]
    lengths = [len(ids) for ids in _prompt_ids(found, task, tokenizer)]
    for place, example in enumerate(examples):
        while lengths[place] > free[place]:
            if counts[place] == 0:
                raise DataError(
                    f"{example.where}: the prompt has {lengths[place]} tokens, and the base's context leaves room for {free[place]}",
                    hint="shorten the prompt, or ask for fewer new tokens",
                )
            counts[place] -= 1
            found[place] = _with_shots(example, shots[len(shots) - counts[place] :], task)
            lengths[place] = len(_prompt_ids([found[place]], task, tokenizer)[0])
    return InContext(tuple(found), tuple(counts))


def in_context_losses(base: Base, task: Task, examples: Sequence[Example], shots: Sequence[Example]) -> Tensor:
    """[n] float32: the base's mean loss over each example's completion, in nats a token, with the shots before its prompt."""
    found = in_context(examples, shots, task, base)
    encoded = encode_examples(found.examples, base.tokenizer, None, chat=task.chat, context=base.context_length, eos_ids=base.eos_ids)
    return base_losses(base.decoder, encoded.rows)


def _with_shots(example: Example, shots: Sequence[Example], task: Task) -> Example:
    if not shots:
        return example
    if task.chat or example.messages is not None:
        return replace(example, messages=_conversation(example, shots))
    first, *rest = [*shots, example]
    prompts = [first.prompt, *(_without(shot.prompt, task.instruction) for shot in rest)]
    answered = "".join(prompt + shot.completion.rstrip() + BETWEEN for prompt, shot in zip(prompts, shots, strict=False))
    return replace(example, prompt=answered + prompts[-1])


def _conversation(example: Example, shots: Sequence[Example]) -> tuple[Turn, ...]:
    """The shots as earlier turns. A template takes system turns at the beginning only, so the example's own go there and the shots' are left out."""
    own = as_turns(example.turns)
    system = [turn for turn in own if turn["role"] == "system"]
    earlier: list[Turn] = []
    for shot in shots:
        earlier += [turn for turn in as_turns(shot.turns) if turn["role"] != "system"]
        earlier.append({"role": "assistant", "content": shot.completion})
    return (*system, *earlier, *(turn for turn in own if turn["role"] != "system"))


def _shot_text(shot: Example) -> str:
    prompt = shot.prompt if shot.messages is None else "\n".join(turn["content"] for turn in shot.messages)
    return prompt + shot.completion.rstrip() + BETWEEN


def _without(prompt: str, instruction: str) -> str:
    return prompt.removeprefix(f"{instruction}\n\n") if instruction else prompt


def _needed(examples: Sequence[Example], task: Task, base: Base, room: int | None) -> list[int]:
    """Tokens to keep free behind each prompt."""
    if room is not None:
        return [room] * len(examples)
    rows = encode_examples(examples, base.tokenizer, None, chat=task.chat, context=base.context_length, eos_ids=base.eos_ids).rows
    return [len(row.token_ids) - row.num_prompt for row in rows]


def _prompt_ids(examples: Sequence[Example], task: Task, tokenizer: Any) -> list[list[int]]:
    return encode_prompts([example.turns for example in examples], tokenizer, task.chat, [example.where for example in examples])
