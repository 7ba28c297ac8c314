"""A tokenizer of characters and an engine that answers from a script, so that evaluation is tested without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from atoll.data.task import Example, Task, TaskData
from atoll.engine.request import Completion

END = 2


class CharTokenizer:
    """One token a character (its code point plus 10), a BOS of 1 before a text, 2 as its end."""

    eos_token_id = END
    bos_token_id = 1
    chat_template = "given"

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        front = [1] if add_special_tokens else []
        encode = lambda text: front + [ord(character) + 10 for character in text]  # noqa: E731
        return {"input_ids": encode(texts) if isinstance(texts, str) else [encode(text) for text in texts]}

    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        text = "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns)
        return text + ("<assistant>" if add_generation_prompt else "")

    def decode(self, token_ids):
        return "".join(chr(token - 10) for token in token_ids if token >= 10)


class ScriptedEngine:
    """Answers with `answer(prompt text, adapter)`, a text or (text, finish reason); scores with `likelihood`; keeps what it was asked."""

    def __init__(self, answer: Callable[..., object], likelihood: Callable[..., float] | None = None) -> None:
        self.answer, self.likelihood = answer, likelihood
        self.requests: list = []
        self.items: list = []

    def generate(self, requests, progress=None):
        self.requests += requests
        completions = []
        for request in reversed(requests):  # an engine finishes rows in any order
            found = self.answer(CharTokenizer().decode(request.prompt_ids), request.adapter)
            text, reason = found if isinstance(found, tuple) else (found, "stop")
            completions.append(Completion(request.request_id, request.adapter, len(request.prompt_ids), tuple(map(ord, text)), text, reason))
        return completions

    def score(self, items, progress=None):
        self.items += items
        decode = CharTokenizer().decode
        return [[self.likelihood(decode(item.prompt_ids), decode(tokens), tokens) for tokens in item.continuations] for item in items]


@pytest.fixture
def tokenizer():
    return CharTokenizer()


@pytest.fixture
def scripted():
    """Makes a ScriptedEngine."""
    return ScriptedEngine


@pytest.fixture
def make_data():
    """Makes a TaskData of (question, answer) pairs for test, and the same kind for train."""

    def make(pairs, train=(("q", "yes"), ("q2", "yes"), ("q3", "no")), **fields):
        task = Task(**{"name": "toy", "metric": "accuracy", "template": "{question} A:", "target": "answer", **fields})
        form = task.prompt_format()

        def examples(rows, part):
            found = []
            for number, (question, answer) in enumerate(rows, start=1):
                row = {"question": question, "answer": answer}
                found.append(Example(form.render(row), form.completion_for(row), row, f"{part}.jsonl:{number}"))
            return tuple(found)

        return TaskData(task, examples(train, "train"), (), examples(pairs, "test"), "version")

    return make
