"""Examples in the prompt: in the task's own words, as many as fit, and the completion's loss alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.compose.base_losses import base_losses
from atoll.compose.in_context import in_context, in_context_losses
from atoll.data.encode import encode_examples
from atoll.data.prompt import encode_prompt, encode_prompts
from atoll.data.task import Example, Task
from atoll.errors import DataError
from atoll.model.base import Base, load_base

TEXT = Task("sums", template="{question}\nAnswer:", target="answer")
CHAT = Task("sums", chat=True, completion_prefix="")


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32")


def example(prompt: str, completion: str, **fields: object) -> Example:
    return Example(prompt, completion, {}, "few.jsonl:1", **fields)  # type: ignore[arg-type]


def sums(num: int) -> list[Example]:
    return [example(f"{index} + 1?\nAnswer:", f" {index + 1}") for index in range(num)]


def test_shots_stand_before_the_prompt_in_the_tasks_words(base: Base) -> None:
    """What a person would write: prompt, answer, an empty line, and the question last."""
    shots = sums(2)
    found = in_context([example("9 + 1?\nAnswer:", " 10")], shots, TEXT, base)
    assert found.examples[0].prompt == "0 + 1?\nAnswer: 1\n\n1 + 1?\nAnswer: 2\n\n9 + 1?\nAnswer:"
    assert found.examples[0].completion == " 10"
    assert found.num_shots == (2,)
    alone = in_context(shots, [], TEXT, base)
    assert alone.examples == tuple(shots)
    assert alone.num_shots == (0, 0)


def test_an_instruction_stands_once(base: Base) -> None:
    """Every prompt of the task begins with it; said again before each shot it would only fill the context."""
    task = replace(TEXT, instruction="Add the numbers.")
    shots = [example(f"Add the numbers.\n\n{shot.prompt}", shot.completion) for shot in sums(2)]
    found = in_context([shots[0]], shots[1:], task, base)
    assert found.examples[0].prompt == "Add the numbers.\n\n1 + 1?\nAnswer: 2\n\n0 + 1?\nAnswer:"


def test_in_a_chat_shots_are_earlier_turns(base: Base) -> None:
    """The base knows conversations by its template; a system turn stands at the beginning, where templates take one."""
    found = in_context([example("9 + 1?", "10")], [example("1 + 1?", "2")], CHAT, base)
    assert [(turn["role"], turn["content"]) for turn in found.examples[0].messages or ()] == [
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "9 + 1?"),
    ]
    system = {"role": "system", "content": "Be brief."}
    talks = [example(text, answer, messages=(system, {"role": "user", "content": text})) for text, answer in (("1 + 1?", "2"), ("2 + 2?", "4"))]
    told = in_context(talks[:1], talks[1:], replace(CHAT, conversations=True), base).examples[0].messages or ()
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[1]["content"] == "2 + 2?"


def test_where_the_context_is_full_the_first_shots_go(base: Base) -> None:
    """As many as fit beside the prompt and its answer, each row by itself; one more would be cut off in the middle."""
    shots = [example(f"{'x' * 60} {index}?", f" {index}") for index in range(20)]  # one token a byte: 69 each, of the last ten
    asked = [example("y" * 100, " z"), example("y" * 400, " z")]
    found = in_context(asked, shots, TEXT, base)
    assert found.num_shots == (5, 1)
    for row, count in zip(found.examples, found.num_shots, strict=True):
        room = base.context_length - len(encode_prompt(row.prompt, base.tokenizer)) - len(" z") - 1
        assert 0 <= room < 69
        assert row.prompt.startswith(shots[20 - count].prompt)
    assert in_context(asked[:1], shots, TEXT, base, room=200).num_shots == ((512 - 100 - 200) // 69,)


def test_a_prompt_that_does_not_fit_alone_is_named(base: Base) -> None:
    with pytest.raises(DataError, match=r"few.jsonl:1: the prompt has 500 tokens, and the base's context leaves room for 412"):
        in_context([example("y" * 500, " z")], sums(3), TEXT, base, room=100)


def test_shots_whose_pieces_count_differently_together_still_fit(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat's template adds tokens to each turn, which counting the texts alone does not see."""
    shots = [example("x" * 20, "y" * 5) for _ in range(40)]
    found = in_context([example("9 + 1?", "10")], shots, CHAT, base)
    (length,) = map(len, encode_prompts([row.turns for row in found.examples], base.tokenizer, True))
    assert 0 < found.num_shots[0] < 40
    assert length <= base.context_length - len("10<|im_end|>")


def test_the_loss_is_of_the_completion_alone_given_the_shots(base: Base) -> None:
    """Encoded by hand: the shots, the prompt, and labels only on the answer and its end."""
    shots, asked = sums(3), [example("9 + 1?\nAnswer:", " 10"), example("7 + 1?\nAnswer:", " 8")]
    for task in (TEXT, CHAT):
        found = in_context_losses(base, task, asked, shots)
        for loss, one in zip(found, asked, strict=True):
            whole = in_context([one], shots, task, base).examples
            row = encode_examples(whole, base.tokenizer, None, chat=task.chat, context=base.context_length, eos_ids=base.eos_ids).rows[0]
            torch.testing.assert_close(loss, base_losses(base.decoder, [row])[0], rtol=1e-5, atol=1e-5)
    rows = encode_examples(in_context(asked, shots, TEXT, base).examples, base.tokenizer, None).rows
    assert [row.num_labels for row in rows] == [len(" 10") + 1, len(" 8") + 1]
