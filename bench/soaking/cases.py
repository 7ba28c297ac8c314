"""The questions of the soak: a finite pool, each in the engine's own terms and in the words of every route that can ask it.

That there are only some hundreds is the point: the reference of each is computed once, alone, after the traffic, and every one of the thousands of
answers is compared with it. Two users who ask the same at the same time are no special case but the usual one.

Used by traffic.py (bodies) and reference.py (requests).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Route = Literal["generate", "generate_stream", "root", "predibase", "completions", "chat", "embed", "embeddings", "classify"]
STREAMED: tuple[Route, ...] = ("generate_stream", "completions", "chat")  # those that can be asked for a stream

MOVING = "moving"
PREDIBASE = "/tenant/deployments/v2/llms/DEPLOYMENT/generate"  # DEPLOYMENT: the last part of the base's name
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "kind": {"enum": ["red", "green"]}},
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
OPENINGS = (  # prompts share them, so that beginnings of answers are in the cache under several adapters and keys
    "",
    "The lagoon lies still before sunrise, and the reef around it keeps the swell of the open sea away from the shallow water inside. ",
    "List of islands, with their areas and the number of people who live on each of them throughout the year:\n",
)
QUESTIONS = ("What is an atoll?", "add 17 and 25", "Name: Ada Lovelace\nAge:", "translate to French: good morning", "Once upon a time")
MERGES: tuple[Mapping[str, Any], ...] = (
    {"ids": ["a00", "a02"], "weights": [0.5, 0.5]},
    {"ids": ["a01", "a03", "a05"], "weights": [0.6, 0.3, -0.2], "merge_strategy": "linear"},
    {"ids": ["a00", "a05"], "weights": [0.7, 0.4], "merge_strategy": "ties", "density": 0.5},
    {"ids": ["a04", "a09"], "weights": [1.0, 0.5], "merge_strategy": "dare_linear", "density": 0.6, "seed": 7},
    {"ids": ["a02", "a07"], "weights": [0.5, 0.5], "merge_strategy": "product"},
)


@dataclass(frozen=True)
class Case:
    """One question. adapter: a name, a merge (an entry of MERGES) or None; sampling: of atoll.engine.request.SamplingParams, as plain values.

    chat: prompt is the user's turn. schema: the answer must fit SCHEMA.
    """

    number: int
    kind: Literal["text", "embed", "classify"]
    prompt: str
    adapter: str | None = None
    merge: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    schema: bool = False
    routes: Sequence[Route] = ()

    def body(self, route: Route, *, stream: bool = False, adapter: str | None = None) -> tuple[str, dict[str, Any]]:
        """(path, body) of asking it by this route. adapter: another reference to the same adapter, such as moving@3."""
        name = adapter or self.adapter
        if route == "chat":
            return "/v1/chat/completions", {
                "messages": [{"role": "user", "content": self.prompt}],
                **self._openai(name, "max_completion_tokens", stream),
            }
        if route == "completions":
            return "/v1/completions", {"prompt": self.prompt, "logprobs": 2, **self._openai(name, "max_tokens", stream)}
        if route == "embeddings":
            return "/v1/embeddings", {"input": self.prompt, "model": name or "", **({"merged_adapters": self.merge} if self.merge else {})}
        parameters: dict[str, Any] = {"adapter_id": name, "merged_adapters": self.merge}
        if route in ("embed", "classify"):
            return f"/{route}", {"inputs": self.prompt, "parameters": parameters}
        if self.schema:
            parameters["response_format"] = {"type": "json_object", "schema": SCHEMA}
        body = {"inputs": self.prompt, "parameters": {**parameters, **self._native()}}
        if route == "root":
            return "/", {**body, "stream": stream}
        return (PREDIBASE if route == "predibase" else f"/{route}"), body

    def _native(self) -> dict[str, Any]:
        """LoRAX's parameters; sampling is off unless one of its own is given."""
        asked, found = self.sampling, dict[str, Any](details=True)
        found |= {key: asked[key] for key in ("max_new_tokens", "top_k", "top_p", "typical_p", "repetition_penalty", "seed") if key in asked}
        if asked.get("temperature"):
            found["temperature"] = asked["temperature"]
        if asked.get("ignore_eos"):
            found["ignore_eos_token"] = True
        if asked.get("stop"):
            found["stop"] = list(asked["stop"])
        return found

    def _openai(self, name: str | None, length: str, stream: bool) -> dict[str, Any]:
        asked, found = self.sampling, dict[str, Any](model=name or "", temperature=self.sampling.get("temperature", 0.0))
        found[length] = asked["max_new_tokens"]
        found |= {key: asked[key] for key in ("top_k", "top_p", "typical_p", "repetition_penalty", "seed", "ignore_eos") if key in asked}
        if asked.get("stop"):
            found["stop"] = list(asked["stop"])
        if self.merge is not None:
            found["merged_adapters"] = self.merge
        if self.schema:
            found["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        return {**found, "stream": True, "stream_options": {"include_usage": True}} if stream else found


def make_cases(good: Sequence[str], seed: int, count: int = 200) -> list[Case]:
    """The pool: every adapter, merge and kind of sampling is in it."""
    draw = random.Random(seed)
    adapters: list[str | None] = [None, None, *good, *good, *[MOVING] * 6]
    cases: list[Case] = []

    def add(kind: Literal["text", "embed", "classify"], prompt: str, **more: Any) -> None:
        cases.append(Case(len(cases), kind, prompt, **more))

    for number in range(count):
        prompt = draw.choice(OPENINGS) + draw.choice(QUESTIONS)
        adapter = adapters[number % len(adapters)]
        if number % 12 == 7:
            add("embed", prompt, adapter=adapter, routes=("embed", "embeddings"))
        elif number % 20 == 11:
            add("classify", prompt, adapter="labels", routes=("classify",))
        elif number % 12 == 4:
            add("text", prompt, merge=MERGES[(number // 12) % len(MERGES)], sampling=_sampling(draw), routes=_TEXT)
        elif number % 10 == 3:
            add("text", prompt, adapter=adapter, sampling=_sampling(draw), chat=True, routes=("chat",))
        elif number % 12 == 9:
            add("text", prompt, adapter=adapter, sampling={**_sampling(draw), "max_new_tokens": 40}, schema=True, routes=_TEXT)
        else:
            add("text", prompt, adapter=adapter, sampling=_sampling(draw), routes=_TEXT)
    return cases


_TEXT: tuple[Route, ...] = ("generate", "generate_stream", "root", "completions", "predibase")


def _sampling(draw: random.Random) -> dict[str, Any]:
    """Greedy as often as not; else a seed and one way of choosing."""
    asked: dict[str, Any] = {"max_new_tokens": draw.choice((1, 8, 16, 16, 24, 60))}
    if draw.random() < 0.5:
        asked |= {"temperature": draw.choice((0.7, 1.0, 1.3)), "seed": draw.randrange(1 << 40)}
        asked |= draw.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"typical_p": 0.8}, {"top_k": 50, "top_p": 0.95}))
    if draw.random() < 0.2:
        asked["repetition_penalty"] = 1.2
    if draw.random() < 0.25:
        asked["stop"] = draw.choice((("e",), (" the", "\n"), (".", "a b")))
    if draw.random() < 0.3:
        asked["ignore_eos"] = True
    return asked
